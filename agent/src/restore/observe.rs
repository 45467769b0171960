//! Reads the cluster into plain facts about one restore: with `survey`, the only room that asks the API server questions.
//!
//! It judges nothing. What a step does not need is not read.

use std::collections::{BTreeMap, BTreeSet};

use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Namespace, PersistentVolume, PersistentVolumeClaim, Pod};
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt};
use sts_backup_api::names::RESTORE_LABEL;
use sts_backup_api::restore::StatefulSetRestore;
use sts_backup_api::snapshot::{VolumeSnapshot, VolumeSnapshotContent};
use sts_backup_api::swap::{Swap, SwapStep};
use sts_backup_service::clock;

use super::facts::{Objects, RestoreFacts, World};
use super::plan::plan;
use super::survey::survey;
use crate::error::{Error, Result};

/// How many objects are read at once.
const PARALLEL_READS: usize = 16;

/// Reads what the next decision about a restore needs; what this process alone knows comes with the call.
pub(super) async fn observe(
    client: &Client,
    restore: &StatefulSetRestore,
    busy_with: Option<String>,
) -> Result<RestoreFacts> {
    let mut facts = RestoreFacts::of(restore, busy_with);
    let wants_back = facts.rollback_request().is_some();
    if let Some(swap) = &facts.status.swap
        && (facts.under_way().is_some() || wants_back)
    {
        facts.world = Some(world(client, &facts, swap).await?);
    } else if !facts.is_over() && !facts.is_deleting() && facts.busy_with.is_none() {
        let survey = survey(client, restore).await?;
        facts.verdict = Some(plan(restore, &survey, clock::now()));
    }
    Ok(facts)
}

/// What a swap is about, as it is now.
async fn world(client: &Client, facts: &RestoreFacts, swap: &Swap) -> Result<World> {
    let namespace = facts.target_namespace();
    let name = &facts.restore.spec.stateful_set_ref.name;
    let sets: Api<StatefulSet> = Api::namespaced(client.clone(), namespace);
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), namespace);
    let namespaces: Api<Namespace> = Api::all(client.clone());

    let everything = ListParams::default();
    let set = async { sets.get_opt(name).await.map_err(Error::request("get the StatefulSet")) };
    let pods = async { pods.list(&everything).await.map_err(Error::request("list the Pods")) };
    let home =
        async { namespaces.get_metadata_opt(namespace).await.map_err(Error::request("get the Namespace")) };
    let snapshots = async {
        match swap.step {
            SwapStep::Staging => usable_snapshots(client, namespace, swap).await.map(Some),
            SwapStep::Protecting
            | SwapStep::ScalingDown
            | SwapStep::Swapping
            | SwapStep::ScalingUp
            | SwapStep::Releasing
            | SwapStep::Abandoning => Ok(None),
        }
    };
    let claims_and_volumes = async {
        // In this order: a volume is never older than the claim that it is compared with.
        let claims = claims.list(&everything).await;
        let claims = claims.map_err(Error::request("list the PersistentVolumeClaims"))?.items;
        let volumes = volumes(client, facts.uid(), swap, &claims).await?;
        Ok::<_, Error>((claims, volumes))
    };
    let (set, pods, home, snapshots, (claims, volumes)) =
        tokio::try_join!(set, pods, home, snapshots, claims_and_volumes)?;
    let namespace_ending = home.is_none_or(|home| home.metadata.deletion_timestamp.is_some());
    let objects = Objects { namespace_ending, set, pods: pods.items, claims, volumes, snapshots };
    Ok(World::of(&objects, facts.uid(), swap))
}

/// The volumes with the restore's label, those that the swap names, and those that its claims have.
async fn volumes(
    client: &Client,
    uid: &str,
    swap: &Swap,
    claims: &[PersistentVolumeClaim],
) -> Result<Vec<PersistentVolume>> {
    let volumes: Api<PersistentVolume> = Api::all(client.clone());
    let labelled = volumes.list(&ListParams::default().labels(&format!("{RESTORE_LABEL}={uid}"))).await;
    let labelled = labelled.map_err(Error::request("list the PersistentVolumes"))?.items;
    let mut found: BTreeMap<_, _> = labelled.into_iter().map(|volume| (volume.name_any(), volume)).collect();
    let ours: BTreeSet<_> = swap.volumes.iter().map(|volume| volume.claim.as_str()).collect();
    let is_ours = |claim: &&PersistentVolumeClaim| {
        let is_staged = claim.labels().get(RESTORE_LABEL).is_some_and(|label| label == uid);
        is_staged || claim.metadata.name.as_deref().is_some_and(|name| ours.contains(name))
    };
    let of_claims =
        claims.iter().filter(is_ours).filter_map(|claim| claim.spec.as_ref()?.volume_name.clone());
    let of_swap = swap.volumes.iter().flat_map(|volume| [&volume.previous, &volume.restored]);
    let of_swap = of_swap.flatten().map(|pv| pv.name.clone());
    let missing: BTreeSet<_> =
        of_claims.chain(of_swap).filter(|name| !name.is_empty() && !found.contains_key(name)).collect();
    let read =
        async |name: String| volumes.get_opt(&name).await.map_err(Error::request("get the PersistentVolume"));
    let read: Vec<_> = stream::iter(missing).map(read).buffer_unordered(PARALLEL_READS).try_collect().await?;
    found.extend(read.into_iter().flatten().map(|volume| (volume.name_any(), volume)));
    Ok(found.into_values().collect())
}

/// The snapshots of the swap that volumes can still be made from.
async fn usable_snapshots(client: &Client, namespace: &str, swap: &Swap) -> Result<BTreeSet<String>> {
    let snapshots: Api<VolumeSnapshot> = Api::namespaced(client.clone(), namespace);
    let contents: Api<VolumeSnapshotContent> = Api::all(client.clone());
    let wanted = swap.volumes.iter().filter(|volume| volume.restored.is_none());
    let wanted: BTreeSet<_> =
        wanted.filter_map(|volume| Some((volume.snapshot.clone()?, volume.snapshot_uid.clone()))).collect();
    let look = async |(name, uid): (String, Option<String>)| {
        let found = snapshots.get_opt(&name).await.map_err(Error::request("get the VolumeSnapshot"))?;
        let is_it = |found: &VolumeSnapshot| {
            found.metadata.deletion_timestamp.is_none() && (uid.is_none() || found.metadata.uid == uid)
        };
        let Some(found) = found.filter(is_it) else {
            return Ok(None);
        };
        let content = found.status.and_then(|status| status.bound_volume_snapshot_content_name);
        let Some(content) = content else { return Ok(None) };
        let content = contents.get_metadata_opt(&content).await;
        let content = content.map_err(Error::request("get the VolumeSnapshotContent"))?;
        Ok::<_, Error>(content.map(|_| name))
    };
    let found: Vec<_> = stream::iter(wanted).map(look).buffer_unordered(PARALLEL_READS).try_collect().await?;
    Ok(found.into_iter().flatten().collect())
}
