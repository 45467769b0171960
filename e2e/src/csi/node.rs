//! CSI's Node service: shows a volume at the path where the kubelet wants it, as a bind mount of the
//! volume's subvolume. There is no staging, since the whole pool is mounted already.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};
use tonic::{Request, Response, Status, async_trait};
use tracing::info;

use super::decide::{access_mode, refuse_unsupported};
use super::proto::csi::node_server::Node;
use super::proto::csi::volume_capability::access_mode::Mode;
use super::proto::csi::{
    NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse,
    NodePublishVolumeRequest, NodePublishVolumeResponse, NodeUnpublishVolumeRequest,
    NodeUnpublishVolumeResponse, Topology,
};
use super::records::VolumeId;
use super::{Driver, TOPOLOGY_KEY, blocking, finish, mounts};

/// The Node service.
#[derive(Debug, Clone)]
pub(super) struct NodeService {
    driver: Arc<Driver>,
}

impl NodeService {
    /// Serves the driver's volumes on its node.
    #[must_use]
    pub(super) fn new(driver: Arc<Driver>) -> Self {
        Self { driver }
    }

    async fn publish(&self, request: NodePublishVolumeRequest) -> Result<NodePublishVolumeResponse, Status> {
        let NodePublishVolumeRequest { volume_id, target_path, volume_capability, readonly } = request;
        let target = required_path(&volume_id, target_path)?;
        let capability =
            volume_capability.ok_or_else(|| Status::invalid_argument("volume capability is missing"))?;
        refuse_unsupported(std::slice::from_ref(&capability))?;
        let read_only = readonly || access_mode(&capability) == Mode::SingleNodeReaderOnly;
        let not_found = || Status::not_found(format!("volume {volume_id} does not exist"));
        let id = VolumeId::parse(&volume_id).ok_or_else(not_found)?;
        let turn = self.driver.locks.lock(&id).await;
        blocking(&self.driver, move |driver| {
            // Held until the mount is done, even if the caller goes away.
            let _turn = turn;
            if !driver.pool.has_volume(&id) {
                return Err(Status::not_found(format!("volume {id} does not exist")));
            }
            publish(driver, &id, &target, read_only)
        })
        .await?;
        Ok(NodePublishVolumeResponse {})
    }

    async fn unpublish(
        &self,
        request: NodeUnpublishVolumeRequest,
    ) -> Result<NodeUnpublishVolumeResponse, Status> {
        let NodeUnpublishVolumeRequest { volume_id, target_path } = request;
        let target = required_path(&volume_id, target_path)?;
        let turn = self.driver.locks.lock(&volume_id).await;
        blocking(&self.driver, move |_| {
            let _turn = turn;
            if unpublish(&target)? {
                info!(volume = volume_id, target = %target.display(), "volume unpublished");
            }
            Ok(())
        })
        .await?;
        Ok(NodeUnpublishVolumeResponse {})
    }
}

fn required_path(volume_id: &str, target_path: String) -> Result<PathBuf, Status> {
    if volume_id.is_empty() {
        return Err(Status::invalid_argument("volume id is missing"));
    }
    let path = PathBuf::from(target_path);
    if path.is_absolute() { Ok(path) } else { Err(Status::invalid_argument("target path is not absolute")) }
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Status {
    let path = path.to_owned();
    move |error| Status::internal(format!("{operation} {}: {error}", path.display()))
}

/// The kernel shows real paths, and a caller may name a symbolic link.
fn real(path: &Path) -> Result<PathBuf, Status> {
    fs::canonicalize(path).map_err(failed("resolve", path))
}

fn publish(driver: &Driver, id: &VolumeId, target: &Path, read_only: bool) -> Result<(), Status> {
    fs::create_dir_all(target).map_err(failed("create directory", target))?;
    let target = real(target)?;
    let mounted_here = driver.pool.mounts_of(id)?.into_iter().rfind(|mount| mount.target == target);
    let already_read_only = match mounted_here {
        Some(mount) if mount.read_only && !read_only => {
            return Err(Status::already_exists(format!(
                "volume {id} is published read-only at {}: unpublish it first",
                target.display()
            )));
        }
        Some(mount) => mount.read_only,
        None => {
            let mounts = mounts::read().map_err(failed("read mounts for", &target))?;
            if mounts::at(&mounts, &target).is_some() {
                return Err(Status::already_exists(format!(
                    "something else is mounted at {}",
                    target.display()
                )));
            }
            mount_bind(driver.pool.volume_path(id), &target)
                .map_err(io::Error::from)
                .map_err(failed("bind mount on", &target))?;
            false
        }
    };
    // A second step, since the kernel ignores the flag when binding; a crash in between is repaired by
    // the repeated call.
    if read_only && !already_read_only {
        mount_remount(&target, MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOATIME, "")
            .map_err(io::Error::from)
            .map_err(failed("remount read-only", &target))?;
    }
    info!(volume = %id, target = %target.display(), read_only, "volume published");
    Ok(())
}

/// Whether there was anything to undo.
fn unpublish(target: &Path) -> Result<bool, Status> {
    match target.try_exists() {
        Ok(false) => return Ok(false),
        Ok(true) => {}
        Err(error) => return Err(failed("look at", target)(error)),
    }
    let target = real(target)?;
    let stacked = mounts::read().map_err(failed("read mounts for", &target))?;
    for _ in stacked.iter().filter(|mount| mount.target == target) {
        unmount(&target, UnmountFlags::NOFOLLOW)
            .map_err(io::Error::from)
            .map_err(failed("unmount", &target))?;
    }
    fs::remove_dir(&target).map_err(failed("remove directory", &target))?;
    Ok(true)
}

#[async_trait]
impl Node for NodeService {
    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        finish("NodePublishVolume", self.publish(request.into_inner()).await)
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        finish("NodeUnpublishVolume", self.unpublish(request.into_inner()).await)
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities: vec![] }))
    }

    async fn node_get_info(
        &self,
        _: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        Ok(Response::new(NodeGetInfoResponse {
            node_id: self.driver.node_name.clone(),
            max_volumes_per_node: 0,
            accessible_topology: Some(this_node(&self.driver)),
        }))
    }
}

/// Where the driver's volumes are usable.
#[must_use]
pub(super) fn this_node(driver: &Driver) -> Topology {
    Topology { segments: [(TOPOLOGY_KEY.to_owned(), driver.node_name.clone())].into() }
}
