//! Snapshots taken by hand, without the agent.

use std::collections::BTreeSet;
use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::StreamExt;
use jiff::Timestamp;
use kube::api::PostParams;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, ResourceExt};
use sts_backup_api::snapshot::{
    VolumeSnapshot, VolumeSnapshotContent, VolumeSnapshotSource, VolumeSnapshotSpec,
};

use super::Namespace;
use crate::condition::{await_condition, snapshot_ready};

/// Asks for a snapshot of the claim `claim` and returns the request as created; it is not cut yet.
///
/// # Errors
/// When the API server refuses it.
pub async fn take_snapshot(ns: &Namespace, name: &str, claim: &str, class: &str) -> Result<VolumeSnapshot> {
    let wanted = VolumeSnapshot::new(
        name,
        VolumeSnapshotSpec {
            source: VolumeSnapshotSource {
                persistent_volume_claim_name: Some(claim.to_owned()),
                volume_snapshot_content_name: None,
            },
            volume_snapshot_class_name: Some(class.to_owned()),
        },
    );
    let snapshots: Api<VolumeSnapshot> = ns.api();
    snapshots
        .create(&PostParams::default(), &wanted)
        .await
        .with_context(|| format!("create the VolumeSnapshot {}/{name}", ns.name()))
}

/// The storage's side of a snapshot that is bound.
///
/// # Errors
/// When the snapshot has no content yet, or the content cannot be read.
pub async fn content_of(ns: &Namespace, snapshot: &VolumeSnapshot) -> Result<VolumeSnapshotContent> {
    let status = snapshot.status.as_ref();
    let name = status
        .and_then(|status| status.bound_volume_snapshot_content_name.as_deref())
        .with_context(|| format!("VolumeSnapshot {} is not bound to a content", snapshot.name_any()))?;
    let contents: Api<VolumeSnapshotContent> = Api::all(ns.cluster().client());
    contents.get(name).await.with_context(|| format!("read the VolumeSnapshotContent {name}"))
}

/// When the storage cut a snapshot, to the nanosecond; the `VolumeSnapshot` itself only has whole seconds. The
/// test driver takes the time just before the cut: it is a lower bound.
///
/// # Errors
/// When the snapshot is not cut, or its content cannot be read.
pub async fn cut_time(ns: &Namespace, snapshot: &VolumeSnapshot) -> Result<Timestamp> {
    let content = content_of(ns, snapshot).await?;
    let nanoseconds = content
        .status
        .and_then(|status| status.creation_time)
        .with_context(|| format!("VolumeSnapshot {} is not cut", snapshot.name_any()))?;
    Ok(Timestamp::from_nanosecond(nanoseconds.into())?)
}

/// Waits for a state of the snapshot `name`: [`await_condition`] with the usual timeout of a minute.
///
/// # Errors
/// When it is not reached in time.
pub async fn await_snapshot(
    ns: &Namespace,
    name: &str,
    what: &str,
    holds: impl Fn(&VolumeSnapshot) -> bool,
) -> Result<VolumeSnapshot> {
    await_condition(&ns.api(), name, what, Duration::from_mins(1), holds).await
}

/// The most snapshots of the namespace that were there and not ready at one time, while `meanwhile` was under way.
///
/// The watch tells of every change in its order, so what its reader counts was so at some time.
///
/// # Errors
/// Those of `meanwhile`, or when the watch fails.
pub async fn most_unready(ns: &Namespace, meanwhile: impl Future<Output = Result<()>>) -> Result<usize> {
    let snapshots: Api<VolumeSnapshot> = ns.api();
    let mut watch = pin!(watcher(snapshots, watcher::Config::default()).default_backoff());
    let mut meanwhile = pin!(meanwhile);
    let (mut unready, mut most) = (BTreeSet::new(), 0);
    loop {
        let event = tokio::select! {
            ended = &mut meanwhile => return ended.map(|()| most),
            event = watch.next() => event.context("a watch does not end")?,
        };
        match event.context("watch the snapshots")? {
            watcher::Event::Init if !unready.is_empty() => {
                bail!("the watch of the snapshots had to begin anew")
            }
            watcher::Event::Init | watcher::Event::InitDone => {}
            watcher::Event::InitApply(snapshot) | watcher::Event::Apply(snapshot)
                if !snapshot_ready(&snapshot) =>
            {
                unready.insert(snapshot.name_any());
            }
            watcher::Event::InitApply(snapshot)
            | watcher::Event::Apply(snapshot)
            | watcher::Event::Delete(snapshot) => {
                unready.remove(&snapshot.name_any());
            }
        }
        most = most.max(unready.len());
    }
}
