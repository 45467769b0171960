//! What the test driver really holds, whatever the API says.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, ResourceExt};

use super::Cluster;
use super::exec::exec;
use crate::condition::pod_ready;

/// Where the harness runs the driver, and the pod's parts as e2e/manifests/csi-driver.yaml has them.
const NAMESPACE: &str = "sts-backup-e2e";
const SELECTOR: &str = "app=csi-driver";
const CONTAINER: &str = "driver";
const FOLDERS: [&str; 2] = ["/var/lib/sts-backup-csi/mnt/volumes", "/var/lib/sts-backup-csi/mnt/snapshots"];

/// The handles of all volumes and snapshots that the driver's storage has.
///
/// # Errors
/// When the driver does not run or cannot be asked.
pub async fn backend_handles(cluster: &Cluster) -> Result<BTreeSet<String>> {
    let pods: Api<Pod> = Api::namespaced(cluster.client(), NAMESPACE);
    let pods = pods.list(&ListParams::default().labels(SELECTOR)).await.context("find the driver's pod")?;
    let pod = pods.iter().find(|pod| pod_ready(pod)).context("no pod of the test CSI driver is ready")?;
    let list = ["find", FOLDERS[0], FOLDERS[1], "-mindepth", "1", "-maxdepth", "1"];
    let found = exec(cluster, NAMESPACE, &pod.name_any(), CONTAINER, &list).await?.success()?;
    Ok(found.lines().filter_map(|path| Some(path.rsplit_once('/')?.1.to_owned())).collect())
}
