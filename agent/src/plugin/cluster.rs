//! The cluster, as the user's kubeconfig reaches it.

use std::fmt::Debug;

use k8s_openapi::NamespaceResourceScope;
use kube::api::{ApiResource, DynamicObject, ListParams, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use sts_backup_api::backup::StatefulSetBackup;

use super::args::Connection;
use super::error::Error;

/// The field manager of all that the plugin writes.
const FIELD_MANAGER: &str = "kubectl-stsbackup";

/// How many objects one answer of the API server may hold; longer lists come in pages.
const PAGE: u32 = 500;

/// A connection, and the namespace that is meant when none is named.
pub(super) struct Cluster {
    client: Client,
    namespace: String,
    address: String,
}

/// Where to look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// In every namespace.
    All,
    /// In one.
    Namespace(String),
}

impl Scope {
    /// The namespace to put on an error, if there is one.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::All => "any namespace".to_owned(),
            Self::Namespace(namespace) => format!("namespace {namespace}"),
        }
    }
}

impl Cluster {
    /// As kubectl does: `--kubeconfig`, `$KUBECONFIG`, `~/.kube/config`, and inside a pod its own account.
    pub(super) async fn connect(connection: &Connection) -> Result<Self, Error> {
        let Connection { kubeconfig, context, namespace } = connection;
        let mut used = context.clone();
        let config = if kubeconfig.is_none() && context.is_none() {
            used = Kubeconfig::read().ok().and_then(|kubeconfig| kubeconfig.current_context);
            Config::infer().await.map_err(|source| Error::NoCluster { source: Box::new(source) })?
        } else {
            let file = kubeconfig.as_ref().map(|file| file.display().to_string());
            let unusable = |source| Error::Kubeconfig { file: file.clone(), source: Box::new(source) };
            let read = kubeconfig.as_ref().map_or_else(Kubeconfig::read, Kubeconfig::read_from);
            let options = KubeConfigOptions { context: context.clone(), ..KubeConfigOptions::default() };
            let kubeconfig = read.map_err(unusable)?;
            used = used.or_else(|| kubeconfig.current_context.clone());
            Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(unusable)?
        };
        let address = match used {
            Some(context) => format!("context {context}, {}", config.cluster_url),
            None => config.cluster_url.to_string(),
        };
        let namespace = namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).map_err(|source| Error::Client { source: Box::new(source) })?;
        Ok(Self { client, namespace, address })
    }

    /// One that a test stands in for.
    #[cfg(test)]
    pub(super) fn of(client: Client, namespace: &str) -> Self {
        Self { client, namespace: namespace.to_owned(), address: "context test".to_owned() }
    }

    /// Which cluster it is, for people: by the context of the kubeconfig and the API server.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// The namespace that is meant when none is named.
    pub(super) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// All namespaces, or the one that is meant.
    pub(super) fn scope(&self, all_namespaces: bool) -> Scope {
        if all_namespaces { Scope::All } else { Scope::Namespace(self.namespace.clone()) }
    }

    /// For requests of other kinds.
    pub(super) fn client(&self) -> Client {
        self.client.clone()
    }

    /// The objects of a kind there.
    pub(super) fn api<K>(&self, scope: &Scope) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        match scope {
            Scope::All => Api::all(self.client()),
            Scope::Namespace(namespace) => Api::namespaced(self.client(), namespace),
        }
    }

    /// The objects of one of our kinds there, whole: fields that this version does not know are kept.
    pub(super) fn whole<K: Resource<DynamicType = ()>>(&self, scope: &Scope) -> Api<DynamicObject> {
        let resource = ApiResource::erase::<K>(&());
        match scope {
            Scope::All => Api::all_with(self.client(), &resource),
            Scope::Namespace(namespace) => Api::namespaced_with(self.client(), namespace, &resource),
        }
    }

    /// All of [`whole`](Self::whole).
    pub(super) async fn list<K>(&self, scope: &Scope) -> Result<Vec<DynamicObject>, Error>
    where
        K: Resource<DynamicType = ()>,
    {
        let what = format!("list {}s", K::kind(&()));
        let mut objects = list_all(&self.whole::<K>(scope), &ListParams::default(), &what).await?;
        for object in &mut objects {
            // The items of a list come without their kind.
            object.types.get_or_insert_with(kube::core::TypeMeta::resource::<K>);
        }
        Ok(objects)
    }

    /// One object of the namespace that is meant.
    pub(super) async fn get<K>(&self, name: &str) -> Result<K, Error>
    where
        K: Resource<DynamicType = ()> + DeserializeOwned,
    {
        let object = format!("{} {}/{name}", K::kind(&()), self.namespace);
        let found = self.whole::<K>(&self.scope(false)).get(name).await;
        let found = found
            .map_err(|err| Error::of(&format!("read {object}"), Some((&self.namespace, &object)), err))?;
        understand(&found)
    }

    /// The `StatefulSetBackups` there, as [`list`](Self::list) says.
    pub(super) async fn backups(&self, scope: &Scope) -> Result<Vec<DynamicObject>, Error> {
        self.list::<StatefulSetBackup>(scope).await
    }

    /// One `StatefulSetBackup` of the namespace that is meant.
    pub(super) async fn backup(&self, name: &str) -> Result<StatefulSetBackup, Error> {
        self.get(name).await
    }
}

/// How the plugin changes objects.
pub(super) fn patch_params() -> PatchParams {
    PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() }
}

/// The object as this version knows it.
pub(super) fn understand<K>(object: &DynamicObject) -> Result<K, Error>
where
    K: Resource<DynamicType = ()> + DeserializeOwned,
{
    serde_json::to_value(object).and_then(serde_json::from_value).map_err(|source| {
        let namespace = object.namespace().unwrap_or_default();
        Error::Unreadable { object: format!("{} {namespace}/{}", K::kind(&()), object.name_any()), source }
    })
}

/// Every object, page by page.
pub(super) async fn list_all<K>(api: &Api<K>, how: &ListParams, what: &str) -> Result<Vec<K>, Error>
where
    K: Clone + DeserializeOwned + Debug,
{
    let mut objects = Vec::new();
    let mut page = ListParams { limit: Some(PAGE), ..how.clone() };
    loop {
        let listed = api.list(&page).await.map_err(|err| Error::of(what, None, err))?;
        objects.extend(listed.items);
        match listed.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page.continue_token = Some(token),
            None => return Ok(objects),
        }
    }
}
