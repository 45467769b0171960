//! What the cluster remembers of the hub: a `ConfigMap` in the agent's namespace, which people can read, and in which they
//! accept what the agent holds back.

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use sts_backup_api::names::{ACCEPT_ANNOTATION, FIELD_MANAGER};

use super::guard::Obeyed;
use crate::error::{Error, Result};

/// The `ConfigMap`'s name.
pub(super) const NAME: &str = "sts-backup-hub-link";

/// Where it is kept.
#[derive(Clone, Debug)]
pub(super) struct State {
    maps: Api<ConfigMap>,
}

impl State {
    pub(super) fn new(client: Client, namespace: &str) -> Self {
        Self { maps: Api::namespaced(client, namespace) }
    }

    pub(super) fn maps(&self) -> Api<ConfigMap> {
        self.maps.clone()
    }

    pub(super) async fn read(&self) -> Result<Obeyed> {
        let found = self.maps.get_opt(NAME).await.map_err(Error::request("get the ConfigMap of the link"))?;
        Ok(found.as_ref().map(obeyed).unwrap_or_default())
    }

    /// Notes what the cluster has, and what it holds back.
    pub(super) async fn write(&self, obeyed: &Obeyed, outcome: &str, detail: &str) -> Result<()> {
        let data: Value = json!({
            "store": obeyed.store,
            "revision": obeyed.revision.to_string(),
            "outcome": outcome,
            "detail": detail,
        });
        let map = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": NAME }, "data": data,
        });
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let written = self.maps.patch(NAME, &params, &Patch::Apply(map)).await;
        written.map_err(Error::request("apply the ConfigMap of the link"))?;
        Ok(())
    }
}

/// What a `ConfigMap` remembers.
pub(super) fn obeyed(map: &ConfigMap) -> Obeyed {
    let data = |key: &str| map.data.as_ref().and_then(|data| data.get(key)).cloned().unwrap_or_default();
    Obeyed {
        store: data("store"),
        revision: data("revision").parse().unwrap_or(0),
        accepted: map.annotations().get(ACCEPT_ANNOTATION).cloned(),
    }
}
