//! A swap and the world it is in, and what both together mean. Pure.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use sts_backup_api::run::Failure;
use sts_backup_api::swap::{Swap, SwapPv, SwapStep, SwapVolume, Toward};

use super::decide::{RestoreStep, VolumeChange, Work, Write, later};
use super::facts::{ClaimFacts, PodFacts, RestoreFacts, SetFacts, VolumeFacts, World};
use super::volumes::is_held_by;

/// The uid of no claim: a volume that names it is bound to nothing, and nothing gets it.
pub(super) const NO_CLAIM: &str = "00000000-0000-0000-0000-000000000000";

/// A swap and the world it is in.
pub(super) struct View<'a> {
    pub(super) facts: &'a RestoreFacts,
    pub(super) swap: &'a Swap,
    pub(super) world: &'a World,
    pub(super) now: Timestamp,
}

impl<'a> View<'a> {
    /// None: no swap is under way.
    pub(super) fn of(facts: &'a RestoreFacts, now: Timestamp) -> Option<Self> {
        Some(Self { facts, swap: facts.under_way()?, world: facts.world.as_ref()?, now })
    }

    pub(super) fn set(&self) -> Option<&'a SetFacts> {
        self.world.set.as_ref()
    }

    /// The claim of that name, as it is now.
    pub(super) fn claim(&self, volume: &SwapVolume) -> Option<&'a ClaimFacts> {
        self.world.claims.get(&volume.claim)
    }

    /// A volume as it is now; none where it is gone, or is another one by that name.
    pub(super) fn pv(&self, pv: &SwapPv) -> Option<&'a VolumeFacts> {
        self.world.volumes.get(&pv.name).filter(|found| found.uid == pv.uid)
    }

    /// The volume that a claim is to have; while a new one is still to be made, the previous.
    pub(super) fn target<'b>(&self, volume: &'b SwapVolume) -> Option<&'b SwapPv> {
        volume.wanted(self.swap.toward).or(volume.previous.as_ref())
    }

    /// The claims of the swap whose new volume is still to be made.
    pub(super) fn unstaged(&self) -> impl Iterator<Item = &'a SwapVolume> + use<'a> {
        let toward = self.swap.toward;
        self.swap.volumes.iter().filter(move |volume| {
            toward == Toward::Restored && volume.snapshot.is_some() && volume.restored.is_none()
        })
    }

    /// The time by which the present step is to be over.
    pub(super) fn deadline(&self, timeout: Duration) -> Timestamp {
        later(self.swap.step_since.0, timeout)
    }

    /// The order to scale down was given, or was not needed: from then on pods may be down.
    pub(super) fn is_down(&self) -> bool {
        let Swap { generation, down_since, contests, step, .. } = self.swap;
        let was_ordered = generation.is_some() || down_since.is_some() || *contests > 0;
        was_ordered || matches!(step, SwapStep::Swapping | SwapStep::ScalingUp | SwapStep::Releasing)
    }

    /// Every claim is the one that it was before the restore.
    pub(super) fn is_untouched(&self) -> bool {
        let had_none = |volume: &SwapVolume| volume.previous.is_none();
        let mut without_past = self.swap.volumes.iter().filter(|volume| had_none(volume));
        self.has_old_claims() && without_past.all(|volume| self.claim(volume).is_none())
    }

    /// Every claim that there was before the restore is there, and stays.
    pub(super) fn has_old_claims(&self) -> bool {
        let is_there = |volume: &SwapVolume, previous: &SwapPv| {
            self.claim(volume).is_some_and(|claim| claim.uid == previous.claim_uid && !claim.ending)
        };
        let mut volumes = self.swap.volumes.iter();
        volumes.all(|volume| volume.previous.as_ref().is_none_or(|previous| is_there(volume, previous)))
    }

    /// A claim has this volume, or asks for it.
    pub(super) fn has(&self, volume: &SwapVolume, pv: &SwapPv) -> bool {
        self.claim(volume)
            .is_some_and(|claim| claim.volume.as_deref() == Some(&pv.name) && claim.phase != "Lost")
    }

    /// A claim is bound to this volume, and stays.
    pub(super) fn is_bound(&self, volume: &SwapVolume, pv: &SwapPv) -> bool {
        let (Some(claim), Some(found)) = (self.claim(volume), self.pv(pv)) else { return false };
        let is_mutual = found.claim.as_ref().is_some_and(|bound| bound.uid.as_deref() == Some(&claim.uid));
        self.has(volume, pv) && claim.is_bound() && is_mutual
    }

    /// The claim has the volume that it is to have. On the way back, one that had none before and whose new one is not
    /// made is to have none.
    pub(super) fn is_well(&self, volume: &SwapVolume) -> bool {
        self.target(volume).is_none_or(|pv| self.is_bound(volume, pv))
    }

    /// Every claim has the volume that it is to have.
    pub(super) fn all_bound(&self) -> bool {
        self.swap.volumes.iter().all(|volume| self.is_well(volume))
    }

    /// The claims that have another volume than they are to have, also those that are going.
    pub(super) fn on_others(&self) -> Vec<(&'a SwapVolume, &'a ClaimFacts)> {
        let on_other = |volume: &&'a SwapVolume| {
            let claim = self.claim(volume)?;
            let is_right = self.target(volume).is_none_or(|pv| self.has(volume, pv));
            (!is_right && claim.volume.is_some()).then_some((*volume, claim))
        };
        self.swap.volumes.iter().filter_map(|volume| on_other(&volume)).collect()
    }

    /// Some claim has had this new volume: pods may have written to it.
    pub(super) fn was_bound(&self, volume: &SwapVolume) -> bool {
        if volume.snapshot.is_none() {
            return false;
        }
        let restored = volume.restored.as_ref().and_then(|pv| self.pv(pv));
        let Some(restored) = restored else { return false };
        let uid = restored.claim.as_ref().and_then(|claim| claim.uid.as_deref());
        restored.is_for(self.facts.target_namespace(), &volume.claim)
            && uid.is_some_and(|uid| uid != NO_CLAIM)
    }

    /// The pods that keep claims from being exchanged.
    pub(super) fn pods_in_the_way(&self) -> Vec<&'a PodFacts> {
        // Claims below the first ordinal can be restored as well, and no pod goes for them.
        let lowest = match self.set() {
            Some(set) => set.start.saturating_add(self.swap.replicas_meanwhile),
            None => self.swap.volumes.iter().map(|volume| volume.ordinal).min().unwrap_or_default(),
        };
        let volumes = || self.swap.volumes.iter().filter(|volume| self.may_go(volume));
        let names_ours = |pod: &PodFacts| volumes().any(|volume| pod.claims.contains(&volume.claim));
        let is_in_the_way =
            |pod: &&PodFacts| pod.ordinal.is_some_and(|ordinal| ordinal >= lowest) || names_ours(pod);
        self.world.pods.iter().filter(is_in_the_way).collect()
    }

    /// Who keeps claims from being deleted, and what to do about it.
    pub(super) fn holds_claims(&self) -> Option<String> {
        let mut found = Vec::new();
        for volume in self.swap.volumes.iter().filter(|volume| self.may_go(volume)) {
            let name = &volume.claim;
            for finalizer in self.claim(volume).into_iter().flat_map(|claim| &claim.finalizers) {
                if is_held_by(finalizer) {
                    found.push(format!("PersistentVolumeClaim {name} has the finalizer {finalizer}"));
                }
            }
            let foreign =
                self.world.pods.iter().filter(|pod| pod.ordinal.is_none() && pod.claims.contains(name));
            found.extend(foreign.map(|pod| format!("Pod {} uses PersistentVolumeClaim {name}", pod.name)));
        }
        let remedy =
            "claims have to go, and could not: remove what holds them, or wait for snapshots to be ready";
        (!found.is_empty()).then(|| format!("{remedy}: {}", found.join("; ")))
    }

    /// Whether the claim of a volume goes in an exchange: as it is swapped, or with its pod.
    fn may_go(&self, volume: &SwapVolume) -> bool {
        // On the way back, a claim that had no volume before keeps its restored one.
        let is_swapped = match self.swap.toward {
            Toward::Restored => volume.snapshot.is_some(),
            Toward::Previous => volume.snapshot.is_some() && volume.previous.is_some(),
        };
        is_swapped || self.set().is_some_and(|set| set.deletes_claims)
    }

    /// Why the old volumes cannot come back.
    pub(super) fn no_way_back(&self) -> Option<String> {
        let restored = || self.swap.volumes.iter().filter(|volume| volume.snapshot.is_some());
        if restored().all(|volume| volume.previous.is_none()) {
            return Some("the claims had no volumes before the restore".to_owned());
        }
        if let Some(set) = self.set().filter(|set| set.deletes_claims && set.replicas > self.swap.replicas) {
            return Some(format!(
                "{} has {} replicas by now, and the claims of those that came since go when they are scaled down: set \
                 persistentVolumeClaimRetentionPolicy.whenScaled to Retain, or scale it to {} first",
                self.facts.set_name(),
                set.replicas,
                self.swap.replicas
            ));
        }
        let is_gone = |pv: &&SwapPv| self.pv(pv).is_none();
        let gone: Vec<_> = restored()
            .filter_map(|volume| volume.previous.as_ref())
            .filter(is_gone)
            .map(|pv| pv.name.as_str())
            .collect();
        (!gone.is_empty()).then(|| {
            format!(
                "the old volumes {} do not exist any more: status.swap.volumes[].previous.manifest has what they were",
                gone.join(", ")
            )
        })
    }

    /// Why a restore that is over cannot be taken back any more: what it left is in other hands by now.
    pub(super) fn moved_on(&self) -> Option<String> {
        let (namespace, ours) = (self.facts.target_namespace(), self.facts.uid());
        for volume in &self.swap.volumes {
            for pv in [&volume.previous, &volume.restored].into_iter().flatten() {
                let Some(found) = self.pv(pv) else { continue };
                if found.restore.as_deref().is_some_and(|restore| restore != ours) {
                    return Some(format!(
                        "PersistentVolume {} is in the hands of a later restore: roll that one back first",
                        pv.name
                    ));
                }
                if found.phase == "Bound" && !found.is_for(namespace, &volume.claim) {
                    return Some(format!(
                        "PersistentVolume {} is bound to another claim: delete that first",
                        pv.name
                    ));
                }
            }
            let has = self.claim(volume).and_then(|claim| claim.volume.as_ref());
            let mut known = [&volume.previous, &volume.restored].into_iter().flatten();
            if has.is_some_and(|has| known.all(|pv| pv.name != *has)) {
                return Some(format!(
                    "PersistentVolumeClaim {namespace}/{} was given another volume after the restore, and the rollback \
                     would take that away",
                    volume.claim
                ));
            }
        }
        None
    }

    /// The swap at another step.
    pub(super) fn at(&self, step: SwapStep) -> Swap {
        Swap { step, step_since: MicroTime(self.now), ..self.swap.clone() }
    }

    /// The swap the other way.
    pub(super) fn rolled_back(&self, failure: Option<Failure>) -> Swap {
        Swap {
            toward: Toward::Previous,
            generation: None,
            contests: 0,
            failure,
            ..self.at(SwapStep::Protecting)
        }
    }

    /// The swap, given up: undone where claims may have been exchanged, else simply left.
    pub(super) fn given_up(&self, reason: &str, message: &str) -> Swap {
        let failure = Some(Failure { reason: reason.to_owned(), message: message.to_owned() });
        let may_lose_claims = self.set().is_some_and(|set| set.deletes_claims);
        if !self.is_down() || (self.is_untouched() && !may_lose_claims) {
            return Swap { failure, ..self.at(SwapStep::Abandoning) };
        }
        self.rolled_back(failure)
    }

    /// Writes down that it is given up.
    pub(super) fn give_up(&self, reason: &str, message: &str) -> RestoreStep {
        RestoreStep::Record(self.given_up(reason, message))
    }

    /// Some writes, if there are any.
    pub(super) fn work(work: Work, writes: impl IntoIterator<Item = Write>) -> Option<RestoreStep> {
        let writes: Vec<_> = writes.into_iter().collect();
        (!writes.is_empty()).then_some(RestoreStep::Do { work, writes })
    }

    /// A change of a volume as it is now.
    pub(super) fn change(volume: &VolumeFacts, change: VolumeChange) -> Write {
        Write::Volume {
            name: volume.name.clone(),
            uid: volume.uid.clone(),
            resource_version: volume.resource_version.clone(),
            change,
        }
    }

    /// Keeps the volumes of the swap from being deleted with their claims, or at an earlier expiry.
    pub(super) fn keep(&self) -> Option<RestoreStep> {
        let writes = self.swap.volumes.iter().flat_map(|volume| {
            let claim = format!("{}/{}", self.facts.target_namespace(), volume.claim);
            [&volume.previous, &volume.restored].into_iter().flatten().filter_map(move |pv| {
                let found = self.pv(pv)?;
                let is_kept = found.policy == "Retain"
                    && found.restore.as_deref() == Some(self.facts.uid())
                    && found.final_policy.as_ref() == Some(&pv.reclaim_policy)
                    && found.for_claim.as_ref() == Some(&claim)
                    && found.expires_at.is_none();
                let keep = || VolumeChange::Keep {
                    restore: self.facts.uid().to_owned(),
                    policy: pv.reclaim_policy.clone(),
                    claim: claim.clone(),
                    expires: None,
                };
                (!is_kept).then(|| Self::change(found, keep()))
            })
        });
        Self::work(Work::Keep, writes)
    }

    /// Whether a volume is the previous or the restored one of a claim.
    pub(super) fn is_known(&self, found: &VolumeFacts) -> bool {
        let mut known = self.swap.volumes.iter().flat_map(|volume| [&volume.previous, &volume.restored]);
        known.any(|pv| pv.as_ref().is_some_and(|pv| pv.uid == found.uid))
    }

    /// Volumes of this restore that it has no use for any more, and that do not expire yet.
    pub(super) fn left_over(&self) -> impl Iterator<Item = &'a VolumeFacts> {
        self.world.volumes.values().filter(|volume| {
            volume.restore.as_deref() == Some(self.facts.uid())
                && volume.expires_at.is_none()
                && !self.is_known(volume)
        })
    }

    /// Volumes that pods somebody else started may have written to go at the end of the rollback window.
    pub(super) fn expire_left_over(&self) -> Option<RestoreStep> {
        let at = later(self.now, self.facts.restore.spec.rollback_window.into());
        let expire = |volume| Self::change(volume, VolumeChange::Expire { at, policy: None });
        Self::work(Work::Release, self.left_over().map(expire))
    }

    /// Takes back the reservation of each volume that its claim is not to have: at most one is armed for a name.
    pub(super) fn disarm(&self) -> Option<RestoreStep> {
        let namespace = self.facts.target_namespace();
        let ours =
            self.world.volumes.values().filter(|found| found.restore.as_deref() == Some(self.facts.uid()));
        let armed = ours.filter(|found| {
            self.swap.volumes.iter().any(|volume| {
                let is_target = self.target(volume).is_some_and(|pv| pv.uid == found.uid);
                found.is_armed_for(namespace, &volume.claim) && !is_target
            })
        });
        Self::work(Work::Disarm, armed.map(|found| Self::change(found, VolumeChange::Disarm)))
    }

    /// Reserves the volume that each claim is to have for the claim's name, where the claim has it not yet.
    pub(super) fn arm(&self) -> Option<RestoreStep> {
        let namespace = self.facts.target_namespace();
        let writes = self.swap.volumes.iter().filter_map(|volume| {
            let pv = self.target(volume)?;
            let (found, claim) = (self.pv(pv)?, self.claim(volume));
            let bound = found.claim.as_ref().and_then(|claim| claim.uid.as_ref());
            let is_being_bound = claim.is_some_and(|claim| bound == Some(&claim.uid));
            if is_being_bound || !found.is_free() || found.is_armed_for(namespace, &volume.claim) {
                return None;
            }
            let arm = VolumeChange::Arm { namespace: namespace.to_owned(), claim: volume.claim.clone() };
            Some(Self::change(found, arm))
        });
        Self::work(Work::Arm, writes)
    }

    /// The volume that a claim is to have waits for it.
    pub(super) fn is_armed(&self, volume: &SwapVolume) -> bool {
        let found = self.target(volume).and_then(|pv| self.pv(pv));
        found.is_some_and(|found| {
            found.phase == "Available" && found.is_armed_for(self.facts.target_namespace(), &volume.claim)
        })
    }

    /// The volumes that claims are to have, and that are gone.
    pub(super) fn gone(&self) -> Vec<&'a str> {
        let gone = |volume: &'a SwapVolume| {
            let pv = self.target(volume)?;
            self.pv(pv).is_none().then_some(pv.name.as_str())
        };
        self.swap.volumes.iter().filter_map(gone).collect()
    }

    /// Scales the `StatefulSet`.
    pub(super) fn scale(set: &SetFacts, work: Work, replicas: i32) -> RestoreStep {
        // Up, only the object matters: its status changes all the time while pods start.
        let resource_version = set.resource_version.clone().filter(|_| work == Work::ScaleDown);
        let write = Write::Scale { uid: set.uid.clone(), resource_version, replicas };
        RestoreStep::Do { work, writes: vec![write] }
    }
}
