//! Agents that helm installed in a cluster: the one that tests share, and those that a test has to itself.
//!
//! The shared agent runs in the first cluster, where every test may use it and none may harm it. The second
//! cluster has none: a test that kills agents, or takes their lease or their API server away, works there, and
//! holds [`alone`] as long as an agent of its own runs, since an agent sees the objects of all namespaces.

use std::fs::File;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{self, Pod};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use kube::api::{DeleteParams, ListParams, LogParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::Mutex;

use super::crds::apply_crds;
use super::helm::{agent_chart, helm};
use super::poll::until;
use super::{Cluster, Namespace};
use crate::condition::{await_condition, deployment_rolled_out};
use crate::harness::clusters::{cluster_name, control_plane};
use crate::harness::engine::Engine;
use crate::harness::{Harness, images};

/// Where the shared agent runs.
pub const NAMESPACE: &str = "sts-backup-system";

/// The release, and by it the names of the Deployment and the Lease.
pub const RELEASE: &str = "sts-backup-agent";

/// Images are loaded already; the rest is for a busy machine.
const ROLLOUT_TIMEOUT: Duration = Duration::from_mins(2);

/// A killed leader is followed when its lease has run out, 15 s by default.
const LEADER_TIMEOUT: Duration = Duration::from_mins(1);

/// For a release that goes with a namespace.
const WITHOUT_CLUSTER_SCOPED: &[&str] =
    &["--set=crds.install=false,userRoles.create=false,admissionPolicy.create=false"];

/// Keeps other tests out of a cluster until it is dropped: [`alone`].
#[must_use = "others are kept out until this is dropped"]
pub struct Alone(#[expect(dead_code, reason = "held for its lock")] File);

/// Waits until no other test, of this run or another, is alone in the cluster. Take it before the test's namespace:
/// the wait is not the test's own.
///
/// # Errors
/// When the lock file cannot be opened.
pub async fn alone(cluster: &Cluster) -> Result<Alone> {
    let path = cluster.dir()?.join("alone.lock");
    let lock = tokio::task::spawn_blocking(move || {
        let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
        file.lock().with_context(|| format!("lock {}", path.display()))?;
        anyhow::Ok(Alone(file))
    });
    lock.await?
}

/// Installs the shared agent of this checkout in the first cluster, or upgrades it.
///
/// # Errors
/// When helm fails, or the agent does not become available and lead.
pub async fn ensure_shared(harness: &Harness) -> Result<()> {
    let name = cluster_name(1);
    let remedy = format!(
        "read its log: kubectl --kubeconfig $(cargo e2e kubeconfig 1) -n {NAMESPACE} logs deployment/{RELEASE}"
    );
    let install =
        async |_: &_| Agent::install_shared(&Cluster::connect(&name).await?, &json!({})).await.map(drop);
    harness.steps.run(&format!("install the agent in {name}"), &remedy, install).await
}

/// Makes the namespace of a cluster's shared agent, where there is none.
///
/// # Errors
/// When the API server refuses.
pub async fn ensure_namespace(cluster: &Cluster) -> Result<()> {
    let namespaces: Api<v1::Namespace> = Api::all(cluster.client());
    let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE } });
    let how = PatchParams::apply("sts-backup-e2e");
    namespaces.patch(NAMESPACE, &how, &Patch::Apply(namespace)).await.context("make the namespace")?;
    Ok(())
}

/// Takes away what a demo installed in a cluster that has no shared agent: tests that are alone there have their own.
///
/// # Errors
/// When helm fails.
pub async fn ensure_none(harness: &Harness, n: usize) -> Result<()> {
    let name = cluster_name(n);
    let remedy = "read what helm says, or make the clusters anew: cargo e2e down";
    let uninstall = async |_: &_| {
        let arguments = ["uninstall", RELEASE, "--namespace", NAMESPACE, "--ignore-not-found", "--wait"];
        helm(Some(&Cluster::connect(&name).await?), &arguments, None).await.map(drop)
    };
    harness.steps.run(&format!("see that {name} has no agent"), remedy, uninstall).await
}

/// An agent in a cluster: a Deployment with the pods of one release.
#[derive(Clone)]
pub struct Agent {
    cluster: Cluster,
    namespace: String,
}

impl Agent {
    /// The agent that tests share. None may harm it.
    #[must_use]
    pub fn shared(cluster: &Cluster) -> Self {
        Self { cluster: cluster.clone(), namespace: NAMESPACE.to_owned() }
    }

    /// Installs or upgrades the shared agent of a cluster, with values over the chart's, and waits until one of its pods
    /// leads.
    ///
    /// # Errors
    /// When helm fails, or the agent does not become available and lead.
    pub async fn install_shared(cluster: &Cluster, values: &Value) -> Result<Self> {
        let agent = Self::shared(cluster);
        agent.upgrade(values, &["--create-namespace"]).await?;
        Ok(agent)
    }

    /// Installs an agent in a test's namespace, with values over the chart's, and waits until one of its pods leads. It
    /// goes with the namespace, also what it has outside of it. The test is [`alone`] in the cluster.
    ///
    /// # Errors
    /// When helm fails, or the agent does not become available and lead.
    pub async fn install(ns: &Namespace, values: &Value) -> Result<Self> {
        let agent = Self { cluster: ns.cluster().clone(), namespace: ns.name().to_owned() };
        // Not by helm: the release goes with the namespace, its kinds stay.
        apply_crds(ns.cluster()).await?;
        agent.upgrade(values, WITHOUT_CLUSTER_SCOPED).await?;

        let name = format!("{}:{RELEASE}", agent.namespace);
        let owned = Patch::Merge(json!({ "metadata": { "ownerReferences": [ns.owner_reference()?] } }));
        let (client, how) = (ns.cluster().client(), PatchParams::default());
        Api::<ClusterRole>::all(client.clone()).patch(&name, &how, &owned).await?;
        Api::<ClusterRoleBinding>::all(client).patch(&name, &how, &owned).await?;
        Ok(agent)
    }

    /// Upgrades an agent that [`install`](Self::install) installed to other values over the chart's, and waits as that
    /// does.
    ///
    /// # Errors
    /// As [`install`](Self::install).
    pub async fn upgrade_to(&self, values: &Value) -> Result<()> {
        self.upgrade(values, WITHOUT_CLUSTER_SCOPED).await
    }

    /// Waits until all its pods run and are of its newest spec.
    ///
    /// # Errors
    /// When they do not in time.
    pub async fn await_rolled_out(&self) -> Result<()> {
        let done = deployment_rolled_out;
        await_condition(&self.deployments(), RELEASE, "rolled out", ROLLOUT_TIMEOUT, done).await?;
        Ok(())
    }

    async fn upgrade(&self, values: &Value, arguments: &[&str]) -> Result<()> {
        let (repository, tag) =
            self.cluster.images().agent.rsplit_once(':').context("an image's name has a tag")?;
        let image =
            format!("image={}", json!({ "repository": repository, "tag": tag, "pullPolicy": "Never" }));
        let chart = agent_chart();
        let chart = chart.to_str().context("the checkout's path is not UTF-8")?;
        // CRDs that a test applied are taken over, and so is what `cargo e2e dev` changed.
        let mut all = vec!["upgrade", "--install", RELEASE, chart, "--namespace", &self.namespace];
        all.extend(["--take-ownership", "--force-conflicts", "--server-side=true", "--history-max=2"]);
        all.extend(["--set-json", &image]);
        all.extend(arguments);
        helm(Some(&self.cluster), &all, Some(values)).await?;
        self.await_rolled_out().await?;
        self.await_present_leader().await?;
        Ok(())
    }

    /// The pod that leads, once it is one of those that there are now: others may have left without giving the lease
    /// away.
    ///
    /// # Errors
    /// When there is none after a minute.
    pub async fn await_present_leader(&self) -> Result<String> {
        let pods = self.pods().await?;
        self.await_lease("held by an agent that runs", |holder| pods.iter().any(|pod| pod == holder)).await
    }

    /// Asks for that many pods, and does not wait.
    ///
    /// # Errors
    /// When the API server refuses.
    pub(crate) async fn scale(&self, replicas: i32) -> Result<()> {
        let wanted = Patch::Merge(json!({ "spec": { "replicas": replicas } }));
        let scaled = self.deployments().patch_scale(RELEASE, &PatchParams::default(), &wanted).await;
        scaled.with_context(|| format!("scale the agent to {replicas}"))?;
        Ok(())
    }

    pub(crate) fn deployments(&self) -> Api<Deployment> {
        Api::namespaced(self.cluster.client(), &self.namespace)
    }

    fn pods_api(&self) -> Api<Pod> {
        Api::namespaced(self.cluster.client(), &self.namespace)
    }

    /// The names of its pods, without those that are ending.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub async fn pods(&self) -> Result<Vec<String>> {
        let ours = ListParams::default().labels(&format!("app.kubernetes.io/instance={RELEASE}"));
        let pods = self.pods_api().list(&ours).await.context("list the agent's pods")?;
        let stay = pods.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none());
        Ok(stay.map(ResourceExt::name_any).collect())
    }

    /// The pod that leads, as the Lease says, once it is not `former`.
    ///
    /// # Errors
    /// When there is none after a minute.
    pub async fn await_leader(&self, former: Option<&str>) -> Result<String> {
        let what = format!("held by another than {former:?}");
        self.await_lease(&what, |holder| Some(holder) != former).await
    }

    async fn await_lease(&self, what: &str, wanted: impl Fn(&str) -> bool) -> Result<String> {
        let leases: Api<Lease> = Api::namespaced(self.cluster.client(), &self.namespace);
        let held = |lease: &Lease| holder(lease).is_some_and(&wanted);
        let lease = await_condition(&leases, RELEASE, what, LEADER_TIMEOUT, held).await?;
        Ok(holder(&lease).context("the lease is held")?.to_owned())
    }

    /// Deletes a pod without any grace.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn delete_pod(&self, pod: &str) -> Result<()> {
        let now = DeleteParams::default().grace_period(0);
        self.pods_api().delete(pod, &now).await.with_context(|| format!("delete the pod {pod}"))?;
        Ok(())
    }

    /// Kills a pod's process on its node with SIGKILL: it can end nothing properly, and the kubelet starts it
    /// again in the same pod, under the same identity.
    ///
    /// # Errors
    /// When it does not run, or the node cannot be reached.
    pub async fn kill(&self, pod: &str) -> Result<()> {
        let (engine, id) = self.container(pod).await?;
        let mut kill = images::ctr(&engine, &control_plane(self.cluster.name()));
        let output = kill.args(["tasks", "kill", "--signal=SIGKILL", &id]).output().await?;
        ensure!(
            output.status.success(),
            "kill {pod}, container {id}: {}",
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
        Ok(())
    }

    /// The most memory that a pod's process has held since it started, bytes, as its node's kernel tells.
    ///
    /// # Errors
    /// When it does not run, or the node cannot be reached.
    pub(crate) async fn peak_memory(&self, pod: &str) -> Result<f64> {
        let (engine, id) = self.container(pod).await?;
        let node = control_plane(self.cluster.name());
        let tasks = images::ctr(&engine, &node).args(["tasks", "ls"]).output().await?;
        let tasks = String::from_utf8_lossy(&tasks.stdout).into_owned();
        // TASK, PID, STATUS.
        let pid = tasks.lines().find_map(|line| line.strip_prefix(&id)?.split_whitespace().next());
        let pid = pid.with_context(|| format!("{node} runs no container {id}"))?;
        let mut read = engine.docker();
        let read = read.args(["exec", &node, "cat", &format!("/proc/{pid}/status")]).output().await?;
        let status = String::from_utf8_lossy(&read.stdout).into_owned();
        // proc(5): `VmHWM:      1234 kB`.
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix("kB"));
        let peak = peak.with_context(|| format!("the kernel of {node} does not tell the memory of {pod}"))?;
        Ok(peak.trim().parse::<f64>()? * 1024.0)
    }

    /// The container of a pod, as its node's containerd names it, and the engine that runs the node.
    async fn container(&self, pod: &str) -> Result<(Engine, String)> {
        let object = self.pods_api().get(pod).await.with_context(|| format!("read the pod {pod}"))?;
        let status = object.status.and_then(|status| status.container_statuses?.pop());
        let id = status.and_then(|status| status.container_id);
        let id = id.as_deref().and_then(|id| id.strip_prefix("containerd://"));
        let id = id.with_context(|| format!("the pod {pod} has no container"))?;
        let engine = Engine::find(&Harness::open()?).await.context("no Docker engine answers")?;
        Ok((engine, id.to_owned()))
    }

    /// Waits until what the pod that leads shows at `/metrics` is as wanted, and returns it.
    ///
    /// # Errors
    /// When it is not within half a minute, or no pod leads.
    pub async fn await_metrics(&self, what: &str, wanted: impl Fn(&str) -> bool) -> Result<String> {
        let shown = Mutex::new(String::new());
        let told = until(what, async || {
            let metrics = self.get(&self.await_leader(None).await?, "/metrics").await?;
            let is_wanted = wanted(&metrics);
            *shown.lock().await = metrics;
            Ok(is_wanted)
        });
        let told = told.await;
        let shown = shown.into_inner();
        told.with_context(|| format!("the metrics are {shown}"))?;
        Ok(shown)
    }

    /// The logs of all its pods.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn logs(&self) -> Result<String> {
        let mut logs = String::new();
        for pod in self.pods().await? {
            logs += &self.pods_api().logs(&pod, &LogParams::default()).await?;
        }
        Ok(logs)
    }

    /// What a pod says at `path`, such as `/metrics`, by way of the API server.
    ///
    /// # Errors
    /// When the pod does not answer with success.
    pub async fn get(&self, pod: &str, path: &str) -> Result<String> {
        let uri = format!("/api/v1/namespaces/{}/pods/{pod}:9090/proxy{path}", self.namespace);
        let request = hyper::Request::get(&uri).body(Vec::new())?;
        self.cluster.client().request_text(request).await.with_context(|| format!("get {uri}"))
    }
}

/// The pod that holds the lease: the holder is its name and, after an underscore, what tells its processes apart.
pub(super) fn holder(lease: &Lease) -> Option<&str> {
    Some(lease.spec.as_ref()?.holder_identity.as_deref()?.rsplit_once('_')?.0)
}
