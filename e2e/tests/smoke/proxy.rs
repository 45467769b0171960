//! The proxy before the API server passes everything on but what a test wants to fail.

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::Api;
use kube::api::ListParams;
use sts_backup_e2e::kit::Cluster;
use sts_backup_e2e::kit::backend::backend_handles;
use sts_backup_e2e::kit::proxy::ApiProxy;

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn exec_passes_through_the_proxy_until_a_rule_fails_it() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    let proxy = ApiProxy::start(&cluster).await?;
    let through = cluster.through(proxy.kubeconfig()).await?;
    // It lists pods and runs a command in one.
    backend_handles(&through).await?;

    let pods: Api<Pod> = Api::namespaced(through.client(), "kube-system");
    let config_maps: Api<ConfigMap> = Api::namespaced(through.client(), "kube-system");
    let list = ListParams::default();
    let fault = proxy.fail(|method, uri| (method == "GET" && uri.path().ends_with("/pods")).then_some(500));
    let refused = pods.list(&list).await.expect_err("the rule fails lists of pods");
    ensure!(matches!(&refused, kube::Error::Api(status) if status.code == 500), "{refused}");
    config_maps.list(&list).await?;
    ensure!(fault.hits() == 1, "the rule failed {} requests", fault.hits());
    fault.await_hits(1).await;

    drop(fault);
    pods.list(&list).await?;
    Ok(())
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_client_that_is_told_to_slow_down_tries_again() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    let proxy = ApiProxy::start(&cluster).await?;
    let through = cluster.through(proxy.kubeconfig()).await?;
    let version = through.client();
    let fault = proxy.fail(|_, uri| (uri.path() == "/version").then_some(429));
    let asked = tokio::spawn(async move { version.apiserver_version().await });
    fault.await_hits(1).await;
    drop(fault);
    asked.await??;
    Ok(())
}
