//! Chooses the data of a restore: which snapshot each claim gets.
//!
//! Pure. A recovery point that is not complete is taken only when somebody names it; data that may not be what its name
//! says is refused, or said where it was asked for by name.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use sts_backup_api::names::{BACKUP_LABEL, RUN_LABEL};
use sts_backup_api::points::{is_ready, recovery_points};
use sts_backup_api::restore::StatefulSetRestore;
use sts_backup_api::run::Consistency;
use sts_backup_api::snapshot::{VolumeSnapshot, VolumeSnapshotContent};

use super::candidates::{Candidate, backup_name, candidates, claim_of, is_going, label, ordered};
use super::plan::{Findings, Problem};
use super::survey::{ClaimId, Shape, Survey, claim_named_by};

/// How far the clocks of the agent, the API server and the storage may differ.
const CLOCKS_DIFFER: SignedDuration = SignedDuration::from_mins(5);

/// How long after the order a run's snapshot may be cut: the largest `maxFreezeSeconds`.
const CUT_WITHIN: SignedDuration = SignedDuration::from_hours(1);

/// How many points a message lists.
const LISTED: usize = 5;

/// The data that the spec asks for.
#[derive(Clone, Debug)]
pub(super) struct Choice<'a> {
    /// The backup that took it; none: snapshots of no backup, or of several.
    pub(super) backup: Option<String>,
    /// The recovery point: its run, or what tells its snapshots from others.
    pub(super) point: String,
    /// When its first cut was ordered.
    pub(super) time: Timestamp,
    /// None: nobody wrote it down.
    pub(super) consistency: Option<Consistency>,
    /// The snapshots were asked for by their names.
    pub(super) by_name: bool,
    /// The snapshot of each claim that is restored.
    pub(super) snapshots: BTreeMap<ClaimId, &'a VolumeSnapshot>,
    /// What the user should know before.
    pub(super) warnings: Vec<String>,
}

/// The data that the spec asks for, or every reason why there is none. The contents of its snapshots are not looked at:
/// see [`damage`].
pub(super) fn choose<'a>(
    restore: &StatefulSetRestore,
    survey: &'a Survey,
) -> Result<Choice<'a>, Vec<Problem>> {
    let Some(shape) = survey.set.as_ref().map(Shape::of) else { return Err(Vec::new()) };
    let mut choice = if restore.spec.snapshot_names.is_empty() {
        let candidates = candidates(restore, survey, shape);
        let chosen = chosen_point(restore, shape, &candidates).map_err(|problem| vec![problem])?;
        choice_of(chosen, shape)?
    } else {
        named(restore, survey, shape)?
    };
    narrow(&mut choice, &restore.spec.replicas, shape)?;
    Ok(choice)
}

/// The point that the spec means.
fn chosen_point<'c, 'a>(
    restore: &StatefulSetRestore,
    shape: Shape<'_>,
    candidates: &'c [Candidate<'a>],
) -> Result<&'c Candidate<'a>, Problem> {
    let spec = &restore.spec;
    let of = match backup_name(restore) {
        Some(backup) => format!("backup {backup} has"),
        None => "there is".to_owned(),
    };
    let set = shape.set;
    if let Some(id) = spec.recovery_point.as_deref().filter(|id| !id.is_empty()) {
        return candidates.iter().find(|candidate| candidate.id == id).ok_or_else(|| Problem {
            reason: "RecoveryPointNotFound",
            message: format!(
                "{of} no recovery point {id} of StatefulSet {set}: name another; {}",
                listed(candidates)
            ),
        });
    }
    let until = spec.point_in_time.as_ref().map(|time| time.0);
    let in_time = |candidate: &&Candidate<'_>| until.is_none_or(|until| candidate.time <= until);
    candidates.iter().filter(in_time).find(|candidate| candidate.complete).ok_or_else(|| Problem {
        reason: "NoRecoveryPoint",
        message: format!(
            "{of} no complete recovery point of StatefulSet {set}{}: name one that is not complete by backupName and \
             recoveryPoint, or take a backup first; {}",
            until.map_or_else(String::new, |until| format!(" from {until} or before")),
            listed(candidates)
        ),
    })
}

fn listed(candidates: &[Candidate<'_>]) -> String {
    if candidates.is_empty() {
        return "there is none at all".to_owned();
    }
    let newest: Vec<_> = candidates.iter().take(LISTED).map(Candidate::said).collect();
    format!("the newest ones are {}", newest.join("; "))
}

/// The snapshots of a point, by their claims.
fn choice_of<'a>(chosen: &Candidate<'a>, shape: Shape<'_>) -> Result<Choice<'a>, Vec<Problem>> {
    let id = &chosen.id;
    let (set, mut warnings) = (shape.set, Vec::new());
    if !chosen.complete {
        warnings.push(format!("recovery point {id} is not complete: {}", chosen.lacks));
    }
    let mut problems = Vec::new();
    let mut snapshots = BTreeMap::new();
    for snapshot in &chosen.members {
        let Some(claim) = claim_of(snapshot, shape) else {
            let name = snapshot.name_any();
            warnings.push(format!(
                "VolumeSnapshot {name} is not restored: StatefulSet {set} has no volumeClaimTemplate for its claim"
            ));
            continue;
        };
        take(&mut snapshots, claim, snapshot, &mut problems);
    }
    if snapshots.is_empty() && problems.is_empty() {
        problems.push(Problem {
            reason: "NothingToRestore",
            message: format!(
                "recovery point {id} has no snapshot that is ready, of a claim of StatefulSet {set}: name another point"
            ),
        });
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    Ok(Choice {
        backup: Some(chosen.backup.to_owned()),
        point: id.clone(),
        time: chosen.time,
        consistency: chosen.consistency,
        by_name: false,
        snapshots,
        warnings,
    })
}

fn take<'a>(
    snapshots: &mut BTreeMap<ClaimId, &'a VolumeSnapshot>,
    claim: ClaimId,
    snapshot: &'a VolumeSnapshot,
    problems: &mut Vec<Problem>,
) {
    if let Some(other) = snapshots.get(&claim) {
        problems.push(Problem {
            reason: "SnapshotsAmbiguous",
            message: format!(
                "VolumeSnapshots {} and {} are both of claim {}: say which by snapshotNames",
                other.name_any(),
                snapshot.name_any(),
                claim.name
            ),
        });
    } else {
        snapshots.insert(claim, snapshot);
    }
}

/// The snapshots that the spec names.
fn named<'a>(
    restore: &StatefulSetRestore,
    survey: &'a Survey,
    shape: Shape<'_>,
) -> Result<Choice<'a>, Vec<Problem>> {
    let (backup, set) = (backup_name(restore), shape.set);
    let mut problems = Vec::new();
    let mut snapshots = BTreeMap::new();
    for name in &restore.spec.snapshot_names {
        let mut refuse = |reason, message| problems.push(Problem { reason, message });
        let found = survey.snapshots.iter().find(|snapshot| snapshot.metadata.name.as_ref() == Some(name));
        let Some(snapshot) = found else {
            refuse(
                "SnapshotNotFound",
                format!("VolumeSnapshot {name} does not exist: see kubectl get volumesnapshots"),
            );
            continue;
        };
        let Some(claim) = claim_of(snapshot, shape) else {
            let message = format!("VolumeSnapshot {name} is of no claim of StatefulSet {set}: leave it out");
            refuse("SnapshotOfAnother", message);
            continue;
        };
        if let Some(backup) = backup
            && label(snapshot, BACKUP_LABEL) != Some(backup)
        {
            let message = format!("VolumeSnapshot {name} is not of backup {backup}: leave backupName out");
            refuse("SnapshotOfAnother", message);
        }
        take(&mut snapshots, claim, snapshot, &mut problems);
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    let chosen: Vec<_> = snapshots.values().copied().collect();
    let common = |name: &str| {
        let values: BTreeSet<_> = chosen.iter().map(|snapshot| label(snapshot, name)).collect();
        values.iter().copied().next().flatten().filter(|_| values.len() == 1)
    };
    let run = common(RUN_LABEL);
    let mut warnings = Vec::new();
    if run.is_none() && chosen.iter().any(|snapshot| label(snapshot, RUN_LABEL).is_some()) {
        warnings.push(
            "the snapshots are not of one recovery point: what they hold may not fit together".to_owned(),
        );
    }
    Ok(Choice {
        backup: common(BACKUP_LABEL).map(ToOwned::to_owned),
        point: run.map_or_else(|| common_name(&chosen), ToOwned::to_owned),
        time: chosen.iter().filter_map(|snapshot| ordered(snapshot)).min().unwrap_or_default(),
        consistency: run.and_then(|_| Some(recovery_points(chosen.iter().copied()).first()?.consistency)),
        by_name: true,
        snapshots,
        warnings,
    })
}

/// What the names of snapshots begin with, all of them, in whole words; or else the first name.
fn common_name(snapshots: &[&VolumeSnapshot]) -> String {
    let names: Vec<String> = snapshots.iter().map(|snapshot| snapshot.name_any()).collect();
    let first = names.first().map(String::as_str).unwrap_or_default();
    let is_common = |end: &usize| {
        let (head, rest) = first.split_at(*end);
        let goes_on = |rest: &str| rest.is_empty() || rest.starts_with(['-', '.']);
        goes_on(rest) && names.iter().all(|name| name.strip_prefix(head).is_some_and(goes_on))
    };
    let end = (1..=first.len()).rev().filter(|end| first.is_char_boundary(*end)).find(is_common);
    first[..end.unwrap_or(first.len())].to_owned()
}

/// Leaves what the spec's ordinals ask for; or says which of them, or of those that run, there is no data of.
fn narrow(choice: &mut Choice<'_>, wanted: &[i32], shape: Shape<'_>) -> Result<(), Vec<Problem>> {
    let has: BTreeSet<i32> = choice.snapshots.keys().map(|claim| claim.ordinal).collect();
    let absent = |ordinals: &[i32]| -> Vec<String> {
        ordinals.iter().filter(|ordinal| !has.contains(ordinal)).map(ToString::to_string).collect()
    };
    let refuse = |absent: Vec<String>, remedy: &str| {
        let message = format!(
            "recovery point {} has no data of ordinal {} of StatefulSet {}: {remedy}; it has data of {}",
            choice.point,
            absent.join(", "),
            shape.set,
            has.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
        );
        Err(vec![Problem { reason: "OrdinalNotInPoint", message }])
    };
    if wanted.is_empty() {
        // Who names snapshots has said which.
        let running: Vec<i32> = shape.ordinals().filter(|_| !choice.by_name).collect();
        let absent = absent(&running);
        if !absent.is_empty() {
            return refuse(absent, "name the ordinals to restore in replicas, and these keep their data");
        }
        return Ok(());
    }
    let absent = absent(wanted);
    if !absent.is_empty() {
        return refuse(absent, "leave it out of replicas, or name another point");
    }
    choice.snapshots.retain(|claim, _| wanted.contains(&claim.ordinal));
    Ok(())
}

/// Whether volumes can be made of the chosen snapshots, and whether they hold what was taken.
pub(super) fn damage(choice: &Choice<'_>, survey: &Survey, findings: &mut Findings) {
    for snapshot in choice.snapshots.values() {
        let name = snapshot.name_any();
        if is_going(snapshot) {
            let message = format!("VolumeSnapshot {name} is being deleted: choose another");
            findings.refuse("SnapshotBeingDeleted", message);
            continue;
        }
        if !is_ready(snapshot) {
            let message =
                format!("VolumeSnapshot {name} is not ready: see kubectl describe volumesnapshot {name}");
            findings.refuse("SnapshotNotReady", message);
            continue;
        }
        match content_of(snapshot, survey) {
            Ok(content) => recut(choice, snapshot, content, findings),
            Err(why) => findings.refuse(
                "SnapshotContentLost",
                format!("VolumeSnapshot {name} has lost its data, {why}: choose another"),
            ),
        }
    }
}

/// The content that a snapshot is bound to.
pub(super) fn content_of<'a>(
    snapshot: &VolumeSnapshot,
    survey: &'a Survey,
) -> Result<&'a VolumeSnapshotContent, String> {
    let name = snapshot.status.as_ref().and_then(|status| status.bound_volume_snapshot_content_name.as_ref());
    let Some(name) = name else { return Err("it is bound to no VolumeSnapshotContent".to_owned()) };
    let Some(content) = survey.contents.get(name) else {
        return Err(format!("VolumeSnapshotContent {name} does not exist"));
    };
    let of = &content.spec.volume_snapshot_ref;
    let is_of = of.name == snapshot.metadata.name
        && of.namespace == snapshot.metadata.namespace
        && of.uid.as_ref().is_none_or(|uid| Some(uid) == snapshot.metadata.uid.as_ref());
    if !is_of {
        return Err(format!("VolumeSnapshotContent {name} is of another snapshot"));
    }
    if content.metadata.deletion_timestamp.is_some() {
        return Err(format!("VolumeSnapshotContent {name} is being deleted"));
    }
    Ok(content)
}

/// Says when a snapshot was not cut when it was ordered.
///
/// One whose content and storage snapshot are lost while its claim lives is cut anew by snapshot-controller under its old
/// name, and only the content's time tells.
fn recut(
    choice: &Choice<'_>,
    snapshot: &VolumeSnapshot,
    content: &VolumeSnapshotContent,
    findings: &mut Findings,
) {
    let cut = content.status.as_ref().and_then(|status| status.creation_time);
    let cut = cut.and_then(|nanoseconds| Timestamp::from_nanosecond(nanoseconds.into()).ok());
    // One that was made from a content is never cut anew.
    let (Some(_), Some(cut), Some(ordered)) = (claim_named_by(snapshot), cut, ordered(snapshot)) else {
        return;
    };
    let late = cut.duration_since(ordered);
    if late <= CUT_WITHIN + CLOCKS_DIFFER && late >= -CLOCKS_DIFFER {
        return;
    }
    let name = snapshot.name_any();
    let message = format!(
        "VolumeSnapshot {name} was ordered at {ordered} and its content cut at {cut}: it was cut anew after its data was \
         lost, or a clock was wrong"
    );
    if choice.by_name {
        findings.warnings.push(message);
    } else {
        findings.refuse(
            "SnapshotRecut",
            format!("{message}: choose another point, or take this one by snapshotNames"),
        );
    }
}

#[cfg(test)]
#[path = "choose_tests.rs"]
mod tests;
