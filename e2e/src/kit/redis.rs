//! A `StatefulSet` of independent Redis servers with the append-only file.
//!
//! Its claims are called `data-<name>-<ordinal>`, as every `StatefulSet`'s with the template `data`.

use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Service;
use kube::Api;
use kube::api::PostParams;
use serde_json::{Value, json};

use super::Namespace;
use super::exec::exec;
use super::hooks::Hooks;
use super::poll::until;
use crate::condition::{await_condition, statefulset_ready};

/// The container in each pod.
const CONTAINER: &str = "redis";

/// Where the volume is mounted, and what Redis takes for its working folder.
const DATA_PATH: &str = "/data";

/// Where `redis-cli` looks by itself. Nothing outside of the pod has a reason to come in.
const LOOPBACK: &str = "127.0.0.1";

/// `nobody` in the image.
const USER_ID: i64 = 65534;

/// A start takes a second; the rest is for a busy machine.
const READY_TIMEOUT: Duration = Duration::from_mins(2);

/// `replicas` servers that know nothing of each other, each with a volume of its own.
#[derive(Clone)]
pub struct Redis {
    ns: Namespace,
    name: String,
    replicas: i32,
}

impl Redis {
    /// One server, with a volume of 64 MiB of the class `stsb-e2e`.
    #[must_use]
    pub fn new(ns: &Namespace, name: &str) -> Self {
        Self { ns: ns.clone(), name: name.to_owned(), replicas: 1 }
    }

    /// How many servers.
    #[must_use]
    pub fn replicas(self, replicas: i32) -> Self {
        Self { replicas, ..self }
    }

    /// Creates the `StatefulSet` and its headless `Service` and waits until every server answers.
    ///
    /// # Errors
    /// When an object cannot be created (one of that name exists), or a server is not ready in time.
    pub async fn deploy(&self) -> Result<()> {
        let Self { ns, name, replicas } = self;
        let create = PostParams::default();
        let service: Service = serde_json::from_value(json!({
            "metadata": { "name": name },
            "spec": {
                "clusterIP": "None",
                "selector": { "app": name },
                "ports": [{ "name": "redis", "port": 6379 }],
            },
        }))?;
        let services: Api<Service> = ns.api();
        services.create(&create, &service).await.with_context(|| format!("create the Service {name}"))?;
        let sets: Api<StatefulSet> = ns.api();
        let set = serde_json::from_value(stateful_set(name, *replicas, &ns.cluster().images().redis))?;
        sets.create(&create, &set).await.with_context(|| format!("create the StatefulSet {name}"))?;
        await_condition(&sets, name, "ready", READY_TIMEOUT, statefulset_ready(*replicas)).await?;
        Ok(())
    }

    /// The pod of one server.
    #[must_use]
    pub fn pod_name(&self, ordinal: u32) -> String {
        format!("{}-{ordinal}", self.name)
    }

    /// The claim of one server.
    #[must_use]
    pub fn claim_name(&self, ordinal: u32) -> String {
        format!("data-{}-{ordinal}", self.name)
    }

    /// The documented hooks, with a freeze that ends by itself after so many seconds.
    ///
    /// # Errors
    /// When the page does not have them.
    pub fn freeze_hooks(expires_seconds: u32) -> Result<Hooks> {
        Hooks::documented("Redis")?.expiring_after(expires_seconds)
    }

    /// Sends a command to one server, waits for the answer, and returns it. A write waits for a thaw; a minute
    /// at most.
    ///
    /// # Errors
    /// When `redis-cli` cannot be run, or the server answers with an error.
    pub async fn redis_cli(&self, ordinal: u32, command: &[&str]) -> Result<String> {
        let command = [&["redis-cli", "-e"], command].concat();
        let (cluster, pod) = (self.ns.cluster(), self.pod_name(ordinal));
        let output = exec(cluster, self.ns.name(), &pod, CONTAINER, &command).await?;
        Ok(output.success()?.trim_end().to_owned())
    }

    /// Waits until a client of one server is held up: by a pause, as nothing here uses blocking commands.
    ///
    /// # Errors
    /// When none is within half a minute.
    pub async fn await_blocked_writer(&self, ordinal: u32) -> Result<()> {
        until(&format!("a client of {} is blocked", self.pod_name(ordinal)), async || {
            let clients = self.redis_cli(ordinal, &["INFO", "clients"]).await?;
            Ok(clients.lines().any(|line| line.trim_end() == "blocked_clients:1"))
        })
        .await
    }
}

fn stateful_set(name: &str, replicas: i32, image: &str) -> Value {
    json!({
        "metadata": { "name": name },
        "spec": {
            "replicas": replicas,
            "serviceName": name,
            "podManagementPolicy": "Parallel",
            "selector": { "matchLabels": { "app": name } },
            "template": {
                "metadata": { "labels": { "app": name } },
                "spec": pod_spec(image),
            },
            "volumeClaimTemplates": [{
                "metadata": { "name": "data" },
                "spec": {
                    "accessModes": ["ReadWriteOnce"],
                    "storageClassName": "stsb-e2e",
                    "resources": { "requests": { "storage": "64Mi" } },
                },
            }],
        },
    })
}

fn pod_spec(image: &str) -> Value {
    json!({
        "automountServiceAccountToken": false,
        "terminationGracePeriodSeconds": 30,
        "securityContext": {
            "runAsNonRoot": true,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "containers": [{
            "name": CONTAINER,
            "image": image,
            "imagePullPolicy": "Never",
            "command": [
                "redis-server", "--bind", LOOPBACK, "--dir", DATA_PATH, "--appendonly", "yes", "--save", "",
            ],
            "readinessProbe": {
                "exec": { "command": ["redis-cli", "-e", "PING"] },
                "periodSeconds": 1,
                "timeoutSeconds": 5,
            },
            "resources": { "requests": { "cpu": "10m", "memory": "16Mi" } },
            "securityContext": {
                "allowPrivilegeEscalation": false,
                "readOnlyRootFilesystem": true,
                "capabilities": { "drop": ["ALL"] },
            },
            "volumeMounts": [{ "name": "data", "mountPath": DATA_PATH }],
        }],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stateful_set_is_one_with_a_claim_of_its_own_for_each_server() {
        let typed: StatefulSet = serde_json::from_value(stateful_set("cache", 2, "redis:e2e")).unwrap();
        let spec = typed.spec.unwrap();
        assert_eq!(spec.replicas, Some(2));
        assert_eq!(spec.volume_claim_templates.unwrap()[0].metadata.name.as_deref(), Some("data"));
    }
}
