//! Finds a cluster that the harness made and connects to it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use kube::Client;

use crate::harness::images::Images;
use crate::harness::paths::Paths;
use crate::kubeconfig::config;

/// A connection to one cluster, as its administrator. Clones share the connections.
///
/// It belongs to the tokio runtime it was made in: each test connects for itself.
#[derive(Clone)]
pub struct Cluster {
    name: String,
    kubeconfig: PathBuf,
    images: Images,
    client: Client,
    exec_client: Client,
}

impl Cluster {
    /// Connects to a cluster by the name the harness gave it, such as `stsb-e2e-1`.
    ///
    /// # Errors
    /// When there is no such cluster or its kubeconfig is unusable. An unreachable API server shows at the
    /// first request.
    pub async fn connect(name: &str) -> Result<Self> {
        let paths = Paths::find()?;
        let kubeconfig = paths.kubeconfig(name);
        if !kubeconfig.exists() {
            bail!("no cluster {name}: run cargo e2e up --clusters 2, or run the tests by cargo e2e test");
        }
        Self::by_kubeconfig(name, Images::load(&paths)?, kubeconfig).await
    }

    /// The same cluster, reached by another kubeconfig.
    ///
    /// # Errors
    /// When the kubeconfig is unusable.
    pub async fn through(&self, kubeconfig: &Path) -> Result<Self> {
        Self::by_kubeconfig(&self.name, self.images.clone(), kubeconfig.to_owned()).await
    }

    async fn by_kubeconfig(name: &str, images: Images, kubeconfig: PathBuf) -> Result<Self> {
        let config = config(&kubeconfig).await?;
        // A command must run once: kube's retry after 429, 503 or 504 could run it a second time.
        let mut exec_config = config.clone();
        exec_config.default_retry = false;
        Ok(Self {
            name: name.to_owned(),
            images,
            kubeconfig,
            client: Client::try_from(config).context("make the client")?,
            exec_client: Client::try_from(exec_config).context("make the client for exec")?,
        })
    }

    /// The name the harness gave the cluster.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file by which programs reach it, as its administrator.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Where the kit keeps files about it.
    pub(super) fn dir(&self) -> Result<PathBuf> {
        Ok(Paths::find()?.cluster(&self.name))
    }

    /// The images that its nodes hold.
    #[must_use]
    pub fn images(&self) -> &Images {
        &self.images
    }

    /// For everything but exec; retries requests that the API server turned away.
    #[must_use]
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// For what another user does, who may do what roles grant them.
    pub(super) async fn client_as(&self, user: &str) -> Result<Client> {
        let mut config = config(&self.kubeconfig).await?;
        config.auth_info.impersonate = Some(user.to_owned());
        Client::try_from(config).context("make the client of a user")
    }

    /// For exec, which must never be retried.
    pub(super) fn exec_client(&self) -> Client {
        self.exec_client.clone()
    }
}
