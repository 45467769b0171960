//! helm, as the harness built it, with homes of its own: it neither reads nor changes the user's.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::Cluster;
use crate::harness::paths::{Paths, e2e_dir};

/// The folder of the agent's chart.
#[must_use]
pub fn agent_chart() -> PathBuf {
    e2e_dir().with_file_name("charts").join("sts-backup-agent")
}

/// The folder of the hub's chart.
#[must_use]
pub fn hub_chart() -> PathBuf {
    e2e_dir().with_file_name("charts").join("sts-backup-hub")
}

/// Runs helm with `arguments`, on a cluster where one is given, with `values` over the chart's, and returns what it
/// printed.
///
/// # Errors
/// When helm fails; the text has its words.
pub async fn helm(cluster: Option<&Cluster>, arguments: &[&str], values: Option<&Value>) -> Result<String> {
    let paths = Paths::find()?;
    let mut helm = Command::new(paths.program("helm"));
    for home in ["CACHE", "CONFIG", "DATA"] {
        helm.env(format!("HELM_{home}_HOME"), paths.state().join("helm").join(home.to_lowercase()));
    }
    // Without a cluster it must not find the user's.
    helm.env("KUBECONFIG", cluster.map_or("/dev/null".as_ref(), Cluster::kubeconfig));
    helm.args(arguments).args(values.map(|_| "--values=-"));
    helm.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = helm.spawn().context("start helm: run cargo e2e up")?;
    let mut stdin = child.stdin.take().context("helm has no stdin")?;
    let values = values.map(Value::to_string).unwrap_or_default();
    // One that ends early closes the pipe; its exit status says why.
    let _ = stdin.write_all(values.as_bytes()).await;
    drop(stdin);
    let output = child.wait_with_output().await?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("helm {}: {}{stdout}", arguments.join(" "), stderr.trim_end());
    }
    Ok(stdout)
}
