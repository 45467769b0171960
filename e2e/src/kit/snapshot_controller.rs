//! A cluster without its snapshot-controller for a while.

use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use super::Cluster;
use crate::condition::{await_condition, await_none, deployment_available};

/// As e2e/manifests/snapshot-controller.yaml has them.
const NAMESPACE: &str = "sts-backup-e2e";
const NAME: &str = "snapshot-controller";

/// Images are loaded already.
const TIMEOUT: Duration = Duration::from_mins(1);

/// The snapshot-controller is away until [`end`](Self::end), or until this is dropped.
#[must_use = "the outage ends when this is dropped"]
pub struct Outage {
    cluster: Option<Cluster>,
}

impl Outage {
    /// Takes the snapshot-controller away: no snapshot is cut any more. The test is alone in the cluster.
    ///
    /// # Errors
    /// When it does not go in time.
    pub async fn begin(cluster: &Cluster) -> Result<Self> {
        let outage = Self { cluster: Some(cluster.clone()) };
        scale(cluster, 0).await?;
        let pods: Api<Pod> = Api::namespaced(cluster.client(), NAMESPACE);
        let is_its = |pod: &Pod| {
            pod.metadata.labels.as_ref().and_then(|labels| labels.get("app")).is_some_and(|app| app == NAME)
        };
        await_none(&pods, "pods of the snapshot-controller", TIMEOUT, is_its).await?;
        Ok(outage)
    }

    /// Brings it back.
    ///
    /// # Errors
    /// When it does not come in time.
    pub async fn end(mut self) -> Result<()> {
        match self.cluster.take() {
            Some(cluster) => restore(&cluster).await,
            None => Ok(()),
        }
    }
}

impl Drop for Outage {
    /// For a test that failed: all that come after it need the snapshot-controller, the removal of its namespace too.
    fn drop(&mut self) {
        let Some(cluster) = self.cluster.take() else { return };
        // A client belongs to the runtime it was made in.
        let restored = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async { restore(&Cluster::connect(cluster.name()).await?).await })
        });
        match restored.join() {
            Ok(Ok(())) => {}
            Ok(Err(err)) => eprintln!("the snapshot-controller is not back: {err:#}"),
            Err(_panic) => eprintln!("the snapshot-controller is not back"),
        }
    }
}

/// Brings it back where an outage was killed, and waits until it runs.
///
/// # Errors
/// When it does not come in time.
pub(crate) async fn restore(cluster: &Cluster) -> Result<()> {
    scale(cluster, 1).await?;
    let deployments = deployments(cluster);
    await_condition(&deployments, NAME, "available", TIMEOUT, deployment_available).await?;
    Ok(())
}

async fn scale(cluster: &Cluster, replicas: i32) -> Result<()> {
    let patch = Patch::Merge(json!({ "spec": { "replicas": replicas } }));
    let scaled = deployments(cluster).patch(NAME, &PatchParams::default(), &patch).await;
    scaled.with_context(|| format!("scale {NAME} to {replicas}"))?;
    Ok(())
}

fn deployments(cluster: &Cluster) -> Api<Deployment> {
    Api::namespaced(cluster.client(), NAMESPACE)
}
