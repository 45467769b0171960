//! The hub's end of the link: agents connect, and each gets a session.
//!
//! [`acceptor`] takes connections, [`peer`] says whose they are, [`session`] speaks with an agent, [`report`] takes apart what it reports. What is said is decided in
//! [`fleet`](crate::fleet).

mod acceptor;
pub mod peer;
mod report;
mod session;
#[cfg(test)]
mod tests;
pub mod tls;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use futures::stream::BoxStream;
use rustls::ServerConfig;
use sts_backup_api::identity::TrustDomain;
use sts_backup_api::link::fleet_server::{self, FleetServer};
use sts_backup_api::link::{AgentMessage, HubMessage, MAX_MESSAGE};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};
use tracing::warn;

use self::acceptor::{Peer, accept};
use crate::fleet::Fleet;

/// What hyper would take of each connection before anybody reads it: its own windows are 1 MiB each.
const STREAM_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = 128 << 10;

/// Connections that are ready before anybody takes them.
const BACKLOG: usize = 64;

/// Serves agents until `stop`; then no new ones, until those that are connected have left.
///
/// # Errors
/// If the listener fails.
pub async fn serve(
    listener: TcpListener,
    tls: Arc<ArcSwap<ServerConfig>>,
    domain: TrustDomain,
    fleet: Arc<Fleet>,
    heartbeat: Duration,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let (accepted, connections) = mpsc::channel(BACKLOG);
    tokio::spawn(accept(listener, tls, domain, accepted, stop));
    let service = FleetServer::new(Service { fleet, heartbeat })
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        // An agent has one session; another one while it ends.
        .max_concurrent_streams(2)
        .add_service(service)
        .serve_with_incoming(ReceiverStream::new(connections))
        .await
}

struct Service {
    fleet: Arc<Fleet>,
    heartbeat: Duration,
}

#[tonic::async_trait]
impl fleet_server::Fleet for Service {
    type SessionStream = BoxStream<'static, Result<HubMessage, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let peer = request.extensions().get::<Peer>().cloned();
        let peer = peer.ok_or_else(|| Status::internal("the connection has no peer"))?;
        let refused = |reason: String| {
            warn!(address = %peer.address, reason, "an agent is refused");
            Status::unauthenticated(reason)
        };
        let id = peer.cluster.clone().map_err(|error| refused(error.to_string()))?;
        let cluster = self.fleet.admit(id).map_err(|refusal| refused(refusal.to_string()))?;
        let messages = request.into_inner();
        let fleet = Arc::clone(&self.fleet);
        let stream = session::start(fleet, cluster, messages, peer.address, self.heartbeat);
        Ok(Response::new(Box::pin(stream)))
    }
}
