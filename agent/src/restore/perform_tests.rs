//! What is asked of the API server for each write, and what its answers mean.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::StatusCode;
use serde_json::{Value, json};

use super::*;

/// A request: method and target, and its body.
type Asked = (String, Value);

/// An API server that answers all that is asked with one status and body.
fn server(status: u16, answer: Value) -> (Client, Arc<Mutex<Vec<Asked>>>) {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&asked);
    let answer = move |request: Request| {
        let (seen, answer) = (Arc::clone(&seen), answer.clone());
        async move {
            let (parts, body) = request.into_parts();
            let body = to_bytes(body, usize::MAX).await.unwrap();
            let body = serde_json::from_slice(&body).unwrap_or_default();
            seen.lock().unwrap().push((format!("{} {}", parts.method, parts.uri), body));
            (StatusCode::from_u16(status).unwrap(), Body::from(answer.to_string()))
        }
    };
    (Client::new(Router::new().fallback(answer), "default"), asked)
}

fn refusal(code: u16, reason: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
        "message": "exceeded quota: small",
    })
}

const TARGET: Target<'static> = Target { namespace: "shop", set: "db" };

fn creation() -> Write {
    let claim = json!({ "metadata": { "name": "data-db-0" }, "spec": {} });
    Write::CreateClaim(Box::new(serde_json::from_value(claim).unwrap()))
}

#[tokio::test]
async fn staged_claims_are_tried_before_any_is_made() {
    let (client, asked) = server(403, refusal(403, "Forbidden"));
    let done = perform(&client, TARGET, Work::Stage, &[creation(), creation()]).await.unwrap();
    assert_eq!(done, Performed::Refused("exceeded quota: small".to_owned()));
    let asked = asked.lock().unwrap();
    assert_eq!(asked.len(), 2, "{asked:?}");
    assert!(asked.iter().all(|(target, _)| target.contains("dryRun=All")), "{asked:?}");
}

#[tokio::test]
async fn a_claim_that_exists_is_judged_by_the_next_look() {
    let (client, _) = server(409, refusal(409, "AlreadyExists"));
    assert_eq!(perform(&client, TARGET, Work::CreateClaims, &[creation()]).await.unwrap(), Performed::Done);
    let (client, _) = server(409, refusal(409, "Conflict"));
    let err = perform(&client, TARGET, Work::CreateClaims, &[creation()]).await.unwrap_err();
    assert!(err.is_conflict());
}

#[tokio::test]
async fn deletions_name_the_object_and_what_is_gone_is_done() {
    let (client, asked) = server(404, refusal(404, "NotFound"));
    let write = |name: &str| Write::DeleteClaim { name: name.to_owned(), uid: "7".to_owned() };
    let done = perform(&client, TARGET, Work::DeleteClaims, &[write("data-db-0"), write("data-db-1")]).await;
    assert_eq!(done.unwrap(), Performed::Done);
    let mut asked = asked.lock().unwrap().clone();
    asked.sort_by(|one, other| one.0.cmp(&other.0));
    let (target, body) = &asked[0];
    assert!(
        target.starts_with("DELETE /api/v1/namespaces/shop/persistentvolumeclaims/data-db-0"),
        "{target}"
    );
    assert_eq!(body["preconditions"]["uid"], "7");
    assert_eq!(asked.len(), 2);
}

#[tokio::test]
async fn a_scale_is_asked_of_the_subresource_and_of_that_object_only() {
    let (client, asked) = server(409, refusal(409, "Conflict"));
    let write = Write::Scale { uid: "7".to_owned(), resource_version: Some("12".to_owned()), replicas: 0 };
    let err = perform(&client, TARGET, Work::ScaleDown, &[write]).await.unwrap_err();
    assert!(err.is_conflict());
    let (target, body) = asked.lock().unwrap()[0].clone();
    assert!(target.starts_with("PATCH /apis/apps/v1/namespaces/shop/statefulsets/db/scale"), "{target}");
    assert_eq!(
        body,
        json!({ "metadata": { "uid": "7", "resourceVersion": "12" }, "spec": { "replicas": 0 } })
    );
}

#[test]
fn a_volume_is_reserved_for_a_name_and_never_open_to_anybody() {
    let arm = VolumeChange::Arm { namespace: "shop".to_owned(), claim: "data-db-0".to_owned() };
    let patch = volume_patch("7", Some("12"), &arm);
    let reference = &patch["spec"]["claimRef"];
    assert_eq!((&reference["namespace"], &reference["name"]), (&json!("shop"), &json!("data-db-0")));
    // Null takes them away; what is absent would stay.
    let removed = |key: &str| reference.get(key) == Some(&Value::Null);
    assert!(removed("uid") && removed("resourceVersion"), "{patch}");
    assert_eq!(patch["metadata"], json!({ "uid": "7", "resourceVersion": "12" }));
    let disarm = volume_patch("7", Some("12"), &VolumeChange::Disarm);
    assert_eq!(disarm["spec"]["claimRef"]["uid"], NO_CLAIM);
}
