//! A hub in a cluster, installed by helm, with certificates that its own program issues, and commands that run beside it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim, Pod, Secret};
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;

use super::exec::exec;
use super::helm::{helm, hub_chart};
use super::poll::until;
use super::{Cluster, Namespace};
use crate::condition::{await_condition, await_deleted, pod_ready, statefulset_ready};
use crate::harness::paths::Paths;

/// The release, and by it the names of what it installs.
const RELEASE: &str = "sts-backup-hub";

/// Its pod.
const POD: &str = "sts-backup-hub-0";

/// The Secret of a cluster's certificate, as the agent's chart has it.
const LINK_SECRET: &str = "sts-backup-link";

/// What all certificates belong to.
const TRUST_DOMAIN: &str = "fleet.example.com";

const READY_TIMEOUT: Duration = Duration::from_mins(2);

/// A hub, and the authority of its fleet.
pub struct Hub {
    ns: Namespace,
    files: TempDir,
    address: String,
    node_port: u16,
}

/// What the hub's program prints when it makes certificates.
pub(super) async fn pki(program: &Path, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    let output = command.arg("pki").args(arguments).output().await.context("start the hub's program")?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "pki {}: {said}", arguments.join(" "));
    Ok(String::from_utf8(output.stdout)?)
}

/// A Secret with the files of a certificate's directory.
async fn write_secret(cluster: &Cluster, namespace: &str, name: &str, directory: &Path) -> Result<()> {
    let read = |file: &str| std::fs::read_to_string(directory.join(file));
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": { "name": name }, "type": "kubernetes.io/tls",
        "stringData": { "tls.crt": read("tls.crt")?, "tls.key": read("tls.key")?, "ca.crt": read("ca.crt")? },
    });
    let api: Api<Secret> = Api::namespaced(cluster.client(), namespace);
    let how = PatchParams::apply("sts-backup-e2e").force();
    api.patch(name, &how, &Patch::Apply(secret)).await.with_context(|| format!("write the Secret {name}"))?;
    Ok(())
}

impl Hub {
    /// Installs a hub in a test's namespace with these fleet policies, by file name, and waits until it is ready. Agents of
    /// other clusters reach it by a port of the cluster's node.
    ///
    /// # Errors
    /// When a certificate cannot be issued, helm fails, or it does not become ready.
    pub async fn install(ns: &Namespace, node_port: u16, policies: &Value) -> Result<Self> {
        let files = tempfile::tempdir()?;
        let at = |name: &str| files.path().join(name).to_string_lossy().into_owned();
        let nodes: Api<Node> = Api::all(ns.cluster().client());
        let node = nodes.list(&ListParams::default()).await?.items.pop().context("a cluster has a node")?;
        let addresses = node.status.and_then(|status| status.addresses).unwrap_or_default();
        let address = addresses.into_iter().find(|address| address.type_ == "InternalIP");
        let address = address.context("a node has an address")?.address;
        let program = Paths::find()?.program("sts-backup-hub");
        pki(&program, &["init", "--dir", &at("ca"), "--trust-domain", TRUST_DOMAIN]).await?;
        pki(&program, &["issue", "--authority", &at("ca"), "--dir", &at("hub"), "--hub", &address]).await?;
        write_secret(ns.cluster(), ns.name(), "hub-tls", &files.path().join("hub")).await?;
        let hub = Self { ns: ns.clone(), files, address, node_port };
        hub.upgrade(policies).await?;
        Ok(hub)
    }

    /// Gives it other policies.
    ///
    /// # Errors
    /// When helm fails, or it does not become ready.
    pub async fn upgrade(&self, policies: &Value) -> Result<()> {
        let (repository, tag) =
            self.ns.cluster().images().hub.rsplit_once(':').context("an image's name has a tag")?;
        let values = json!({
            "image": { "repository": repository, "tag": tag, "pullPolicy": "Never" },
            "trustDomain": TRUST_DOMAIN,
            "certificates": { "secretName": "hub-tls" },
            "policies": policies,
            "persistence": { "size": "64Mi", "storageClassName": "stsb-e2e" },
            "service": { "type": "NodePort", "nodePort": self.node_port },
        });
        let chart = hub_chart();
        let chart = chart.to_str().context("the checkout's path is not UTF-8")?;
        let arguments = ["upgrade", "--install", RELEASE, chart, "--namespace", self.ns.name()];
        helm(Some(self.ns.cluster()), &arguments, Some(&values)).await?;
        await_condition(&self.sets(), RELEASE, "ready", READY_TIMEOUT, statefulset_ready(1)).await?;
        // The kubelet looks at mounted files once a minute, and whenever the pod changes.
        let now =
            json!({ "metadata": { "annotations": { "e2e.sts-backup.io/policies": policies.to_string() } } });
        let pods: Api<Pod> = self.ns.api();
        pods.patch(POD, &PatchParams::default(), &Patch::Merge(now)).await.context("touch the hub's pod")?;
        Ok(())
    }

    fn sets(&self) -> Api<StatefulSet> {
        self.ns.api()
    }

    /// The address of the node that agents reach it at.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What an agent's configuration says of it.
    #[must_use]
    pub fn link(&self) -> String {
        format!("{}:{}", self.address, self.node_port)
    }

    /// Lets a cluster in, and puts its certificate into the namespace where its agent will run; the cluster's id.
    ///
    /// # Errors
    /// When the hub refuses, or the certificate cannot be issued or written.
    pub async fn let_in(
        &self,
        name: &str,
        labels: &[&str],
        cluster: &Cluster,
        namespace: &str,
    ) -> Result<String> {
        let mut command = vec!["clusters", "add", name, "--output=json"];
        command.extend(labels.iter().flat_map(|label| ["--label", label]));
        let added: Value = serde_json::from_str(&self.run(&command).await?)?;
        let id = added["id"].as_str().context("a cluster has an id")?;
        let at = |name: &str| self.files.path().join(name).to_string_lossy().into_owned();
        let program = Paths::find()?.program("sts-backup-hub");
        pki(&program, &["issue", "--authority", &at("ca"), "--dir", &at(name), "--cluster", id]).await?;
        write_secret(cluster, namespace, LINK_SECRET, &self.files.path().join(name)).await?;
        Ok(id.to_owned())
    }

    /// Runs a command of the hub's program beside it, and returns what it prints.
    ///
    /// # Errors
    /// When it fails.
    pub async fn run(&self, command: &[&str]) -> Result<String> {
        let mut all = vec!["/usr/local/bin/sts-backup-hub"];
        all.extend(command);
        exec(self.ns.cluster(), self.ns.name(), POD, "hub", &all).await?.success()
    }

    /// What a command answers, as JSON.
    ///
    /// # Errors
    /// When it fails.
    pub async fn ask(&self, command: &[&str]) -> Result<Value> {
        let mut all = command.to_vec();
        all.push("--output=json");
        Ok(serde_json::from_str(&self.run(&all).await?)?)
    }

    /// Waits until a command's answer is as wanted, and returns it.
    ///
    /// # Errors
    /// When it is not within half a minute.
    pub async fn await_answer(&self, command: &[&str], wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let last = tokio::sync::Mutex::new(Value::Null);
        let what = command.join(" ");
        let told = until(&what, async || {
            let answer = self.ask(command).await?;
            let is_wanted = wanted(&answer);
            *last.lock().await = answer;
            Ok(is_wanted)
        });
        let told = told.await;
        let last = last.into_inner();
        told.with_context(|| format!("the hub answers {last:#}"))?;
        Ok(last)
    }

    /// Takes it away, but not what it remembers.
    ///
    /// # Errors
    /// When its pod does not go.
    pub async fn stop(&self) -> Result<()> {
        let pods: Api<Pod> = self.ns.api();
        let pod = pods.get(POD).await?;
        self.scale(0).await?;
        await_deleted(&pods, &pod, READY_TIMEOUT).await
    }

    /// Takes it and its database away, and brings it back with an empty one.
    ///
    /// # Errors
    /// When its pod or claim do not go, or it does not become ready.
    pub async fn lose_database(&self) -> Result<()> {
        self.stop().await?;
        let claims: Api<PersistentVolumeClaim> = self.ns.api();
        let name = format!("data-{POD}");
        let claim = claims.get(&name).await?;
        claims.delete(&name, &DeleteParams::default()).await?;
        await_deleted(&claims, &claim, READY_TIMEOUT).await?;
        self.start().await
    }

    /// Brings it back.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn start(&self) -> Result<()> {
        self.scale(1).await?;
        let pods: Api<Pod> = self.ns.api();
        await_condition(&pods, POD, "ready", READY_TIMEOUT, pod_ready).await?;
        Ok(())
    }

    async fn scale(&self, replicas: i32) -> Result<()> {
        let wanted = Patch::Merge(json!({ "spec": { "replicas": replicas } }));
        let scaled = self.sets().patch_scale(RELEASE, &PatchParams::default(), &wanted).await;
        scaled.with_context(|| format!("scale the hub to {replicas}"))?;
        Ok(())
    }
}

/// A file of one fleet policy, for [`Hub::install`].
#[must_use]
pub fn fleet_policy(name: &str, spec: &Value) -> String {
    // JSON is YAML.
    json!({
        "apiVersion": "hub.sts-backup.io/v1alpha1",
        "kind": "FleetPolicy",
        "metadata": { "name": name },
        "spec": spec,
    })
    .to_string()
}
