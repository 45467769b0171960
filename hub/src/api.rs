//! The hub's API: JSON over HTTP, for its own commands and for programs. It shows what the fleet and the store know, and
//! passes changes on; it decides nothing.

mod answers;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sts_backup_api::identity::ClusterId;
use sts_backup_service::clock;
use sts_backup_service::telemetry::chain;
use subtle::ConstantTimeEq;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::{debug, warn};
use uuid::Uuid;

pub use self::answers::{
    AuditEntry, BackupAnswer, ClusterAnswer, ClusterDetail, FleetAnswer, NewCluster, PolicyAnswer,
    RestoreAnswer, RunAnswer,
};
use crate::config::ApiConfig;
use crate::fleet::{Fleet, FleetError};
use crate::link::tls::{TlsError, api_config};
use crate::store::StoreError;

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// The most entries of a list of what has happened.
const MOST: u32 = 1000;

/// The API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The address cannot be listened on.
    #[error("listen on {listen}: set `api.listen` to an address of this machine and a free port")]
    Listen {
        /// The configured address.
        listen: SocketAddr,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The token cannot be read.
    #[error("read the token {}: put at least 16 characters there, or leave `api.token_file` out", path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Option<std::io::Error>,
    },
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Listens, and gives what serves from then on.
///
/// # Errors
/// If it cannot.
pub async fn bind(
    config: &ApiConfig,
    fleet: Arc<Fleet>,
) -> Result<impl Future<Output = ()> + Send + use<>, ApiError> {
    let token = match &config.token_file {
        None => None,
        Some(path) => {
            let read = std::fs::read_to_string(path);
            let read = read.map_err(|source| ApiError::Token { path: path.clone(), source: Some(source) })?;
            let token = read.trim().to_owned();
            if token.len() < 16 {
                return Err(ApiError::Token { path: path.clone(), source: None });
            }
            Some(Arc::from(token))
        }
    };
    let tls = config.certificates.as_deref().map(api_config).transpose()?;
    let listener = TcpListener::bind(config.listen).await;
    let listener = listener.map_err(|source| ApiError::Listen { listen: config.listen, source })?;
    let routes = routes(fleet, token);
    Ok(async move {
        let served = match tls {
            None => axum::serve(listener, routes).await,
            Some(tls) => {
                axum::serve(Tls { listener, acceptor: TlsAcceptor::from(Arc::new(tls)) }, routes).await
            }
        };
        if let Err(error) = served {
            warn!(error = %chain(&error), "serving the API failed");
        }
    })
}

struct Tls {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl axum::serve::Listener for Tls {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            let (stream, address) = axum::serve::Listener::accept(&mut self.listener).await;
            match timeout(HANDSHAKE, self.acceptor.accept(stream)).await {
                Ok(Ok(stream)) => return (stream, address),
                Ok(Err(error)) => debug!(%address, %error, "a connection to the API is refused"),
                Err(_) => debug!(%address, "a connection to the API ends: no handshake in time"),
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// All that can be asked for.
fn routes(fleet: Arc<Fleet>, token: Option<Arc<str>>) -> Router {
    let guard = move |request: Request, next: Next| authorised(token.clone(), request, next);
    Router::new()
        .route("/v1/fleet", get(show_fleet))
        .route("/v1/clusters", get(list_clusters).post(add_cluster))
        .route("/v1/clusters/{name}", get(show_cluster).delete(remove_cluster))
        .route("/v1/clusters/{name}/labels", post(label_cluster))
        .route("/v1/clusters/{name}/revoke", post(revoke_cluster))
        .route("/v1/clusters/{name}/confirm", post(confirm_cluster))
        .route("/v1/backups", get(list_backups))
        .route("/v1/runs", get(list_runs))
        .route("/v1/restores", get(list_restores))
        .route("/v1/policies", get(list_policies))
        .route("/v1/policies/{name}", get(show_policy))
        .route("/v1/audit", get(list_audit))
        .with_state(fleet)
        .layer(middleware::from_fn(guard))
}

async fn authorised(token: Option<Arc<str>>, request: Request, next: Next) -> Response {
    if let Some(token) = token {
        let shown = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let shown = shown.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
        // How long it takes tells nothing of the token.
        if !bool::from(shown.as_bytes().ct_eq(token.as_bytes())) {
            let error = "the token is missing or wrong: name the hub's token file with --token-file";
            return (StatusCode::UNAUTHORIZED, Json(json!({ "error": error }))).into_response();
        }
    }
    next.run(request).await
}

/// What went wrong, for people and programs.
struct Failed(FleetError);

impl From<FleetError> for Failed {
    fn from(error: FleetError) -> Self {
        Self(error)
    }
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        Self(FleetError::Store(error))
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let code = match &self.0 {
            FleetError::Unknown(_) => StatusCode::NOT_FOUND,
            FleetError::NameTaken(_) | FleetError::IdTaken(_) | FleetError::NothingHeld(_) => {
                StatusCode::CONFLICT
            }
            FleetError::Text { .. } => StatusCode::BAD_REQUEST,
            FleetError::Store(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        if code == StatusCode::SERVICE_UNAVAILABLE {
            warn!(error = %chain(&self.0), "the API cannot answer");
        }
        (code, Json(json!({ "error": chain(&self.0) }))).into_response()
    }
}

type Answer<T> = Result<Json<T>, Failed>;
type Hub = State<Arc<Fleet>>;

async fn show_fleet(State(fleet): Hub) -> Answer<FleetAnswer> {
    Ok(Json(answers::fleet(&fleet, clock::now()).await?))
}

async fn list_clusters(State(fleet): Hub) -> Json<Vec<ClusterAnswer>> {
    Json(fleet.clusters().values().map(|cluster| answers::cluster(cluster)).collect())
}

async fn show_cluster(State(fleet): Hub, Path(name): Path<String>) -> Answer<ClusterDetail> {
    Ok(Json(answers::cluster_detail(&fleet, &name).await?))
}

async fn add_cluster(State(fleet): Hub, Json(new): Json<NewCluster>) -> Answer<ClusterAnswer> {
    let id = new.id.as_deref().map(str::parse::<ClusterId>).transpose().map_err(|error| {
        Failed(FleetError::Text { what: "the id", text: error.to_string(), example: "a UUID in lower case" })
    })?;
    let id = id.unwrap_or_else(|| ClusterId::new(Uuid::new_v4()));
    fleet.add(id, &new.name, new.labels, clock::now()).await?;
    Ok(Json(answers::cluster(&*fleet.named(&new.name)?)))
}

async fn remove_cluster(State(fleet): Hub, Path(name): Path<String>) -> Answer<serde_json::Value> {
    fleet.remove(&name, clock::now()).await?;
    Ok(Json(json!({})))
}

async fn label_cluster(
    State(fleet): Hub,
    Path(name): Path<String>,
    Json(changes): Json<std::collections::BTreeMap<String, Option<String>>>,
) -> Answer<ClusterAnswer> {
    fleet.label(&name, &changes, clock::now()).await?;
    Ok(Json(answers::cluster(&*fleet.named(&name)?)))
}

async fn revoke_cluster(State(fleet): Hub, Path(name): Path<String>) -> Answer<ClusterAnswer> {
    fleet.revoke(&name, clock::now()).await?;
    Ok(Json(answers::cluster(&*fleet.named(&name)?)))
}

async fn confirm_cluster(State(fleet): Hub, Path(name): Path<String>) -> Answer<ClusterAnswer> {
    fleet.confirm(&name, clock::now()).await?;
    Ok(Json(answers::cluster(&*fleet.named(&name)?)))
}

/// Which backups are wanted.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct BackupQuery {
    /// Of this cluster only.
    pub cluster: Option<String>,
    /// Those whose newest recovery point is too old.
    pub overdue: bool,
    /// Those whose newest run failed.
    pub failed: bool,
}

async fn list_backups(State(fleet): Hub, Query(query): Query<BackupQuery>) -> Answer<Vec<BackupAnswer>> {
    Ok(Json(answers::backups(&fleet, &query, clock::now()).await?))
}

/// Which of what has ended is wanted.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct HistoryQuery {
    /// Of this cluster only.
    pub cluster: Option<String>,
    /// At most so many, newest first.
    pub limit: Option<u32>,
}

async fn list_runs(State(fleet): Hub, Query(query): Query<HistoryQuery>) -> Answer<Vec<RunAnswer>> {
    let limit = query.limit.unwrap_or(100).min(MOST);
    Ok(Json(answers::runs(&fleet, query.cluster.as_deref(), limit).await?))
}

async fn list_restores(State(fleet): Hub) -> Answer<Vec<RestoreAnswer>> {
    Ok(Json(answers::restores(&fleet).await?))
}

async fn list_policies(State(fleet): Hub) -> Json<Vec<PolicyAnswer>> {
    Json(answers::policies(&fleet))
}

async fn show_policy(State(fleet): Hub, Path(name): Path<String>) -> Result<Json<PolicyAnswer>, Response> {
    let found = answers::policies(&fleet).into_iter().find(|policy| policy.name == name);
    found.map(Json).ok_or_else(|| {
        let error = format!("there is no fleet policy {name}: see policies list");
        (StatusCode::NOT_FOUND, Json(json!({ "error": error }))).into_response()
    })
}

async fn list_audit(State(fleet): Hub) -> Answer<Vec<AuditEntry>> {
    let entries = fleet.store.audit(MOST).await?;
    let entry = |(at, action, object, detail)| AuditEntry { at, action, object, detail };
    Ok(Json(entries.into_iter().map(entry).collect()))
}
