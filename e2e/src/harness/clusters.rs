//! The clusters: made by kind, checked, and given the snapshot machinery. Every function here can be
//! repeated: what is whole is kept, what is half-made is made anew.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::future::try_join_all;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::storage::v1::CSINode;
use kube::{Api, Client};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::Harness;
use super::archive::Archive;
use super::cache::{Key, remove_dir};
use super::engine::{Engine, NETWORK};
use super::images::{self, Images};
use super::machine::{self, INOTIFY_FILE, INOTIFY_INSTANCES, Machine};
use super::node_image::{self, ETCD_VERSION, NodeImage};
use super::paths::e2e_dir;
use super::programs::{CSI, HELM, KIND};
use super::step::Log;
use super::traces;
use crate::condition::{await_condition, daemonset_ready, deployment_available, has_csi_driver, node_ready};
use crate::csi::DRIVER_NAME;

/// All our clusters' names begin with it.
const PREFIX: &str = "stsb-e2e-";
/// More would starve a common machine: half a GiB each, and each has its own control plane.
const MOST_CLUSTERS: usize = 6;
/// Where the snapshot machinery runs.
const NAMESPACE: &str = "sts-backup-e2e";

const READY_TIMEOUT: Duration = Duration::from_mins(3);
/// A cluster of an earlier run that does not work by then is made anew.
const STILL_WHOLE_TIMEOUT: Duration = Duration::from_mins(1);

/// The name of the `n`-th cluster, counted from 1.
#[must_use]
pub fn cluster_name(n: usize) -> String {
    format!("{PREFIX}{n}")
}

/// The container that is a cluster's node, and the node's name.
#[must_use]
pub fn control_plane(cluster: &str) -> String {
    format!("{cluster}-control-plane")
}

/// Makes sure that at least `count` clusters run and have what tests need, and returns their names.
///
/// # Errors
/// When the machine cannot do it, or a step fails; a repeated call goes on from there.
pub async fn up(harness: &Harness, count: usize) -> Result<Vec<String>> {
    if !(1..=MOST_CLUSTERS).contains(&count) {
        bail!("--clusters {count}: one machine runs 1 to {MOST_CLUSTERS} clusters");
    }
    let names: Vec<String> = (1..=count).map(cluster_name).collect();
    let new = names.iter().filter(|name| !marker(harness, name).exists()).count();
    let engine = usable_engine(harness, new).await?;
    let kind = KIND.build(harness).await?.join("kind");
    let node_image = node_image::find_or_make(harness, &engine).await?;
    let (images, archives) = images::make(harness).await?;
    let helm = harness.paths.program("helm");
    let _ = std::fs::remove_file(&helm);
    std::os::unix::fs::symlink(HELM.build(harness).await?.join("helm"), helm)?;
    if engine.ours && machine::inotify_instances()? < INOTIFY_INSTANCES {
        std::fs::write(INOTIFY_FILE, INOTIFY_INSTANCES.to_string())
            .with_context(|| format!("write {INOTIFY_FILE}"))?;
    }
    let plan = Plan { engine, kind, node_image, archives, manifests: manifests(&images).await?, images };
    try_join_all(names.iter().map(|name| plan.make_whole(harness, name))).await?;
    Ok(names)
}

/// Pulls or builds the node image, and returns its name.
///
/// # Errors
/// When the machine cannot do it, or a step fails.
pub async fn make_node_image(harness: &Harness) -> Result<String> {
    let engine = usable_engine(harness, 0).await?;
    Ok(node_image::find_or_make(harness, &engine).await?.name)
}

/// The engine, on a machine that can make this many more clusters and is cleared of half-made things.
async fn usable_engine(harness: &Harness, new_clusters: usize) -> Result<Engine> {
    let found = Engine::find(harness).await;
    Machine::look(&harness.paths, found.as_ref(), new_clusters as u64).await?.check()?;
    traces::clear_making(&harness.paths).await?;
    match found {
        Some(engine) => Ok(engine),
        None => Engine::find_or_start(harness).await,
    }
}

/// Deletes all clusters and everything that they and the engine left on the machine, but the cache; with `purge`
/// the cache too.
///
/// # Errors
/// When something is left; it is listed.
pub async fn down(harness: &Harness, purge: bool) -> Result<()> {
    // Docker itself knows best how to end what it started, also after it was killed: bring it back for that.
    let engine = match Engine::find(harness).await {
        None if traces::are_recorded(&harness.paths) => Engine::find_or_start(harness).await.ok(),
        found => found,
    };
    if let Some(engine) = &engine {
        let remedy = "try again; `docker ps -a` shows what is left";
        let deleted = harness
            .steps
            .run("delete the clusters", remedy, async |log| {
                remove_containers(log, engine).await?;
                if purge {
                    node_image::remove_older(engine, "").await;
                }
                Ok(())
            })
            .await;
        // What a broken engine of ours cannot delete is cleared below.
        if !engine.ours {
            deleted?;
        }
    }
    Engine::stop(harness).await?;
    remove_dir(&harness.paths.state().join("clusters"))?;
    let remedy = "read the cause, remove it by hand and try again";
    harness
        .steps
        .run("clear what is left", remedy, async |_| {
            traces::clear(harness).await?;
            let left = traces::list(harness).await?;
            anyhow::ensure!(left.is_empty(), "still there after all:\n  {}", left.join("\n  "));
            traces::forget(&harness.paths)
        })
        .await?;
    if purge {
        remove_dir(harness.paths.root())?;
    }
    Ok(())
}

async fn remove_containers(log: &Log, engine: &Engine) -> Result<()> {
    // By our names, so that a user's other kind clusters are not touched.
    let filter = format!("name=^{PREFIX}");
    let containers =
        log.output(engine.docker().args(["ps", "--all", "--quiet", "--filter", &filter])).await?;
    if !containers.trim().is_empty() {
        let mut remove = engine.docker();
        log.run(remove.args(["rm", "--force", "--volumes"]).args(containers.split_whitespace())).await?;
    }
    let filter = format!("name=^{NETWORK}$");
    let networks =
        log.output(engine.docker().args(["network", "ls", "--quiet", "--filter", &filter])).await?;
    if !networks.trim().is_empty() {
        log.run(engine.docker().args(["network", "rm"]).args(networks.split_whitespace())).await?;
    }
    Ok(())
}

/// What is in a cluster once it is whole; written last, so a cluster without it is half-made.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Whole {
    node_image: String,
    images: Images,
    /// A key over what was applied.
    manifests: String,
}

fn marker(harness: &Harness, cluster: &str) -> PathBuf {
    harness.paths.cluster(cluster).join("whole.json")
}

/// What every cluster is made with.
struct Plan {
    engine: Engine,
    kind: PathBuf,
    node_image: NodeImage,
    images: Images,
    archives: Vec<Archive>,
    /// What is applied, in this order.
    manifests: Vec<String>,
}

impl Plan {
    /// Makes sure that a cluster runs and has all that tests need.
    async fn make_whole(&self, harness: &Harness, name: &str) -> Result<()> {
        let whole = Whole {
            node_image: self.node_image.name.clone(),
            images: self.images.clone(),
            manifests: self.manifests.iter().fold(Key::new(), Key::with).finish(),
        };
        let marker = marker(harness, name);
        let had: Option<Whole> =
            std::fs::read(&marker).ok().and_then(|file| serde_json::from_slice(&file).ok());
        let keep = had.as_ref().is_some_and(|had| had.node_image == whole.node_image)
            && match client(harness, name).await {
                Ok(client) => Box::pin(await_whole(client, name, STILL_WHOLE_TIMEOUT)).await.is_ok(),
                Err(_) => false,
            };
        if keep && had.as_ref() == Some(&whole) {
            eprintln!("  ✓ cluster {name} is up");
            return Ok(());
        }
        let _ = std::fs::remove_file(&marker);
        if !keep {
            let what = format!("create cluster {name}");
            let remedy = "read the log; `cargo e2e down` clears the machine, then try again";
            harness.steps.run(&what, remedy, async |log| self.create(harness, log, name).await).await?;
        }
        let what = format!("equip cluster {name}");
        let remedy = "look at the pods: kubectl --kubeconfig $(cargo e2e kubeconfig CLUSTER) get pods -A";
        harness.steps.run(&what, remedy, async |log| self.equip(harness, log, name).await).await?;
        Ok(std::fs::write(&marker, serde_json::to_vec_pretty(&whole)?)?)
    }

    async fn create(&self, harness: &Harness, log: &Log, name: &str) -> Result<()> {
        let kind = || {
            let mut command = Command::new(&self.kind);
            self.engine.set_environment(&mut command);
            command
        };
        // Always with our own kubeconfig: kind would lock and edit the user's.
        let kubeconfig = harness.paths.kubeconfig(name);
        let mut delete = kind();
        log.run(delete.args(["delete", "cluster", "--name", name, "--kubeconfig"]).arg(&kubeconfig)).await?;
        let dir = harness.paths.cluster(name);
        remove_dir(&dir)?;
        std::fs::create_dir_all(&dir)?;
        let config = dir.join("kind.yaml");
        std::fs::write(&config, kind_config(&self.node_image))?;
        let mut create = kind();
        create.args(["create", "cluster", "--retain", "--name", name, "--image", &self.node_image.name]);
        create.arg("--config").arg(&config).arg("--kubeconfig").arg(kubeconfig);
        log.run(&mut create).await
    }

    async fn equip(&self, harness: &Harness, log: &Log, name: &str) -> Result<()> {
        let node = control_plane(name);
        images::load(log, &self.engine, &node, &self.archives).await?;
        let kubectl = || {
            let mut kubectl = self.engine.docker();
            kubectl.args(["exec", "--interactive", &node, "kubectl"]);
            kubectl.arg("--kubeconfig=/etc/kubernetes/admin.conf");
            kubectl
        };
        for part in &self.manifests {
            let mut apply = kubectl();
            apply.args(["apply", "--server-side", "--force-conflicts", "--filename=-"]);
            log.run_with_text(&mut apply, part).await?;
            // Later parts have objects of kinds that earlier ones define.
            let mut wait = kubectl();
            wait.args(["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"]);
            log.run(&mut wait).await?;
        }
        Box::pin(await_whole(client(harness, name).await?, name, READY_TIMEOUT)).await?;
        images::unload_older(log, &self.engine, &node, &self.archives).await
    }
}

/// Waits until everything that tests need in a cluster works.
async fn await_whole(client: Client, name: &str, timeout: Duration) -> Result<()> {
    let node = control_plane(name);
    let nodes: Api<Node> = Api::all(client.clone());
    let csi_nodes: Api<CSINode> = Api::all(client.clone());
    let system: Api<Deployment> = Api::namespaced(client.clone(), "kube-system");
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), NAMESPACE);
    let daemon_sets: Api<DaemonSet> = Api::namespaced(client, NAMESPACE);
    tokio::try_join!(
        await_condition(&nodes, &node, "ready", timeout, node_ready),
        await_condition(&system, "coredns", "available", timeout, deployment_available),
        await_condition(&deployments, "snapshot-controller", "available", timeout, deployment_available),
        await_condition(&daemon_sets, "csi-driver", "ready", timeout, daemonset_ready),
        // The kubelet knows the driver: before that, pods with volumes fail and are tried again slowly.
        await_condition(&csi_nodes, &node, "given the CSI driver", timeout, has_csi_driver(DRIVER_NAME)),
    )?;
    Ok(())
}

async fn client(harness: &Harness, name: &str) -> Result<Client> {
    crate::kubeconfig::client(&harness.paths.kubeconfig(name)).await
}

/// kind's configuration; our own image brings its network, and its etcd's version is not kubeadm's default.
fn kind_config(node_image: &NodeImage) -> String {
    let (etcd, networking) = if node_image.ours {
        (format!("imageTag: \"{ETCD_VERSION}\""), "disableDefaultCNI: true")
    } else {
        (String::new(), "")
    };
    include_str!("../../manifests/kind.yaml")
        .replace("@ETCD_IMAGE@", &etcd)
        .replace("@NETWORKING@", networking)
}

/// What is applied to a cluster, in this order.
async fn manifests(images: &Images) -> Result<Vec<String>> {
    let source = CSI.source("github.com/kubernetes-csi/external-snapshotter/client/v8").await?;
    let read =
        |file: &Path| std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()));
    let dir = source.join("config/crd");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&dir)
        .with_context(|| format!("read {}", dir.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        // The folder also has a kustomization.
        .filter(|file| file.to_string_lossy().contains(".storage.k8s.io_"))
        .collect();
    files.sort();
    let crds = files.iter().map(|file| read(file)).collect::<Result<Vec<_>>>()?.join("\n---\n");
    let ours = |name: &str| -> Result<String> {
        let text = read(&e2e_dir().join("manifests").join(name))?;
        Ok(text.replace("@CSI_DRIVER@", &images.csi_driver).replace("@CSI_SIDECARS@", &images.csi_sidecars))
    };
    Ok(vec![crds, ours("snapshot-controller.yaml")?, ours("csi-driver.yaml")?])
}

/// What runs now, for a person.
#[derive(Debug, Serialize)]
pub struct Status {
    /// The Docker daemon: `ours`, `the machine's`, or none.
    pub engine: Option<&'static str>,
    /// Each cluster with what it says.
    pub clusters: Vec<ClusterStatus>,
    /// Images for pods, where they were made.
    pub images: Option<Images>,
    /// Bytes of the cache.
    pub cache_bytes: u64,
}

/// One cluster.
#[derive(Debug, Serialize)]
pub struct ClusterStatus {
    /// kind's name of it.
    pub name: String,
    /// `ready`, `half-made` (an `up` was interrupted), or `not answering`.
    pub state: &'static str,
    /// Its kubeconfig.
    pub kubeconfig: PathBuf,
    /// Kubernetes' version, where it answers.
    pub version: Option<String>,
    /// Memory of the node's container as Docker reports it.
    pub memory: Option<String>,
}

/// Looks at what runs.
///
/// # Errors
/// When the state cannot be read.
pub async fn status(harness: &Harness) -> Result<Status> {
    let engine = Engine::find(harness).await;
    let mut clusters = Vec::new();
    let mut names: Vec<String> = std::fs::read_dir(harness.paths.state().join("clusters"))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    for name in names {
        let version = match client(harness, &name).await {
            Ok(client) => client.apiserver_version().await.ok().map(|info| info.git_version),
            Err(_) => None,
        };
        let whole = harness.paths.cluster(&name).join("whole.json").exists();
        let state = match (whole, &version) {
            (true, Some(_)) => "ready",
            (false, Some(_)) => "half-made",
            (_, None) => "not answering",
        };
        let memory = match &engine {
            Some(engine) => memory(engine, &name).await,
            None => None,
        };
        clusters.push(ClusterStatus {
            state,
            kubeconfig: harness.paths.kubeconfig(&name),
            version,
            memory,
            name,
        });
    }
    Ok(Status {
        engine: engine.map(|engine| if engine.ours { "ours" } else { "the machine's" }),
        clusters,
        images: Images::load(&harness.paths).ok(),
        cache_bytes: size_of(&harness.paths.cache()),
    })
}

async fn memory(engine: &Engine, name: &str) -> Option<String> {
    let mut stats = engine.docker();
    stats.args(["stats", "--no-stream", "--format", "{{.MemUsage}}", &control_plane(name)]);
    let output = stats.output().await.ok()?;
    let usage = String::from_utf8_lossy(&output.stdout).split(" / ").next()?.trim().to_owned();
    (!usage.is_empty()).then_some(usage)
}

/// Bytes of all files below a folder; what vanishes meanwhile does not count.
fn size_of(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => size_of(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}
