use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use serde_json::json;
use sts_backup_api::backup::{RetentionPolicy, StatefulSetBackupSpec};
use sts_backup_api::names::{RUN_LABEL, TIME_ANNOTATION, VOLUMES_ANNOTATION};
use sts_backup_api::run::{CurrentRun, RunRecord, RunResult};
use sts_backup_api::snapshot::VolumeSnapshot;

use super::super::decide::{BackupStep, Idle, new_run, next_backup_step};
use super::super::observe::Target;
use super::super::status::next_status;
use super::*;

fn at(time: &str) -> Timestamp {
    time.parse().unwrap()
}

/// A backup of every day at 02:00, created on the first of the month at noon.
fn nightly() -> BackupFacts {
    let mut spec = StatefulSetBackupSpec::new("db");
    spec.schedule = Some("0 2 * * *".to_owned());
    BackupFacts {
        namespace: "shop".to_owned(),
        uid: "uid".to_owned(),
        generation: Some(1),
        created: at("2026-03-01T12:00:00Z"),
        deleting: false,
        has_finalizer: true,
        request: None,
        spec,
        status: StatefulSetBackupStatus::default(),
        in_section: false,
        target: Target::Exists,
        busy_with: None,
        snapshots: None,
    }
}

fn scheduled(facts: &BackupFacts, now: &str) -> Option<String> {
    due(facts, at(now)).unwrap().slot.map(|slot| slot.value)
}

/// The backup after its agent has looked at it.
fn seen(mut facts: BackupFacts, now: &str) -> BackupFacts {
    facts.status = next_status(&facts, &BackupStep::Idle(Idle::NothingDue), at(now));
    facts
}

/// The backup after somebody has written its spec.
fn edited(mut facts: BackupFacts, edit: impl FnOnce(&mut StatefulSetBackupSpec)) -> BackupFacts {
    edit(&mut facts.spec);
    facts.generation = facts.generation.map(|generation| generation + 1);
    facts
}

fn interrupted(started: &str, slot: Slot) -> RunRecord {
    RunRecord {
        id: new_run("uid", slot.clone(), at(started)).id,
        slot,
        started: MicroTime(at(started)),
        duration_ms: 1000,
        freeze_ms: None,
        cut_skew_ms: None,
        result: RunResult::Failed,
        kept_volumes: Some(0),
        reason: "Interrupted".to_owned(),
        message: String::new(),
    }
}

#[test]
fn a_schedule_counts_from_the_creation_and_nothing_runs_at_it() {
    let facts = nightly();
    assert_eq!(due(&facts, at("2026-03-01T12:00:00Z")).unwrap(), Due::default());
    assert_eq!(next_run(&facts, at("2026-03-01T12:00:00Z")), Some(at("2026-03-02T02:00:00Z")));
    assert_eq!(scheduled(&facts, "2026-03-02T02:00:00Z").as_deref(), Some("2026-03-02T02:00:00Z"));
}

#[test]
fn what_was_missed_is_begun_once_and_late_or_counted() {
    let facts = nightly();
    let missed = due(&facts, at("2026-03-05T03:00:00Z")).unwrap();
    assert_eq!(missed.slot, Some(Slot::schedule(at("2026-03-05T02:00:00Z"))));
    assert_eq!(missed.missed.count, 3);

    // Later than half a day.
    let missed = due(&facts, at("2026-03-05T15:00:00Z")).unwrap();
    let latest = Some(at("2026-03-05T02:00:00Z"));
    assert_eq!(missed, Due { slot: None, missed: Missed { count: 4, latest } });
}

#[test]
fn without_a_schedule_one_run_is_due_at_the_creation_unless_the_original_took_it() {
    let mut facts = edited(nightly(), |spec| spec.schedule = None);
    assert_eq!(due(&facts, at("2026-04-01T00:00:00Z")).unwrap().slot, Some(Slot::creation(facts.created)));
    facts.status.last_backup_time = Some(MicroTime(at("2026-03-01T12:00:01Z")));
    assert_eq!(due(&facts, at("2026-04-01T00:00:00Z")).unwrap(), Due::default());
}

#[test]
fn the_originals_last_backup_is_what_its_schedule_counts_from() {
    let mut facts = nightly();
    facts.created = at("2020-01-01T00:00:00Z");
    facts.status.last_backup_time = Some(MicroTime(at("2026-03-01T02:00:07Z")));
    let due = due(&facts, at("2026-03-02T02:00:10Z")).unwrap();
    assert_eq!((due.slot, due.missed.count), (Some(Slot::schedule(at("2026-03-02T02:00:00Z"))), 0));
}

#[test]
fn nothing_is_caught_up_with_when_a_backup_goes_on() {
    let suspended = seen(edited(nightly(), |spec| spec.suspend = true), "2026-03-01T13:00:00Z");
    assert_eq!(next_run(&suspended, at("2026-03-05T02:00:00Z")), None);
    let goes_on = edited(suspended, |spec| spec.suspend = false);
    assert_eq!(due(&goes_on, at("2026-03-05T02:00:01Z")).unwrap(), Due::default());
    let goes_on = seen(goes_on, "2026-03-05T02:00:01Z");
    assert_eq!(due(&goes_on, at("2026-03-05T02:00:02Z")).unwrap(), Due::default());
    assert_eq!(scheduled(&goes_on, "2026-03-06T02:00:00Z").as_deref(), Some("2026-03-06T02:00:00Z"));
}

#[test]
fn a_backup_without_a_schedule_that_was_suspended_from_the_start_waits_to_be_asked() {
    let suspended = edited(nightly(), |spec| (spec.schedule, spec.suspend) = (None, true));
    let suspended = seen(suspended, "2026-03-01T12:00:01Z");
    assert_eq!(next_backup_step(&suspended, at("2026-03-01T12:00:02Z")), BackupStep::RemoveFinalizer);
    let goes_on = seen(edited(suspended, |spec| spec.suspend = false), "2026-03-01T13:00:00Z");
    assert_eq!(due(&goes_on, at("2026-03-01T13:00:01Z")).unwrap(), Due::default());
}

#[test]
fn a_new_schedule_counts_from_when_it_is_written() {
    let facts = seen(nightly(), "2026-03-01T12:00:00Z");
    let hourly = edited(facts, |spec| spec.schedule = Some("0 * * * *".to_owned()));
    assert_eq!(due(&hourly, at("2026-03-01T16:05:00Z")).unwrap(), Due::default());
    let hourly = seen(hourly, "2026-03-01T16:05:00Z");
    assert_eq!(due(&hourly, at("2026-03-01T16:06:00Z")).unwrap(), Due::default());
    assert_eq!(scheduled(&hourly, "2026-03-01T17:00:00Z").as_deref(), Some("2026-03-01T17:00:00Z"));
}

#[test]
fn an_edit_while_no_agent_is_there_does_not_undo_a_run_that_was_announced() {
    let facts = seen(nightly(), "2026-03-01T12:00:00Z");
    let edited = edited(facts, |spec| spec.history_limit = 3);
    assert_eq!(scheduled(&edited, "2026-03-02T03:00:00Z").as_deref(), Some("2026-03-02T02:00:00Z"));
}

#[test]
fn an_interrupted_run_is_repeated_until_something_newer_was_dealt_with() {
    let mut facts = nightly();
    let slot = Slot::schedule(at("2026-03-02T02:00:00Z"));
    facts.status.last_schedule_time = Some(Time(at("2026-03-02T02:00:00Z")));
    facts.status.history = vec![interrupted("2026-03-02T02:00:01Z", slot.clone())];
    let again = Some(Slot { attempt: 2, ..slot });
    assert_eq!(due(&facts, at("2026-03-02T02:10:00Z")).unwrap().slot, again);

    facts.status.last_schedule_time = Some(Time(at("2026-03-03T02:00:00Z")));
    assert_eq!(due(&facts, at("2026-03-03T02:10:00Z")).unwrap(), Due::default());
}

#[test]
fn a_request_while_suspended_is_refused_once() {
    let mut facts = edited(nightly(), |spec| spec.suspend = true);
    facts.request = Some("now".to_owned());
    let now = at("2026-03-01T13:00:00Z");
    assert_eq!(next_backup_step(&facts, now), BackupStep::RefuseRequest);
    facts.status = next_status(&facts, &BackupStep::RefuseRequest, now);
    assert_eq!(requested(&facts), None);
}

#[test]
fn no_point_goes_while_a_restore_may_be_reading_it() {
    let point = |run: &str, time: &str| -> VolumeSnapshot {
        serde_json::from_value(json!({
            "apiVersion": "snapshot.storage.k8s.io/v1", "kind": "VolumeSnapshot",
            "metadata": {
                "name": format!("data-db-0-{run}"),
                "labels": { RUN_LABEL: run },
                "annotations": { TIME_ANNOTATION: time, VOLUMES_ANNOTATION: "1" },
            },
            "spec": { "source": { "persistentVolumeClaimName": "data-db-0" } },
            "status": { "readyToUse": true },
        }))
        .unwrap()
    };
    let mut facts = nightly();
    facts.spec.retention_policy = Some(RetentionPolicy { keep_last: Some(1), ..RetentionPolicy::default() });
    facts.snapshots = Some(vec![point("old", "2026-03-01T13:00:00Z"), point("new", "2026-03-01T14:00:00Z")]);
    let next = |facts: &BackupFacts| next_backup_step(facts, at("2026-03-01T15:00:00Z"));
    let BackupStep::Prune(pruned) = next(&facts) else { unreachable!("{:?}", next(&facts)) };
    assert_eq!(pruned.point.as_str(), "old");

    facts.busy_with = Some("StatefulSetRestore shop/back".to_owned());
    assert!(!matches!(next(&facts), BackupStep::Prune(_)), "{:?}", next(&facts));
}

#[test]
fn a_run_that_has_just_begun_waits_for_those_whose_time_has_come_and_for_no_others() {
    let waiting = seen(nightly(), "2026-03-01T13:00:00Z").status;
    assert!(!is_to_begin(&waiting, at("2026-03-02T01:59:59Z")));
    assert!(is_to_begin(&waiting, at("2026-03-02T02:00:00Z")));
    assert!(!is_to_begin(&waiting, at("2026-03-02T02:00:10Z")), "nobody waits for one that cannot begin");

    let run = new_run("uid", Slot::schedule(at("2026-03-02T02:00:00Z")), at("2026-03-02T02:00:01Z"));
    let step = BackupStep::Begin { run: run.clone(), missed: 0 };
    let facts = nightly();
    let begun = next_status(&facts, &step, at("2026-03-02T02:00:01Z"));
    assert!(!is_to_begin(&begun, at("2026-03-02T02:00:01Z")));
    assert!(has_just_begun(&begun, at("2026-03-02T02:00:01Z")));
    assert!(!has_just_begun(&begun, at("2026-03-02T02:00:00Z")), "a clock that went back holds nobody up");
    assert!(!has_just_begun(&begun, at("2026-03-02T02:00:11Z")));
    let frozen = CurrentRun { step: RunStep::Frozen, ..run };
    let goes_on = next_status(&facts, &BackupStep::Record(frozen), at("2026-03-02T02:00:02Z"));
    assert!(!has_just_begun(&goes_on, at("2026-03-02T02:00:02Z")));
}

#[test]
fn the_object_is_held_after_its_run_has_begun_and_before_anything_is_touched() {
    let mut facts = nightly();
    facts.has_finalizer = false;
    let now = at("2026-03-02T02:00:00Z");
    let begin = next_backup_step(&facts, now);
    assert!(matches!(begin, BackupStep::Begin { .. }), "{begin:?}");
    facts.status = next_status(&facts, &begin, now);
    assert_eq!(next_backup_step(&facts, now), BackupStep::AddFinalizer);
    facts.deleting = true;
    let next = next_backup_step(&facts, now);
    assert!(!matches!(next, BackupStep::AddFinalizer | BackupStep::Freeze(_)), "{next:?}");
}
