use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::StatusCode;
use serde_json::{Value, json};
use sts_backup_api::names::HOLD_LABEL;
use sts_backup_api::snapshot::SOURCE_PROTECTION_FINALIZER;

use super::*;
use crate::plugin::owned::owned;

fn which(points: &[&str]) -> DeletePoints {
    DeletePoints {
        name: "nightly".to_owned(),
        points: points.iter().map(ToString::to_string).collect(),
        yes: true,
        force: false,
    }
}

fn refusal(owned: &Owned, points: &[&str]) -> String {
    chosen(owned, &which(points)).map_or_else(|err| err.brief(), |_| "deleted".to_owned())
}

#[test]
fn a_point_that_nobody_needs_goes_and_naming_it_twice_is_naming_it_once() {
    let owned = owned(&["r3", "r2", "r1"]);
    let chosen = chosen(&owned, &which(&["r1", "r2", "r1"])).unwrap();
    assert_eq!(chosen.iter().map(|point| point.id.as_str()).collect::<Vec<_>>(), ["r1", "r2"]);
    assert_eq!(
        question(&owned, &chosen),
        "Delete 2 recovery points (4 VolumeSnapshots) of shop/nightly? [y/N]"
    );
}

#[test]
fn one_wrong_name_deletes_nothing() {
    let refused = chosen(&owned(&["r2", "r1"]), &which(&["r1", "r9"])).unwrap_err();
    assert_eq!(refused.exit(), Exit::Usage);
    assert_eq!(refused.brief(), "StatefulSetBackup shop/nightly has no recovery point r9");
}

#[test]
fn what_somebody_wants_is_refused_even_by_force() {
    let mut owned = owned(&["r4", "r3", "r2", "r1"]);
    owned.snapshots[3].labels_mut().insert(HOLD_LABEL.to_owned(), "true".to_owned());
    owned.snapshots[4].finalizers_mut().push(SOURCE_PROTECTION_FINALIZER.to_owned());
    owned.backup.as_mut().unwrap().status.as_mut().unwrap().current_run = serde_json::from_value(json!({
        "id": "r4", "slot": { "due": "Request", "value": "x", "attempt": 1 }, "step": "Readying",
        "started": "2026-02-28T01:59:00.000000Z",
    }))
    .unwrap();
    for force in [false, true] {
        let refused = chosen(&owned, &DeletePoints { force, ..which(&["r2", "r3", "r4"]) }).unwrap_err();
        assert_eq!(
            refused.brief(),
            "nothing was deleted: a volume is being made from r2: wait until it is bound; \
             r3 is on hold: kubectl stsbackup release nightly r3 -n shop; \
             r4 is the run under way: wait for its end"
        );
    }
    assert_eq!(refusal(&owned, &["r1"]), "deleted");
}

#[test]
fn the_last_complete_point_goes_only_by_force() {
    let mut owned = owned(&["r3", "r2", "r1"]);
    owned.snapshots[0].status.as_mut().unwrap().ready_to_use = Some(false);
    let last = "nothing was deleted: r2 is the last complete recovery point: --force deletes it all the same";
    assert_eq!(refusal(&owned, &["r2"]), "deleted");
    assert_eq!(refusal(&owned, &["r2", "r1"]), last);
    assert_eq!(refusal(&owned, &["r3"]), "deleted");
    assert!(chosen(&owned, &DeletePoints { force: true, ..which(&["r2", "r1"]) }).is_ok());
    // The one that the run under way makes does not count yet.
    owned.snapshots[0].status.as_mut().unwrap().ready_to_use = Some(true);
    assert_eq!(refusal(&owned, &["r2", "r1"]), "deleted");
    owned.backup.as_mut().unwrap().status.as_mut().unwrap().current_run = serde_json::from_value(json!({
        "id": "r3", "slot": { "due": "Request", "value": "x", "attempt": 1 }, "step": "Readying",
        "started": "2026-02-28T01:59:00.000000Z",
    }))
    .unwrap();
    assert_eq!(refusal(&owned, &["r2", "r1"]), last);
}

#[test]
fn incomplete_points_go_also_when_none_is_complete() {
    let mut owned = owned(&["r1"]);
    owned.snapshots.remove(0);
    assert_eq!(refusal(&owned, &["r1"]), "deleted");
}

#[test]
fn only_a_yes_is_a_yes() {
    for (answer, yes) in [
        ("y\n", true),
        ("Yes\r\n", true),
        (" y ", true),
        ("\n", false),
        ("", false),
        ("no\n", false),
        ("yo", false),
    ] {
        assert_eq!(is_yes(answer), yes, "{answer:?}");
    }
}

/// A cluster whose API server gives these answers one after the other, and what it was asked: method and body.
fn answering(answers: Vec<(u16, Value)>) -> (Cluster, Arc<Mutex<Vec<(String, Value)>>>) {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let answers = Arc::new(Mutex::new(VecDeque::from(answers)));
    let seen = Arc::clone(&asked);
    let answer = move |request: Request| {
        let (seen, answers) = (Arc::clone(&seen), Arc::clone(&answers));
        async move {
            let (parts, body) = request.into_parts();
            let body = to_bytes(body, usize::MAX).await.unwrap();
            let body = serde_json::from_slice(&body).unwrap_or_default();
            seen.lock().unwrap().push((parts.method.to_string(), body));
            let (status, answer) = answers.lock().unwrap().pop_front().unwrap();
            (StatusCode::from_u16(status).unwrap(), Body::from(answer.to_string()))
        }
    };
    let client = kube::Client::new(Router::new().fallback(answer), "default");
    (Cluster::of(client), asked)
}

fn refused(code: u16) -> (u16, Value) {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": "", "message": "no",
    });
    (code, status)
}

/// A snapshot as an API server has it.
fn seen(version: &str) -> VolumeSnapshot {
    let mut snapshot = owned(&["r1"]).snapshots.remove(0);
    snapshot.metadata.uid = Some("uid".to_owned());
    snapshot.metadata.resource_version = Some(version.to_owned());
    snapshot
}

fn found(snapshot: &VolumeSnapshot) -> (u16, Value) {
    (200, serde_json::to_value(snapshot).unwrap())
}

fn deletes(version: &str) -> (String, Value) {
    let preconditions = json!({ "uid": "uid", "resourceVersion": version });
    ("DELETE".to_owned(), json!({ "preconditions": preconditions }))
}

#[tokio::test]
async fn a_snapshot_that_changed_is_looked_at_again_and_deleted_as_it_is_then() {
    let (cluster, asked) = answering(vec![refused(409), found(&seen("2")), found(&seen("2"))]);
    delete(&cluster, &seen("1")).await.unwrap();
    assert_eq!(*asked.lock().unwrap(), [deletes("1"), ("GET".to_owned(), json!(null)), deletes("2")]);
}

#[tokio::test]
async fn a_snapshot_that_somebody_wants_meanwhile_stays() {
    let mut held = seen("2");
    held.labels_mut().insert(HOLD_LABEL.to_owned(), "true".to_owned());
    let mut used = seen("2");
    used.finalizers_mut().push(SOURCE_PROTECTION_FINALIZER.to_owned());
    for (now, why) in [(held, "it was put on hold meanwhile"), (used, "a volume is being made from it")] {
        let (cluster, asked) = answering(vec![refused(409), found(&now)]);
        let refused = delete(&cluster, &seen("1")).await.unwrap_err();
        assert_eq!(refused.brief(), format!("delete VolumeSnapshot shop/data-db-0-r1: {why}"));
        assert_eq!(asked.lock().unwrap().len(), 2);
    }
}

#[tokio::test]
async fn a_snapshot_that_is_gone_or_another_one_is_done_with() {
    let mut another = seen("2");
    another.metadata.uid = Some("another".to_owned());
    for answers in [vec![refused(404)], vec![refused(409), refused(404)], vec![refused(409), found(&another)]]
    {
        delete(&answering(answers).0, &seen("1")).await.unwrap();
    }
}

#[tokio::test]
async fn a_right_that_is_missing_is_told_and_nothing_is_tried_again() {
    let (cluster, asked) = answering(vec![refused(403)]);
    let refused = delete(&cluster, &seen("1")).await.unwrap_err();
    assert_eq!(refused.brief(), "delete VolumeSnapshot shop/data-db-0-r1: you may not: no");
    assert_eq!(asked.lock().unwrap().len(), 1);
}
