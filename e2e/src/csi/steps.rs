//! Gathers the facts that [`decide`](super::decide) asks for and does the steps that it answers. Decides
//! nothing itself. The functions that change an object expect its lock to be held: see [`to_the_end`].

use std::sync::Arc;

use tokio::sync::OwnedMutexGuard;
use tonic::Status;
use tracing::{info, warn};

use super::decide::{SnapshotFacts, VolumeFacts};
use super::records::{SnapshotId, SnapshotRecord, VolumeId, VolumeRecord};
use super::{Driver, blocking, chain, clock};

/// Does the action with the object's lock held, to its end even if the caller gives up meanwhile.
pub(super) async fn to_the_end(
    turn: OwnedMutexGuard<()>,
    action: impl Future<Output = Result<(), Status>> + Send + 'static,
) -> Result<(), Status> {
    let task = tokio::spawn(async move {
        let _turn = turn;
        action.await
    });
    task.await.map_err(|error| Status::internal(chain(&error)))?
}

/// What is known about a requested volume and its wanted source.
pub(super) async fn volume_facts(
    driver: &Arc<Driver>,
    id: &VolumeId,
    source: Option<SnapshotId>,
    waited: bool,
) -> Result<VolumeFacts, Status> {
    let id = id.clone();
    blocking(driver, move |driver| {
        let source = match source.filter(|source| driver.pool.has_snapshot(source)) {
            Some(source) => driver.snapshots.read(&source)?.filter(|source| source.cut_at.is_some()),
            None => None,
        };
        let record = driver.volumes.read(&id)?;
        Ok(VolumeFacts { record, made: driver.pool.has_volume(&id), waited, source })
    })
    .await
}

/// What is known about a requested snapshot and its wanted volume.
pub(super) async fn snapshot_facts(
    driver: &Arc<Driver>,
    id: &SnapshotId,
    source: Option<VolumeId>,
    waited: bool,
) -> Result<SnapshotFacts, Status> {
    let id = id.clone();
    blocking(driver, move |driver| {
        let source = match source.filter(|source| driver.pool.has_volume(source)) {
            Some(source) => driver.volumes.read(&source)?,
            None => None,
        };
        Ok(SnapshotFacts {
            record: driver.snapshots.read(&id)?,
            on_disk: driver.pool.has_snapshot(&id),
            waited,
            source_bytes: source.map(|source| source.capacity_bytes),
        })
    })
    .await
}

/// Remembers the request for a volume.
pub(super) async fn record_volume(driver: Arc<Driver>, record: VolumeRecord) -> Result<(), Status> {
    blocking(&driver, move |driver| Ok(driver.volumes.write(&record.id, &record)?)).await
}

/// Remembers the request for a snapshot, or what became of it.
pub(super) async fn record_snapshot(driver: Arc<Driver>, record: SnapshotRecord) -> Result<(), Status> {
    blocking(&driver, move |driver| Ok(driver.snapshots.write(&record.id, &record)?)).await
}

/// Makes the recorded volume.
pub(super) async fn make_volume(driver: Arc<Driver>, record: VolumeRecord) -> Result<(), Status> {
    let VolumeRecord { id, name, capacity_bytes, source, due_at: _ } = record;
    match &source {
        None => driver.pool.make_volume(&id).await?,
        Some(source) => driver.pool.make_volume_from(&id, source).await?,
    }
    info!(volume = %id, name, capacity_bytes, source = source.as_ref().map(AsRef::as_ref), "volume made");
    Ok(())
}

/// Deletes a volume unless it is published; an absent one is success.
pub(super) async fn delete_volume(driver: Arc<Driver>, id: VolumeId) -> Result<(), Status> {
    let (used, checked) = (id.clone(), Arc::clone(&driver));
    blocking(&checked, move |driver| {
        let mounts = driver.pool.mounts_of(&used)?;
        mounts.first().map_or(Ok(()), |mount| {
            let place = mount.target.display();
            Err(Status::failed_precondition(format!(
                "volume {used} is in use at {place}: unpublish it first"
            )))
        })
    })
    .await?;
    // The subvolume first: a record without one is a request, never the other way round.
    driver.pool.delete_volume(&id).await?;
    blocking(&driver, move |driver| {
        driver.volumes.remove(&id)?;
        info!(volume = %id, "volume deleted");
        Ok(())
    })
    .await
}

/// Cuts the recorded snapshot, after deleting a leftover if there is one, and records the time.
pub(super) async fn cut_snapshot(
    driver: Arc<Driver>,
    mut record: SnapshotRecord,
    discard: bool,
) -> Result<(), Status> {
    if discard {
        driver.pool.delete_snapshot(&record.id).await?;
        warn!(snapshot = %record.id, "snapshot of an interrupted call discarded");
    }
    // Before the cut, so that all that was written by this time is in the snapshot.
    let cut_at = clock::now();
    driver.pool.cut_snapshot(&record.id, &record.source).await?;
    info!(snapshot = %record.id, name = record.name, volume = %record.source, %cut_at, "snapshot cut");
    record.cut_at = Some(cut_at);
    record_snapshot(driver, record).await
}

/// Deletes a snapshot; an absent one is success.
pub(super) async fn delete_snapshot(driver: Arc<Driver>, id: SnapshotId) -> Result<(), Status> {
    driver.pool.delete_snapshot(&id).await?;
    blocking(&driver, move |driver| {
        driver.snapshots.remove(&id)?;
        info!(snapshot = %id, "snapshot deleted");
        Ok(())
    })
    .await
}
