//! The steps of a swap beside the running application: before the exchange (protecting, staging), and after it or
//! instead of it (releasing, abandoning). Pure.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::VolumeNodeAffinity;
use sts_backup_api::names::staged_claim_name;
use sts_backup_api::run::Failure;
use sts_backup_api::swap::{Swap, SwapPv, SwapStep, SwapVolume, Toward};

use super::claims::staged_claim;
use super::decide::{LOOK_AGAIN, Outcome, RestoreStep, VolumeChange, Work, Write, later};
use super::exchange;
use super::facts::{ClaimFacts, SetFacts, VolumeFacts};
use super::view::View;

/// Volumes that claims have now are kept from being deleted with their claims.
pub(super) fn protecting(view: &View<'_>) -> RestoreStep {
    match view.swap.toward {
        Toward::Restored => {
            if let Some(step) = changed_hands(view) {
                return step;
            }
            view.keep().unwrap_or_else(|| RestoreStep::Record(view.at(SwapStep::Staging)))
        }
        Toward::Previous => {
            if let Some(message) = view.no_way_back()
                && view
                    .swap
                    .volumes
                    .iter()
                    .all(|volume| volume.wanted(Toward::Restored).is_some_and(|pv| view.is_bound(volume, pv)))
            {
                // They have gone at the last moment, and nothing is exchanged yet.
                let failure = Some(Failure { reason: "NoWayBack".to_owned(), message });
                let swap = view.at(SwapStep::Releasing);
                return RestoreStep::Record(Swap { toward: Toward::Restored, failure, ..swap });
            }
            view.keep().unwrap_or_else(|| RestoreStep::Record(view.at(SwapStep::ScalingDown)))
        }
    }
}

/// Gives up where the `StatefulSet`, a claim or its volume is not what it was when the plan was made.
fn changed_hands(view: &View<'_>) -> Option<RestoreStep> {
    if let Some(step) = view.set().and_then(|set| scaled_meanwhile(view, set)) {
        return Some(step);
    }
    for volume in &view.swap.volumes {
        let name = format!("PersistentVolumeClaim {}/{}", view.facts.target_namespace(), volume.claim);
        let what = match (&volume.previous, view.claim(volume)) {
            (None, Some(_)) => "appeared",
            (Some(_), None) => "was deleted",
            (Some(previous), Some(claim)) if claim.uid != previous.claim_uid => "was replaced by another one",
            (Some(_), Some(claim)) if claim.ending => "is being deleted",
            (Some(previous), Some(_)) if view.pv(previous).is_none() => "lost its volume",
            (None, None) | (Some(_), Some(_)) => continue,
        };
        let message = format!("{name} {what} since the plan was made: create another restore");
        return Some(view.give_up("ClaimChanged", &message));
    }
    None
}

/// Gives up where somebody has scaled the `StatefulSet` since the plan was made, and we have not: the plan says nothing of the
/// claims of replicas that came since.
pub(super) fn scaled_meanwhile(view: &View<'_>, set: &SetFacts) -> Option<RestoreStep> {
    let message = format!(
        "{} had {} replicas when the plan was made, and has {} now: create another restore",
        view.facts.set_name(),
        view.swap.replicas,
        set.replicas
    );
    (set.replicas > view.swap.replicas).then(|| view.give_up("StatefulSetChanged", &message))
}

/// New volumes are made from the snapshots.
pub(super) fn staging(view: &View<'_>) -> RestoreStep {
    if view.is_down() {
        // Anew: somebody else has scaled the StatefulSet up in the middle.
        if let Some(step) = exchange::contested(view) {
            return step;
        }
    } else if let Some(step) = changed_hands(view) {
        return step;
    }
    if let Some(step) = view.keep().or_else(|| view.expire_left_over()) {
        return step;
    }
    if view.is_down()
        && let Some(step) = view.disarm().or_else(|| view.arm())
    {
        return step;
    }
    let gone = view.gone();
    if !gone.is_empty() {
        return volumes_gone(view, &gone);
    }
    let waiting = match staged(view) {
        Ok(waiting) => waiting,
        Err(step) => return *step,
    };
    if let Some(step) = unstage(view) {
        return step;
    }
    let deadline = view.deadline(view.facts.restore.spec.provision_timeout());
    if waiting.is_empty()
        && done_staging(view).next().is_none()
        && view.swap.volumes.iter().all(|v| is_released(view, v))
    {
        return RestoreStep::Record(view.at(SwapStep::ScalingDown));
    }
    let message = if waiting.is_empty() {
        "the claims by which the new volumes were made are going".to_owned()
    } else {
        format!("volumes are being made for {}", waiting.join(", "))
    };
    if view.now >= deadline {
        let message = format!(
            "not in time: {message}. Look at the PersistentVolumeClaims' Events, or raise provisionTimeoutSeconds"
        );
        return view.give_up("ProvisioningTimedOut", &message);
    }
    RestoreStep::wait("Provisioning", message, Some(deadline.min(later(view.now, LOOK_AGAIN))))
}

/// The claims whose new volumes are made and written down.
fn done_staging<'a>(view: &View<'a>) -> impl Iterator<Item = (String, &'a ClaimFacts)> {
    let made = view.swap.volumes.iter().filter(|volume| volume.restored.is_some());
    made.filter_map(|volume| claim_of_staging(view, volume))
}

/// Such claims go: a volume is free for its final claim then.
pub(super) fn unstage(view: &View<'_>) -> Option<RestoreStep> {
    let going = done_staging(view).filter(|(_, claim)| !claim.ending);
    View::work(Work::Unstage, going.map(|(name, claim)| Write::DeleteClaim { name, uid: claim.uid.clone() }))
}

pub(super) fn volumes_gone(view: &View<'_>, gone: &[&str]) -> RestoreStep {
    let message = format!(
        "PersistentVolumes {} do not exist any more: status.swap.volumes[] has the manifests of the old ones",
        gone.join(", ")
    );
    match view.swap.toward {
        Toward::Restored => view.give_up("VolumeGone", &message),
        Toward::Previous => RestoreStep::wait("VolumeGone", message, Some(later(view.now, LOOK_AGAIN))),
    }
}

/// The claim by which a volume was made or is being made, if it exists.
fn claim_of_staging<'a>(view: &View<'a>, volume: &SwapVolume) -> Option<(String, &'a ClaimFacts)> {
    let name = staged_claim_name(&volume.claim, view.facts.uid(), volume.stagings);
    let claim = view.world.claims.get(&name)?;
    Some((name, claim))
}

/// The claim that a new volume was made by has let go of it.
fn is_released(view: &View<'_>, volume: &SwapVolume) -> bool {
    let restored = volume.restored.as_ref().and_then(|pv| view.pv(pv));
    restored.is_none_or(|found| found.is_free() || found.is_for(view.facts.target_namespace(), &volume.claim))
}

/// Asks for volumes, and notes those that are made; or says which claims still wait for theirs.
fn staged(view: &View<'_>) -> Result<Vec<String>, Box<RestoreStep>> {
    let mut swap = view.swap.clone();
    let (mut wanted, mut waiting, mut found_some) = (Vec::new(), Vec::new(), false);
    for (at, volume) in view.swap.volumes.iter().enumerate() {
        if volume.snapshot.is_none() || volume.restored.is_some() {
            continue;
        }
        let staged = claim_of_staging(view, volume);
        if let Some((name, claim)) = &staged
            && claim.restore.as_deref() != Some(view.facts.uid())
        {
            let message = format!(
                "PersistentVolumeClaim {name} is not of this restore: delete it, and create another restore"
            );
            return Err(Box::new(view.give_up("NameTaken", &message)));
        }
        let made = staged.as_ref().filter(|(_, claim)| claim.is_bound());
        let made = made.and_then(|(_, claim)| Some((claim, view.world.volumes.get(claim.volume.as_ref()?)?)));
        if let Some((claim, pv)) = made {
            if let Some(unfit) = unfit(view, volume, pv) {
                return Err(Box::new(view.give_up("VolumeUnfit", &unfit)));
            }
            let policy = volume.previous.as_ref().map_or(&pv.policy, |previous| &previous.reclaim_policy);
            swap.volumes[at].restored = Some(SwapPv {
                name: pv.name.clone(),
                uid: pv.uid.clone(),
                reclaim_policy: policy.clone(),
                claim_uid: claim.uid.clone(),
                manifest: None,
            });
            found_some = true;
            continue;
        }
        if let Some(step) = lost_snapshot(view, volume) {
            return Err(Box::new(step));
        }
        if staged.is_none() {
            wanted.push(Write::CreateClaim(Box::new(staged_claim(view.facts.uid(), volume))));
        }
        waiting.push(volume.claim.clone());
    }
    if let Some(step) = View::work(Work::Stage, wanted) {
        return Err(Box::new(step));
    }
    if found_some {
        return Err(Box::new(RestoreStep::Record(swap)));
    }
    Ok(waiting)
}

/// A claim whose snapshot is gone would wait for ever.
fn lost_snapshot(view: &View<'_>, volume: &SwapVolume) -> Option<RestoreStep> {
    let (Some(snapshot), Some(usable)) = (&volume.snapshot, &view.world.snapshots) else { return None };
    if usable.contains(snapshot) {
        return None;
    }
    let namespace = view.facts.target_namespace();
    let message = format!(
        "VolumeSnapshot {namespace}/{snapshot} or its content is gone, or another one has its name: restore another recovery \
         point"
    );
    Some(view.give_up("SnapshotGone", &message))
}

/// Why a new volume cannot stand in for the old one.
fn unfit(view: &View<'_>, volume: &SwapVolume, new: &VolumeFacts) -> Option<String> {
    let differs = |what: &str, is: &str, was: &str| {
        Some(format!(
            "PersistentVolume {} is made for {}, but its {what} is {is} and should be {was}: look at the StorageClass",
            new.name, volume.claim
        ))
    };
    let bytes = new.bytes.unwrap_or_default();
    if bytes < volume.size_bytes {
        return differs("capacity", &bytes.to_string(), &format!("{} bytes or more", volume.size_bytes));
    }
    let old = view.pv(volume.previous.as_ref()?)?;
    if new.driver != old.driver {
        let (is, was) = (new.driver.as_deref().unwrap_or("none"), old.driver.as_deref().unwrap_or("none"));
        return differs("CSI driver", is, was);
    }
    if new.fs_type != old.fs_type {
        let (is, was) = (new.fs_type.as_deref().unwrap_or("none"), old.fs_type.as_deref().unwrap_or("none"));
        return differs("file system", is, was);
    }
    // A volume that more nodes reach is no worse; one that was reachable from everywhere promised no node.
    let (Some(is), Some(was)) = (&new.affinity, &old.affinity) else { return None };
    let (is, was) = (terms(is), terms(was));
    if is == was { None } else { differs("node affinity", &is.join(" or "), &was.join(" or ")) }
}

/// The terms of an affinity, in an order of their own: that of the API means nothing.
fn terms(affinity: &VolumeNodeAffinity) -> Vec<String> {
    let terms = affinity.required.iter().flat_map(|required| &required.node_selector_terms);
    let mut terms: Vec<_> = terms
        .map(|term| {
            let parts = [&term.match_expressions, &term.match_fields];
            let mut parts: Vec<_> = parts
                .into_iter()
                .flatten()
                .flatten()
                .map(|part| {
                    let mut values = part.values.clone().unwrap_or_default();
                    values.sort();
                    format!("{} {} {}", part.key, part.operator, values.join(","))
                })
                .collect();
            parts.sort();
            parts.join(" and ")
        })
        .collect();
    terms.sort();
    terms
}

/// Volumes get their own policies back, and those that are left over their end.
pub(super) fn releasing(view: &View<'_>) -> RestoreStep {
    if let Some(step) = view.disarm() {
        return step;
    }
    let at = view.deadline(view.facts.restore.spec.rollback_window.into());
    let expire = |found: &VolumeFacts| View::change(found, VolumeChange::Expire { at, policy: None });
    let mut writes: Vec<_> = view.left_over().map(expire).collect();
    for volume in &view.swap.volumes {
        let wanted = volume.wanted(view.swap.toward);
        for pv in [&volume.previous, &volume.restored].into_iter().flatten() {
            let Some(found) = view.pv(pv) else { continue };
            let is_ours = found.restore.as_deref() == Some(view.facts.uid());
            // A claim that its user deleted meanwhile does not take the data along.
            let is_served = wanted.is_some_and(|wanted| wanted.uid == pv.uid) && view.is_bound(volume, pv);
            if is_served && is_ours {
                let policy = pv.reclaim_policy.clone();
                writes.push(View::change(found, VolumeChange::Release { policy }));
            } else if !is_served && is_ours && found.expires_at.is_none() {
                writes.push(expire(found));
            }
        }
    }
    let outcome = match view.swap.toward {
        Toward::Restored => Outcome::Completed,
        Toward::Previous => Outcome::RolledBack,
    };
    View::work(Work::Release, writes)
        .or_else(|| unstaged(view))
        .unwrap_or_else(|| RestoreStep::Finish { outcome, swap: view.swap.clone() })
}

/// Takes back what was asked for and is not needed any more.
fn unstaged(view: &View<'_>) -> Option<RestoreStep> {
    let ours = Some(view.facts.uid());
    // By their names: a label can be put on any claim.
    let name = |volume: &SwapVolume, staging| staged_claim_name(&volume.claim, view.facts.uid(), staging);
    let names =
        view.swap.volumes.iter().flat_map(|volume| (0..=volume.stagings).map(move |at| name(volume, at)));
    let names: BTreeSet<_> = names.collect();
    let is_staged =
        |name: &String, claim: &ClaimFacts| names.contains(name) && claim.restore.as_deref() == ours;
    let staged = || view.world.claims.iter().filter(|(name, claim)| is_staged(name, claim));
    let lost = staged().filter_map(|(name, claim)| {
        let found = view.world.volumes.get(claim.volume.as_ref()?)?;
        // Its class keeps it, and nobody would ever find it again.
        let is_its = found.claim.as_ref().is_some_and(|bound| bound.uid.as_deref() == Some(&claim.uid));
        let is_lost = is_its && found.restore.is_none() && found.policy == "Retain";
        let keep = || VolumeChange::Keep {
            restore: view.facts.uid().to_owned(),
            policy: "Delete".to_owned(),
            claim: format!("{}/{name}", view.facts.target_namespace()),
            expires: Some(view.now),
        };
        is_lost.then(|| View::change(found, keep()))
    });
    let doomed = staged().filter(|(_, claim)| !claim.ending);
    let deletions =
        doomed.map(|(name, claim)| Write::DeleteClaim { name: name.clone(), uid: claim.uid.clone() });
    View::work(Work::Release, lost).or_else(|| View::work(Work::Unstage, deletions))
}

/// Nothing was swapped: the new volumes go, and the old ones are as they were.
pub(super) fn abandoning(view: &View<'_>) -> RestoreStep {
    let is_scaled = view.swap.down_since.is_some();
    if is_scaled && !view.has_old_claims() {
        // Claims went with their pods after all. One that there was not is whose it is: there is nothing to take back.
        return RestoreStep::Record(view.rolled_back(view.swap.failure.clone()));
    }
    let armed = view.swap.volumes.iter().filter_map(|volume| {
        let found = volume.restored.as_ref().and_then(|pv| view.pv(pv))?;
        let is_armed = found.is_armed_for(view.facts.target_namespace(), &volume.claim);
        is_armed.then(|| View::change(found, VolumeChange::Disarm))
    });
    if let Some(step) = View::work(Work::Disarm, armed) {
        return step;
    }
    if let Some(set) = view.set().filter(|set| is_scaled && set.replicas < view.swap.replicas) {
        return View::scale(set, Work::ScaleUp, view.swap.replicas);
    }
    if let Some(step) = View::work(Work::Release, abandoned_volumes(view)) {
        return step;
    }
    unstaged(view)
        .unwrap_or_else(|| RestoreStep::Finish { outcome: Outcome::Failed, swap: view.swap.clone() })
}

/// What becomes of the volumes: the new ones hold no data that is not in a snapshot, and go at once.
fn abandoned_volumes(view: &View<'_>) -> Vec<Write> {
    let (ours, now) = (view.facts.uid(), view.now);
    let previous = |found: &VolumeFacts| {
        let mut volumes = view.swap.volumes.iter();
        volumes.find(|volume| volume.previous.as_ref().is_some_and(|pv| pv.uid == found.uid))
    };
    let served = |found: &VolumeFacts| {
        view.swap.volumes.iter().find_map(|volume| {
            let pv = volume.restored.as_ref().filter(|pv| pv.uid == found.uid)?;
            view.is_bound(volume, pv).then(|| pv.reclaim_policy.clone())
        })
    };
    let mut writes = Vec::new();
    for found in view.world.volumes.values() {
        let is_ours = found.restore.as_deref() == Some(ours);
        if let Some(volume) = previous(found) {
            let Some(pv) = volume.previous.as_ref().filter(|_| is_ours) else { continue };
            if view.is_bound(volume, pv) {
                let policy = pv.reclaim_policy.clone();
                writes.push(View::change(found, VolumeChange::Release { policy }));
            } else if found.expires_at.is_none() {
                // Whoever deleted the claim meant this restore no harm: the data stays for the window.
                let at = view.deadline(view.facts.restore.spec.rollback_window.into());
                writes.push(View::change(found, VolumeChange::Expire { at, policy: None }));
            }
        } else if let Some(policy) = served(found).filter(|_| is_ours) {
            // Somebody scaled up at the last moment, and its claim found it reserved.
            writes.push(View::change(found, VolumeChange::Release { policy }));
        } else if is_ours && found.expires_at.is_none() {
            writes.push(View::change(found, VolumeChange::Expire { at: now, policy: Some("Delete") }));
        }
    }
    writes
}
