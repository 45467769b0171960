//! A `StatefulSetBackupPolicy` under test: made, changed, watched, and what it makes.
//!
//! It is cluster-scoped, so it is named after the test's namespace, which also owns it: it goes with the namespace.

use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, Resource};
use serde_json::{Value, json};
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::conditions;
use sts_backup_api::names::policy_backup_name;
use sts_backup_api::policy::{StatefulSetBackupPolicy, StatefulSetBackupPolicyStatus};

use super::{Backup, Namespace};
use crate::condition::{await_condition, await_deleted, await_event};

/// The agent looks at changes twice a second; the rest is for a busy machine.
const TIMEOUT: Duration = Duration::from_mins(1);

/// Where Events about objects without a namespace are.
const EVENTS: &str = "default";

/// A schedule that is never due in a test.
pub const NEVER: &str = "0 0 29 2 *";

/// A policy.
#[derive(Clone)]
pub struct Policy {
    ns: Namespace,
    name: String,
}

impl Policy {
    /// Creates the policy `<namespace>-<suffix>` with that spec. Where it has no `namespaceSelector`, it selects the
    /// test's namespace alone.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn write(ns: &Namespace, suffix: &str, spec: &Value) -> Result<Self> {
        let policy = Self { ns: ns.clone(), name: format!("{}-{suffix}", ns.name()) };
        let mut object = manifest(ns, &policy.name, spec);
        object["metadata"]["ownerReferences"] = json!([ns.owner_reference()?]);
        let object: StatefulSetBackupPolicy = serde_json::from_value(object)?;
        let created = policy.api().create(&PostParams::default(), &object).await;
        created.with_context(|| format!("create the StatefulSetBackupPolicy {}", policy.name))?;
        Ok(policy)
    }

    /// Its API.
    #[must_use]
    pub fn api(&self) -> Api<StatefulSetBackupPolicy> {
        Api::all(self.ns.cluster().client())
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Changes its spec by a merge patch.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn change(&self, spec: &Value) -> Result<()> {
        let patch = Patch::Merge(json!({ "spec": spec }));
        self.api().patch(&self.name, &PatchParams::default(), &patch).await?;
        Ok(())
    }

    /// Waits until its status is as wanted, and speaks of its newest spec.
    ///
    /// # Errors
    /// When it is not in time; the text has the state at the end.
    pub async fn await_status(
        &self,
        what: &str,
        wanted: impl Fn(&StatefulSetBackupPolicyStatus) -> bool,
    ) -> Result<StatefulSetBackupPolicyStatus> {
        let is_wanted = |policy: &StatefulSetBackupPolicy| {
            let status = policy.status.as_ref();
            let status = status.filter(|status| status.observed_generation == policy.metadata.generation);
            status.is_some_and(&wanted)
        };
        let found = await_condition(&self.api(), &self.name, what, TIMEOUT, is_wanted).await?;
        Ok(found.status.unwrap_or_default())
    }

    /// Waits until so many `StatefulSets` are selected and so many of these are protected.
    ///
    /// # Errors
    /// When it is not so in time.
    pub async fn await_counts(&self, matched: i64, protected: i64) -> Result<StatefulSetBackupPolicyStatus> {
        let what = format!("at {protected} of {matched} protected");
        self.await_status(&what, |status| (status.matched, status.protected) == (matched, protected)).await
    }

    /// Waits until one of its conditions has that status and reason.
    ///
    /// # Errors
    /// When it has not in time.
    pub async fn await_condition(&self, type_: &str, status: &str, reason: &str) -> Result<Condition> {
        let is_so = |condition: &Condition| condition.status == status && condition.reason == reason;
        let found = |found: &StatefulSetBackupPolicyStatus| {
            conditions::find(&found.conditions, type_).filter(|condition| is_so(condition)).cloned()
        };
        let what = format!("{type_}={status} ({reason})");
        let status = self.await_status(&what, |status| found(status).is_some()).await?;
        found(&status).context("the condition was there")
    }

    /// Waits until an Event of that reason was published about it, and returns its text.
    ///
    /// # Errors
    /// When none is in time.
    pub async fn await_event(&self, reason: &str) -> Result<String> {
        let events: Api<Event> = Api::namespaced(self.ns.cluster().client(), EVENTS);
        let event = await_event(&events, &self.name, reason, TIMEOUT).await?;
        event.message.context("an Event has a message")
    }

    /// The name of its backup of a `StatefulSet`.
    #[must_use]
    pub fn backup_name(&self, set: &str) -> String {
        policy_backup_name(&self.name, set)
    }

    /// Waits until its backup of a `StatefulSet` of the test's namespace is as wanted.
    ///
    /// # Errors
    /// When it is not in time.
    pub async fn await_backup(
        &self,
        set: &str,
        what: &str,
        wanted: impl Fn(&StatefulSetBackup) -> bool,
    ) -> Result<(Backup, StatefulSetBackup)> {
        let name = self.backup_name(set);
        let found = await_condition(&self.ns.api(), &name, what, TIMEOUT, wanted).await?;
        Ok((Backup::existing(&self.ns, &name), found))
    }

    /// Waits until a backup is gone.
    ///
    /// # Errors
    /// When it is not in time.
    pub async fn await_backup_gone(&self, backup: &StatefulSetBackup) -> Result<()> {
        await_deleted(&self.ns.api(), backup, TIMEOUT).await
    }

    /// Deletes it, and waits until it is gone; the garbage collector takes what it made.
    ///
    /// # Errors
    /// When it is not in time.
    pub async fn remove(&self) -> Result<()> {
        let object = self.api().get(&self.name).await?;
        self.api().delete(&self.name, &DeleteParams::default()).await?;
        await_deleted(&self.api(), &object, TIMEOUT).await
    }
}

/// The manifest of a policy. Where the spec has no `namespaceSelector`, it selects the test's namespace alone.
#[must_use]
pub fn manifest(ns: &Namespace, name: &str, spec: &Value) -> Value {
    let mut spec = spec.clone();
    if spec.is_object() && spec.get("namespaceSelector").is_none() {
        spec["namespaceSelector"] = json!({ "matchLabels": { "kubernetes.io/metadata.name": ns.name() } });
    }
    json!({
        "apiVersion": StatefulSetBackupPolicy::api_version(&()),
        "kind": StatefulSetBackupPolicy::kind(&()),
        "metadata": { "name": name },
        "spec": spec,
    })
}

/// Creates a `StatefulSet` with a claim template and these labels, and without pods.
///
/// # Errors
/// When the API server refuses it.
pub async fn create_idle_set(ns: &Namespace, name: &str, labels: &Value) -> Result<()> {
    let claim = json!({
        "metadata": { "name": "data" },
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "stsb-e2e",
            "resources": { "requests": { "storage": "16Mi" } },
        },
    });
    let set = json!({
        "metadata": { "name": name, "labels": labels },
        "spec": {
            "replicas": 0,
            "selector": { "matchLabels": { "app": name } },
            "template": {
                "metadata": { "labels": { "app": name } },
                "spec": { "containers": [{ "name": "main", "image": ns.cluster().images().shell }] },
            },
            "volumeClaimTemplates": [claim],
        },
    });
    let sets: Api<StatefulSet> = ns.api();
    let created = sets.create(&PostParams::default(), &serde_json::from_value(set)?).await;
    created.with_context(|| format!("create the StatefulSet {name}"))?;
    Ok(())
}

/// Changes labels and annotations of a `StatefulSet` by a merge patch; null removes one.
///
/// # Errors
/// When the API server refuses it.
pub async fn change_set(ns: &Namespace, name: &str, metadata: &Value) -> Result<()> {
    let patch = Patch::Merge(json!({ "metadata": metadata }));
    ns.api::<StatefulSet>().patch(name, &PatchParams::default(), &patch).await?;
    Ok(())
}
