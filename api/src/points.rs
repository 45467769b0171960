//! Recovery points: what the `VolumeSnapshots` of a namespace amount to.
//!
//! A recovery point *is* the set of snapshots that carry its run's label. Nothing else records it, so nothing
//! else can disagree with it.

use std::collections::BTreeMap;
use std::str::FromStr;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::ResourceExt;

use crate::names::{
    CONSISTENCY_ANNOTATION, HOLD_LABEL, REPLICAS_ANNOTATION, RUN_LABEL, TIME_ANNOTATION, VOLUMES_ANNOTATION,
};
use crate::run::{Consistency, RecoveryPoint, RunId, RunRecord, RunResult};
use crate::snapshot::{SOURCE_PROTECTION_FINALIZER, VolumeSnapshot};

/// The recovery points that the snapshots of one `StatefulSetBackup` amount to, newest first; snapshots without
/// a run label, and those that are being deleted, do not count.
///
/// A point is complete when as many snapshots are ready as its run was to take. An annotation that is missing
/// or was tampered with reads as the worse value: no time as the creation of the snapshot, no count as
/// incomplete, no consistency as [`Consistency::CrashPerVolume`].
#[must_use]
pub fn recovery_points<'a>(snapshots: impl IntoIterator<Item = &'a VolumeSnapshot>) -> Vec<RecoveryPoint> {
    let mut runs: BTreeMap<&str, Vec<&VolumeSnapshot>> = BTreeMap::new();
    for snapshot in snapshots {
        let run = snapshot.metadata.labels.as_ref().and_then(|labels| labels.get(RUN_LABEL));
        if let (Some(run), None) = (run, &snapshot.metadata.deletion_timestamp) {
            runs.entry(run).or_default().push(snapshot);
        }
    }
    let mut points: Vec<_> = runs.into_iter().map(|(run, members)| recovery_point(run, &members)).collect();
    points.sort_by(|one, other| other.time.cmp(&one.time).then_with(|| other.id.cmp(&one.id)));
    points
}

/// The recovery points that snapshots amount to, as [`recovery_points`] says, where the finished runs are known.
///
/// A snapshot that was created for a run just before its agent died can appear after the clean-up: it does not make the
/// point of a failed run complete.
#[must_use]
pub fn points_of<'a>(
    snapshots: impl IntoIterator<Item = &'a VolumeSnapshot>,
    history: &[RunRecord],
) -> Vec<RecoveryPoint> {
    let mut points = recovery_points(snapshots);
    for point in &mut points {
        let failed = history.iter().any(|run| run.id == point.id && run.result == RunResult::Failed);
        point.complete &= !failed;
    }
    points
}

fn recovery_point(run: &str, members: &[&VolumeSnapshot]) -> RecoveryPoint {
    let ready: Vec<_> = members.iter().filter(|snapshot| is_ready(snapshot)).collect();
    let ready_volumes = i32::try_from(ready.len()).unwrap_or(i32::MAX);
    let expected_volumes = members.iter().filter_map(|snapshot| number(snapshot, VOLUMES_ANNOTATION)).max();
    let consistent = |snapshot: &&VolumeSnapshot| {
        annotation(snapshot, CONSISTENCY_ANNOTATION) == Some(Consistency::Application.as_str())
    };
    let time = members.iter().filter_map(|snapshot| time(snapshot)).min();
    let sizes = ready.iter().filter_map(|snapshot| snapshot.status.as_ref()?.restore_size.as_ref());
    RecoveryPoint {
        id: RunId::from(run.to_owned()),
        time: MicroTime(time.unwrap_or(Timestamp::UNIX_EPOCH)),
        complete: expected_volumes == Some(ready_volumes),
        ready_volumes,
        expected_volumes: expected_volumes.unwrap_or_default(),
        replicas: members
            .iter()
            .filter_map(|snapshot| number(snapshot, REPLICAS_ANNOTATION))
            .max()
            .unwrap_or_default(),
        consistency: if members.iter().all(consistent) {
            Consistency::Application
        } else {
            Consistency::CrashPerVolume
        },
        size_bytes: sizes.filter_map(|size| bytes(&size.0)).fold(0, i64::saturating_add),
        hold: members.iter().any(|snapshot| is_held(snapshot)),
    }
}

/// Whether the storage has cut the snapshot: later writes are not in it.
#[must_use]
pub fn is_cut(snapshot: &VolumeSnapshot) -> bool {
    // Some drivers report a snapshot as ready without saying when it was cut.
    let status = snapshot.status.as_ref();
    status.is_some_and(|status| status.creation_time.is_some()) || is_ready(snapshot)
}

/// Whether a volume can be made from the snapshot.
#[must_use]
pub fn is_ready(snapshot: &VolumeSnapshot) -> bool {
    snapshot.status.as_ref().and_then(|status| status.ready_to_use) == Some(true)
}

/// Whether a volume is being made from the snapshot, as far as csi-provisioner says so: [`SOURCE_PROTECTION_FINALIZER`].
#[must_use]
pub fn is_in_use(snapshot: &VolumeSnapshot) -> bool {
    snapshot.finalizers().iter().any(|finalizer| finalizer == SOURCE_PROTECTION_FINALIZER)
}

/// Whether somebody holds the snapshot, and with it its whole recovery point.
#[must_use]
pub fn is_held(snapshot: &VolumeSnapshot) -> bool {
    snapshot.labels().get(HOLD_LABEL).is_some_and(|hold| hold == "true")
}

fn annotation<'a>(snapshot: &'a VolumeSnapshot, name: &str) -> Option<&'a str> {
    snapshot.annotations().get(name).map(String::as_str)
}

fn number(snapshot: &VolumeSnapshot, name: &str) -> Option<i32> {
    annotation(snapshot, name)?.parse().ok()
}

fn time(snapshot: &VolumeSnapshot) -> Option<Timestamp> {
    let ordered = annotation(snapshot, TIME_ANNOTATION).and_then(|time| Timestamp::from_str(time).ok());
    let time = ordered.or_else(|| Some(snapshot.metadata.creation_timestamp.as_ref()?.0))?;
    // As a status keeps it: a point that is read again must not differ from itself.
    Timestamp::from_microsecond(time.as_microsecond()).ok()
}

/// A quantity of bytes, rounded up to a whole one; what is no quantity gives nothing.
/// <https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/>
#[must_use]
pub fn bytes(quantity: &str) -> Option<i64> {
    let digits = quantity.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(quantity.len());
    let (number, suffix) = quantity.split_at(digits);
    let factor = match suffix {
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "E" => 1e18,
        "Ki" => 1024.0,
        "Mi" => 1024.0_f64.powi(2),
        "Gi" => 1024.0_f64.powi(3),
        "Ti" => 1024.0_f64.powi(4),
        "Pi" => 1024.0_f64.powi(5),
        "Ei" => 1024.0_f64.powi(6),
        "m" => 1e-3,
        exponent => 10.0_f64.powi(exponent.strip_prefix(['e', 'E'])?.parse().ok()?),
    };
    let whole = number.parse::<f64>().ok()? * factor;
    #[expect(clippy::cast_possible_truncation, reason = "a float that is too large becomes i64::MAX")]
    Some(whole.ceil() as i64)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn snapshot(run: &str, ordinal: i32, time: &str, ready: bool) -> VolumeSnapshot {
        serde_json::from_value(json!({
            "apiVersion": "snapshot.storage.k8s.io/v1", "kind": "VolumeSnapshot",
            "metadata": {
                "name": format!("data-db-{ordinal}-{run}"),
                "labels": { RUN_LABEL: run },
                "annotations": {
                    TIME_ANNOTATION: time, VOLUMES_ANNOTATION: "2", REPLICAS_ANNOTATION: "2",
                    CONSISTENCY_ANNOTATION: "Application",
                },
            },
            "spec": { "source": { "persistentVolumeClaimName": format!("data-db-{ordinal}") } },
            "status": { "readyToUse": ready, "restoreSize": "1Gi", "creationTime": "2026-01-01T00:00:00Z" },
        }))
        .unwrap()
    }

    #[test]
    fn the_snapshots_of_a_run_are_a_point_and_the_newest_comes_first() {
        let snapshots = [
            snapshot("old", 0, "2026-01-01T00:00:00Z", true),
            snapshot("new", 1, "2026-01-02T00:00:01Z", true),
            snapshot("new", 0, "2026-01-02T00:00:00Z", true),
            snapshot("old", 1, "2026-01-01T00:00:00Z", false),
        ];
        let points = recovery_points(&snapshots);
        let said: Vec<_> = points
            .iter()
            .map(|point| (point.id.as_str(), point.complete, point.ready_volumes, point.expected_volumes))
            .collect();
        assert_eq!(said, [("new", true, 2, 2), ("old", false, 1, 2)]);
        assert_eq!(points[0].time.0.to_string(), "2026-01-02T00:00:00Z");
        assert_eq!((points[0].replicas, points[0].size_bytes), (2, 2 << 30));
        assert_eq!(points[0].consistency, Consistency::Application);
    }

    #[test]
    fn a_point_is_not_complete_without_every_snapshot() {
        let whole =
            [snapshot("r", 0, "2026-01-01T00:00:00Z", true), snapshot("r", 1, "2026-01-01T00:00:00Z", true)];
        assert!(recovery_points(&whole)[0].complete);
        assert!(!recovery_points(&whole[..1])[0].complete);

        let mut deleted = whole.clone();
        deleted[0].metadata.deletion_timestamp = Some(Timestamp::UNIX_EPOCH.into());
        assert!(!recovery_points(&deleted)[0].complete);

        let mut uncounted = whole;
        for snapshot in &mut uncounted {
            snapshot.metadata.annotations = None;
        }
        let point = &recovery_points(&uncounted)[0];
        assert!(!point.complete);
        assert_eq!(point.consistency, Consistency::CrashPerVolume);
    }

    #[test]
    fn the_point_of_a_failed_run_is_not_complete_whatever_appears() {
        let whole =
            [snapshot("r", 0, "2026-01-01T00:00:00Z", true), snapshot("r", 1, "2026-01-01T00:00:00Z", true)];
        let ended = |run: &str, result: &str| -> RunRecord {
            serde_json::from_value(json!({
                "id": run, "slot": { "due": "Creation", "value": "x", "attempt": 1 }, "durationMs": 1,
                "started": "2026-01-01T00:00:00.000000Z", "result": result, "reason": result, "message": "",
            }))
            .unwrap()
        };
        for (history, complete) in [
            (ended("r", "Failed"), false),
            (ended("r", "Completed"), true),
            (ended("another", "Failed"), true),
        ] {
            assert_eq!(
                points_of(&whole, std::slice::from_ref(&history))[0].complete,
                complete,
                "{history:?}"
            );
        }
    }

    #[test]
    fn a_hold_is_the_label_with_true_and_one_member_holds_the_point() {
        let mut members =
            [snapshot("r", 0, "2026-01-01T00:00:00Z", true), snapshot("r", 1, "2026-01-01T00:00:00Z", true)];
        assert!(!recovery_points(&members)[0].hold);
        members[1].labels_mut().insert(HOLD_LABEL.to_owned(), "false".to_owned());
        assert!(!recovery_points(&members)[0].hold);
        members[1].labels_mut().insert(HOLD_LABEL.to_owned(), "true".to_owned());
        assert!(recovery_points(&members)[0].hold);
    }

    #[test]
    fn only_the_provisioner_s_finalizer_tells_that_a_volume_is_being_made() {
        let mut source = snapshot("r", 0, "2026-01-01T00:00:00Z", true);
        source.finalizers_mut().extend([
            "snapshot.storage.kubernetes.io/volumesnapshot-as-source-protection".to_owned(),
            "snapshot.storage.kubernetes.io/volumesnapshot-bound-protection".to_owned(),
        ]);
        assert!(!is_in_use(&source));
        source.finalizers_mut().push(SOURCE_PROTECTION_FINALIZER.to_owned());
        assert!(is_in_use(&source));
    }

    #[test]
    fn a_snapshot_without_a_run_belongs_to_no_point() {
        let mut original = snapshot("r", 0, "2026-01-01T00:00:00Z", true);
        original.metadata.labels = None;
        assert_eq!(recovery_points(&[original]), []);
    }

    #[test]
    fn quantities_are_read_as_kubernetes_writes_them() {
        for (quantity, expected) in [
            ("0", Some(0)),
            ("268435456", Some(1 << 28)),
            ("256Mi", Some(1 << 28)),
            ("1.5Gi", Some(3 << 29)),
            ("2k", Some(2000)),
            ("1e3", Some(1000)),
            ("1500m", Some(2)),
            ("1Ei", Some(1 << 60)),
            ("2E", Some(2_000_000_000_000_000_000)),
            ("", None),
            ("1Xi", None),
        ] {
            assert_eq!(bytes(quantity), expected, "{quantity}");
        }
    }
}
