//! Connections of agents: accepted, shaken hands with, and bounded. tonic's own acceptor knows no limit of handshakes, no
//! time for one, and no certificates that change.

use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use sts_backup_api::identity::{ClusterId, TrustDomain};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use super::peer::{PeerError, cluster_of};
use sts_backup_service::clock;

/// How many handshakes are under way at once: each costs about a millisecond of a core.
const HANDSHAKES: usize = 64;

/// How long one may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// How long the peer may take nothing of what it is sent.
const STALLED: Duration = Duration::from_secs(30);

/// Who is at the other end.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    pub(super) address: SocketAddr,
    /// The cluster, as its certificate says.
    pub(super) cluster: Result<ClusterId, PeerError>,
}

/// Accepts until `stop`, and hands over whoever has a certificate of the fleet's authority.
pub(super) async fn accept(
    listener: TcpListener,
    tls: Arc<ArcSwap<ServerConfig>>,
    domain: TrustDomain,
    accepted: mpsc::Sender<io::Result<Connection>>,
    stop: CancellationToken,
) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
    loop {
        let slot = Arc::clone(&handshakes).acquire_owned();
        let Ok(slot) = slot.await else { return };
        let (stream, address) = tokio::select! {
            () = stop.cancelled() => return,
            next = listener.accept() => match next {
                Ok(next) => next,
                Err(error) => {
                    // Out of file descriptors: others that end give some back.
                    warn!(%error, "a connection cannot be accepted");
                    sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let acceptor = TlsAcceptor::from(tls.load_full());
        let (accepted, domain) = (accepted.clone(), domain.clone());
        tokio::spawn(async move {
            let shaken = timeout(HANDSHAKE, shake(acceptor, stream, address, &domain)).await;
            drop(slot);
            match shaken {
                Ok(Ok(connection)) => drop(accepted.send(Ok(connection)).await),
                Ok(Err(error)) => warn!(%address, %error, "a connection is refused"),
                Err(_) => debug!(%address, "a connection ends: no handshake in time"),
            }
        });
    }
}

async fn shake(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    address: SocketAddr,
    domain: &TrustDomain,
) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    let stream = acceptor.accept(stream).await?;
    let (_, session) = stream.get_ref();
    let certificate = session.peer_certificates().and_then(<[_]>::first);
    let cluster = certificate.map_or(Err(PeerError::Unreadable), |one| cluster_of(one, domain));
    Ok(Connection { stream, peer: Peer { address, cluster }, stalled: None })
}

/// A connection that ends when its peer takes nothing for a while.
pub(super) struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl Connection {
    /// What a write gives, or the end of the peer's time.
    fn watched<T>(&mut self, context: &mut Context<'_>, poll: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.stalled = None;
            return poll;
        }
        let until = || Box::pin(tokio::time::sleep_until(clock::monotonic() + STALLED));
        let stalled = self.stalled.get_or_insert_with(until);
        match stalled.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        pin!(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let poll = pin!(&mut self.stream).poll_write(context, bytes);
        self.watched(context, poll)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = pin!(&mut self.stream).poll_flush(context);
        self.watched(context, poll)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = pin!(&mut self.stream).poll_shutdown(context);
        self.watched(context, poll)
    }
}
