//! An API server for tests, which knows one lease and its own version, and fails on demand.

use std::future::pending;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use kube::Client;
use serde_json::json;
use tokio::time::sleep;

/// What requests come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// They work.
    None,
    /// They are refused with this code.
    Status(u16),
    /// Nothing happens, and no answer comes.
    Hang,
    /// They work, but the answer to those that write never comes.
    LoseAnswer,
    /// They work at once, but their answer takes a second.
    Slow,
}

struct Stored {
    lease: Option<Lease>,
    version: u64,
    fault: Fault,
}

/// A handle: clones are the same API server.
#[derive(Clone)]
pub(crate) struct FakeApi {
    stored: Arc<Mutex<Stored>>,
}

impl FakeApi {
    pub(crate) fn new() -> Self {
        Self { stored: Arc::new(Mutex::new(Stored { lease: None, version: 1, fault: Fault::None })) }
    }

    /// A client of its own: connections are not shared.
    pub(crate) fn client(&self) -> Client {
        Client::new(Router::new().fallback(answer).with_state(self.clone()), "default")
    }

    pub(crate) fn fails(&self, fault: Fault) {
        self.stored.lock().unwrap().fault = fault;
    }

    /// The lease's spec; empty if there is no lease.
    pub(crate) fn spec(&self) -> LeaseSpec {
        self.stored.lock().unwrap().lease.clone().and_then(|lease| lease.spec).unwrap_or_default()
    }

    pub(crate) fn holder(&self) -> String {
        self.spec().holder_identity.unwrap_or_default()
    }

    /// Somebody else's write.
    pub(crate) fn edit(&self, edit: impl FnOnce(&mut Lease)) {
        let mut stored = self.stored.lock().unwrap();
        let mut lease = stored.lease.take().unwrap_or_default();
        edit(&mut lease);
        stored.store(lease);
    }

    pub(crate) fn delete(&self) {
        self.stored.lock().unwrap().lease = None;
    }

    fn obey(&self, method: &Method, path: &str, body: &[u8]) -> Response {
        let mut stored = self.stored.lock().unwrap();
        if let Fault::Status(code) = stored.fault {
            return status(code, "Ordered");
        }
        if path == "/version" {
            let version = json!({ "gitVersion": "v1.36.0", "buildDate": "", "compiler": "", "gitCommit": "",
                "gitTreeState": "", "goVersion": "", "major": "1", "minor": "36", "platform": "" });
            return version.to_string().into_response();
        }
        let sent = || serde_json::from_slice::<Lease>(body).expect("a lease");
        match (method.as_str(), stored.lease.clone()) {
            ("GET", Some(lease)) => encode(&lease),
            ("GET" | "PUT", None) => status(404, "NotFound"),
            ("POST", Some(_)) => status(409, "AlreadyExists"),
            ("POST", None) => stored.store(sent()),
            ("PUT", Some(lease)) => {
                let sent = sent();
                let version = sent.metadata.resource_version.as_ref();
                assert!(version.is_some(), "every write names the version that it replaces");
                if version == lease.metadata.resource_version.as_ref() {
                    stored.store(sent)
                } else {
                    status(409, "Conflict")
                }
            }
            (method, _) => unreachable!("nobody sends {method}"),
        }
    }
}

impl Stored {
    fn store(&mut self, mut lease: Lease) -> Response {
        self.version += 1;
        lease.metadata.resource_version = Some(self.version.to_string());
        let answer = encode(&lease);
        self.lease = Some(lease);
        answer
    }
}

async fn answer(State(api): State<FakeApi>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let body = to_bytes(body, usize::MAX).await.expect("a body in memory");
    let fault = api.stored.lock().unwrap().fault;
    if fault == Fault::Hang {
        pending::<()>().await;
    }
    let answer = api.obey(&head.method, head.uri.path(), &body);
    if fault == Fault::LoseAnswer && head.method != Method::GET {
        pending::<()>().await;
    }
    if fault == Fault::Slow {
        sleep(Duration::from_secs(1)).await;
    }
    answer
}

fn encode(lease: &Lease) -> Response {
    Body::from(serde_json::to_vec(lease).expect("a lease is JSON")).into_response()
}

fn status(code: u16, reason: &str) -> Response {
    let body = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason,
        "message": reason, "code": code });
    (StatusCode::from_u16(code).expect("an HTTP status"), body.to_string()).into_response()
}
