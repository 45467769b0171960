//! Whether every claim that a backup expects can be snapshotted. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::ResourceExt;
use sts_backup_api::backup::{MAX_CLAIMS, StatefulSetBackup};
use sts_backup_api::snapshot::VolumeSnapshotClass;

use super::cluster_checks::is_default;
use super::observe::{NamespaceFacts, TargetFacts};
use super::{Finding, Level, Read};
use crate::plugin::table::count;

/// The ordinals that the `StatefulSet` wants to run.
pub(super) fn ordinals(set: &StatefulSet) -> std::ops::Range<i32> {
    let spec = set.spec.as_ref();
    let start = spec.and_then(|spec| spec.ordinals.as_ref()?.start).unwrap_or(0);
    let replicas = spec.and_then(|spec| spec.replicas).unwrap_or(1);
    start..start.saturating_add(replicas)
}

/// One finding for every claim that is unfit, or one that all are fit.
pub(super) fn check_claims(
    backup: &StatefulSetBackup,
    set: &StatefulSet,
    facts: &NamespaceFacts,
    targets: &TargetFacts,
    classes: &Read<Vec<VolumeSnapshotClass>>,
) -> Vec<Finding> {
    let namespace = set.namespace().unwrap_or_default();
    let object = format!("StatefulSet {namespace}/{}", set.name_any());
    let claim_templates = set.spec.iter().flat_map(|spec| spec.volume_claim_templates.iter().flatten());
    let existing: Vec<_> = claim_templates.map(ResourceExt::name_any).collect();
    let wanted = &backup.spec.volume_claim_templates;
    let unknown: Vec<_> = wanted.iter().filter(|name| !existing.contains(name)).map(String::as_str).collect();
    if !unknown.is_empty() {
        return vec![Finding::fail(
            object,
            format!("has no claim template {}", unknown.join(", ")),
            format!("write in spec.volumeClaimTemplates some of: {}", existing.join(", ")),
        )];
    }
    let templates: Vec<_> =
        existing.iter().filter(|name| wanted.is_empty() || wanted.contains(name)).collect();
    if templates.is_empty() {
        return vec![Finding::fail(
            object,
            "has no volumeClaimTemplates: there is nothing to snapshot",
            "only volumes of claim templates are backed up",
        )];
    }
    let (claims, drivers, classes) = match (&facts.claims, &targets.drivers, classes) {
        (Ok(claims), Ok(drivers), Ok(classes)) => (claims, drivers, classes),
        (Err(why), _, _) | (_, Err(why), _) | (_, _, Err(why)) => {
            return vec![Finding::unread(format!("Claims of {object}"), why)];
        }
    };
    let claims: BTreeMap<_, _> = claims.iter().map(|claim| (claim.name_any(), claim)).collect();
    let expected = expected_claims(set, &templates, &claims);
    match expected.len() {
        0 => {
            return vec![Finding::fail(
                object,
                "has no replicas and no claims: there is nothing to snapshot",
                "scale it up",
            )];
        }
        claims if claims > MAX_CLAIMS => {
            return vec![Finding::fail(
                object,
                format!("has {claims} claims; a backup takes {MAX_CLAIMS} at most"),
                "name fewer claim templates in spec.volumeClaimTemplates",
            )];
        }
        _ => {}
    }

    let unfit = |name: &String| {
        let claim = claims.get(name).copied();
        let Unfit { needed, reason, remedy } =
            fitness(claim, drivers, backup.spec.snapshot_class(), classes).err()?;
        let level = if backup.spec.allow_partial && !needed { Level::Warn } else { Level::Fail };
        Some(Finding::bad(level, format!("PersistentVolumeClaim {namespace}/{name}"), reason, remedy))
    };
    let findings: Vec<_> = expected.iter().filter_map(unfit).collect();
    if findings.is_empty() {
        return vec![Finding::ok(object, format!("{} can be snapshotted", count(expected.len(), "claim")))];
    }
    findings
}

/// Those of every replica; without replicas, those that are left.
fn expected_claims(
    set: &StatefulSet,
    templates: &[&String],
    claims: &BTreeMap<String, &PersistentVolumeClaim>,
) -> Vec<String> {
    let stems: Vec<_> = templates.iter().map(|template| format!("{template}-{}-", set.name_any())).collect();
    let ordinals = ordinals(set);
    if ordinals.is_empty() {
        let is_left = |name: &&String| {
            let mut ends = stems.iter().filter_map(|stem| name.strip_prefix(stem.as_str()));
            ends.any(|ordinal| ordinal.parse::<u32>().is_ok())
        };
        return claims.keys().filter(is_left).cloned().collect();
    }
    ordinals.flat_map(|ordinal| stems.iter().map(move |stem| format!("{stem}{ordinal}"))).collect()
}

/// Why a claim cannot be snapshotted.
struct Unfit {
    /// Not even a partial backup goes on without it.
    needed: bool,
    reason: String,
    remedy: String,
}

impl Unfit {
    fn new(reason: impl Into<String>, remedy: &str) -> Self {
        Self { needed: false, reason: reason.into(), remedy: remedy.to_owned() }
    }

    /// A matter of the spec or the cluster, not of the claim.
    fn needed(reason: String, remedy: &str) -> Self {
        Self { needed: true, ..Self::new(reason, remedy) }
    }
}

/// Whether a claim can be snapshotted; or why not, and what to do.
fn fitness(
    claim: Option<&PersistentVolumeClaim>,
    drivers: &BTreeMap<String, Option<String>>,
    class: Option<&str>,
    classes: &[VolumeSnapshotClass],
) -> Result<(), Unfit> {
    let claim = claim.ok_or_else(|| {
        Unfit::new("does not exist", "wait for its pod, or set spec.allowPartial to back up without it")
    })?;
    if claim.metadata.deletion_timestamp.is_some() {
        return Err(Unfit::new("is being deleted", "delete its pod to get a new one"));
    }
    let bound = claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound");
    let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).filter(|_| bound);
    let volume = volume.ok_or_else(|| {
        Unfit::new("is not bound to a volume", "kubectl describe pvc tells what it waits for")
    })?;
    let driver = drivers.get(volume).ok_or_else(|| {
        Unfit::new(
            "is bound to a volume that does not exist",
            "its data is lost or moved: kubectl describe pvc",
        )
    })?;
    let driver = driver.as_ref().ok_or_else(|| {
        Unfit::new(
            "is not a CSI volume: it cannot be snapshotted",
            "leave its template out by spec.volumeClaimTemplates, or use a StorageClass of a CSI driver",
        )
    })?;
    match class {
        Some(name) => named_class(name, driver, classes),
        None => default_class(driver, classes),
    }
}

fn named_class(name: &str, driver: &str, classes: &[VolumeSnapshotClass]) -> Result<(), Unfit> {
    let class = classes.iter().find(|class| class.name_any() == name).ok_or_else(|| {
        Unfit::needed(
            format!("needs VolumeSnapshotClass {name}, which does not exist"),
            "create it, or name another in spec.volumeSnapshotClassName",
        )
    })?;
    if class.driver == driver {
        return Ok(());
    }
    Err(Unfit::new(
        format!("is of the driver {driver}, and VolumeSnapshotClass {name} is of {}", class.driver),
        "leave spec.volumeSnapshotClassName out to use each driver's default class",
    ))
}

fn default_class(driver: &str, classes: &[VolumeSnapshotClass]) -> Result<(), Unfit> {
    let defaults = classes.iter().filter(|class| class.driver == driver && is_default(class));
    match defaults.count() {
        1 => Ok(()),
        0 => Err(Unfit::needed(
            format!("has no VolumeSnapshotClass: none of driver {driver} is the default"),
            "name one in spec.volumeSnapshotClassName, or mark one of the driver's as its default",
        )),
        several => Err(Unfit::needed(
            format!("has {several} default VolumeSnapshotClasses of driver {driver}"),
            "leave one default, or name one in spec.volumeSnapshotClassName",
        )),
    }
}

#[cfg(test)]
#[path = "claim_checks_tests.rs"]
mod tests;
