//! An HTTP proxy before a cluster's API server that a test makes fail: plain HTTP toward the agent, the
//! administrator's TLS toward the API server. Watches and web sockets (exec) pass through.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use hyper_util::rt::TokioIo;
use kube::{Client, Config};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::Cluster;
use crate::kubeconfig::config;

/// Decides a request: `Some(status)` is answered without asking the API server.
type Rule = dyn Fn(&Method, &Uri) -> Option<u16> + Send + Sync;

/// The rules in force; the first that has an answer counts.
#[derive(Clone, Default)]
struct Faults(Arc<Mutex<Vec<Arc<Ordered>>>>);

struct Ordered {
    rule: Box<Rule>,
    hits: watch::Sender<u64>,
    /// The fault has ended.
    over: watch::Sender<bool>,
}

/// What a [`hold`](ApiProxy::hold) orders in place of a status.
const HOLD: u16 = 0;

impl Faults {
    fn rules(&self) -> MutexGuard<'_, Vec<Arc<Ordered>>> {
        // A rule of a test may panic; the list is whole all the same.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, method: &Method, uri: &Uri) -> Option<(u16, Arc<Ordered>)> {
        let rules = self.rules().clone();
        rules.iter().find_map(|ordered| {
            let status = (ordered.rule)(method, uri)?;
            ordered.hits.send_modify(|hits| *hits += 1);
            Some((status, Arc::clone(ordered)))
        })
    }
}

/// A running proxy; it ends when it is dropped.
pub struct ApiProxy {
    kubeconfig: PathBuf,
    faults: Faults,
    server: JoinHandle<()>,
}

impl ApiProxy {
    /// Starts a proxy that passes everything on.
    ///
    /// # Errors
    /// When there is no port for it, or its kubeconfig cannot be written.
    pub async fn start(cluster: &Cluster) -> Result<Self> {
        let mut upstream: Config = config(cluster.kubeconfig()).await?;
        // Each request is passed on once: to try again is up to the agent.
        upstream.default_retry = false;
        let upstream = Client::try_from(upstream).context("make the proxy's client")?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("listen")?;
        let address = listener.local_addr()?;
        let faults = Faults::default();
        let router = Router::new().fallback(answer).with_state((upstream, faults.clone()));
        let server = tokio::spawn(async move {
            if let Err(err) = axum::serve(listener, router).await {
                eprintln!("the proxy before the API server ended: {err}");
            }
        });

        let kubeconfig = cluster.dir()?.join(format!("proxy-{}.kubeconfig", address.port()));
        // JSON is YAML.
        let text = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "proxy", "cluster": { "server": format!("http://{address}") } }],
            "users": [{ "name": "proxy", "user": {} }],
            "contexts": [{ "name": "proxy", "context": { "cluster": "proxy", "user": "proxy" } }],
            "current-context": "proxy",
        });
        std::fs::write(&kubeconfig, text.to_string())
            .with_context(|| format!("write {}", kubeconfig.display()))?;
        Ok(Self { kubeconfig, faults, server })
    }

    /// The kubeconfig of the cluster by way of the proxy.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Puts a rule in force until the returned fault is dropped: requests for which it names a status are answered
    /// with that by the proxy, and never reach the API server. 429 comes with `Retry-After: 1`.
    pub fn fail(&self, rule: impl Fn(&Method, &Uri) -> Option<u16> + Send + Sync + 'static) -> Fault {
        let (rule, hits, over) = (Box::new(rule), watch::Sender::new(0), watch::Sender::new(false));
        let ordered = Arc::new(Ordered { rule, hits, over });
        self.faults.rules().push(Arc::clone(&ordered));
        Fault { faults: self.faults.clone(), ordered }
    }

    /// Holds up the requests that a rule names until the returned fault is dropped; then they reach the API server,
    /// also those whose client has given up on them meanwhile, as it goes with an API server that is slow.
    pub fn hold(&self, rule: impl Fn(&Method, &Uri) -> bool + Send + Sync + 'static) -> Fault {
        self.fail(move |method, uri| rule(method, uri).then_some(HOLD))
    }

    /// Counts requests as [`Fault::hits`], and passes them on.
    pub fn count(&self, rule: impl Fn(&Method, &Uri) -> bool + Send + Sync + 'static) -> Count {
        let hits = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&hits);
        let fault = self.fail(move |method, uri| {
            counted.fetch_add(u64::from(rule(method, uri)), Ordering::SeqCst);
            None
        });
        Count { hits, _fault: fault }
    }
}

impl Drop for ApiProxy {
    fn drop(&mut self) {
        self.server.abort();
        // What is left goes with the cluster.
        let _ = std::fs::remove_file(&self.kubeconfig);
    }
}

/// A rule in force; dropping it heals the API server.
#[must_use = "the fault ends when this is dropped"]
pub struct Fault {
    faults: Faults,
    ordered: Arc<Ordered>,
}

impl Fault {
    /// How many requests it has failed.
    #[must_use]
    pub fn hits(&self) -> u64 {
        *self.ordered.hits.borrow()
    }

    /// Waits until it has failed that many requests. The test's own deadline ends the wait.
    pub async fn await_hits(&self, wanted: u64) {
        // The sender lives as long as `self`.
        let _ = self.ordered.hits.subscribe().wait_for(|hits| *hits >= wanted).await;
    }
}

/// Requests that are counted.
pub struct Count {
    hits: Arc<AtomicU64>,
    _fault: Fault,
}

impl Count {
    /// How many there were.
    #[must_use]
    pub fn hits(&self) -> u64 {
        self.hits.load(Ordering::SeqCst)
    }
}

impl Drop for Fault {
    fn drop(&mut self) {
        self.ordered.over.send_replace(true);
        self.faults.rules().retain(|ordered| !Arc::ptr_eq(ordered, &self.ordered));
    }
}

/// Orders a snapshot.
#[must_use]
pub fn is_create_of_snapshot(method: &Method, uri: &Uri) -> bool {
    method == Method::POST && uri.path().ends_with("/volumesnapshots")
}

/// Writes the status of a backup.
#[must_use]
pub fn is_status_write(method: &Method, uri: &Uri) -> bool {
    let path = uri.path();
    method == Method::PATCH && path.contains("/statefulsetbackups/") && path.ends_with("/status")
}

/// Changes the cluster or the status in the course of a restore; what only asks by a dry run changes nothing.
#[must_use]
pub fn is_write_of_restore(method: &Method, uri: &Uri) -> bool {
    const PARTS: [&str; 5] =
        ["/statefulsetrestores/", "/persistentvolumes/", "/persistentvolumeclaims", "/scale", "/pods/"];
    let is_dry_run = uri.query().is_some_and(|query| query.contains("dryRun"));
    method != Method::GET && !is_dry_run && PARTS.iter().any(|part| uri.path().contains(part))
}

/// Deletes a claim of an application, which a restore makes again; not one by which it has a new volume made.
#[must_use]
pub fn is_deletion_of_claim(method: &Method, uri: &Uri) -> bool {
    let name = uri.path().rsplit_once("/persistentvolumeclaims/").map(|(_, name)| name);
    method == Method::DELETE && name.is_some_and(|name| !name.contains("-restore-"))
}

/// Scales a `StatefulSet`.
#[must_use]
pub fn is_scale(method: &Method, uri: &Uri) -> bool {
    method == Method::PATCH && uri.path().ends_with("/scale")
}

/// Runs the pre hook of a [drill](super::drill), which has a word of its trace.
#[must_use]
pub fn is_pre_hook(_method: &Method, uri: &Uri) -> bool {
    runs(uri, "frozen+")
}

/// Runs the post hook of a [drill](super::drill), which has a word of its trace.
#[must_use]
pub fn is_post_hook(_method: &Method, uri: &Uri) -> bool {
    runs(uri, "thawed+")
}

fn runs(uri: &Uri, word: &str) -> bool {
    uri.path().ends_with("/exec") && uri.query().is_some_and(|query| query.contains(word))
}

async fn answer(State((upstream, faults)): State<(Client, Faults)>, request: Request) -> Response {
    let passed_on = match faults.answer(request.method(), request.uri()) {
        None => Box::pin(pass_on(&upstream, request)).await,
        Some((HOLD, fault)) => pass_on_later(upstream, request, fault).await,
        Some((status, _)) => return refusal(status),
    };
    passed_on.unwrap_or_else(|err| (StatusCode::BAD_GATEWAY, format!("{err:#}")).into_response())
}

/// As the API server words its failures, which clients parse.
fn refusal(status: u16) -> Response {
    let text = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": status,
        "reason": if status == 429 { "TooManyRequests" } else { "InternalError" },
        "message": "refused by the proxy of the test",
    });
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response =
        (status, [(header::CONTENT_TYPE, "application/json")], text.to_string()).into_response();
    if status == StatusCode::TOO_MANY_REQUESTS {
        response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
    }
    response
}

/// In a task of its own: the client that goes away does not take its request along.
async fn pass_on_later(upstream: Client, request: Request, fault: Arc<Ordered>) -> Result<Response> {
    let (parts, body) = request.into_parts();
    let body = to_bytes(body, usize::MAX).await.context("read the request")?;
    let later = tokio::spawn(async move {
        // The sender lives as long as `fault`.
        let _ = fault.over.subscribe().wait_for(|over| *over).await;
        pass_on(&upstream, Request::from_parts(parts, Body::from(body))).await
    });
    later.await?
}

async fn pass_on(upstream: &Client, mut request: Request) -> Result<Response> {
    let downstream = hyper::upgrade::on(&mut request);
    let (mut parts, body) = request.into_parts();
    parts.headers.remove(header::HOST);
    let body = to_bytes(body, usize::MAX).await.context("read the request")?;
    let request = Request::from_parts(parts, kube::client::Body::from(body.to_vec()));
    let mut response = upstream.send(request).await.context("ask the API server")?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let upstream = hyper::upgrade::on(&mut response);
        tokio::spawn(async move {
            if let Ok((downstream, upstream)) = tokio::try_join!(downstream, upstream) {
                let (mut downstream, mut upstream) = (TokioIo::new(downstream), TokioIo::new(upstream));
                // Either side may break the connection off; the other one sees that.
                let _ = tokio::io::copy_bidirectional(&mut downstream, &mut upstream).await;
            }
        });
    }
    Ok(response.map(Body::new))
}
