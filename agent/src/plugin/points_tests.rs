use serde_json::json;
use sts_backup_api::names::{CONSISTENCY_ANNOTATION, TIME_ANNOTATION, VOLUMES_ANNOTATION};

use super::*;

fn snapshot(namespace: &str, owner: (&str, &str), run: Option<&str>, ready: bool) -> VolumeSnapshot {
    let mut snapshot: VolumeSnapshot = serde_json::from_value(json!({
        "apiVersion": "snapshot.storage.k8s.io/v1", "kind": "VolumeSnapshot",
        "metadata": {
            "name": "any", "namespace": namespace,
            "labels": { BACKUP_LABEL: owner.1, BACKUP_NAMESPACE_LABEL: owner.0, STATEFUL_SET_LABEL: "db" },
            "annotations": {
                TIME_ANNOTATION: "2026-02-03T02:00:00Z", VOLUMES_ANNOTATION: "2", CONSISTENCY_ANNOTATION: "Application",
            },
        },
        "spec": { "source": {} },
        "status": { "readyToUse": ready, "restoreSize": "10Mi" },
    }))
    .unwrap();
    if let Some(run) = run {
        snapshot.labels_mut().insert(RUN_LABEL.to_owned(), run.to_owned());
    }
    snapshot
}

fn facts() -> Facts {
    let nightly = ("shop", "nightly");
    let exists = |namespace: &str, name: &str, exists| ((namespace.to_owned(), name.to_owned()), exists);
    Facts {
        snapshots: vec![
            snapshot("shop", nightly, Some("run-1"), true),
            snapshot("shop", nightly, Some("run-1"), true),
            snapshot("shop", nightly, Some("run-2"), true),
            snapshot("shop", ("shop", "old"), Some("run-3"), true),
            snapshot("shop", ("ops", "far"), Some("run-4"), true),
            snapshot("shop", nightly, None, true),
        ],
        exists: [exists("shop", "nightly", true), exists("shop", "old", false)].into(),
    }
}

#[test]
fn points_are_told_with_their_owners_even_when_those_are_gone() {
    let now = "2026-02-03T05:00:00Z".parse().unwrap();
    assert_eq!(
        render(&listed(&facts()), now),
        "NAMESPACE   BACKUP          STATEFULSET   POINT   TIME                        VOLUMES   COMPLETE   CONSISTENCY   SIZE   HOLD\n\
         shop        ops/far         db            run-4   2026-02-03T02:00:00Z (3h)   1/2       no         Application   10Mi   no\n\
         shop        nightly         db            run-2   2026-02-03T02:00:00Z (3h)   1/2       no         Application   10Mi   no\n\
         shop        nightly         db            run-1   2026-02-03T02:00:00Z (3h)   2/2       yes        Application   20Mi   no\n\
         shop        old (deleted)   db            run-3   2026-02-03T02:00:00Z (3h)   1/2       no         Application   10Mi   no\n"
    );
}

#[test]
fn snapshots_of_the_original_operator_are_counted_and_not_shown() {
    assert_eq!(originals(&facts().snapshots), 1);
    assert_eq!(
        originals_line(1),
        "not shown: 1 snapshot of the original operator (backup.sts-backup.io/policy without a run): \
         kubectl get volumesnapshots -l backup.sts-backup.io/policy,'!backup.sts-backup.io/run'"
    );
}

#[test]
fn a_backup_that_may_not_be_looked_for_is_not_said_to_be_deleted() {
    let listed = listed(&facts());
    let deleted = |backup| listed.iter().find(|listed| listed.backup == backup).unwrap().backup_deleted;
    assert_eq!((deleted("nightly"), deleted("old"), deleted("far")), (Some(false), Some(true), None));
}

#[test]
fn programs_get_the_point_and_its_owner_in_one_object() {
    let text = data(&listed(&facts())[2..3], DataFormat::Json).unwrap();
    let read: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        read["recoveryPoints"][0],
        json!({
            "namespace": "shop", "backupNamespace": "shop", "backup": "nightly", "backupDeleted": false,
            "statefulSet": "db", "id": "run-1", "time": "2026-02-03T02:00:00.000000Z", "complete": true,
            "readyVolumes": 2, "expectedVolumes": 2, "replicas": 0, "consistency": "Application",
            "sizeBytes": 20_971_520, "hold": false,
        })
    );
}

#[test]
fn without_points_it_says_where_it_looked_and_what_makes_one() {
    assert_eq!(
        nothing_in(&Scope::Namespace("shop".to_owned()), Some("nightly")),
        "No recovery point of StatefulSetBackup nightly in namespace shop.\n  \
         kubectl stsbackup points -A looks in all namespaces\n  kubectl stsbackup run NAME --wait makes one"
    );
}
