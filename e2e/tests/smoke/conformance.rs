//! The test driver is a CSI driver: the project that defines what one must do says so.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use sts_backup_e2e::kit::pod::run_pod;
use sts_backup_e2e::kit::{Cluster, with_temp_namespace};

/// csi-sanity skips what a driver does not claim to offer: fewer mean that the driver lost something.
const LEAST_PASSED: u32 = 45;

/// csi-sanity runs beside a driver of its own: it counts what the driver lists, which other tests would change.
#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn the_test_driver_passes_csi_sanity() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "conformance", async |ns| {
        let images = cluster.images();
        let pod = json!({
            "metadata": { "name": "csi-sanity" },
            "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 10,
                "initContainers": [{
                    "name": "driver",
                    "restartPolicy": "Always",
                    "image": images.csi_driver,
                    "imagePullPolicy": "Never",
                    "args": ["--pool-dir=/pool", "--csi-socket=/scratch/csi.sock", "--node-name=sanity"],
                    "securityContext": { "privileged": true },
                    "startupProbe": { "exec": { "command": ["test", "-S", "/scratch/csi.sock"] }, "periodSeconds": 1 },
                    "volumeMounts": [
                        { "name": "scratch", "mountPath": "/scratch" },
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
                        "--csi.endpoint=unix:///scratch/csi.sock",
                        "--csi.mountdir=/scratch/target",
                        "--csi.stagingdir=/scratch/staging",
                    ],
                    "volumeMounts": [{ "name": "scratch", "mountPath": "/scratch" }],
                }],
                "volumes": [{ "name": "scratch", "emptyDir": {} }, { "name": "pool", "emptyDir": {} }],
            },
        });
        let log = run_pod(ns, &serde_json::from_value(pod)?, Duration::from_mins(2)).await?;
        ensure!(log.contains("| 0 Failed |"), "csi-sanity says:\n{log}");
        let passed = log.split_once(" Passed |").and_then(|(before, _)| before.rsplit(' ').next());
        let passed: u32 = passed.and_then(|count| count.parse().ok()).context("csi-sanity ran nothing")?;
        println!("csi-sanity: {passed} passed");
        ensure!(passed >= LEAST_PASSED, "only {passed} tests of csi-sanity ran:\n{log}");
        Ok(())
    })
    .await
}
