use std::cell::RefCell;

use kube::runtime::watcher;
use serde_json::Value;

use super::*;
use crate::plugin::watch::WAITING;

const VALUE: &str = "2026-02-03T02:00:00.000000001Z";

fn state(status: &Value) -> DynamicObject {
    serde_json::from_value(json!({
        "metadata": {
            "name": "nightly", "namespace": "shop", "uid": "uid-1",
            "annotations": { REQUESTED_AT_ANNOTATION: VALUE },
        },
        "spec": { "statefulSetRef": { "name": "db" } },
        "status": status,
    }))
    .unwrap()
}

fn slot() -> Value {
    json!({ "due": "Request", "value": VALUE, "attempt": 1 })
}

fn record(result: &str, reason: &str) -> Value {
    json!({
        "id": "run-1", "slot": slot(), "started": "2026-02-03T02:00:01.000000Z", "durationMs": 2100,
        "result": result, "reason": reason, "message": "it said so",
    })
}

fn code(verdict: Result<Exit, Error>) -> u8 {
    verdict.unwrap_or_else(|err| err.exit()).code()
}

/// What was said until the end, and the end.
async fn followed(
    states: Vec<watcher::Result<Option<DynamicObject>>>,
) -> (Vec<String>, Result<Progress, Error>) {
    let said = RefCell::new(Vec::new());
    let say = |line: &str| {
        said.borrow_mut().push(line.to_owned());
        Ok(())
    };
    let asked = Asked::new("uid-1", VALUE);
    let look = |object: Option<&DynamicObject>| look(object, &asked);
    let end = follow(futures::stream::iter(states), "StatefulSetBackup", look, say).await;
    (said.into_inner(), end)
}

#[test]
fn a_request_is_the_time_to_the_nanosecond() {
    let value = request_value("2026-02-03T02:00:00.5Z".parse().unwrap());
    assert_eq!(value, "2026-02-03T02:00:00.500000000Z");
    assert_eq!(
        request_patch(&value),
        json!({ "metadata": { "annotations": { "backup.sts-backup.io/requested-at": value } } })
    );
}

#[tokio::test]
async fn a_line_is_said_once_and_the_end_ends_it() {
    let preflight = json!({ "currentRun": {
        "id": "run-1", "slot": slot(), "started": "2026-02-03T02:00:01.000000Z", "step": "Preflight",
    }});
    let (said, end) = followed(vec![
        Ok(Some(state(&json!({})))),
        Ok(Some(state(&preflight))),
        Ok(Some(state(&preflight))),
        Err(watcher::Error::NoResourceVersion),
        Ok(Some(state(&json!({ "history": [record("Completed", "Completed")] })))),
    ])
    .await;
    assert_eq!(said, [WAITING, "preflight"]);
    let (record, point) = conclude(end.unwrap(), "shop", "nightly").unwrap();
    assert_eq!((record.id.as_str(), point), ("run-1", None));
    assert_eq!(code(verdict(&record, "shop", "nightly")), 0);
}

#[tokio::test]
async fn a_right_that_is_missing_ends_the_wait() {
    let status = kube::core::Status::failure("no watch for you", "Forbidden").with_code(403).boxed();
    let (_, end) = followed(vec![Err(watcher::Error::WatchStartFailed(kube::Error::Api(status)))]).await;
    assert!(end.unwrap_err().to_text().contains("no watch for you"));
}

#[test]
fn results_have_their_exit_codes_and_words() {
    let verdict = |result, reason| {
        let record: RunRecord = serde_json::from_value(record(result, reason)).unwrap();
        verdict(&record, "shop", "nightly")
    };
    assert_eq!(code(verdict("PartiallyFailed", "ClaimsLeftOut")), 3);
    let failed = verdict("Failed", "Interrupted").unwrap_err();
    assert_eq!(failed.exit().code(), 1);
    assert_eq!(
        failed.to_text(),
        "error: run run-1 failed: Interrupted: it said so\n  \
         to do: ask again: kubectl stsbackup run nightly -n shop --wait"
    );
}

#[test]
fn a_run_that_never_comes_is_a_failure_with_its_reason() {
    let replaced = conclude(Progress::Replaced { by: "later".to_owned() }, "shop", "nightly").unwrap_err();
    assert_eq!(replaced.exit().code(), 1);
    assert!(
        replaced.to_text().contains("another run (later) before this one began"),
        "{}",
        replaced.to_text()
    );
    let suspended = conclude(Progress::Suspended, "shop", "nightly").unwrap_err();
    assert_eq!(suspended.exit().code(), 1);
    assert_eq!(
        suspended.to_text(),
        "error: StatefulSetBackup shop/nightly was suspended before this run began, so it will not\n  \
         to do: kubectl stsbackup resume nightly -n shop, then ask again"
    );
    let deleted = conclude(Progress::Deleted, "shop", "nightly").unwrap_err();
    assert_eq!(deleted.to_text(), "error: StatefulSetBackup shop/nightly was deleted");
}
