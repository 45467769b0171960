//! Clients of a cluster by its kubeconfig file.

use std::path::Path;

use anyhow::{Context, Result};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

/// A client by a kubeconfig file; it retries requests that the API server turned away.
///
/// # Errors
/// When the file cannot be used. An unreachable API server shows at the first request.
pub async fn client(kubeconfig: &Path) -> Result<Client> {
    Client::try_from(config(kubeconfig).await?).context("make the client")
}

/// How to reach a cluster by a kubeconfig file.
///
/// # Errors
/// When the file cannot be used.
pub(crate) async fn config(kubeconfig: &Path) -> Result<Config> {
    let file = Kubeconfig::read_from(kubeconfig)
        .with_context(|| format!("read the kubeconfig {}", kubeconfig.display()))?;
    Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
        .await
        .with_context(|| format!("use the kubeconfig {}", kubeconfig.display()))
}
