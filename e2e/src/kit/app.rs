//! A `StatefulSet` whose pods do nothing but what a test tells them by `sh`: for tests of what goes on around an
//! application.
//!
//! Its claims are called `<template>-<name>-<ordinal>`. Pods may write to `/dev/shm`, which all containers of a pod
//! share and which ends with the pod, and to their volumes at `/volumes/<template>`. `$CONTAINER` is the name of the
//! container, `$HOSTNAME` that of the pod.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, PropagationPolicy};
use serde_json::{Value, json};

use super::Namespace;
use super::exec::exec;
use super::poll::until;
use crate::condition::{await_condition, await_deleted, statefulset_ready};

/// A start takes a second; the rest is for a busy machine.
const READY_TIMEOUT: Duration = Duration::from_mins(2);

/// A pod that waits to be told is ready once it has this file.
const READY_FILE: &str = "/dev/shm/ready";

/// `nobody` in the image.
const USER_ID: i64 = 65534;

/// `replicas` pods that wait for commands.
#[derive(Clone)]
pub struct App {
    ns: Namespace,
    name: String,
    replicas: i32,
    start: i32,
    templates: Vec<(String, String)>,
    containers: Vec<String>,
    environment: Vec<(String, String)>,
    default_container: Option<String>,
    /// What must succeed in the container for the pod to be ready.
    readiness: Option<String>,
    management: &'static str,
    size: String,
    retention: Value,
}

impl App {
    /// One pod with the container `main` and the claim template `data`, 16 MiB of the class `stsb-e2e`.
    #[must_use]
    pub fn new(ns: &Namespace, name: &str) -> Self {
        Self {
            ns: ns.clone(),
            name: name.to_owned(),
            replicas: 1,
            start: 0,
            templates: vec![("data".to_owned(), "stsb-e2e".to_owned())],
            containers: vec!["main".to_owned()],
            environment: Vec::new(),
            default_container: None,
            readiness: None,
            management: "Parallel",
            size: "16Mi".to_owned(),
            retention: json!({ "whenDeleted": "Retain", "whenScaled": "Retain" }),
        }
    }

    /// How many pods.
    #[must_use]
    pub fn replicas(self, replicas: i32) -> Self {
        Self { replicas, ..self }
    }

    /// The ordinal of the first pod.
    #[must_use]
    pub fn start(self, start: i32) -> Self {
        Self { start, ..self }
    }

    /// One more claim template, of a `StorageClass`.
    #[must_use]
    pub fn template(mut self, name: &str, storage_class: &str) -> Self {
        self.templates.push((name.to_owned(), storage_class.to_owned()));
        self
    }

    /// One more container, which `kubectl.kubernetes.io/default-container` names.
    #[must_use]
    pub fn default_container(mut self, name: &str) -> Self {
        self.containers.push(name.to_owned());
        self.default_container = Some(name.to_owned());
        self
    }

    /// One more environment variable, in all containers.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// No pod is ready before [`Self::tell_ready`].
    #[must_use]
    pub fn ready_when_told(self) -> Self {
        self.ready_when(&format!("test -e {READY_FILE}"))
    }

    /// A pod is ready as long as this script succeeds in it.
    #[must_use]
    pub fn ready_when(self, script: &str) -> Self {
        Self { readiness: Some(script.to_owned()), ..self }
    }

    /// Pods start one after the other, each when the one before is ready.
    #[must_use]
    pub fn ordered(self) -> Self {
        Self { management: "OrderedReady", ..self }
    }

    /// The size that the claim templates ask for, a Kubernetes quantity.
    #[must_use]
    pub fn size(self, size: &str) -> Self {
        Self { size: size.to_owned(), ..self }
    }

    /// The `StorageClass` of the template `data`.
    #[must_use]
    pub fn storage_class(mut self, storage_class: &str) -> Self {
        storage_class.clone_into(&mut self.templates[0].1);
        self
    }

    /// Claims are deleted with their pods, when the `StatefulSet` is scaled down or deleted.
    #[must_use]
    pub fn claims_go(self) -> Self {
        Self { retention: json!({ "whenDeleted": "Delete", "whenScaled": "Delete" }), ..self }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The ordinals of the pods that it was made with.
    #[must_use]
    pub fn ordinals(&self) -> std::ops::Range<i32> {
        self.start..self.start + self.replicas
    }

    /// The claims of the pods that it was made with.
    #[must_use]
    pub fn claims(&self) -> Vec<String> {
        self.ordinals().flat_map(|ordinal| self.claims_of(ordinal)).collect()
    }

    /// The claims of one pod.
    #[must_use]
    pub fn claims_of(&self, ordinal: i32) -> Vec<String> {
        let claim = |(template, _): &(String, String)| format!("{template}-{}-{ordinal}", self.name);
        self.templates.iter().map(claim).collect()
    }

    /// Writes a text into every volume of a pod, with the volume's claim, so that no volume is taken for another one.
    ///
    /// # Errors
    /// When the pod takes no command.
    pub async fn write(&self, ordinal: i32, text: &str) -> Result<()> {
        for (template, _) in &self.templates {
            let line = format!("{text} of {template}-{}-{ordinal}", self.name);
            self.sh(ordinal, &format!("echo '{line}' >/volumes/{template}/text && sync")).await?;
        }
        Ok(())
    }

    /// [`Self::write`] in all pods.
    ///
    /// # Errors
    /// When a pod takes no command.
    pub async fn write_all(&self, text: &str) -> Result<()> {
        try_join_all(self.ordinals().map(|ordinal| self.write(ordinal, text))).await?;
        Ok(())
    }

    /// Checks that every volume of a pod has what [`Self::write`] wrote last, and is the volume that it wrote it to.
    ///
    /// # Errors
    /// When one has not: an empty volume says `nothing`.
    pub async fn ensure_text(&self, ordinal: i32, text: &str) -> Result<()> {
        for (template, _) in &self.templates {
            let found = self.sh(ordinal, &format!("cat /volumes/{template}/text || echo nothing")).await?;
            let claim = format!("{template}-{}-{ordinal}", self.name);
            let found = found.trim_end();
            ensure!(found == format!("{text} of {claim}"), "{claim} has {found:?}, not {text:?}");
        }
        Ok(())
    }

    /// [`Self::ensure_text`] of all pods.
    ///
    /// # Errors
    /// As [`Self::ensure_text`].
    pub async fn ensure_texts(&self, text: &str) -> Result<()> {
        try_join_all(self.ordinals().map(|ordinal| self.ensure_text(ordinal, text))).await?;
        Ok(())
    }

    /// Waits until so many pods are ready, and no more exist.
    ///
    /// # Errors
    /// When it is not so in time.
    pub async fn await_ready(&self, replicas: i32) -> Result<()> {
        let sets: Api<StatefulSet> = self.ns.api();
        let what = format!("at {replicas} ready");
        await_condition(&sets, &self.name, &what, READY_TIMEOUT, statefulset_ready(replicas)).await?;
        Ok(())
    }

    /// Asks for that many pods, and does not wait.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn scale(&self, replicas: i32) -> Result<()> {
        let wanted = Patch::Merge(json!({ "spec": { "replicas": replicas } }));
        let sets: Api<StatefulSet> = self.ns.api();
        let scaled = sets.patch_scale(&self.name, &PatchParams::default(), &wanted).await;
        scaled.with_context(|| format!("scale the StatefulSet {} to {replicas}", self.name))?;
        Ok(())
    }

    /// Deletes the `StatefulSet` and leaves its pods and claims.
    ///
    /// # Errors
    /// When it is not gone in time.
    pub async fn orphan(&self) -> Result<()> {
        let sets: Api<StatefulSet> = self.ns.api();
        let set = sets.get(&self.name).await?;
        let leaving =
            DeleteParams { propagation_policy: Some(PropagationPolicy::Orphan), ..DeleteParams::default() };
        sets.delete(&self.name, &leaving).await?;
        await_deleted(&sets, &set, READY_TIMEOUT).await
    }

    /// Creates the `StatefulSet` and waits until every pod is ready.
    ///
    /// # Errors
    /// When it cannot be created, or a pod is not ready in time.
    pub async fn deploy(&self) -> Result<()> {
        self.create().await?;
        self.await_ready(self.replicas).await
    }

    /// Creates the `StatefulSet`, and does not wait.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn create(&self) -> Result<()> {
        let sets: Api<StatefulSet> = self.ns.api();
        let set = serde_json::from_value(self.stateful_set(&self.ns.cluster().images().shell))?;
        sets.create(&PostParams::default(), &set)
            .await
            .with_context(|| format!("create the StatefulSet {}", self.name))?;
        Ok(())
    }

    /// The pod of an ordinal.
    #[must_use]
    pub fn pod_name(&self, ordinal: i32) -> String {
        format!("{}-{ordinal}", self.name)
    }

    /// Runs a script in the first container of a pod, and returns what it printed.
    ///
    /// # Errors
    /// When it cannot be run, or fails.
    pub async fn sh(&self, ordinal: i32, script: &str) -> Result<String> {
        self.exec(ordinal, script).await?.success()
    }

    /// Waits until a script succeeds in a pod.
    ///
    /// # Errors
    /// When it does not within half a minute, or cannot be run.
    pub async fn await_success(&self, ordinal: i32, what: &str, script: &str) -> Result<()> {
        until(what, async || Ok(self.exec(ordinal, script).await?.exit_code == 0)).await
    }

    /// Makes a pod ready that waits to be told.
    ///
    /// # Errors
    /// When the pod takes no command.
    pub async fn tell_ready(&self, ordinal: i32) -> Result<()> {
        self.sh(ordinal, &format!("touch {READY_FILE}")).await?;
        Ok(())
    }

    async fn exec(&self, ordinal: i32, script: &str) -> Result<super::exec::Output> {
        let (cluster, pod) = (self.ns.cluster(), self.pod_name(ordinal));
        exec(cluster, self.ns.name(), &pod, &self.containers[0], &["sh", "-c", script]).await
    }

    fn stateful_set(&self, image: &str) -> Value {
        let Self { ns: _, name, replicas, start, templates, management, size, retention, .. } = self;
        let claim = |(template, class): &(String, String)| {
            json!({
                "metadata": { "name": template },
                "spec": {
                    "accessModes": ["ReadWriteOnce"],
                    "storageClassName": class,
                    "resources": { "requests": { "storage": size } },
                },
            })
        };
        let annotations =
            self.default_container.iter().map(|name| ("kubectl.kubernetes.io/default-container", name));
        let annotations: serde_json::Map<String, Value> =
            annotations.map(|(key, name)| (key.to_owned(), json!(name))).collect();
        json!({
            "metadata": { "name": name },
            "spec": {
                "replicas": replicas,
                "ordinals": { "start": start },
                "podManagementPolicy": management,
                "persistentVolumeClaimRetentionPolicy": retention,
                "selector": { "matchLabels": { "app": name } },
                "template": {
                    "metadata": { "labels": { "app": name }, "annotations": annotations },
                    "spec": self.pod_spec(image),
                },
                "volumeClaimTemplates": templates.iter().map(claim).collect::<Vec<_>>(),
            },
        })
    }

    fn pod_spec(&self, image: &str) -> Value {
        let mount = |(template, _): &(String, String)| json!({ "name": template, "mountPath": format!("/volumes/{template}") });
        let mounts: Vec<Value> = self.templates.iter().map(mount).collect();
        let own = self.environment.iter().map(|(name, value)| json!({ "name": name, "value": value }));
        let own: Vec<Value> = own.collect();
        let container = |name: &String| {
            let environment: Vec<Value> =
                [json!({ "name": "CONTAINER", "value": name })].into_iter().chain(own.clone()).collect();
            let mut container = json!({
                "name": name,
                "image": image,
                "imagePullPolicy": "Never",
                "command": ["/bin/sh", "-c", "trap exit TERM; sleep 2147483647 & wait"],
                "env": environment,
                "resources": { "requests": { "cpu": "5m", "memory": "4Mi" } },
                "securityContext": {
                    "allowPrivilegeEscalation": false,
                    "readOnlyRootFilesystem": true,
                    "capabilities": { "drop": ["ALL"] },
                },
                "volumeMounts": mounts,
            });
            if let Some(script) = &self.readiness {
                let command = ["sh", "-c", script];
                container["readinessProbe"] =
                    json!({ "exec": { "command": command }, "periodSeconds": 1, "timeoutSeconds": 5 });
            }
            container
        };
        json!({
            "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": 2,
            "securityContext": {
                "runAsNonRoot": true,
                "runAsUser": USER_ID,
                "runAsGroup": USER_ID,
                "fsGroup": USER_ID,
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            "containers": self.containers.iter().map(container).collect::<Vec<_>>(),
        })
    }
}
