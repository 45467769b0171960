use serde_json::{Value, json};

use super::*;

const VALUE: &str = "2026-02-03T02:00:00.000000001Z";

fn asked() -> Asked {
    Asked::new("uid-1", VALUE)
}

fn backup(status: &Value) -> StatefulSetBackup {
    serde_json::from_value(json!({
        "metadata": {
            "name": "nightly", "namespace": "shop", "uid": "uid-1", "generation": 2,
            "annotations": { REQUESTED_AT_ANNOTATION: VALUE },
        },
        "spec": { "statefulSetRef": { "name": "db" } },
        "status": status,
    }))
    .unwrap()
}

fn slot(attempt: i32) -> Value {
    json!({ "due": "Request", "value": VALUE, "attempt": attempt })
}

fn record(attempt: i32, result: &str, reason: &str) -> Value {
    json!({
        "id": format!("run-{attempt}"), "slot": slot(attempt), "started": "2026-02-03T02:00:01.000000Z",
        "durationMs": 2100, "freezeMs": 120, "cutSkewMs": 35, "result": result, "reason": reason, "message": "3/3 volumes",
    })
}

fn volume(ordinal: i32, state: &str) -> Value {
    let claim = format!("data-db-{ordinal}");
    json!({
        "claim": claim, "template": "data", "ordinal": ordinal, "snapshot": format!("{claim}-run-1"),
        "snapshotClass": "fast", "state": state,
    })
}

fn pod(ordinal: i32, thaw: &str, message: Option<&str>) -> Value {
    json!({
        "name": format!("db-{ordinal}"), "uid": format!("pod-{ordinal}"), "freezeContainer": "db",
        "thaw": { "container": "db", "state": thaw, "failures": i32::from(message.is_some()), "message": message },
    })
}

fn running(attempt: i32, step: &str, volumes: &[Value], pods: &[Value]) -> Value {
    json!({
        "id": format!("run-{attempt}"), "slot": slot(attempt), "started": "2026-02-03T02:00:01.000000Z",
        "step": step, "volumes": volumes, "pods": pods,
    })
}

fn ready_false(reason: &str) -> Value {
    json!([{ "type": "Ready", "status": "False", "reason": reason, "message": "no", "observedGeneration": 2,
        "lastTransitionTime": "2026-02-01T00:00:00Z" }])
}

fn seen(status: &Value) -> Progress {
    progress(Some(&backup(status)), &asked())
}

fn goes(line: &str) -> Progress {
    Progress::Goes(line.to_owned())
}

#[test]
fn every_step_has_a_line_of_its_own() {
    let volumes = |states: [&str; 3]| [volume(0, states[0]), volume(1, states[1]), volume(2, states[2])];
    let pods = |state| [pod(0, state, None), pod(1, "Thawed", None)];
    for (run, line) in [
        (running(1, "Preflight", &[], &[]), "preflight"),
        (
            running(1, "Frozen", &volumes(["Pending", "Cut", "Ready"]), &pods("Owed")),
            "freezing and cutting: 2/3 volumes cut, 1/2 pods thawed",
        ),
        (
            running(1, "Thawing", &volumes(["Cut", "Cut", "Ready"]), &[pod(0, "Owed", Some("exit code 1"))]),
            "thawing: 3/3 volumes cut, 1/3 ready, 0/1 pods thawed, db-0 failed once: exit code 1",
        ),
        (
            running(2, "Readying", &volumes(["Ready", "Cut", "Ready"]), &pods("Gone")),
            "attempt 2: waiting for the snapshots to be ready: 3/3 volumes cut, 2/3 ready, 2/2 pods thawed",
        ),
    ] {
        assert_eq!(seen(&json!({ "currentRun": run })), goes(line));
    }
}

#[test]
fn a_run_that_is_going_to_fail_says_so() {
    let mut run = running(1, "CleaningUp", &[], &[]);
    run["failure"] = json!({ "reason": "FrozenTooLong", "message": "over 120 s" });
    assert_eq!(
        seen(&json!({ "currentRun": run })),
        goes("cleaning up; the run fails: FrozenTooLong: over 120 s")
    );
}

#[test]
fn a_request_waits_for_the_agent_and_for_another_run() {
    assert_eq!(seen(&json!({})), goes(WAITING));
    let mut other = running(1, "Preflight", &[], &[]);
    other["slot"] = json!({ "due": "Creation", "value": VALUE, "attempt": 1 });
    assert_eq!(
        seen(&json!({ "currentRun": other })),
        goes("waiting for run run-1 to end, which is at: preflight")
    );
}

#[test]
fn what_a_run_waits_for_is_said_in_the_agent_s_words() {
    let waits = |status: &str, reason: &str| {
        json!([{ "type": "Progressing", "status": status, "reason": reason, "message": "waits for it",
            "lastTransitionTime": "2026-02-01T00:00:00Z" }])
    };
    assert_eq!(seen(&json!({ "conditions": waits("False", "Queued") })), goes("waits for it"));
    assert_eq!(seen(&json!({ "conditions": waits("False", "Idle") })), goes(WAITING));
    let starting = json!({ "conditions": waits("True", "WaitingForStatefulSet"), "currentRun": running(1, "Preflight", &[], &[]) });
    assert_eq!(seen(&starting), goes("waits for it"));
}

#[test]
fn an_interrupted_attempt_is_not_the_end_and_the_last_attempt_is() {
    let interrupted = |attempt| record(attempt, "Failed", "Interrupted");
    assert_eq!(
        seen(&json!({ "history": [interrupted(1)] })),
        goes("attempt 1 was interrupted; waiting for the next one")
    );
    assert_eq!(
        seen(&json!({ "history": [interrupted(1)], "currentRun": running(2, "Preflight", &[], &[]) })),
        goes("attempt 2: preflight")
    );
    let last = match seen(&json!({ "history": [record(2, "Completed", "Completed"), interrupted(1)] })) {
        Progress::Over { record, .. } => Some((record.slot.attempt, record.result)),
        Progress::Goes(_)
        | Progress::CannotStart { .. }
        | Progress::Suspended
        | Progress::Replaced { .. }
        | Progress::Deleted => None,
    };
    assert_eq!(last, Some((2, RunResult::Completed)));
    assert!(matches!(seen(&json!({ "history": [interrupted(3)] })), Progress::Over { .. }));
    assert!(matches!(
        seen(&json!({ "history": [interrupted(1)], "conditions": ready_false("StatefulSetNotFound") })),
        Progress::Over { .. }
    ));
}

#[test]
fn a_request_that_cannot_begin_says_why_but_an_old_verdict_of_a_preflight_does_not_count() {
    assert_eq!(
        seen(&json!({ "conditions": ready_false("StatefulSetNotFound") })),
        Progress::CannotStart { reason: "StatefulSetNotFound".to_owned(), message: "no".to_owned() }
    );
    assert!(matches!(
        seen(&json!({ "conditions": ready_false("InvalidSchedule") })),
        Progress::CannotStart { .. }
    ));
    assert_eq!(seen(&json!({ "conditions": ready_false("ClaimMissing") })), goes(WAITING));
    let mut older = ready_false("StatefulSetNotFound");
    older[0]["observedGeneration"] = json!(1);
    assert_eq!(seen(&json!({ "conditions": older })), goes(WAITING));
}

#[test]
fn a_request_that_was_replaced_before_it_began_never_runs() {
    let mut replaced = backup(&json!({}));
    let annotations = replaced.annotations_mut();
    annotations.insert(REQUESTED_AT_ANNOTATION.to_owned(), "later".to_owned());
    assert_eq!(progress(Some(&replaced), &asked()), Progress::Replaced { by: "later".to_owned() });

    replaced.status =
        serde_json::from_value(json!({ "history": [record(1, "Completed", "Completed")] })).unwrap();
    assert!(matches!(progress(Some(&replaced), &asked()), Progress::Over { .. }));
}

#[test]
fn a_backup_that_is_suspended_begins_no_run_and_finishes_the_one_it_has() {
    let suspended = |status: Value| {
        let mut backup = backup(&status);
        backup.spec.suspend = true;
        progress(Some(&backup), &asked())
    };
    assert_eq!(suspended(json!({})), Progress::Suspended);
    assert_eq!(suspended(json!({ "currentRun": running(1, "Preflight", &[], &[]) })), goes("preflight"));
    let interrupted = json!({ "history": [record(1, "Failed", "Interrupted")] });
    assert!(matches!(suspended(interrupted), Progress::Over { .. }));
}

#[test]
fn an_object_that_is_gone_or_made_anew_ends_the_wait() {
    assert_eq!(progress(None, &asked()), Progress::Deleted);
    let mut anew = backup(&json!({}));
    anew.metadata.uid = Some("uid-2".to_owned());
    assert_eq!(progress(Some(&anew), &asked()), Progress::Deleted);
}

#[test]
fn the_point_line_has_what_is_known() {
    let point: RecoveryPoint = serde_json::from_value(json!({
        "id": "run-1", "time": "2026-02-03T02:00:00.000000Z", "complete": true, "readyVolumes": 3,
        "expectedVolumes": 3, "replicas": 3, "consistency": "Application", "sizeBytes": 0,
    }))
    .unwrap();
    let mut record: RunRecord = serde_json::from_value(record(1, "Completed", "Completed")).unwrap();
    assert_eq!(
        point_line(&record, Some(&point)),
        "recovery point run-1: 3/3 volumes, frozen 120 ms, cut skew 35 ms, Application"
    );
    (record.freeze_ms, record.cut_skew_ms) = (None, None);
    assert_eq!(point_line(&record, Some(&point)), "recovery point run-1: 3/3 volumes, Application");
    assert_eq!(point_line(&record, None), "recovery point run-1: 3/3 volumes");
}
