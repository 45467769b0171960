//! The harness's clusters are clusters of their own.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::{ListParams, PostParams};
use sts_backup_e2e::kit::shell::run_shell;
use sts_backup_e2e::kit::{Cluster, with_temp_namespaces};

/// Marks the one object that only one cluster may have.
const LABEL: &str = "e2e.sts-backup.io/only-in";

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn two_clusters_run_at_once_and_do_not_share_objects() -> Result<()> {
    let one = Cluster::connect("stsb-e2e-1").await?;
    let two = Cluster::connect("stsb-e2e-2").await?;
    ensure!(identity(&one).await? != identity(&two).await?, "both kubeconfigs lead to the same cluster");

    with_temp_namespaces(&[&one, &two], "clusters", async |namespaces| {
        let (ns_one, ns_two) = (&namespaces[0], &namespaces[1]);
        let config_maps: Api<ConfigMap> = ns_one.api();
        config_maps.create(&PostParams::default(), &labelled(ns_one.name())).await?;
        ensure!(labelled_objects(&one, ns_one.name()).await? == 1, "the ConfigMap is not in its cluster");
        ensure!(labelled_objects(&two, ns_one.name()).await? == 0, "the ConfigMap is in both clusters");

        let (said_in_one, said_in_two) = tokio::try_join!(
            run_shell(ns_one, "hello", "echo from one"),
            run_shell(ns_two, "hello", "echo from two"),
        )?;
        ensure!(said_in_one == "from one\n", "the pod in the first cluster said {said_in_one:?}");
        ensure!(said_in_two == "from two\n", "the pod in the second cluster said {said_in_two:?}");
        Ok(())
    })
    .await
}

/// The uid of `kube-system`, which by convention tells clusters apart.
async fn identity(cluster: &Cluster) -> Result<String> {
    let namespaces: Api<Namespace> = Api::all(cluster.client());
    let namespace = namespaces.get("kube-system").await.with_context(|| format!("ask {}", cluster.name()))?;
    namespace.metadata.uid.context("every object has a uid")
}

fn labelled(value: &str) -> ConfigMap {
    ConfigMap {
        metadata: ObjectMeta {
            name: Some("only-here".to_owned()),
            labels: Some([(LABEL.to_owned(), value.to_owned())].into()),
            ..ObjectMeta::default()
        },
        ..ConfigMap::default()
    }
}

async fn labelled_objects(cluster: &Cluster, value: &str) -> Result<usize> {
    let config_maps: Api<ConfigMap> = Api::all(cluster.client());
    let selected = ListParams::default().labels(&format!("{LABEL}={value}"));
    Ok(config_maps.list(&selected).await?.items.len())
}
