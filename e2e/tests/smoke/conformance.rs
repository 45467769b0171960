//! The test driver is a CSI driver: the project that defines what one must do says so.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{LogParams, PostParams};
use serde_json::json;
use sts_backup_e2e::kit::condition::{await_condition, pod_finished};
use sts_backup_e2e::kit::{Cluster, with_temp_namespace};

/// csi-sanity runs beside a driver of its own: it counts what the driver lists, which other tests would change.
#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn the_test_driver_passes_csi_sanity() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "conformance", async |ns| {
        let images = cluster.images();
        let pod: Pod = serde_json::from_value(json!({
            "metadata": { "name": "csi-sanity" },
            "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 10,
                "initContainers": [{
                    "name": "driver",
                    "restartPolicy": "Always",
                    "image": images.csi_driver,
                    "imagePullPolicy": "Never",
                    "args": ["--pool-dir=/pool", "--csi-socket=/work/csi.sock", "--node-name=sanity"],
                    "securityContext": { "privileged": true },
                    "startupProbe": { "exec": { "command": ["test", "-S", "/work/csi.sock"] }, "periodSeconds": 1 },
                    "volumeMounts": [
                        { "name": "work", "mountPath": "/work" },
                        { "name": "pool", "mountPath": "/pool" },
                    ],
                }],
                "containers": [{
                    "name": "csi-sanity",
                    "image": images.csi_sanity,
                    "imagePullPolicy": "Never",
                    "command": [
                        "csi-sanity",
                        "--ginkgo.no-color",
                        "--csi.endpoint=unix:///work/csi.sock",
                        "--csi.mountdir=/work/target",
                        "--csi.stagingdir=/work/staging",
                    ],
                    "volumeMounts": [{ "name": "work", "mountPath": "/work" }],
                }],
                "volumes": [{ "name": "work", "emptyDir": {} }, { "name": "pool", "emptyDir": {} }],
            },
        }))?;
        let pods: Api<Pod> = ns.api();
        pods.create(&PostParams::default(), &pod).await.context("create the pod csi-sanity")?;
        let pod = await_condition(&pods, "csi-sanity", "finished", Duration::from_mins(2), pod_finished).await?;
        let of_the_test = LogParams { container: Some("csi-sanity".to_owned()), ..LogParams::default() };
        let log = pods.logs("csi-sanity", &of_the_test).await?;
        let succeeded = pod.status.and_then(|status| status.phase).as_deref() == Some("Succeeded");
        ensure!(succeeded && log.contains("| 0 Failed |"), "csi-sanity says:\n{log}");
        let summary = log.lines().find(|line| line.starts_with("Ran ")).context("csi-sanity ran nothing")?;
        println!("csi-sanity: {summary}");
        Ok(())
    })
    .await
}
