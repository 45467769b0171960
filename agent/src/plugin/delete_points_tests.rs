use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::StatusCode;
use kube::Client;
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
        question(&owned, &chosen, "context prod, https://10.0.0.1:6443/"),
        "Delete 2 recovery points (4 VolumeSnapshots) of shop/nightly in the cluster of context prod, \
         https://10.0.0.1:6443/?"
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
fn a_snapshot_goes_only_as_it_was_seen() {
    let mut snapshot = owned(&["r1"]).snapshots.remove(0);
    snapshot.metadata.uid = Some("uid".to_owned());
    snapshot.metadata.resource_version = Some("4711".to_owned());
    assert_eq!(
        serde_json::to_value(as_seen(&snapshot)).unwrap(),
        json!({ "preconditions": { "uid": "uid", "resourceVersion": "4711" } })
    );
    assert!(still_to_delete(snapshot.clone(), "it").is_ok());
    snapshot.labels_mut().insert(HOLD_LABEL.to_owned(), "true".to_owned());
    assert_eq!(
        still_to_delete(snapshot, "it").unwrap_err().brief(),
        "delete it: it was put on hold meanwhile"
    );
}

/// A cluster whose lists are what `lists` says, the last one for ever, and that answers deletions with these codes; and
/// what it was asked.
fn cluster(lists: Vec<Owned>, deletions: Vec<u16>) -> (Cluster, Arc<Mutex<Vec<String>>>) {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (seen, state) = (Arc::clone(&asked), Arc::new(Mutex::new((lists, deletions))));
    let answer = move |request: Request| {
        let (path, method) = (request.uri().path().to_owned(), request.method().to_string());
        let name = path.rsplit('/').next().unwrap_or_default().to_owned();
        let mut state = state.lock().unwrap();
        let (lists, deletions) = &mut *state;
        let (code, body) = match (method.as_str(), name.as_str()) {
            ("DELETE", _) => {
                let code = deletions.remove(0);
                let reason = if code == 409 { "Conflict" } else { "Forbidden" };
                let status = if code == 200 { "Success" } else { "Failure" };
                let refused = json!({
                    "kind": "Status", "apiVersion": "v1", "status": status, "code": code, "reason": reason, "message": "no",
                });
                (code, refused)
            }
            (_, "volumesnapshots") => {
                let owned = if lists.len() > 1 { lists.remove(0) } else { lists[0].clone() };
                (200, json!({ "metadata": {}, "items": owned.snapshots }))
            }
            _ => {
                let mut backup = json!(lists[0].backup);
                backup["apiVersion"] = json!("backup.sts-backup.io/v1alpha1");
                backup["kind"] = json!("StatefulSetBackup");
                (200, backup)
            }
        };
        seen.lock().unwrap().push(format!("{method} {name}"));
        let answer = (StatusCode::from_u16(code).unwrap(), Body::from(Value::to_string(&body)));
        async move { answer }
    };
    (Cluster::of(Client::new(Router::new().fallback(answer), "default"), "shop"), asked)
}

const READ: [&str; 2] = ["GET nightly", "GET volumesnapshots"];

#[tokio::test]
async fn a_point_is_read_again_and_the_others_go_only_after_the_first() {
    let (cluster, asked) = cluster(vec![owned(&["r2", "r1"])], vec![409, 200, 200]);
    let id = RunId::from("r1".to_owned());
    assert_eq!(delete_point(&cluster, &which(&["r1"]), &id).await, Ok(2));
    let (first, other) = ("DELETE data-db-0-r1", "DELETE data-db-1-r1");
    let expected = [&READ[..], &[first], &READ[..], &[first, other]].concat();
    assert_eq!(*asked.lock().unwrap(), expected);
}

#[tokio::test]
async fn a_point_whose_first_snapshot_cannot_be_deleted_stays_whole() {
    let (cluster, asked) = cluster(vec![owned(&["r2", "r1"])], vec![403]);
    let id = RunId::from("r1".to_owned());
    let refused = delete_point(&cluster, &which(&["r1"]), &id).await.unwrap_err();
    assert!(refused.contains("delete VolumeSnapshot shop/data-db-0-r1: you may not"), "{refused}");
    assert_eq!(*asked.lock().unwrap(), [&READ[..], &["DELETE data-db-0-r1"]].concat());
}

#[tokio::test]
async fn a_point_one_of_whose_snapshots_was_held_meanwhile_stays_whole() {
    let mut held = owned(&["r2", "r1"]);
    held.snapshots[3].labels_mut().insert(HOLD_LABEL.to_owned(), "true".to_owned());
    // The first one has changed as well, which is how the other one comes to be seen.
    let (cluster, asked) = cluster(vec![owned(&["r2", "r1"]), held], vec![409]);
    let id = RunId::from("r1".to_owned());
    let refused = delete_point(&cluster, &which(&["r1"]), &id).await.unwrap_err();
    assert!(refused.starts_with("r1 is on hold"), "{refused}");
    assert_eq!(*asked.lock().unwrap(), [&READ[..], &["DELETE data-db-0-r1"], &READ[..]].concat());
}
