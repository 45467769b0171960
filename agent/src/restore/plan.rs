//! Decides what a restore is going to do, or why it cannot, before anything is touched.
//!
//! Pure. [`choose`](super::choose) finds the data, [`volumes`](super::volumes) what becomes of each claim, and
//! [`checks`](super::checks) what else is in the way. All that is found is said at once.

use std::collections::BTreeSet;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{PersistentVolume, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::ResourceExt;
use sts_backup_api::backup::MAX_CLAIMS;
use sts_backup_api::conditions::{NAMESPACE_NOT_GRANTED, STATEFUL_SET_NOT_FOUND};
use sts_backup_api::names::{ALLOW_RESTORE_FROM_ANNOTATION, short_hash};
use sts_backup_api::restore::{PlannedVolume, RestorePlan, StatefulSetRestore, VolumeAction};
use sts_backup_api::run::Consistency;
use sts_backup_api::swap::{Swap, SwapStep, SwapVolume, Toward};

use super::choose::{Choice, choose, damage};
use super::survey::{ClaimId, Shape, Survey};
use super::{checks, volumes};
use crate::backup::observe::ordinal_of;

/// The API server stores at most 1.5 MiB in an object: <https://etcd.io/docs/v3.5/dev-guide/limit/>. The plan and what is
/// added on the way need some of it.
const MAX_SWAP_BYTES: usize = 1_000_000;

/// Whether a restore can be done.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Verdict {
    /// It can be done so. The swap has step Protecting, toward Restored, stepSince = now.
    Go(Box<Planned>),
    /// It is refused: nothing was touched, and trying again without a change is no use.
    Refuse(Vec<Problem>),
    /// Something that passes by itself is in the way: a rollout under way, a claim or a snapshot of one that is not
    /// ready yet.
    Wait(Problem),
}

/// What is going to be done.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Planned {
    /// For people.
    pub(super) plan: RestorePlan,
    /// For the agent.
    pub(super) swap: Swap,
}

/// Why a restore cannot be done, or not yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    /// One CamelCase word for programs.
    pub(super) reason: &'static str,
    /// What is wrong, with which object, and what to do.
    pub(super) message: String,
}

/// What was found on the way to a plan.
#[derive(Clone, Debug, Default)]
pub(super) struct Findings {
    /// What must be mended first.
    pub(super) problems: Vec<Problem>,
    /// What passes by itself.
    pub(super) waits: Vec<Problem>,
    /// What the user should know before.
    pub(super) warnings: Vec<String>,
}

impl Findings {
    pub(super) fn refuse(&mut self, reason: &'static str, message: String) {
        self.problems.push(Problem { reason, message });
    }

    pub(super) fn wait_or_refuse(&mut self, passes: bool, reason: &'static str, message: String) {
        let found = if passes { &mut self.waits } else { &mut self.problems };
        found.push(Problem { reason, message });
    }
}

/// The `StatefulSet` and its surroundings, and how far it goes down.
#[derive(Clone, Copy)]
pub(super) struct Ground<'a> {
    pub(super) survey: &'a Survey,
    pub(super) set: &'a StatefulSet,
    pub(super) shape: Shape<'a>,
    /// The replicas while claims are swapped.
    pub(super) meanwhile: i32,
    pub(super) now: Timestamp,
}

impl<'a> Ground<'a> {
    /// Whether the replica runs and has to go.
    fn goes_down(&self, ordinal: i32) -> bool {
        self.shape.ordinals().contains(&ordinal) && ordinal >= self.lowest()
    }

    /// From this ordinal on no pod may run.
    pub(super) fn lowest(&self) -> i32 {
        self.shape.start.saturating_add(self.meanwhile)
    }

    /// How many replicas have to go.
    pub(super) fn going(&self) -> i32 {
        self.shape.replicas - self.meanwhile
    }

    /// Whether a pod is one of the `StatefulSet`'s own.
    pub(super) fn owns(&self, pod: &Pod) -> bool {
        let is_set = |uid: &String| Some(uid) == self.set.metadata.uid.as_ref();
        pod.owner_references().iter().any(|owner| owner.controller == Some(true) && is_set(&owner.uid))
    }

    /// The `StatefulSet`'s own pods, with their ordinals.
    pub(super) fn pods(&self) -> impl Iterator<Item = (&'a Pod, i32)> + use<'a, '_> {
        let own = self.survey.pods.iter().filter(|pod| self.owns(pod));
        own.filter_map(|pod| Some((pod, ordinal_of(pod.metadata.name.as_deref()?, self.shape.set)?)))
    }

    /// The volume of the claim of that name.
    pub(super) fn volume_of(&self, claim: &str) -> Option<&'a PersistentVolume> {
        let spec = self.survey.claims.get(claim)?.spec.as_ref()?;
        self.survey.volumes.get(spec.volume_name.as_ref()?)
    }

    /// The claims of replicas that are scaled away are deleted by the controller.
    pub(super) fn claims_go_with_pods(&self) -> bool {
        let spec = self.set.spec.as_ref();
        let policy = spec.and_then(|spec| spec.persistent_volume_claim_retention_policy.as_ref());
        policy.and_then(|policy| policy.when_scaled.as_deref()) == Some("Delete")
    }

    /// The storage class that the API server gives claims that name none: of several the newest.
    pub(super) fn default_class(&self) -> Option<String> {
        const DEFAULT: &str = "storageclass.kubernetes.io/is-default-class";
        let defaults = self.survey.classes.values().filter(|class| {
            class
                .metadata
                .annotations
                .as_ref()
                .and_then(|annotations| annotations.get(DEFAULT))
                .map(String::as_str)
                == Some("true")
        });
        let newest =
            defaults.max_by_key(|class| class.metadata.creation_timestamp.as_ref().map(|time| time.0));
        newest.map(ResourceExt::name_any)
    }
}

/// What `restore` is going to do with what was found, or why it cannot.
pub(super) fn plan(restore: &StatefulSetRestore, survey: &Survey, now: Timestamp) -> Verdict {
    let set = match target(restore, survey) {
        Ok(set) => set,
        // As for a backup, whose namespace may be let in later.
        Err(problem) if problem.reason == NAMESPACE_NOT_GRANTED => return Verdict::Wait(problem),
        Err(problem) => return Verdict::Refuse(vec![problem]),
    };
    let mut findings = Findings::default();
    let shape = Shape::of(set);
    let choice = choose(restore, survey).map_err(|problems| findings.problems.extend(problems)).ok();
    let meanwhile = choice.as_ref().map_or(0, |choice| replicas_meanwhile(choice, shape));
    let ground = Ground { survey, set, shape, meanwhile, now };
    checks::rollout(&ground, &mut findings);
    checks::contested(restore, &ground, &mut findings);
    let Some(choice) = choice else { return Verdict::Refuse(findings.problems) };

    damage(&choice, survey, &mut findings);
    checks::scale_down(restore, &ground, &mut findings);
    let volumes = swap_volumes(&choice, &ground, &mut findings);
    checks::quotas(&volumes, &ground, &mut findings);
    if !findings.problems.is_empty() {
        return Verdict::Refuse(findings.problems);
    }
    if let Some(wait) = findings.waits.into_iter().next() {
        return Verdict::Wait(wait);
    }
    let warnings = warnings(&choice, &volumes, &ground, findings.warnings);
    let swap = Swap {
        step: SwapStep::Protecting,
        step_since: MicroTime(now),
        toward: Toward::Restored,
        stateful_set_uid: set.uid().unwrap_or_default(),
        replicas: shape.replicas,
        replicas_meanwhile: meanwhile,
        generation: None,
        down_since: None,
        contests: 0,
        failure: None,
        volumes,
    };
    let bytes = serde_json::to_vec(&swap).map_or(0, |swap| swap.len());
    if bytes > MAX_SWAP_BYTES {
        let message = format!(
            "the manifests of the claims and volumes have {bytes} bytes, and a status has room for {MAX_SWAP_BYTES}: restore \
             some ordinals at a time by spec.replicas, or remove large annotations"
        );
        return Verdict::Refuse(vec![Problem { reason: "TooLarge", message }]);
    }
    Verdict::Go(Box::new(Planned { plan: restore_plan(&choice, &swap, &ground, warnings), swap }))
}

/// The `StatefulSet`, if the restore may have it.
fn target<'a>(restore: &StatefulSetRestore, survey: &'a Survey) -> Result<&'a StatefulSet, Problem> {
    let own = restore.namespace().unwrap_or_default();
    let target = &restore.spec.stateful_set_ref;
    let (home, name) = (target.namespace_or(&own), &target.name);
    if !survey.granted {
        let message = format!(
            "namespace {home} does not let restores of {own} in: annotate it with {ALLOW_RESTORE_FROM_ANNOTATION}={own}"
        );
        return Err(Problem { reason: NAMESPACE_NOT_GRANTED, message });
    }
    let refuse = |what: &str| Problem {
        reason: STATEFUL_SET_NOT_FOUND,
        message: format!(
            "StatefulSet {home}/{name} {what}: create it, with any number of replicas, then restore"
        ),
    };
    let set = survey.set.as_ref().ok_or_else(|| refuse("does not exist"))?;
    if set.metadata.deletion_timestamp.is_some() {
        return Err(refuse("is being deleted"));
    }
    Ok(set)
}

/// The replicas while claims are swapped: those below the lowest running ordinal that is restored.
fn replicas_meanwhile(choice: &Choice<'_>, shape: Shape<'_>) -> i32 {
    let running = choice.snapshots.keys().filter(|claim| claim.ordinal >= shape.start);
    let lowest = running.map(|claim| claim.ordinal - shape.start).min();
    lowest.map_or(shape.replicas, |lowest| lowest.min(shape.replicas))
}

/// Every claim that is restored, and every other one of the replicas that go down.
fn swap_volumes(choice: &Choice<'_>, ground: &Ground<'_>, findings: &mut Findings) -> Vec<SwapVolume> {
    let existing = ground.survey.claims.keys().filter_map(|name| ground.shape.claim(name));
    let kept = existing.filter(|claim| ground.goes_down(claim.ordinal));
    let claims: BTreeSet<ClaimId> = choice.snapshots.keys().cloned().chain(kept).collect();
    if claims.len() > MAX_CLAIMS {
        findings.refuse(
            "TooManyClaims",
            format!(
                "{} claims of StatefulSet {} would be swapped, which is more than {MAX_CLAIMS}: restore some ordinals at a \
                 time, the highest first, by replicas",
                claims.len(),
                ground.shape.set
            ),
        );
        return Vec::new();
    }
    claims
        .iter()
        .filter_map(|claim| {
            volumes::swap_volume(claim, choice.snapshots.get(claim).copied(), ground, findings)
        })
        .collect()
}

fn restore_plan(choice: &Choice<'_>, swap: &Swap, ground: &Ground<'_>, warnings: Vec<String>) -> RestorePlan {
    let volumes: Vec<_> = swap.volumes.iter().map(planned_volume).collect();
    RestorePlan {
        hash: hash(choice, swap, &volumes),
        backup: choice.backup.clone(),
        point: choice.point.clone(),
        time: MicroTime(choice.time),
        consistency: choice.consistency,
        replicas: swap.replicas,
        replicas_meanwhile: swap.replicas_meanwhile,
        expected_downtime_seconds: expected_downtime_seconds(&volumes, ground),
        volumes,
        warnings,
    }
}

fn planned_volume(volume: &SwapVolume) -> PlannedVolume {
    PlannedVolume {
        claim: volume.claim.clone(),
        action: match (&volume.snapshot, &volume.previous) {
            (Some(_), Some(_)) => VolumeAction::Replace,
            (Some(_), None) => VolumeAction::Create,
            (None, _) => VolumeAction::Keep,
        },
        size_bytes: volume.snapshot.as_ref().map(|_| volume.size_bytes),
        snapshot: volume.snapshot.clone(),
        old_volume: volume.previous.as_ref().map(|previous| previous.name.clone()),
    }
}

/// Of what makes this plan another one; not of what only tells about it.
fn hash(choice: &Choice<'_>, swap: &Swap, volumes: &[PlannedVolume]) -> String {
    let mut parts =
        vec![choice.point.clone(), swap.replicas.to_string(), swap.replicas_meanwhile.to_string()];
    for (volume, planned) in swap.volumes.iter().zip(volumes) {
        let PlannedVolume { claim, action, snapshot, size_bytes: _, old_volume } = planned;
        let claim_uid = volume.previous.as_ref().map(|previous| previous.claim_uid.clone());
        parts.extend([
            claim.clone(),
            format!("{action:?}"),
            snapshot.clone().unwrap_or_default(),
            volume.snapshot_uid.clone().unwrap_or_default(),
            old_volume.clone().unwrap_or_default(),
            claim_uid.unwrap_or_default(),
        ]);
    }
    short_hash(&parts.iter().map(String::as_str).collect::<Vec<_>>())
}

/// How long pods are down, as measured with pods that start at once: scaling down and up, and the claims in between, which
/// the controller-manager takes longer for when they are many.
fn expected_downtime_seconds(volumes: &[PlannedVolume], ground: &Ground<'_>) -> i64 {
    let going = i64::from(ground.going());
    if going == 0 {
        return 0;
    }
    let policy = ground.set.spec.as_ref().and_then(|spec| spec.pod_management_policy.as_deref());
    let pods = if policy == Some("Parallel") { 20 } else { 17 * going };
    let swapped = volumes.iter().filter(|volume| volume.action != VolumeAction::Keep).count();
    let swapped = i64::try_from(swapped).unwrap_or(i64::MAX / 3);
    let tenths = pods + swapped.min(6) + 3 * (swapped - 6).max(0);
    // Rounded up.
    (tenths + 9) / 10
}

/// What the user should know before.
fn warnings(
    choice: &Choice<'_>,
    volumes: &[SwapVolume],
    ground: &Ground<'_>,
    found: Vec<String>,
) -> Vec<String> {
    let set = ground.shape.set;
    let mut warnings = choice.warnings.clone();
    warnings.extend(found);
    match choice.consistency {
        Some(Consistency::CrashPerVolume) => warnings.push(
            "the volumes are as after a power cut, each at its own instant: the application must recover from that"
                .to_owned(),
        ),
        None => warnings.push("nobody wrote down whether the application was frozen for the snapshots".to_owned()),
        Some(Consistency::Application) => {}
    }
    let restored: BTreeSet<i32> = choice.snapshots.keys().map(|claim| claim.ordinal).collect();
    let idle: Vec<_> = restored.iter().filter(|ordinal| !ground.shape.ordinals().contains(ordinal)).collect();
    if ground.shape.replicas == 0 {
        warnings.push(format!("StatefulSet {set} is scaled to 0 and stays so: scale it up afterwards"));
    } else if !idle.is_empty() {
        warnings.push(format!(
            "ordinals {} of StatefulSet {set} do not run, and do not run afterwards: only their claims are restored",
            list(&idle)
        ));
    }
    let kept: Vec<_> = ground
        .shape
        .ordinals()
        .filter(|ordinal| !restored.contains(ordinal))
        .map(|ordinal| {
            format!("{set}-{ordinal}{}", if ground.goes_down(ordinal) { " (restarted)" } else { "" })
        })
        .collect();
    if !kept.is_empty() {
        warnings.push(format!("pods {} keep the data that they have", kept.join(", ")));
    }
    let half =
        volumes.iter().filter(|volume| volume.snapshot.is_none() && restored.contains(&volume.ordinal));
    let half: Vec<_> = half.map(|volume| &volume.claim).collect();
    if !half.is_empty() {
        warnings
            .push(format!("claims {} keep their data beside restored ones of the same pods", list(&half)));
    }
    let retained = volumes
        .iter()
        .filter(|volume| volume.snapshot.is_some())
        .filter_map(|volume| volume.previous.as_ref().filter(|previous| previous.reclaim_policy == "Retain"));
    let retained: Vec<_> = retained.map(|previous| &previous.name).collect();
    if !retained.is_empty() {
        let volumes = list(&retained);
        warnings.push(format!(
            "old volumes {volumes} have the reclaim policy Retain: they stay after the rollback window, delete them then"
        ));
    }
    if ground.claims_go_with_pods() && ground.going() > 0 {
        warnings.push(format!(
            "StatefulSet {set} deletes the claims of pods that are scaled away (whenScaled: Delete): their volumes are kept"
        ));
    }
    warnings
}

fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
