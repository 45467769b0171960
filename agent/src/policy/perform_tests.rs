//! What is asked of the API server at each step, and what its answers mean.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::StatusCode;
use serde_json::{Value, json};
use sts_backup_api::backup::StatefulSetBackupSpec;

use super::*;

/// A request: method and target, and its body.
type Asked = (String, Value);

/// An API server that answers reads and writes each with one status and body.
fn server(read: (u16, Value), write: (u16, Value)) -> (Client, Arc<Mutex<Vec<Asked>>>) {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&asked);
    let answer = move |request: Request| {
        let (seen, read, write) = (Arc::clone(&seen), read.clone(), write.clone());
        async move {
            let (parts, body) = request.into_parts();
            let (status, answer) = if parts.method == "GET" { read } else { write };
            let body = to_bytes(body, usize::MAX).await.unwrap();
            let body = serde_json::from_slice(&body).unwrap_or_default();
            seen.lock().unwrap().push((format!("{} {}", parts.method, parts.uri), body));
            (StatusCode::from_u16(status).unwrap(), Body::from(answer.to_string()))
        }
    };
    (Client::new(Router::new().fallback(answer), "default"), asked)
}

fn refusal(code: u16) -> (u16, Value) {
    let reason = if code == 404 { "NotFound" } else { "Other" };
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": "no",
    });
    (code, status)
}

/// A backup's metadata, which a policy of that uid owns.
fn metadata(owner: &str) -> (u16, Value) {
    let owner =
        json!({ "apiVersion": "backup.sts-backup.io/v1alpha1", "kind": "X", "name": "gold", "uid": owner });
    let metadata = json!({
        "name": "gold-db-1", "namespace": "shop", "resourceVersion": "12", "ownerReferences": [owner],
    });
    (200, json!({ "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": metadata }))
}

fn policy() -> PolicyFacts {
    let object = json!({
        "apiVersion": "backup.sts-backup.io/v1alpha1", "kind": "StatefulSetBackupPolicy",
        "metadata": { "name": "gold", "uid": "7", "resourceVersion": "41" },
        "spec": { "template": { "spec": {} } },
    });
    let object = Arc::new(serde_json::from_value(object).unwrap());
    PolicyFacts { name: "gold".to_owned(), uid: "7".to_owned(), deleting: false, object }
}

fn wanted() -> Wanted {
    Wanted {
        key: ("shop".to_owned(), "gold-db-1".to_owned()),
        labels: [("team".to_owned(), "dba".to_owned())].into(),
        spec: StatefulSetBackupSpec::new("db"),
        hash: "cafe".to_owned(),
    }
}

const PATH: &str = "/apis/backup.sts-backup.io/v1alpha1/namespaces/shop/statefulsetbackups/gold-db-1?";

#[tokio::test]
async fn a_backup_that_does_not_exist_is_applied_but_not_by_force() {
    let (client, asked) = server(refusal(404), metadata("7"));
    let done = perform(&client, &policy(), &Step::Create(wanted())).await.unwrap();
    assert_eq!(done, Outcome::Done);
    let asked = asked.lock().unwrap().clone();
    let [(get, _), (patch, body)] = &asked[..] else { unreachable!("{asked:?}") };
    assert_eq!(get.trim_end_matches(['?', '&']), format!("GET {PATH}").trim_end_matches('?'));
    assert!(patch.starts_with(&format!("PATCH {PATH}")), "{patch}");
    assert!(patch.contains("fieldManager=sts-backup-agent") && !patch.contains("force=true"), "{patch}");
    assert_eq!(body["metadata"].get("uid"), None);
    assert_eq!(body["metadata"]["ownerReferences"][0]["uid"], "7");
    assert_eq!(body["metadata"]["annotations"], json!({ TEMPLATE_HASH_ANNOTATION: "cafe" }));
    assert_eq!(body["spec"]["statefulSetRef"], json!({ "name": "db" }));
    assert_eq!(body["spec"].get("suspend"), None, "people may suspend it");
}

#[tokio::test]
async fn a_name_that_is_taken_meanwhile_is_left_alone() {
    let mut going = metadata("7");
    going.1["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    for (found, expected) in
        [(metadata("7"), Outcome::Unchanged), (metadata("8"), Outcome::Outdated), (going, Outcome::Outdated)]
    {
        let (client, asked) = server(found, refusal(500));
        assert_eq!(perform(&client, &policy(), &Step::Create(wanted())).await.unwrap(), expected);
        assert_eq!(asked.lock().unwrap().len(), 1, "it was only looked at");
    }
    let (client, _) = server(refusal(404), refusal(409));
    assert_eq!(perform(&client, &policy(), &Step::Create(wanted())).await.unwrap(), Outcome::Outdated);
}

#[tokio::test]
async fn an_update_is_of_one_object_and_by_force() {
    let of_version = |version: &str| Step::Update {
        wanted: wanted(),
        uid: "42".to_owned(),
        version: Some(version.to_owned()),
    };
    let step = of_version("11");
    let (client, asked) = server(refusal(500), metadata("7"));
    assert_eq!(perform(&client, &policy(), &step).await.unwrap(), Outcome::Done);
    let asked = asked.lock().unwrap().clone();
    let [(patch, body)] = &asked[..] else { unreachable!("{asked:?}") };
    assert!(patch.starts_with(&format!("PATCH {PATH}")) && patch.contains("force=true"), "{patch}");
    assert_eq!(body["metadata"]["uid"], "42");

    let (client, _) = server(refusal(500), metadata("7"));
    assert_eq!(perform(&client, &policy(), &of_version("12")).await.unwrap(), Outcome::Unchanged);
    let (client, _) = server(refusal(500), refusal(409));
    assert_eq!(perform(&client, &policy(), &step).await.unwrap(), Outcome::Outdated);
    let (client, _) = server(refusal(500), refusal(422));
    assert!(perform(&client, &policy(), &step).await.is_err());
}

#[tokio::test]
async fn a_deletion_is_of_one_object() {
    let step = Step::Delete { key: wanted().key, uid: "42".to_owned(), version: Some("11".to_owned()) };
    let (client, asked) =
        server(refusal(500), (200, json!({ "kind": "Status", "apiVersion": "v1", "status": "Success" })));
    assert_eq!(perform(&client, &policy(), &step).await.unwrap(), Outcome::Done);
    let asked = asked.lock().unwrap().clone();
    let [(delete, body)] = &asked[..] else { unreachable!("{asked:?}") };
    assert!(delete.starts_with("DELETE "), "{delete}");
    assert_eq!(body["preconditions"], json!({ "uid": "42", "resourceVersion": "11" }));

    for code in [404, 409] {
        let (client, _) = server(refusal(500), refusal(code));
        assert_eq!(perform(&client, &policy(), &step).await.unwrap(), Outcome::Outdated, "{code}");
    }
    let (client, _) = server(refusal(500), refusal(403));
    assert!(perform(&client, &policy(), &step).await.is_err());
}

#[tokio::test]
async fn a_status_is_written_on_the_version_it_was_decided_on() {
    let policy = policy();
    let status = StatefulSetBackupPolicyStatus { matched: 3, ..Default::default() };
    let (client, asked) = server(refusal(500), (200, json!(*policy.object)));
    assert_eq!(write_status(&client, &policy.object, &status).await.unwrap(), Outcome::Done);
    let asked = asked.lock().unwrap().clone();
    let [(patch, body)] = &asked[..] else { unreachable!("{asked:?}") };
    assert!(patch.contains("/statefulsetbackuppolicies/gold/status?"), "{patch}");
    assert_eq!(body[0]["value"], "41");
    assert_eq!((&body[1]["path"], &body[1]["value"]["matched"]), (&json!("/status"), &json!(3)));

    for (code, is_outdated) in [(409, true), (404, true), (403, false)] {
        let (client, _) = server(refusal(500), refusal(code));
        let written = write_status(&client, &policy.object, &status).await;
        assert_eq!(matches!(written, Ok(Outcome::Outdated)), is_outdated, "{code}");
    }
}
