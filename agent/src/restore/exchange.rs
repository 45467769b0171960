//! The steps of a swap while pods are down: scaling down, swapping the volumes below the claims, scaling up. Pure.
//!
//! No old claim is deleted unless its manifest is recorded, both volumes are kept and the wanted one waits for the claim's
//! name; at most one volume waits for a name. From the first deletion on the shortest way is forward.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use sts_backup_api::restore::OnFailure;
use sts_backup_api::run::Failure;
use sts_backup_api::swap::{Swap, SwapStep, SwapVolume, Toward};

use super::claims::final_claim;
use super::decide::{
    CLAIM_HELD, CONTESTED, LOOK_AGAIN, PODS_NOT_READY, RestoreStep, VolumeChange, Work, Write, later,
};
use super::facts::{ClaimFacts, PodFacts, SetFacts};
use super::prepare::{scaled_meanwhile, unstage, volumes_gone};
use super::view::View;

/// How long an order to scale down may be without effect on pods that are not ready: the controller of a `StatefulSet`
/// with ordered pods waits for them for ever.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often somebody else may scale the `StatefulSet` up in the middle.
const MAX_CONTESTS: i32 = 3;

/// The pods are going; the wanted volumes are reserved for the claims' names.
pub(super) fn scaling_down(view: &View<'_>) -> RestoreStep {
    // Somebody can have scaled it while volumes were made anew.
    if let Some(step) = view.keep().or_else(|| unstage(view)) {
        return step;
    }
    let may_lose_claims = view.set().is_some_and(|set| set.deletes_claims);
    if view.swap.toward == Toward::Previous && view.all_bound() && !may_lose_claims {
        // Nothing was exchanged.
        return view.disarm().unwrap_or_else(|| RestoreStep::Record(scaled_up(view)));
    }
    if view.swap.toward == Toward::Restored && view.swap.down_since.is_some() {
        // Whoever scales up does so before or after our order is known to be carried out; and before any is reserved anew,
        // which takes away the trace of who had it.
        let swap = without_served(view);
        if swap != *view.swap {
            return RestoreStep::Record(swap);
        }
    }
    if let Some(set) = view.set()
        && let Some(step) = ordered(view, set)
    {
        return step;
    }
    if let Some(step) = view.expire_left_over().or_else(|| view.disarm()) {
        return step;
    }
    let gone = view.gone();
    if !gone.is_empty() {
        return volumes_gone(view, &gone);
    }
    if let Some(step) = view.arm().or_else(|| pods_gone(view)) {
        return step;
    }
    if view.swap.toward == Toward::Restored {
        let swap = view.swap.clone();
        if swap.volumes.iter().any(|volume| volume.snapshot.is_some() && volume.restored.is_none()) {
            return RestoreStep::Record(Swap {
                step: SwapStep::Staging,
                step_since: MicroTime(view.now),
                ..swap
            });
        }
    }
    RestoreStep::Record(view.at(SwapStep::Swapping))
}

/// Gives the order to scale down, and notes that it was carried out.
fn ordered(view: &View<'_>, set: &SetFacts) -> Option<RestoreStep> {
    let swap = view.swap;
    if swap.generation.is_some() {
        return contested(view);
    }
    if set.replicas <= swap.replicas_meanwhile {
        return Some(RestoreStep::Record(Swap { generation: Some(set.generation), ..swap.clone() }));
    }
    if !view.facts.restore.spec.scale_down {
        return Some(scale_down_yourself(view, set));
    }
    if swap.contests > MAX_CONTESTS {
        // Whoever scales it up again and again gets as much time as we do.
        let until = view.deadline(LOOK_AGAIN);
        if view.now < until {
            return Some(RestoreStep::wait(CONTESTED, contest(view, set), Some(until)));
        }
    }
    if swap.down_since.is_none() {
        let is_first = swap.toward == Toward::Restored && swap.contests == 0;
        if let Some(step) = scaled_meanwhile(view, set).filter(|_| is_first) {
            return Some(step);
        }
        if let Some(step) = held(view) {
            return Some(step);
        }
    }
    if set.deletes_claims
        && let Some(step) = view.disarm().or_else(|| view.arm())
    {
        // Claims go with their pods, and from then on a pod that somebody starts finds what waits for their names.
        return Some(step);
    }
    if swap.down_since.is_none() {
        return Some(RestoreStep::Record(Swap {
            down_since: Some(MicroTime(view.now)),
            replicas: swap.replicas.min(set.replicas),
            ..swap.clone()
        }));
    }
    Some(View::scale(set, Work::ScaleDown, swap.replicas_meanwhile))
}

/// What would keep claims from being deleted is waited for while the application still runs.
fn held(view: &View<'_>) -> Option<RestoreStep> {
    let message = view.holds_claims()?;
    // As long as for the new volumes: it costs no more.
    let deadline = view.deadline(view.facts.restore.spec.provision_timeout());
    if view.swap.toward == Toward::Restored && view.now >= deadline {
        return Some(view.give_up(CLAIM_HELD, &message));
    }
    Some(RestoreStep::wait(CLAIM_HELD, message, Some(later(view.now, LOOK_AGAIN))))
}

fn scale_down_yourself(view: &View<'_>, set: &SetFacts) -> RestoreStep {
    let swap = view.swap;
    let message = format!(
        "{} has {} replicas, and spec.scaleDown is false: scale it down to {}",
        view.facts.set_name(),
        set.replicas,
        swap.replicas_meanwhile
    );
    let deadline = view.deadline(view.facts.restore.spec.pvc_deletion_timeout());
    if swap.toward == Toward::Restored && view.is_untouched() && view.now >= deadline {
        return view.give_up("NotScaledDown", &message);
    }
    RestoreStep::wait("NotScaledDown", message, Some(deadline).filter(|deadline| view.now < *deadline))
}

/// Waits until the pods are gone, and helps where nobody else takes them down.
fn pods_gone(view: &View<'_>) -> Option<RestoreStep> {
    let pods = view.pods_in_the_way();
    if pods.is_empty() {
        return None;
    }
    let Swap { step_since, down_since, .. } = view.swap;
    let since = down_since.as_ref().map_or(step_since.0, |down| down.0.max(step_since.0));
    // Ordered pods go one after the other.
    let is_ordered = view.set().is_some_and(|set| set.is_ordered);
    let going = view.swap.replicas.saturating_sub(view.swap.replicas_meanwhile);
    let turns = if is_ordered { u32::try_from(going).unwrap_or_default().max(1) } else { 1 };
    let limit = view.facts.restore.spec.pvc_deletion_timeout().saturating_mul(turns);
    let (patience, deadline) = (later(since, PATIENCE), later(since, limit));
    let is_late = view.now >= deadline;
    if is_late && view.swap.toward == Toward::Restored && view.is_untouched() {
        let message = format!(
            "pods {} did not go in time: look what keeps them, or raise pvcDeletionTimeoutSeconds",
            names(&pods)
        );
        return Some(view.give_up("PodsStayed", &message));
    }
    let has_order = view.set().is_some_and(|set| set.replicas <= view.swap.replicas_meanwhile);
    // While one is ending, the others wait for it in their order.
    let is_moving = pods.iter().any(|pod| pod.ordinal.is_some() && pod.ending);
    let is_stuck = |pod: &&&PodFacts| {
        let has_waited = !pod.ready && view.now >= patience && !is_moving;
        pod.ordinal.is_some() && !pod.ending && has_order && (is_late || has_waited)
    };
    let stuck = pods.iter().filter(is_stuck);
    let deletions = stuck.map(|pod| Write::DeletePod { name: pod.name.clone(), uid: pod.uid.clone() });
    if let Some(step) = View::work(Work::DeletePods, deletions) {
        return Some(step);
    }
    let next = [patience, deadline].into_iter().find(|time| view.now < *time);
    let until = next.unwrap_or_else(|| later(view.now, LOOK_AGAIN));
    let (reason, message) = if view.now < patience {
        ("ScalingDown", "the pods are going".to_owned())
    } else {
        ("PodsGoing", format!("waits until the pods are gone: {}", names(&pods)))
    };
    Some(RestoreStep::wait(reason, message, Some(until)))
}

fn names(pods: &[&PodFacts]) -> String {
    pods.iter().map(|pod| pod.name.as_str()).collect::<Vec<_>>().join(", ")
}

/// What to do when somebody else has changed the `StatefulSet` since it was scaled down: pods may have run meanwhile.
pub(super) fn contested(view: &View<'_>) -> Option<RestoreStep> {
    let (set, swap) = (view.set()?, view.swap);
    let generation = swap.generation?;
    let is_ours = set.uid == swap.stateful_set_uid;
    if set.replicas <= swap.replicas_meanwhile && (!is_ours || set.generation == generation) {
        return None;
    }
    let is_staged = view.unstaged().next().is_none();
    if is_staged && view.on_others().is_empty() && !set.deletes_claims {
        // Whatever pod comes finds the wanted volumes: that is where we were going.
        return (swap.step != SwapStep::Swapping).then(|| RestoreStep::Record(view.at(SwapStep::Swapping)));
    }
    let contests = swap.contests.saturating_add(1);
    if swap.toward == Toward::Restored && contests >= MAX_CONTESTS {
        let swap = view.given_up(CONTESTED, &contest(view, set));
        return Some(RestoreStep::Record(Swap { contests, ..swap }));
    }
    let swap = without_served(view);
    Some(RestoreStep::Record(Swap {
        step: SwapStep::ScalingDown,
        step_since: MicroTime(view.now),
        generation: None,
        contests,
        ..swap
    }))
}

/// What a contest is, for people.
pub(super) fn contest(view: &View<'_>, set: &SetFacts) -> String {
    format!(
        "{} was changed by somebody else in the middle, and has {} replicas instead of {}: keep autoscalers, operators \
         and deployment tools away from it, and create another restore",
        view.facts.set_name(),
        set.replicas,
        view.swap.replicas_meanwhile
    )
}

/// The swap without the new volumes that pods may have used beside old ones of others: such volumes are made anew.
fn without_served(view: &View<'_>) -> Swap {
    let mut swap = view.swap.clone();
    let is_restored = |volume: &SwapVolume| volume.snapshot.is_some();
    let all_new =
        view.swap.volumes.iter().filter(|volume| is_restored(volume)).all(|volume| view.was_bound(volume));
    if swap.toward == Toward::Previous || all_new {
        return swap;
    }
    for volume in &mut swap.volumes {
        if view.was_bound(volume) {
            volume.restored = None;
            volume.stagings += 1;
        }
    }
    swap
}

/// Claims are deleted and made again, each with its wanted volume.
pub(super) fn swapping(view: &View<'_>) -> RestoreStep {
    if let Some(step) = view.keep().or_else(|| keep_foreign(view)).or_else(|| view.expire_left_over()) {
        return step;
    }
    let others = view.on_others();
    if !others.is_empty() {
        if view.set().is_some() && view.swap.generation.is_none() {
            // It was created again in the middle.
            return RestoreStep::Record(view.at(SwapStep::ScalingDown));
        }
        if let Some(step) = contested(view) {
            return step;
        }
    }
    if let Some(step) = view.disarm() {
        return step;
    }
    let gone = view.gone();
    if !gone.is_empty() {
        return volumes_gone(view, &gone);
    }
    if let Some(step) = view.arm() {
        return step;
    }
    let going: Vec<_> = others.into_iter().filter(|(_, claim)| !claim.ending).collect();
    if !going.is_empty() {
        return delete_claims(view, &going);
    }
    let missing =
        view.swap.volumes.iter().filter(|volume| view.claim(volume).is_none() && view.is_armed(volume));
    let creations = missing.filter_map(|volume| {
        let claim = final_claim(volume, &view.target(volume)?.name);
        Some(Write::CreateClaim(Box::new(claim)))
    });
    if let Some(step) = View::work(Work::CreateClaims, creations) {
        return step;
    }
    if view.all_bound() {
        return RestoreStep::Record(scaled_up(view));
    }
    until_bound(view)
}

/// A volume that is none of ours and that a claim has got all the same may hold somebody's data: it stays for a while.
fn keep_foreign(view: &View<'_>) -> Option<RestoreStep> {
    let expires = later(view.now, view.facts.restore.spec.rollback_window.into());
    let writes = view.on_others().into_iter().filter_map(|(volume, claim)| {
        let found = view.world.volumes.get(claim.volume.as_ref()?)?;
        // A claim can name any volume.
        let is_its = found.claim.as_ref().is_some_and(|bound| bound.uid.as_deref() == Some(&claim.uid));
        if !is_its || found.restore.is_some() || view.is_known(found) {
            return None;
        }
        let keep = VolumeChange::Keep {
            restore: view.facts.uid().to_owned(),
            policy: found.policy.clone(),
            claim: format!("{}/{}", view.facts.target_namespace(), volume.claim),
            expires: Some(expires),
        };
        Some(View::change(found, keep))
    });
    View::work(Work::Keep, writes)
}

/// Deletes claims all at once, or says what that waits for.
fn delete_claims(view: &View<'_>, going: &[(&SwapVolume, &ClaimFacts)]) -> RestoreStep {
    // On others are also claims whose volume is reserved already; only these may go.
    let is_ready = |volume: &SwapVolume| {
        view.is_armed(volume) || view.target(volume).is_some_and(|pv| view.has(volume, pv))
    };
    let unready: Vec<_> = view
        .swap
        .volumes
        .iter()
        .filter(|volume| !is_ready(volume) && view.target(volume).is_some())
        .collect();
    let look_again = Some(later(view.now, LOOK_AGAIN));
    if !unready.is_empty() {
        if view.now < swap_deadline(view) {
            return RestoreStep::wait("Reserving", "volumes are being reserved for their claims", look_again);
        }
        let message = format!("volumes are not reserved for their claims: {}", told(view, &unready));
        return RestoreStep::wait("NotReserved", message, look_again);
    }
    if let Some(step) = pods_gone(view) {
        return step;
    }
    if view.set().is_some_and(|set| set.observed_generation < set.generation) {
        let message = format!("the controller of {} has not seen its scale yet", view.facts.set_name());
        return RestoreStep::wait("ScalingDown", message, look_again);
    }
    let writes: Vec<_> = going
        .iter()
        .map(|(volume, claim)| Write::DeleteClaim { name: volume.claim.clone(), uid: claim.uid.clone() })
        .collect();
    RestoreStep::Do { work: Work::DeleteClaims, writes }
}

/// What claims are waiting for.
fn until_bound(view: &View<'_>) -> RestoreStep {
    let deadline = swap_deadline(view);
    let is_late = view.now >= deadline;
    let until = if is_late { later(view.now, LOOK_AGAIN) } else { deadline };
    let ending = |volume: &SwapVolume| {
        view.claim(volume).filter(|claim| claim.ending).map(|claim| (volume.claim.clone(), claim))
    };
    let ending: Vec<_> = view.swap.volumes.iter().filter_map(ending).collect();
    if ending.is_empty() {
        if !is_late {
            return RestoreStep::wait("Binding", "the claims are being bound to their volumes", Some(until));
        }
        let unbound: Vec<_> = view.swap.volumes.iter().filter(|volume| !view.is_well(volume)).collect();
        let message = format!("claims are not bound to their volumes: {}", told(view, &unbound));
        return RestoreStep::wait("NotBound", message, Some(until));
    }
    if !is_late {
        return RestoreStep::wait("Exchanging", "the claims are going", Some(until));
    }
    let stuck = ending.iter().map(|(name, claim)| {
        let pods =
            view.world.pods.iter().filter(|pod| pod.claims.contains(name)).map(|pod| pod.name.as_str());
        let pods: Vec<_> = pods.collect();
        format!("{name} (finalizers: {}; pods: {})", claim.finalizers.join(", "), pods.join(", "))
    });
    let stuck: Vec<_> = stuck.collect();
    let message = format!(
        "claims do not go: {}. Remove what holds them; the restore goes on by itself",
        stuck.join("; ")
    );
    RestoreStep::wait("ClaimStuck", message, Some(until))
}

/// When an exchange takes longer than it should.
fn swap_deadline(view: &View<'_>) -> Timestamp {
    view.deadline(view.facts.restore.spec.pvc_deletion_timeout())
}

/// Claims and the volumes that they are to have, for people who look what keeps them apart.
fn told(view: &View<'_>, volumes: &[&SwapVolume]) -> String {
    let told = volumes.iter().map(|volume| {
        let claim = view.claim(volume).map_or("missing", |claim| &claim.phase);
        let pv = view.target(volume);
        let found = pv.and_then(|pv| view.pv(pv));
        let kept_for = found.and_then(|found| found.claim.as_ref());
        let kept_for =
            kept_for.map_or_else(String::new, |claim| format!(" for {}/{}", claim.namespace, claim.name));
        format!(
            "{} ({claim}), PersistentVolume {} ({}{kept_for})",
            volume.claim,
            pv.map_or("none", |pv| &pv.name),
            found.map_or("missing", |found| &found.phase),
        )
    });
    told.collect::<Vec<_>>().join("; ")
}

/// The pods come back.
fn scaled_up(view: &View<'_>) -> Swap {
    Swap { generation: None, ..view.at(SwapStep::ScalingUp) }
}

/// The pods are coming back.
pub(super) fn scaling_up(view: &View<'_>) -> RestoreStep {
    let swap = view.swap;
    let Some(set) = view.set() else {
        // Nothing is there to be served; the claims are as they should be for whoever creates it again.
        return RestoreStep::Record(view.at(SwapStep::Releasing));
    };
    if swap.generation.is_none() {
        if !view.all_bound() {
            // Before the order to come back no pod may find a claim without its volume.
            return RestoreStep::Record(view.at(SwapStep::ScalingDown));
        }
        if set.replicas < swap.replicas && swap.down_since.is_some() {
            return View::scale(set, Work::ScaleUp, swap.replicas);
        }
        // From here on its replicas are its user's business again.
        return RestoreStep::Record(Swap { generation: Some(set.generation), ..swap.clone() });
    }
    let late = unready(view, set);
    if late.is_empty() && serves_others(view, set) {
        // What an agent that has died asked for can come late, and a user can delete a claim of a pod that is held.
        return RestoreStep::Record(Swap { generation: None, ..view.at(SwapStep::ScalingDown) });
    }
    if late.is_empty() {
        return RestoreStep::Record(view.at(SwapStep::Releasing));
    }
    let deadline = view.deadline(view.facts.restore.spec.ready_timeout());
    if view.now < deadline {
        return RestoreStep::wait("ScalingUp", "the pods are coming back", Some(deadline));
    }
    if view.facts.is_deleting() {
        // Whoever deletes the restore does not want to hear of it any more; the volumes stay for the window.
        return RestoreStep::Record(view.at(SwapStep::Releasing));
    }
    let message = format!("pods are not ready: {}", late.join(", "));
    let may_go_back = swap.toward == Toward::Restored && view.no_way_back().is_none();
    if may_go_back && view.facts.restore.spec.on_failure == OnFailure::Rollback {
        let failure = Failure { reason: PODS_NOT_READY.to_owned(), message };
        return RestoreStep::Record(view.rolled_back(Some(failure)));
    }
    let message = if may_go_back { format!("{message}. {}", way_back(view)) } else { message };
    RestoreStep::wait(PODS_NOT_READY, message, Some(later(view.now, LOOK_AGAIN)))
}

/// Some pod runs on another volume than its claim is to have.
fn serves_others(view: &View<'_>, set: &SetFacts) -> bool {
    let running = set.start..set.start.saturating_add(set.replicas);
    // Claims of pods that are scaled away go with them.
    let is_to_stay = |volume: &&SwapVolume| !set.deletes_claims || running.contains(&volume.ordinal);
    !view.swap.volumes.iter().filter(is_to_stay).all(|volume| view.is_well(volume))
}

/// How a user brings the old volumes back.
fn way_back(view: &View<'_>) -> String {
    use kube::ResourceExt;
    use sts_backup_api::names::ROLLBACK_REQUESTED_AT_ANNOTATION;
    let restore = &view.facts.restore;
    format!(
        "It completes once they are; to bring the old volumes back: kubectl annotate statefulsetrestore {} -n {} \
         {ROLLBACK_REQUESTED_AT_ANNOTATION}=now",
        restore.name_any(),
        restore.namespace().unwrap_or_default()
    )
}

/// The pods that are not ready yet, among those that went down; or the `StatefulSet`, where it is behind.
fn unready(view: &View<'_>, set: &SetFacts) -> Vec<String> {
    let end = set.start.saturating_add(set.replicas);
    let mut ordinals: Vec<_> = view
        .swap
        .volumes
        .iter()
        .map(|volume| volume.ordinal)
        .filter(|at| (set.start..end).contains(at))
        .collect();
    ordinals.dedup();
    let is_ready = |ordinal: &i32| {
        view.world.pods.iter().any(|pod| pod.ordinal == Some(*ordinal) && pod.ready && !pod.ending)
    };
    ordinals.retain(|ordinal| !is_ready(ordinal));
    let mut late: Vec<_> = ordinals.into_iter().map(|ordinal| format!("{}-{ordinal}", set.name)).collect();
    if late.is_empty() && set.observed_generation < set.generation {
        late.push(format!("{} as a whole", set.name));
    }
    late
}
