//! Decides, before anything is touched, what a run will snapshot and where its hooks run, or why it cannot.
//!
//! Pure. The claims that must be there follow from the `StatefulSet` alone: a claim that is missing is a finding,
//! never a smaller backup.

use std::fmt::{self, Display, Formatter};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::ResourceExt;
use sts_backup_api::backup::{Hook, HookPods, MAX_CLAIMS, OnError, StatefulSetBackupSpec};
use sts_backup_api::names::snapshot_name;
use sts_backup_api::run::{CurrentRun, RunPod, RunStep, RunVolume, Slot, SnapshotState, ThawDuty, ThawState};

use super::decide::{START_WITHIN, later, new_run};
use super::observe::{ClaimFacts, TargetFacts};
use crate::hooks::hook_container;

/// Why a run cannot start as it should.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) kind: ProblemKind,
    /// What is wrong, with which object, and what to do.
    pub(crate) message: String,
}

/// The kinds of problems; their names are reasons in the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProblemKind {
    NothingToBackUp,
    TooManyClaims,
    UnknownTemplate,
    ClaimMissing,
    ClaimNotBound,
    ClaimBeingDeleted,
    NotACsiVolume,
    NoSnapshotClass,
    SnapshotClassOfAnotherDriver,
    PodMissing,
    PodNotReady,
    ContainerNotFound,
}

impl ProblemKind {
    /// The run may go on without the claim, if the spec allows a partial backup.
    fn is_of_one_claim(self) -> bool {
        match self {
            Self::ClaimMissing
            | Self::ClaimNotBound
            | Self::ClaimBeingDeleted
            | Self::NotACsiVolume
            | Self::SnapshotClassOfAnotherDriver => true,
            Self::NothingToBackUp
            | Self::TooManyClaims
            | Self::UnknownTemplate
            | Self::NoSnapshotClass
            | Self::PodMissing
            | Self::PodNotReady
            | Self::ContainerNotFound => false,
        }
    }

    /// A `StatefulSet` that is still starting may solve it by itself.
    fn may_heal(self) -> bool {
        match self {
            Self::NothingToBackUp
            | Self::ClaimMissing
            | Self::ClaimNotBound
            | Self::PodMissing
            | Self::PodNotReady => true,
            Self::TooManyClaims
            | Self::UnknownTemplate
            | Self::ClaimBeingDeleted
            | Self::NotACsiVolume
            | Self::NoSnapshotClass
            | Self::SnapshotClassOfAnotherDriver
            | Self::ContainerNotFound => false,
        }
    }
}

impl Display for ProblemKind {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, formatter)
    }
}

/// The run with all that it will do, its frozen section about to begin; or every problem that there is.
pub(super) fn plan(
    run: &CurrentRun,
    spec: &StatefulSetBackupSpec,
    set: &str,
    target: &TargetFacts,
    now: Timestamp,
) -> Result<CurrentRun, Vec<Problem>> {
    let mut problems = Vec::new();
    let mut volumes = Vec::new();
    for (claim, template, ordinal) in expected_claims(spec, set, target, &mut problems) {
        match snapshot_class(spec, &claim, target.claims.get(&claim), target) {
            Ok((class, driver)) => volumes.push(RunVolume {
                snapshot: snapshot_name(&claim, &run.id),
                claim,
                template,
                ordinal,
                snapshot_class: class,
                driver,
                state: SnapshotState::Pending,
            }),
            Err(problem) => problems.push(problem),
        }
    }
    if volumes.is_empty() && problems.is_empty() {
        problems.push(problem(
            ProblemKind::NothingToBackUp,
            format!("StatefulSet {set} has no PersistentVolumeClaim: add a volumeClaimTemplate, or delete this backup"),
        ));
    }
    let pods = pods(spec, set, target, now, &mut problems);

    let goes_on = spec.allow_partial && !volumes.is_empty();
    let (left_out, serious): (Vec<_>, Vec<_>) =
        problems.into_iter().partition(|problem| goes_on && problem.kind.is_of_one_claim());
    if !serious.is_empty() {
        return Err(serious);
    }
    Ok(CurrentRun {
        step: RunStep::Frozen,
        replicas: target.replicas,
        volumes,
        left_out: left_out.into_iter().map(|problem| problem.message).collect(),
        pods,
        thaw_hook: spec.post_backup_hook.clone(),
        frozen_since: Some(MicroTime(now)),
        ..run.clone()
    })
}

/// What a run that began now would do; or every problem that it would have.
pub(crate) fn rehearse(
    spec: &StatefulSetBackupSpec,
    set: &str,
    target: &TargetFacts,
    now: Timestamp,
) -> Result<CurrentRun, Vec<Problem>> {
    plan(&new_run("", Slot::request(""), now), spec, set, target, now)
}

/// Whether a `StatefulSet` that is still starting may solve all these problems by itself.
pub(crate) fn may_heal(target: &TargetFacts, problems: &[Problem]) -> bool {
    !target.settled && problems.iter().all(|problem| problem.kind.may_heal())
}

fn problem(kind: ProblemKind, message: String) -> Problem {
    Problem { kind, message }
}

/// The claims that the `StatefulSet` has by its spec, as name, template and ordinal. One that is scaled to zero
/// has none, so there its claims that exist are taken.
fn expected_claims(
    spec: &StatefulSetBackupSpec,
    set: &str,
    target: &TargetFacts,
    problems: &mut Vec<Problem>,
) -> Vec<(String, String, i32)> {
    let wanted = &spec.volume_claim_templates;
    for unknown in wanted.iter().filter(|name| !target.templates.contains(name)) {
        problems.push(problem(
            ProblemKind::UnknownTemplate,
            format!(
                "StatefulSet {set} has no volumeClaimTemplate {unknown}: set volumeClaimTemplates to some of {}",
                target.templates.join(", ")
            ),
        ));
    }
    let is_wanted = |template: &String| wanted.is_empty() || wanted.contains(template);
    let claims: Vec<_> = if target.replicas == 0 {
        let existing = target.claims.iter().filter(|(_, claim)| is_wanted(&claim.template));
        existing.map(|(name, claim)| (name.clone(), claim.template.clone(), claim.ordinal)).collect()
    } else {
        ordinals(target)
            .flat_map(|ordinal| target.templates.iter().map(move |template| (ordinal, template)))
            .filter(|(_, template)| is_wanted(template))
            .map(|(ordinal, template)| (format!("{template}-{set}-{ordinal}"), template.clone(), ordinal))
            .take(MAX_CLAIMS + 1)
            .collect()
    };
    if claims.len() > MAX_CLAIMS {
        problems.push(problem(
            ProblemKind::TooManyClaims,
            format!(
                "StatefulSet {set} has more than {MAX_CLAIMS} claims: back up some of its templates by each of several \
                 StatefulSetBackups (volumeClaimTemplates)"
            ),
        ));
        return Vec::new();
    }
    claims
}

fn ordinals(target: &TargetFacts) -> impl Iterator<Item = i32> + use<> {
    target.start..target.start.saturating_add(target.replicas)
}

/// The class that a claim is snapshotted with and the CSI driver of both, or why it cannot be.
fn snapshot_class(
    spec: &StatefulSetBackupSpec,
    name: &str,
    claim: Option<&ClaimFacts>,
    target: &TargetFacts,
) -> Result<(String, String), Problem> {
    let refuse = |kind, message| Err(problem(kind, message));
    let Some(claim) = claim else {
        return refuse(
            ProblemKind::ClaimMissing,
            format!("PersistentVolumeClaim {name} does not exist: wait for its pod, or set allowPartial"),
        );
    };
    if claim.deleting {
        return refuse(
            ProblemKind::ClaimBeingDeleted,
            format!("PersistentVolumeClaim {name} is being deleted: delete its pod to get a new one"),
        );
    }
    if !claim.bound {
        return refuse(
            ProblemKind::ClaimNotBound,
            format!("PersistentVolumeClaim {name} is not bound: see kubectl describe pvc {name}"),
        );
    }
    let Some(driver) = &claim.driver else {
        return refuse(
            ProblemKind::NotACsiVolume,
            format!(
                "PersistentVolumeClaim {name} is on a volume without a CSI driver, which cannot be snapshotted: leave \
                 its template out by volumeClaimTemplates"
            ),
        );
    };
    if let Some(class) = spec.snapshot_class() {
        let Some(found) = target.classes.iter().find(|found| found.name == class) else {
            return refuse(
                ProblemKind::NoSnapshotClass,
                format!("VolumeSnapshotClass {class} does not exist: create it, or name another"),
            );
        };
        if found.driver != *driver {
            return refuse(
                ProblemKind::SnapshotClassOfAnotherDriver,
                format!(
                    "VolumeSnapshotClass {class} is of the driver {}, PersistentVolumeClaim {name} of {driver}: leave \
                     volumeSnapshotClassName out to use each driver's default class",
                    found.driver
                ),
            );
        }
        return Ok((class.to_owned(), driver.clone()));
    }
    let of_driver = || target.classes.iter().filter(|class| class.driver == *driver);
    let defaults: Vec<_> = of_driver().filter(|class| class.is_default).collect();
    match defaults[..] {
        [class] => Ok((class.name.clone(), driver.clone())),
        [] => refuse(
            ProblemKind::NoSnapshotClass,
            no_default(driver, of_driver().map(|class| class.name.as_str())),
        ),
        [_, ..] => refuse(
            ProblemKind::NoSnapshotClass,
            format!(
                "the CSI driver {driver} has several default VolumeSnapshotClasses, {}: unmark all but one, or set \
                 volumeSnapshotClassName",
                defaults.iter().map(|class| class.name.as_str()).collect::<Vec<_>>().join(" and ")
            ),
        ),
    }
}

fn no_default<'a>(driver: &str, classes: impl Iterator<Item = &'a str>) -> String {
    let classes: Vec<_> = classes.collect();
    if classes.is_empty() {
        return format!(
            "the CSI driver {driver} has no VolumeSnapshotClass: create one with the annotation \
             snapshot.storage.kubernetes.io/is-default-class=true"
        );
    }
    format!(
        "the CSI driver {driver} has no default VolumeSnapshotClass: mark one with the annotation \
         snapshot.storage.kubernetes.io/is-default-class=true, or set volumeSnapshotClassName to one of {}",
        classes.join(", ")
    )
}

/// The pods that hooks run in, and in which containers.
fn pods(
    spec: &StatefulSetBackupSpec,
    set: &str,
    target: &TargetFacts,
    now: Timestamp,
    problems: &mut Vec<Problem>,
) -> Vec<RunPod> {
    let StatefulSetBackupSpec { pre_backup_hook, post_backup_hook, .. } = spec;
    let runs_in = |hook: &Option<Hook>, ordinal: i32| {
        hook.as_ref().filter(|hook| hook.pods == HookPods::All || ordinal == target.start).cloned()
    };
    let mut pods = Vec::new();
    for ordinal in ordinals(target).take(MAX_CLAIMS) {
        let (freeze, thaw) = (runs_in(pre_backup_hook, ordinal), runs_in(post_backup_hook, ordinal));
        if freeze.is_none() && thaw.is_none() {
            continue;
        }
        let pod = match running_pod(set, ordinal, target) {
            Ok(pod) => pod,
            Err(found) => {
                // Else the freeze of this pod counts as failed, and nothing is owed to it.
                if freeze.or(thaw).is_some_and(|hook| hook.on_error == OnError::Fail) {
                    problems.push(found);
                }
                continue;
            }
        };
        let mut container = |hook: &Hook| match hook_container(pod, hook.container_name.as_deref()) {
            Ok(container) => Some(container),
            Err(missing) => {
                problems.push(problem(ProblemKind::ContainerNotFound, missing.to_string()));
                None
            }
        };
        pods.push(RunPod {
            name: pod.name_any(),
            uid: pod.uid().unwrap_or_default(),
            freeze_container: freeze.as_ref().and_then(&mut container),
            hooks_may_run_until: freeze
                .as_ref()
                .map(|hook| MicroTime(later(now, START_WITHIN + hook.timeout()))),
            thaw: thaw.as_ref().and_then(&mut container).map(|container| ThawDuty {
                container,
                state: ThawState::Owed,
                not_before: None,
                failures: 0,
                message: None,
            }),
        });
    }
    pods
}

/// The pod of an ordinal, if commands can run in it.
fn running_pod<'a>(set: &str, ordinal: i32, target: &'a TargetFacts) -> Result<&'a Pod, Problem> {
    let name = format!("{set}-{ordinal}");
    let not_ready = |state: &str| {
        let message =
            format!("Pod {name} {state}, so the hook cannot run in it: see kubectl describe pod {name}");
        Err(problem(ProblemKind::PodNotReady, message))
    };
    let Some(pod) = target.pods.get(&ordinal) else {
        let message = format!(
            "Pod {name} does not exist, so the hook cannot run in it: see kubectl describe sts {set}"
        );
        return Err(problem(ProblemKind::PodMissing, message));
    };
    if pod.metadata.deletion_timestamp.is_some() {
        return not_ready("is terminating");
    }
    let status = pod.status.as_ref();
    match status.and_then(|status| status.phase.as_deref()) {
        Some("Succeeded") => return not_ready("has completed"),
        Some("Failed") => return not_ready("has failed"),
        Some(_) | None => {}
    }
    let conditions = status.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    if conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True") {
        Ok(pod)
    } else {
        not_ready("is not Ready")
    }
}

#[cfg(test)]
#[path = "preflight_tests.rs"]
mod tests;
