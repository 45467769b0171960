//! A pod that runs one shell script to its end.

use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use super::Namespace;
use super::pod::run_pod;

/// Runs `script` in a pod called `name`, waits for its end and returns what it printed.
///
/// # Errors
/// When the pod cannot be made, does not end within a minute, or the script fails; the text has its output.
pub async fn run_shell(ns: &Namespace, name: &str, script: &str) -> Result<String> {
    let pod = json!({
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
    });
    run_pod(ns, &serde_json::from_value(pod)?, Duration::from_mins(1)).await
}
