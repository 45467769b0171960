//! The recovery points that a restore can choose from: those of our runs, and those of the original operator.
//!
//! Pure.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use sts_backup_api::names::{
    BACKUP_LABEL, BACKUP_NAMESPACE_LABEL, CLAIM_ANNOTATION, RUN_LABEL, STATEFUL_SET_LABEL, TIME_ANNOTATION,
};
use sts_backup_api::points::{is_ready, points_of};
use sts_backup_api::restore::StatefulSetRestore;
use sts_backup_api::run::Consistency;
use sts_backup_api::snapshot::VolumeSnapshot;

use super::survey::{ClaimId, Shape, Survey, claim_named_by};

/// The original operator cut the snapshots of a run one after the other: how long after the first one another may be of
/// the same run.
const RUN_OF_ORIGINAL: SignedDuration = SignedDuration::from_mins(10);

/// A recovery point of the `StatefulSet`.
pub(super) struct Candidate<'a> {
    pub(super) backup: &'a str,
    /// The namespace of the backup; none: the original operator took the point, and did not write it down.
    pub(super) backup_namespace: Option<&'a str>,
    pub(super) id: String,
    pub(super) time: Timestamp,
    pub(super) consistency: Option<Consistency>,
    pub(super) complete: bool,
    /// What is wrong with one that is not complete.
    pub(super) lacks: String,
    /// Its snapshots that have data.
    pub(super) members: Vec<&'a VolumeSnapshot>,
}

impl Candidate<'_> {
    /// The point, for people.
    pub(super) fn said(&self) -> String {
        format!("{} of {} ({})", self.id, self.time, if self.complete { "complete" } else { &self.lacks })
    }
}

/// All recovery points of the `StatefulSet` that the spec's source means, newest first.
pub(super) fn candidates<'a>(
    restore: &StatefulSetRestore,
    survey: &'a Survey,
    shape: Shape<'_>,
) -> Vec<Candidate<'a>> {
    let own = restore.namespace().unwrap_or_default();
    let wanted = backup_name(restore);
    let mut candidates = points_of_runs(survey, shape);
    candidates.extend(points_of_original(restore, survey, shape));
    candidates.retain(|candidate| {
        wanted.is_none_or(|wanted| {
            candidate.backup == wanted && candidate.backup_namespace.is_none_or(|namespace| namespace == own)
        })
    });
    candidates.sort_by(|one, other| other.time.cmp(&one.time).then_with(|| other.id.cmp(&one.id)));
    candidates
}

pub(super) fn backup_name(restore: &StatefulSetRestore) -> Option<&str> {
    restore.spec.backup_name.as_deref().filter(|name| !name.is_empty())
}

pub(super) fn label<'a>(snapshot: &'a VolumeSnapshot, name: &str) -> Option<&'a str> {
    let value = snapshot.metadata.labels.as_ref()?.get(name)?;
    Some(value.as_str()).filter(|value| !value.is_empty())
}

pub(super) fn is_going(snapshot: &VolumeSnapshot) -> bool {
    snapshot.metadata.deletion_timestamp.is_some()
}

/// The snapshots that say they are of the `StatefulSet`, by their backup.
fn by_backup<'a, 's>(
    survey: &'a Survey,
    set: &'s str,
) -> impl Iterator<Item = (&'a str, &'a VolumeSnapshot)> + use<'a, 's> {
    let of_set =
        survey.snapshots.iter().filter(move |snapshot| label(snapshot, STATEFUL_SET_LABEL) == Some(set));
    of_set.filter_map(|snapshot| Some((label(snapshot, BACKUP_LABEL)?, snapshot)))
}

/// The recovery points of our runs.
fn points_of_runs<'a>(survey: &'a Survey, shape: Shape<'_>) -> Vec<Candidate<'a>> {
    let mut backups: BTreeMap<(&str, &str), Vec<&VolumeSnapshot>> = BTreeMap::new();
    for (backup, snapshot) in by_backup(survey, shape.set) {
        if let (Some(namespace), Some(_)) =
            (label(snapshot, BACKUP_NAMESPACE_LABEL), label(snapshot, RUN_LABEL))
        {
            backups.entry((namespace, backup)).or_default().push(snapshot);
        }
    }
    let mut candidates = Vec::new();
    for ((namespace, backup), snapshots) in backups {
        for point in points_of(snapshots.iter().copied(), &survey.failed_runs) {
            let of_run = snapshots.iter().filter(|one| label(one, RUN_LABEL) == Some(point.id.as_str()));
            let members: Vec<_> = of_run.copied().filter(|one| is_ready(one) && !is_going(one)).collect();
            let ordinals = shape.start..shape.start.saturating_add(point.replicas);
            let missing = missing(&members, ordinals, shape);
            let (ready, expected) = (point.ready_volumes, point.expected_volumes);
            candidates.push(Candidate {
                backup,
                backup_namespace: Some(namespace),
                id: point.id.to_string(),
                time: point.time.0,
                consistency: Some(point.consistency),
                complete: point.complete,
                lacks: if ready == expected {
                    "its run failed".to_owned()
                } else if missing.is_empty() {
                    format!("{ready} of {expected} volumes")
                } else {
                    format!("{ready} of {expected} volumes, without {}", missing.join(", "))
                },
                members,
            });
        }
    }
    candidates
}

/// The claims of those ordinals without a snapshot among `members`, of the templates that any member is of.
fn missing(
    members: &[&VolumeSnapshot],
    ordinals: impl IntoIterator<Item = i32>,
    shape: Shape<'_>,
) -> Vec<String> {
    let present: BTreeSet<_> = members.iter().filter_map(|one| claim_of(one, shape)).collect();
    let templates: BTreeSet<_> = present.iter().map(|claim| &claim.template).collect();
    let expected = ordinals.into_iter().flat_map(|ordinal| shape.claims_of(ordinal));
    expected
        .filter(|claim| templates.contains(&claim.template) && !present.contains(claim))
        .map(|claim| claim.name)
        .collect()
}

/// The claim of the `StatefulSet` that a snapshot is of; none: it is of none.
pub(super) fn claim_of(snapshot: &VolumeSnapshot, shape: Shape<'_>) -> Option<ClaimId> {
    // What snapshot-controller was asked for cannot be changed. One that was brought back by its content was not asked for.
    if let Some(name) = claim_named_by(snapshot) {
        return shape.claim(name);
    }
    if let Some(name) = snapshot.annotations().get(CLAIM_ANNOTATION) {
        return shape.claim(name);
    }
    let (template, _, ordinal) = original_name(snapshot)?;
    shape.claim(&format!("{template}-{}-{ordinal}", shape.set))
}

/// Template, time and ordinal in the name that the original operator gave a snapshot: `<backup>-<template>-<unix
/// time>-<ordinal>`.
fn original_name(snapshot: &VolumeSnapshot) -> Option<(&str, Timestamp, i32)> {
    if label(snapshot, RUN_LABEL).is_some() {
        return None;
    }
    let rest = snapshot.metadata.name.as_deref()?.strip_prefix(label(snapshot, BACKUP_LABEL)?)?;
    let mut parts = rest.strip_prefix('-')?.rsplitn(3, '-');
    let (ordinal, seconds, template) = (parts.next()?, parts.next()?, parts.next()?);
    Some((template, Timestamp::from_second(seconds.parse().ok()?).ok()?, ordinal.parse().ok()?))
}

/// When the cut of a snapshot was ordered.
pub(super) fn ordered(snapshot: &VolumeSnapshot) -> Option<Timestamp> {
    let written = snapshot.annotations().get(TIME_ANNOTATION).and_then(|time| time.parse().ok());
    written
        .or_else(|| original_name(snapshot).map(|(_, time, _)| time))
        .or_else(|| Some(snapshot.metadata.creation_timestamp.as_ref()?.0))
}

/// The recovery points of the original operator: the snapshots of a backup that were taken one soon after the other, up to
/// the first claim that comes again.
///
/// Nobody wrote down how many there were to be. One with every claim that the `StatefulSet` has now is complete.
fn points_of_original<'a>(
    restore: &StatefulSetRestore,
    survey: &'a Survey,
    shape: Shape<'_>,
) -> Vec<Candidate<'a>> {
    let mut backups: BTreeMap<&str, Vec<(Timestamp, ClaimId, &VolumeSnapshot)>> = BTreeMap::new();
    for (backup, snapshot) in by_backup(survey, shape.set) {
        let is_ours =
            label(snapshot, RUN_LABEL).is_some() || label(snapshot, BACKUP_NAMESPACE_LABEL).is_some();
        if let (false, Some(time), Some(claim)) =
            (is_ours || is_going(snapshot), ordered(snapshot), claim_of(snapshot, shape))
        {
            backups.entry(backup).or_default().push((time, claim, snapshot));
        }
    }
    let mut candidates = Vec::new();
    for (backup, mut snapshots) in backups {
        snapshots.sort_by(|one, other| (one.0, &one.1).cmp(&(other.0, &other.1)));
        let mut groups: Vec<Vec<(Timestamp, ClaimId, &VolumeSnapshot)>> = Vec::new();
        for (time, claim, snapshot) in snapshots {
            let fits = |group: &&mut Vec<(Timestamp, ClaimId, &VolumeSnapshot)>| {
                group.iter().all(|(first, other, _)| {
                    time.duration_since(*first) <= RUN_OF_ORIGINAL && *other != claim
                })
            };
            match groups.last_mut().filter(fits) {
                Some(group) => group.push((time, claim, snapshot)),
                None => groups.push(vec![(time, claim, snapshot)]),
            }
        }
        candidates
            .extend(groups.iter().filter_map(|group| original_point(restore, survey, shape, backup, group)));
    }
    candidates
}

fn original_point<'a>(
    restore: &StatefulSetRestore,
    survey: &Survey,
    shape: Shape<'_>,
    backup: &'a str,
    group: &[(Timestamp, ClaimId, &'a VolumeSnapshot)],
) -> Option<Candidate<'a>> {
    let (time, ..) = group.first()?;
    let ready: Vec<_> = group.iter().filter(|(_, _, snapshot)| is_ready(snapshot)).collect();
    let present: BTreeSet<_> = ready.iter().map(|(_, claim, _)| claim).collect();
    let expected: BTreeSet<i32> = if !restore.spec.replicas.is_empty() {
        restore.spec.replicas.iter().copied().collect()
    } else if shape.replicas > 0 {
        shape.ordinals().collect()
    } else {
        // One that is scaled to zero has the replicas whose claims there are.
        let claims = survey.claims.keys().filter_map(|name| shape.claim(name));
        claims.chain(group.iter().map(|(_, claim, _)| claim.clone())).map(|claim| claim.ordinal).collect()
    };
    let expected = expected.into_iter().flat_map(|ordinal| shape.claims_of(ordinal));
    let missing: Vec<_> = expected.filter(|claim| !present.contains(claim)).map(|claim| claim.name).collect();
    Some(Candidate {
        backup,
        backup_namespace: None,
        id: time.as_second().to_string(),
        time: *time,
        consistency: None,
        complete: missing.is_empty(),
        lacks: format!("taken by the original operator, without {}", missing.join(", ")),
        members: ready.iter().map(|(_, _, snapshot)| *snapshot).collect(),
    })
}
