//! Which recovery points the snapshots of a cluster make. Temporary: the same function comes to
//! `sts_backup_api::points`, and this file goes.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::ResourceExt;
use sts_backup_api::names::{
    CONSISTENCY_ANNOTATION, REPLICAS_ANNOTATION, RUN_LABEL, TIME_ANNOTATION, VOLUMES_ANNOTATION,
};
use sts_backup_api::run::{Consistency, RecoveryPoint, RunId};
use sts_backup_api::snapshot::VolumeSnapshot;

/// The recovery points, newest first; snapshots without a run are not part of any.
pub(super) fn recovery_points<'a>(snapshots: impl Iterator<Item = &'a VolumeSnapshot>) -> Vec<RecoveryPoint> {
    let mut runs: BTreeMap<&str, Vec<&VolumeSnapshot>> = BTreeMap::new();
    for snapshot in snapshots {
        if let Some(run) = snapshot.labels().get(RUN_LABEL) {
            runs.entry(run).or_default().push(snapshot);
        }
    }
    let mut points: Vec<_> = runs.iter().filter_map(|(id, members)| recovery_point(id, members)).collect();
    points.sort_by(|one, other| (&other.time.0, &other.id).cmp(&(&one.time.0, &one.id)));
    points
}

fn recovery_point(id: &str, members: &[&VolumeSnapshot]) -> Option<RecoveryPoint> {
    let number =
        |name| members.iter().filter_map(|member| member.annotations().get(name)?.parse::<i32>().ok()).max();
    let ready = |member: &&&VolumeSnapshot| {
        member.status.as_ref().is_some_and(|status| status.ready_to_use == Some(true))
    };
    let ready_volumes = i32::try_from(members.iter().filter(ready).count()).ok()?;
    let expected_volumes = number(VOLUMES_ANNOTATION).or(i32::try_from(members.len()).ok())?;
    let ordered = |member: &&VolumeSnapshot| {
        let written = member.annotations().get(TIME_ANNOTATION).and_then(|time| time.parse().ok());
        written.or(member.metadata.creation_timestamp.as_ref().map(|time| time.0))
    };
    let application = |member: &&VolumeSnapshot| {
        member.annotations().get(CONSISTENCY_ANNOTATION).map(String::as_str) == Some("Application")
    };
    let size = |member: &&VolumeSnapshot| member.status.as_ref()?.restore_size.as_ref().and_then(bytes);
    Some(RecoveryPoint {
        id: RunId::from(id.to_owned()),
        time: MicroTime(members.iter().filter_map(ordered).min()?),
        complete: ready_volumes == expected_volumes,
        ready_volumes,
        expected_volumes,
        replicas: number(REPLICAS_ANNOTATION).unwrap_or(0),
        consistency: if members.iter().all(application) {
            Consistency::Application
        } else {
            Consistency::CrashPerVolume
        },
        size_bytes: members.iter().filter_map(size).sum(),
    })
}

/// Whole quantities, as snapshots carry them.
fn bytes(quantity: &Quantity) -> Option<i64> {
    let text = quantity.0.as_str();
    let digits = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: i64 = match unit {
        "" => 1,
        "k" => 1000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    number.parse::<i64>().ok()?.checked_mul(factor)
}
