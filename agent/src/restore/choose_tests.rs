//! Which data a restore chooses, as tables.

use serde_json::{Value, json};
use sts_backup_api::names::{BACKUP_NAMESPACE_LABEL, STATEFUL_SET_LABEL, VOLUMES_ANNOTATION};
use sts_backup_api::snapshot::VolumeSnapshotStatus;

use super::super::scene::{
    add_replica, add_snapshot, object, restore, snapshot_mut, survey, take, take_original, template, time,
};
use super::*;

/// Two replicas, and the points old, new, and the newest with one of its two snapshots.
fn points() -> Survey {
    let mut survey = survey(2);
    take(&mut survey, "old", "2026-01-01T00:00:00Z");
    take(&mut survey, "new", "2026-01-02T00:00:00Z");
    take(&mut survey, "part", "2026-01-03T00:00:00Z");
    survey.snapshots.retain(|snapshot| snapshot.name_any() != "data-db-1-part");
    survey
}

/// The point and its snapshots.
fn chosen(spec: &Value, survey: &Survey) -> (String, Vec<String>) {
    let choice = choose(&restore(spec), survey).unwrap();
    (choice.point.clone(), choice.snapshots.values().map(|snapshot| snapshot.name_any()).collect())
}

/// The only reason why nothing is chosen, and what it says.
fn refused(spec: &Value, survey: &Survey) -> (&'static str, String) {
    let mut problems = choose(&restore(spec), survey).unwrap_err();
    let problem = problems.remove(0);
    assert_eq!(problems, [], "one problem expected beside {problem:?}");
    (problem.reason, problem.message)
}

/// Whether the chosen data is whole: what is refused, and what is warned of.
fn damages(spec: &Value, survey: &Survey) -> (Vec<&'static str>, Vec<String>) {
    let choice = choose(&restore(spec), survey).unwrap();
    let mut findings = Findings::default();
    damage(&choice, survey, &mut findings);
    (findings.problems.iter().map(|problem| problem.reason).collect(), findings.warnings)
}

fn nightly() -> Value {
    json!({ "backupName": "nightly" })
}

#[test]
fn each_source_means_its_point() {
    let survey = points();
    for (spec, point) in [
        (nightly(), "new"),
        (json!({ "useLatestBackup": true }), "new"),
        (json!({ "backupName": "nightly", "recoveryPoint": "old" }), "old"),
        (json!({ "backupName": "nightly", "pointInTime": "2026-01-01T23:59:59Z" }), "old"),
        (json!({ "backupName": "nightly", "pointInTime": "2026-01-02T00:00:00Z" }), "new"),
        (json!({ "backupName": "nightly", "pointInTime": "2026-01-09T00:00:00Z" }), "new"),
        (json!({ "snapshotNames": ["data-db-1-old", "data-db-0-old"] }), "old"),
    ] {
        let expected = ["data-db-0", "data-db-1"].map(|claim| format!("{claim}-{point}"));
        assert_eq!(chosen(&spec, &survey), (point.to_owned(), expected.to_vec()), "{spec}");
    }
    let choice = choose(&restore(&nightly()), &survey).unwrap();
    assert_eq!(choice.backup.as_deref(), Some("nightly"));
    assert_eq!(choice.time, time("2026-01-02T00:00:00Z"));
    assert_eq!((choice.consistency, choice.warnings), (Some(Consistency::Application), Vec::<String>::new()));
}

#[test]
fn what_is_not_there_is_said_with_what_there_is() {
    let survey = points();
    for (spec, reason, text) in [
        (json!({ "backupName": "weekly" }), "NoRecoveryPoint", "there is none at all"),
        (
            json!({ "backupName": "nightly", "recoveryPoint": "gone" }),
            "RecoveryPointNotFound",
            "new of 2026-01-02T00:00:00Z (complete)",
        ),
        (
            json!({ "backupName": "nightly", "pointInTime": "2025-01-01T00:00:00Z" }),
            "NoRecoveryPoint",
            "from 2025-01-01T00:00:00Z or before",
        ),
        (json!({ "snapshotNames": ["gone"] }), "SnapshotNotFound", "VolumeSnapshot gone does not exist"),
        (
            json!({ "backupName": "weekly", "snapshotNames": ["data-db-0-old"] }),
            "SnapshotOfAnother",
            "not of backup weekly",
        ),
        (
            json!({ "snapshotNames": ["data-db-0-old", "data-db-0-new"] }),
            "SnapshotsAmbiguous",
            "both of claim data-db-0",
        ),
    ] {
        let (found, message) = refused(&spec, &survey);
        assert_eq!(found, reason, "{spec}");
        assert!(message.contains(text), "{message}");
    }
}

#[test]
fn every_unfit_name_is_said_at_once() {
    let mut survey = points();
    add_snapshot(&mut survey, "stray", "data-web-0", "2026-01-01T00:00:00Z", &json!({}));
    let spec = json!({ "snapshotNames": ["gone", "stray", "data-db-0-old"] });
    let problems = choose(&restore(&spec), &survey).unwrap_err();
    let reasons: Vec<_> = problems.iter().map(|problem| problem.reason).collect();
    assert_eq!(reasons, ["SnapshotNotFound", "SnapshotOfAnother"]);
}

#[test]
fn a_partial_point_is_taken_only_by_name_and_says_what_is_missing() {
    let mut survey = points();
    let by_name = json!({ "backupName": "nightly", "recoveryPoint": "part", "replicas": [0] });
    let choice = choose(&restore(&by_name), &survey).unwrap();
    assert_eq!(choice.point, "part");
    assert_eq!(choice.warnings, ["recovery point part is not complete: 1 of 2 volumes, without data-db-1"]);

    survey.snapshots.retain(|snapshot| snapshot.name_any().ends_with("part"));
    let (reason, message) = refused(&nightly(), &survey);
    assert_eq!(reason, "NoRecoveryPoint");
    assert!(
        message.contains("part of 2026-01-03T00:00:00Z (1 of 2 volumes, without data-db-1)"),
        "{message}"
    );
}

#[test]
fn the_point_of_a_failed_run_is_not_the_newest_complete_one() {
    let mut survey = points();
    survey.failed_runs = vec![object(json!({
        "id": "new", "slot": { "due": "Creation", "value": "x", "attempt": 1 }, "durationMs": 1,
        "started": "2026-01-02T00:00:00.000000Z", "result": "Failed", "reason": "X", "message": "",
    }))];
    assert_eq!(chosen(&nightly(), &survey).0, "old");
    let by_name = json!({ "backupName": "nightly", "recoveryPoint": "new" });
    let choice = choose(&restore(&by_name), &survey).unwrap();
    assert_eq!(choice.warnings, ["recovery point new is not complete: its run failed"]);
}

#[test]
fn a_backup_s_points_are_those_of_its_namespace_and_the_latest_those_of_all() {
    let mut survey = points();
    for snapshot in &mut survey.snapshots {
        if snapshot.name_any().ends_with("new") {
            snapshot.labels_mut().insert(BACKUP_NAMESPACE_LABEL.to_owned(), "ops".to_owned());
        }
    }
    assert_eq!(chosen(&nightly(), &survey).0, "old");
    assert_eq!(chosen(&json!({ "useLatestBackup": true }), &survey).0, "new");

    for snapshot in &mut survey.snapshots {
        snapshot.labels_mut().insert(STATEFUL_SET_LABEL.to_owned(), "web".to_owned());
    }
    assert_eq!(refused(&json!({ "useLatestBackup": true }), &survey).0, "NoRecoveryPoint");
}

#[test]
fn ordinals_narrow_the_point_and_those_without_data_are_named() {
    let mut survey = points();
    add_replica(&mut survey, "data", 2);
    survey.set.as_mut().unwrap().spec.as_mut().unwrap().replicas = Some(3);

    let (reason, message) = refused(&nightly(), &survey);
    assert_eq!(reason, "OrdinalNotInPoint");
    assert!(message.contains("recovery point new has no data of ordinal 2"), "{message}");

    let of = |replicas: Value| json!({ "backupName": "nightly", "replicas": replicas });
    assert_eq!(chosen(&of(json!([1])), &survey).1, ["data-db-1-new"]);
    assert_eq!(chosen(&of(json!([0, 1])), &survey).1, ["data-db-0-new", "data-db-1-new"]);
    let (_, message) = refused(&of(json!([1, 2])), &survey);
    assert!(message.contains("no data of ordinal 2"), "{message}");

    // Who names snapshots has said which claims are meant.
    assert_eq!(chosen(&json!({ "snapshotNames": ["data-db-1-old"] }), &survey).1, ["data-db-1-old"]);
}

#[test]
fn what_the_stateful_set_has_no_template_for_is_left_out_with_a_warning() {
    let mut survey = survey(1);
    add_replica(&mut survey, "wal", 0);
    take(&mut survey, "r", "2026-01-01T00:00:00Z");
    let choice = choose(&restore(&nightly()), &survey).unwrap();
    assert_eq!(choice.snapshots.len(), 1);
    assert!(
        choice.warnings[0].contains("VolumeSnapshot wal-db-0-r is not restored"),
        "{:?}",
        choice.warnings
    );

    let set = survey.set.as_mut().unwrap();
    set.spec.as_mut().unwrap().volume_claim_templates.as_mut().unwrap().push(object(template("wal")));
    assert_eq!(chosen(&nightly(), &survey).1, ["data-db-0-r", "wal-db-0-r"]);
}

#[test]
fn snapshots_of_several_points_may_not_fit_together() {
    let survey = points();
    let spec = json!({ "snapshotNames": ["data-db-0-old", "data-db-1-new"] });
    let choice = choose(&restore(&spec), &survey).unwrap();
    assert_eq!((choice.point.as_str(), choice.consistency), ("data-db", None));
    assert!(choice.warnings[0].contains("not of one recovery point"), "{:?}", choice.warnings);
}

#[test]
fn the_original_s_snapshots_are_points_by_backup_and_time() {
    let mut survey = survey(2);
    // One after the other, and a claim that comes again begins the next run.
    for (unix, ordinal) in [(1000, 0), (1004, 1), (1060, 0), (1066, 1)] {
        take_original(&mut survey, "my-db", "data", unix, ordinal);
    }
    take_original(&mut survey, "other", "data", 1070, 0);
    let of = |more: Value| {
        let mut spec = json!({ "backupName": "my-db" });
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        spec
    };
    let second = ["my-db-data-1060-0", "my-db-data-1066-1"].map(ToOwned::to_owned).to_vec();
    let first = ["my-db-data-1000-0", "my-db-data-1004-1"].map(ToOwned::to_owned).to_vec();
    assert_eq!(chosen(&of(json!({})), &survey), ("1060".to_owned(), second.clone()));
    assert_eq!(chosen(&json!({ "useLatestBackup": true }), &survey), ("1060".to_owned(), second.clone()));
    assert_eq!(chosen(&of(json!({ "recoveryPoint": "1000" })), &survey).1, first);
    let one = json!({ "snapshotNames": ["my-db-data-1000-0"] });
    assert_eq!(chosen(&one, &survey).0, "my-db-data-1000-0");
    assert_eq!(chosen(&of(json!({ "pointInTime": "1970-01-01T00:17:00Z" })), &survey).1, first);
    assert_eq!(chosen(&of(json!({ "snapshotNames": second })), &survey), ("my-db-data".to_owned(), second));

    let choice = choose(&restore(&of(json!({}))), &survey).unwrap();
    assert_eq!((choice.backup.as_deref(), choice.consistency), (Some("my-db"), None));
    let (reason, message) = refused(&json!({ "backupName": "other" }), &survey);
    assert_eq!(reason, "NoRecoveryPoint");
    assert!(
        message.contains("1070 of 1970-01-01T00:17:50Z (taken by the original operator, without data-db-1)")
    );
}

#[test]
fn a_set_of_the_original_that_is_not_whole_is_taken_only_by_name() {
    let mut survey = survey(2);
    take_original(&mut survey, "my-db", "data", 1000, 0);
    take_original(&mut survey, "my-db", "data", 1001, 1);
    // Too late to be of one run.
    take_original(&mut survey, "my-db", "data", 5000, 0);
    take_original(&mut survey, "my-db", "data", 5601, 1);
    assert_eq!(chosen(&json!({ "backupName": "my-db" }), &survey).0, "1000");
    let by_name = json!({ "backupName": "my-db", "recoveryPoint": "5000", "replicas": [0] });
    assert_eq!(chosen(&by_name, &survey).1, ["my-db-data-5000-0"]);

    // Only these ordinals are asked for, and of these it has all.
    let of_second = json!({ "backupName": "my-db", "replicas": [1] });
    assert_eq!(chosen(&of_second, &survey).1, ["my-db-data-5601-1"]);

    // A snapshot that is not ready is no data.
    snapshot_mut(&mut survey, "my-db-data-1001-1").status.as_mut().unwrap().ready_to_use = Some(false);
    assert_eq!(refused(&json!({ "backupName": "my-db" }), &survey).0, "NoRecoveryPoint");
}

#[test]
fn a_set_of_the_original_is_whole_with_every_template_of_every_replica() {
    let mut survey = survey(2);
    let spec = survey.set.as_mut().unwrap().spec.as_mut().unwrap();
    spec.volume_claim_templates.as_mut().unwrap().push(object(template("write-log")));
    for ordinal in 0..2 {
        take_original(&mut survey, "my-db", "data", 1000, ordinal);
        take_original(&mut survey, "my-db", "write-log", 1000, ordinal);
    }
    assert_eq!(chosen(&json!({ "backupName": "my-db" }), &survey).1.len(), 4);

    // Also when it is scaled to 0, by the claims that there are; and when a snapshot was brought back by its content.
    survey.set.as_mut().unwrap().spec.as_mut().unwrap().replicas = Some(0);
    let source = &mut snapshot_mut(&mut survey, "my-db-write-log-1000-1").spec.source;
    source.persistent_volume_claim_name = None;
    source.volume_snapshot_content_name = Some("brought-back".to_owned());
    assert_eq!(chosen(&json!({ "backupName": "my-db" }), &survey).1.len(), 4);

    survey.snapshots.pop();
    assert_eq!(refused(&json!({ "backupName": "my-db" }), &survey).0, "NoRecoveryPoint");
}

#[test]
fn a_snapshot_that_was_cut_anew_under_its_old_name_is_refused() {
    let minutes = |minutes: i64| time("2026-01-02T00:00:00Z").as_second() + minutes * 60;
    for (cut, fits) in [
        (minutes(-6), false),
        (minutes(-4), true),
        (minutes(0), true),
        (minutes(64), true),
        (minutes(66), false),
        (minutes(10_000), false),
    ] {
        let mut survey = points();
        let content = survey.contents.get_mut("content-data-db-1-new").unwrap();
        content.status.as_mut().unwrap().creation_time = Some(cut * 1_000_000_000);
        let expected: &[&str] = if fits { &[] } else { &["SnapshotRecut"] };
        assert_eq!(damages(&nightly(), &survey), (expected.to_vec(), Vec::new()), "{cut}");

        // Asked for by name, it is only said.
        let (problems, warnings) = damages(&json!({ "snapshotNames": ["data-db-1-new"] }), &survey);
        assert_eq!((problems, warnings.len()), (Vec::new(), usize::from(!fits)), "{cut}");
    }
}

#[test]
fn the_original_s_snapshots_are_held_against_the_time_in_their_names() {
    let mut survey = survey(1);
    take_original(&mut survey, "my-db", "data", 1_000_000, 0);
    let spec = json!({ "backupName": "my-db" });
    assert_eq!(damages(&spec, &survey).0, [""; 0]);
    let content = survey.contents.values_mut().next().unwrap();
    content.status.as_mut().unwrap().creation_time = Some(2_000_000 * 1_000_000_000);
    assert_eq!(damages(&spec, &survey).0, ["SnapshotRecut"]);
    // A driver that does not say when it cut leaves nothing to compare.
    survey.contents.values_mut().next().unwrap().status.as_mut().unwrap().creation_time = None;
    assert_eq!(damages(&spec, &survey).0, [""; 0]);
}

#[test]
fn data_that_is_lost_is_found_before_anything_is_touched() {
    type Change = fn(&mut Survey);
    let lost: [(Change, &str); 7] = [
        (|survey| drop(survey.contents.remove("content-data-db-0-new")), "SnapshotContentLost"),
        (
            |survey| {
                let content = survey.contents.get_mut("content-data-db-0-new").unwrap();
                content.spec.volume_snapshot_ref.uid = Some("another".to_owned());
            },
            "SnapshotContentLost",
        ),
        (
            |survey| {
                let content = survey.contents.get_mut("content-data-db-0-new").unwrap();
                content.spec.volume_snapshot_ref.name = Some("another".to_owned());
            },
            "SnapshotContentLost",
        ),
        (
            |survey| {
                let content = survey.contents.get_mut("content-data-db-0-new").unwrap();
                content.metadata.deletion_timestamp = Some(Timestamp::UNIX_EPOCH.into());
            },
            "SnapshotContentLost",
        ),
        (
            |survey| {
                let status = &mut snapshot_mut(survey, "data-db-0-new").status;
                status.as_mut().unwrap().bound_volume_snapshot_content_name = None;
            },
            "SnapshotContentLost",
        ),
        (|survey| snapshot_mut(survey, "data-db-0-new").status = None, "SnapshotNotReady"),
        (
            |survey| {
                let snapshot = snapshot_mut(survey, "data-db-0-new");
                snapshot.metadata.deletion_timestamp = Some(Timestamp::UNIX_EPOCH.into());
            },
            "SnapshotBeingDeleted",
        ),
    ];
    let spec = json!({ "snapshotNames": ["data-db-0-new", "data-db-1-new"] });
    assert_eq!(damages(&spec, &points()), (Vec::new(), Vec::new()));
    for (change, reason) in lost {
        let mut survey = points();
        change(&mut survey);
        assert_eq!(damages(&spec, &survey), (vec![reason], Vec::new()));
    }
}

#[test]
fn two_snapshots_of_one_claim_in_a_point_are_not_chosen_between() {
    let mut survey = points();
    let mut twin = snapshot_mut(&mut survey, "data-db-0-new").clone();
    twin.metadata.name = Some("twin".to_owned());
    survey.snapshots.push(twin);
    for snapshot in &mut survey.snapshots {
        snapshot.annotations_mut().insert(VOLUMES_ANNOTATION.to_owned(), "3".to_owned());
    }
    assert_eq!(refused(&nightly(), &survey).0, "SnapshotsAmbiguous");
}

#[test]
fn a_point_whose_snapshots_are_all_unready_has_nothing_to_restore() {
    let mut survey = points();
    for snapshot in &mut survey.snapshots {
        snapshot.status = Some(VolumeSnapshotStatus::default());
    }
    let spec = json!({ "backupName": "nightly", "recoveryPoint": "old" });
    assert_eq!(refused(&spec, &survey).0, "NothingToRestore");
}
