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
    let expected: Vec<_> = ordinals(set)
        .flat_map(|ordinal| templates.iter().map(move |template| (template, ordinal)))
        .map(|(template, ordinal)| format!("{template}-{}-{ordinal}", set.name_any()))
        .collect();
    match expected.len() {
        0 => {
            return vec![Finding::warn(
                object,
                "has no replicas: there are no claims to snapshot",
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

    let (claims, drivers, classes) = match (&facts.claims, &targets.drivers, classes) {
        (Ok(claims), Ok(drivers), Ok(classes)) => (claims, drivers, classes),
        (Err(why), _, _) | (_, Err(why), _) | (_, _, Err(why)) => {
            return vec![Finding::unread(format!("Claims of {object}"), why)];
        }
    };
    let claims: BTreeMap<_, _> = claims.iter().map(|claim| (claim.name_any(), claim)).collect();
    let unfit = |name: &String| {
        let (reason, remedy) =
            fitness(claims.get(name).copied(), drivers, backup.spec.snapshot_class(), classes).err()?;
        let level = if backup.spec.allow_partial { Level::Warn } else { Level::Fail };
        Some(Finding::bad(level, format!("PersistentVolumeClaim {namespace}/{name}"), reason, remedy))
    };
    let findings: Vec<_> = expected.iter().filter_map(unfit).collect();
    if findings.is_empty() {
        return vec![Finding::ok(object, format!("{} can be snapshotted", count(expected.len(), "claim")))];
    }
    findings
}

/// Whether a claim can be snapshotted; or why not, and what to do.
fn fitness(
    claim: Option<&PersistentVolumeClaim>,
    drivers: &BTreeMap<String, Option<String>>,
    class: Option<&str>,
    classes: &[VolumeSnapshotClass],
) -> Result<(), (String, String)> {
    let wrong = |reason: &str, remedy: &str| Err((reason.to_owned(), remedy.to_owned()));
    let Some(claim) = claim else {
        return wrong(
            "does not exist",
            "scale the StatefulSet so that it is created, leave its template out of spec.volumeClaimTemplates, or set spec.allowPartial",
        );
    };
    let bound = claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound");
    let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).filter(|_| bound);
    let Some(volume) = volume else {
        return wrong("is not bound to a volume", "kubectl describe pvc tells what it waits for");
    };
    let Some(driver) = drivers.get(volume) else {
        return wrong(
            "is bound to a volume that does not exist",
            "its data is lost or moved: kubectl describe pvc",
        );
    };
    let Some(driver) = driver else {
        return wrong(
            "is not a CSI volume: it cannot be snapshotted",
            "use a StorageClass of a CSI driver that can take snapshots",
        );
    };
    let of_driver: Vec<_> = classes.iter().filter(|class| class.driver == *driver).collect();
    match class {
        Some(name) => match classes.iter().find(|class| class.name_any() == name) {
            Some(class) if class.driver == *driver => Ok(()),
            Some(class) => Err((
                format!("is of the driver {driver}, and VolumeSnapshotClass {name} is of {}", class.driver),
                "name a class of the claim's driver in spec.volumeSnapshotClassName, or none".to_owned(),
            )),
            None => Err((
                format!("needs VolumeSnapshotClass {name}, which does not exist"),
                "create it, or name another in spec.volumeSnapshotClassName".to_owned(),
            )),
        },
        None => match of_driver.iter().filter(|class| is_default(class)).count() {
            1 => Ok(()),
            0 => Err((
                format!("has no VolumeSnapshotClass: none of driver {driver} is the default"),
                "name one in spec.volumeSnapshotClassName, or mark one of the driver's as its default"
                    .to_owned(),
            )),
            several => Err((
                format!("has {several} default VolumeSnapshotClasses of driver {driver}"),
                "leave one default, or name one in spec.volumeSnapshotClassName".to_owned(),
            )),
        },
    }
}

#[cfg(test)]
#[path = "claim_checks_tests.rs"]
mod tests;
