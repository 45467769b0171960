//! A pod that runs one shell script to its end.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{LogParams, PostParams};
use serde_json::json;

use super::Namespace;
use super::condition::{await_condition, pod_finished};

/// Runs `script` in a pod called `name`, waits for its end and returns what it printed.
///
/// # Errors
/// When the pod cannot be made, does not end within a minute, or the script fails; the text has its output.
pub async fn run_shell(ns: &Namespace, name: &str, script: &str) -> Result<String> {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": { "name": name },
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": 1,
            "securityContext": {
                "runAsNonRoot": true,
                "runAsUser": 65534,
                "runAsGroup": 65534,
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            "containers": [{
                "name": "shell",
                "image": ns.cluster().images().shell,
                "imagePullPolicy": "Never",
                "command": ["/bin/sh", "-euc", script],
                "securityContext": {
                    "allowPrivilegeEscalation": false,
                    "readOnlyRootFilesystem": true,
                    "capabilities": { "drop": ["ALL"] },
                },
            }],
        },
    }))?;
    let pods: Api<Pod> = ns.api();
    pods.create(&PostParams::default(), &pod).await.with_context(|| format!("create the pod {name}"))?;
    let pod = await_condition(&pods, name, "finished", Duration::from_mins(1), pod_finished).await?;
    let log =
        pods.logs(name, &LogParams::default()).await.with_context(|| format!("read the log of {name}"))?;
    if pod.status.and_then(|status| status.phase).as_deref() != Some("Succeeded") {
        bail!("the script of the pod {name} failed: {}", log.trim_end());
    }
    Ok(log)
}
