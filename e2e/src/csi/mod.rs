//! The test CSI driver: real volumes and atomic snapshots on btrfs, without any image to pull, and
//! faults on demand (see `faults`) so that tests can make a storage system slow or broken. One driver
//! serves one node: its volumes are usable there only. Sizes are nominal; nothing enforces them.
//!
//! A request goes from `controller` or `node` to `decide`, which is pure, and its steps are done
//! on `pool` and `records`. Not for production: it never repairs a pool and trusts its callers.

mod clock;
mod controller;
mod decide;
mod faults;
mod identity;
mod locks;
mod mounts;
mod node;
mod pool;
mod records;
mod registration;
mod steps;

use std::error::Error;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures::FutureExt;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Code, Response, Status};
use tracing::{debug, info, warn};

use controller::ControllerService;
use faults::ParameterError;
use identity::IdentityService;
use locks::Locks;
use node::NodeService;
pub use pool::POOL_FILE;
use pool::{Pool, PoolError};
use proto::csi::controller_server::ControllerServer;
use proto::csi::identity_server::IdentityServer;
use proto::csi::node_server::NodeServer;
use proto::registration::registration_server::RegistrationServer;
use records::{Folder, RecordError, SnapshotRecord, VolumeRecord};
use registration::RegistrationService;

/// The driver's name, as `StorageClass`, `VolumeSnapshotClass` and `CSIDriver` give it.
pub const DRIVER_NAME: &str = "csi.e2e.sts-backup.io";
/// The topology key (a node label) whose value is the name of a volume's node.
pub const TOPOLOGY_KEY: &str = "topology.csi.e2e.sts-backup.io/node";
/// How long calls may go on after the driver was told to stop.
const GRACE: Duration = Duration::from_secs(5);

/// The gRPC interfaces, generated from `proto/`.
mod proto {
    /// The Container Storage Interface.
    pub(super) mod csi {
        #![allow(
            missing_docs,
            unreachable_pub,
            clippy::pedantic,
            clippy::allow_attributes_without_reason,
            clippy::wildcard_enum_match_arm,
            reason = "generated; proto/csi.proto has the comments"
        )]
        tonic::include_proto!("csi.v1");
    }
    /// The kubelet's plugin registration.
    pub(super) mod registration {
        #![allow(
            missing_docs,
            unreachable_pub,
            clippy::pedantic,
            clippy::allow_attributes_without_reason,
            clippy::wildcard_enum_match_arm,
            reason = "generated; proto/pluginregistration.proto has the comments"
        )]
        tonic::include_proto!("pluginregistration");
    }
}

/// How to run the driver.
#[derive(Debug, Clone)]
pub struct Options {
    /// Directory of the pool; survives the driver.
    pub pool_dir: PathBuf,
    /// Size in bytes of the sparse file that a new pool gets.
    pub pool_size_bytes: u64,
    /// Where to serve CSI.
    pub csi_socket: PathBuf,
    /// How to register with the kubelet; `None`: not at all.
    pub registration: Option<Registration>,
    /// The node's name in Kubernetes.
    pub node_name: String,
}

/// How to register with the kubelet.
#[derive(Debug, Clone)]
pub struct Registration {
    /// Where to serve the registration, in the kubelet's `plugins_registry`.
    pub socket: PathBuf,
    /// The CSI socket, as the kubelet sees the path.
    pub endpoint: PathBuf,
}

/// What all services share.
#[derive(Debug)]
struct Driver {
    /// The node's name.
    node_name: String,
    /// Contents.
    pool: Pool,
    /// Volumes that were requested.
    volumes: Folder<VolumeRecord>,
    /// Snapshots that were requested.
    snapshots: Folder<SnapshotRecord>,
    /// Turns per object; to be held while an object changes.
    locks: Locks,
}

/// Serves until `stop` ends, then lets running calls end for a short while and removes the sockets. The
/// pool stays mounted for the pods that use it.
///
/// # Errors
/// The pool cannot be opened or a socket not be served.
pub async fn run(options: Options, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let Options { pool_dir, pool_size_bytes, csi_socket, registration, node_name } = options;
    let pool = Pool::open(&pool_dir, pool_size_bytes).await.context("open the pool")?;
    let records = pool.records_dir();
    let driver = Arc::new(Driver {
        node_name,
        volumes: Folder::open(records.join("volumes"))?,
        snapshots: Folder::open(records.join("snapshots"))?,
        locks: Locks::default(),
        pool,
    });
    let (stopping, stopped) = watch::channel(false);
    let stopped = || {
        let mut stopped = stopped.clone();
        // A dropped sender means stop, too.
        async move { drop(stopped.wait_for(|stopped| *stopped).await) }
    };

    let (csi_listener, csi_file) = listen(&csi_socket)?;
    let csi = Server::builder()
        .add_service(IdentityServer::new(IdentityService))
        .add_service(ControllerServer::new(ControllerService::new(Arc::clone(&driver))))
        .add_service(NodeServer::new(NodeService::new(driver)))
        .serve_with_incoming_shutdown(csi_listener, stopped());
    // The kubelet calls the CSI socket as soon as it sees the registration socket.
    let (registering, registration_file) = match registration {
        Some(Registration { socket, endpoint }) => {
            let (listener, file) = listen(&socket)?;
            let serving = Server::builder()
                .add_service(RegistrationServer::new(RegistrationService::new(&endpoint)))
                .serve_with_incoming_shutdown(listener, stopped());
            (serving.boxed(), Some(file))
        }
        None => (futures::future::ready(Ok(())).boxed(), None),
    };
    info!(socket = %csi_socket.display(), "serving");
    let servers = async { tokio::try_join!(csi, registering) }.boxed();
    tokio::pin!(servers);
    tokio::select! {
        served = &mut servers => {
            served.context("serve")?;
            anyhow::bail!("the servers ended by themselves");
        }
        () = stop => info!("stopping"),
    }
    // First, so that the kubelet sends no more calls.
    drop(registration_file);
    stopping.send_replace(true);
    if let Ok(served) = tokio::time::timeout(GRACE, servers).await {
        served.context("serve")?;
    } else {
        warn!("calls were still running; callers will repeat them");
    }
    drop(csi_file);
    info!("stopped");
    Ok(())
}

/// Removes the socket's file when dropped.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            debug!(path = %self.0.display(), %error, "socket not removed");
        }
    }
}

fn listen(path: &Path) -> anyhow::Result<(UnixListenerStream, SocketFile)> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {
            // Left behind by a driver that was killed.
            std::fs::remove_file(path).with_context(|| format!("remove the old {}", path.display()))?;
        }
        Ok(_) => anyhow::bail!("{} exists and is not a socket: remove it", path.display()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("look at {}", path.display())),
    }
    let listener = UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))?;
    Ok((UnixListenerStream::new(listener), SocketFile(path.to_owned())))
}

/// Ends a call: the one place that logs its refusal or failure.
fn finish<T>(call: &'static str, result: Result<T, Status>) -> Result<Response<T>, Status> {
    if let Err(status) = &result {
        let (code, reason) = (status.code(), status.message());
        if code == Code::Internal {
            warn!(call, reason, "call failed");
        } else {
            debug!(call, ?code, reason, "call refused");
        }
    }
    result.map(Response::new)
}

/// The error and its causes on one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    anyhow::Chain::new(error).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

impl From<ParameterError> for Status {
    fn from(error: ParameterError) -> Self {
        Self::invalid_argument(error.to_string())
    }
}

impl From<PoolError> for Status {
    fn from(error: PoolError) -> Self {
        Self::internal(chain(&error))
    }
}

impl From<RecordError> for Status {
    fn from(error: RecordError) -> Self {
        match &error {
            RecordError::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Self::resource_exhausted(chain(&error))
            }
            RecordError::Write { .. }
            | RecordError::Read { .. }
            | RecordError::Parse { .. }
            | RecordError::Remove { .. } => Self::internal(chain(&error)),
        }
    }
}

/// Runs a function of the driver that blocks, off the async workers.
async fn blocking<T: Send + 'static>(
    driver: &Arc<Driver>,
    work: impl FnOnce(&Driver) -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    let driver = Arc::clone(driver);
    tokio::task::spawn_blocking(move || work(&driver))
        .await
        .map_err(|error| Status::internal(chain(&error)))?
}
