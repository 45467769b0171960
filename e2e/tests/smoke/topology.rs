//! A claim of a class that waits for its first consumer needs no pod: naming its node in an annotation, as the
//! scheduler does, is enough, and a wrong node does no harm.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Event, Node, PersistentVolume, PersistentVolumeClaim};
use kube::api::{ListParams, PostParams};
use kube::{Api, ResourceExt};
use sts_backup_e2e::condition::{await_condition, await_event, pvc_bound, snapshot_ready};
use sts_backup_e2e::csi::TOPOLOGY_KEY;
use sts_backup_e2e::kit::claim::{empty_claim, restored_claim};
use sts_backup_e2e::kit::class::{Binding, create_storage_class};
use sts_backup_e2e::kit::snapshot::{await_snapshot, take_snapshot};
use sts_backup_e2e::kit::{Cluster, with_temp_namespace};

const TIMEOUT: Duration = Duration::from_mins(1);

/// Set by the scheduler for csi-provisioner, which removes it when the node is of no use.
const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_restored_claim_that_waits_for_a_consumer_is_bound_by_naming_its_node() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "topology", async |ns| {
        let create = PostParams::default();
        let claims: Api<PersistentVolumeClaim> = ns.api();
        claims.create(&create, &empty_claim("data", "stsb-e2e", "16Mi")).await?;
        await_condition(&claims, "data", "bound", TIMEOUT, pvc_bound).await?;
        take_snapshot(ns, "snapshot", "data", "stsb-e2e").await?;
        await_snapshot(ns, "snapshot", "ready", snapshot_ready).await?;
        let class = create_storage_class(ns, Binding::WaitForFirstConsumer, &[]).await?;
        let restored = |name: &str, node: &str| {
            let mut claim = restored_claim(name, "snapshot", &class, "16Mi");
            claim.annotations_mut().insert(SELECTED_NODE.to_owned(), node.to_owned());
            claim
        };

        let nodes: Api<Node> = Api::all(cluster.client());
        let node = nodes.list(&ListParams::default()).await?.items.pop().context("a cluster has a node")?;
        let node = node.name_any();
        claims.create(&create, &restored("restored", &node)).await?;
        let claim = await_condition(&claims, "restored", "bound", TIMEOUT, pvc_bound).await?;
        let volume = claim.spec.and_then(|spec| spec.volume_name).context("a bound claim has a volume")?;
        let volumes: Api<PersistentVolume> = Api::all(cluster.client());
        let only_on = nodes_of(&volumes.get(&volume).await?);
        ensure!(only_on == [node.as_str()], "the volume is tied to the nodes {only_on:?}, not to {node}");

        claims.create(&create, &restored("stray", "no-such-node")).await?;
        let event = await_event(&ns.api::<Event>(), "stray", "ProvisioningFailed", TIMEOUT).await?;
        ensure!(event.message.iter().any(|said| said.contains("no-such-node")), "{:?}", event.message);
        await_condition(&claims, "stray", "without a node", TIMEOUT, |claim| {
            !claim.annotations().contains_key(SELECTED_NODE) && !pvc_bound(claim)
        })
        .await?;
        Ok(())
    })
    .await
}

/// The nodes that the volume's affinity admits by the driver's topology.
fn nodes_of(volume: &PersistentVolume) -> Vec<String> {
    let affinity = volume.spec.as_ref().and_then(|spec| spec.node_affinity.as_ref());
    let terms = affinity.and_then(|affinity| affinity.required.as_ref());
    let terms = terms.iter().flat_map(|terms| &terms.node_selector_terms);
    let expressions = terms.flat_map(|term| term.match_expressions.iter().flatten());
    let of_the_driver = expressions.filter(|expression| expression.key == TOPOLOGY_KEY);
    of_the_driver.flat_map(|expression| expression.values.iter().flatten()).cloned().collect()
}
