//! The clusters: made by kind, checked, and given the snapshot machinery. Every function here can be
//! repeated: what is whole is kept, what is half-made is made anew.

use std::path::PathBuf;
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
use super::machine::Machine;
use super::node_image::{self, ETCD_VERSION, NodeImage};
use super::paths::e2e_dir;
use super::programs::{CSI, KIND};
use super::step::Log;
use super::traces;
use crate::csi::DRIVER_NAME;
use crate::kit::condition::{
    await_condition, daemonset_ready, deployment_available, has_csi_driver, node_ready,
};

/// All our clusters' names begin with it.
const PREFIX: &str = "stsb-e2e-";
/// More would starve a common machine: half a GiB each, and each has its own control plane.
pub const MOST_CLUSTERS: usize = 6;
/// Three nodes exhaust the kernel's default of 128, and kind then still reports success.
const INOTIFY_INSTANCES: u32 = 1024;

const READY_TIMEOUT: Duration = Duration::from_mins(3);
/// A cluster of an earlier run that does not answer by then is made anew.
const STILL_ALIVE_TIMEOUT: Duration = Duration::from_mins(1);

/// The name of the `n`-th cluster, counted from 1.
#[must_use]
pub fn cluster_name(n: usize) -> String {
    format!("{PREFIX}{n}")
}

/// What is in a cluster once it is whole; written last, so a cluster without it is half-made.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Whole {
    node_image: String,
    images: Images,
    /// Over the manifests that were applied.
    manifests: String,
}

/// Makes sure that at least `count` clusters run and have what tests need.
///
/// # Errors
/// When the machine cannot do it, or a step fails; a repeated call goes on from there.
pub async fn up(harness: &Harness, count: usize) -> Result<Vec<String>> {
    if !(1..=MOST_CLUSTERS).contains(&count) {
        bail!("--clusters {count}: one machine runs 1 to {MOST_CLUSTERS} clusters");
    }
    let found = Engine::find(harness).await;
    Machine::look(&harness.paths, found.is_some()).await?.check()?;
    let engine = match found {
        Some(engine) => engine,
        None => Engine::find_or_start(harness).await?,
    };
    let kind = KIND.build(harness).await?.join("kind");
    let node_image = node_image::find_or_make(harness, &engine).await?;
    let (images, archives) = images::make(harness).await?;
    allow_inotify_instances(engine.ours)?;

    let whole =
        Whole { node_image: node_image.name.clone(), manifests: manifests(&images).await?.key, images };
    let names: Vec<String> = (1..=count).map(cluster_name).collect();
    try_join_all(
        names.iter().map(|name| make_whole(harness, &engine, &kind, name, &node_image, &archives, &whole)),
    )
    .await?;
    Ok(names)
}

/// Builds or pulls the node image, and returns its name.
///
/// # Errors
/// When the machine cannot do it, or a step fails.
pub async fn make_node_image(harness: &Harness) -> Result<String> {
    let found = Engine::find(harness).await;
    Machine::look(&harness.paths, found.is_some()).await?.check()?;
    let engine = Engine::find_or_start(harness).await?;
    Ok(node_image::find_or_make(harness, &engine).await?.name)
}

/// Deletes all clusters and everything that they and the engine left on the machine, but the cache.
///
/// # Errors
/// When something is left; it is listed.
pub async fn down(harness: &Harness) -> Result<()> {
    // Docker itself knows best how to end what it started, also after it was killed: bring it back for that.
    let has_engine = super::engine::engine_dir(&harness.paths).join("data").exists();
    let engine = match Engine::find(harness).await {
        None if has_engine && rustix::process::geteuid().is_root() => {
            Engine::find_or_start(harness).await.ok()
        }
        found => found,
    };
    if let Some(engine) = &engine {
        harness
            .steps
            .run("delete the clusters", "try again; `docker ps -a` shows what is left", async |log| {
                remove_containers(log, engine).await
            })
            .await?;
    }
    Engine::stop(harness).await?;
    remove_dir(&harness.paths.state().join("clusters"))?;
    harness
        .steps
        .run("clear what is left", "read the cause, remove it by hand and try again", async |_| {
            traces::clear(harness).await?;
            let left = traces::list(harness).await?;
            anyhow::ensure!(left.is_empty(), "still there after all:\n  {}", left.join("\n  "));
            traces::forget(&harness.paths)
        })
        .await
}

async fn remove_containers(log: &Log, engine: &Engine) -> Result<()> {
    // kind's own label; by the network, so that a user's other kind clusters are not touched.
    let filter = ["ps", "--all", "--quiet", "--filter", &format!("network={NETWORK}")];
    let containers = log.output(engine.docker().args(filter)).await?;
    if !containers.trim().is_empty() {
        log.run(engine.docker().args(["rm", "--force", "--volumes"]).args(containers.split_whitespace()))
            .await?;
    }
    let networks = log
        .output(engine.docker().args(["network", "ls", "--quiet", "--filter", &format!("name=^{NETWORK}$")]))
        .await?;
    if !networks.trim().is_empty() {
        log.run(engine.docker().args(["network", "rm"]).args(networks.split_whitespace())).await?;
    }
    Ok(())
}

async fn make_whole(
    harness: &Harness,
    engine: &Engine,
    kind: &PathBuf,
    name: &str,
    node_image: &NodeImage,
    archives: &[Archive],
    whole: &Whole,
) -> Result<()> {
    let marker = harness.paths.cluster(name).join("whole.json");
    let had: Option<Whole> = std::fs::read(&marker).ok().and_then(|file| serde_json::from_slice(&file).ok());
    let keep =
        had.as_ref().is_some_and(|had| had.node_image == whole.node_image) && is_alive(harness, name).await;
    if keep && had.as_ref() == Some(whole) {
        eprintln!("  ✓ cluster {name} is up");
        return Ok(());
    }
    let _ = std::fs::remove_file(&marker);
    if !keep {
        let remedy = "read the log; `cargo e2e down` clears the machine, then try again";
        harness
            .steps
            .run(&format!("create cluster {name}"), remedy, async |log| {
                create(harness, log, engine, kind, name, node_image).await
            })
            .await?;
    }
    let remedy = "look at the pods: kubectl --kubeconfig $(cargo e2e kubeconfig CLUSTER) get pods -A";
    harness
        .steps
        .run(&format!("equip cluster {name}"), remedy, async |log| {
            Box::pin(equip(harness, log, engine, name, archives, &whole.images)).await
        })
        .await?;
    Ok(std::fs::write(&marker, serde_json::to_vec_pretty(whole)?)?)
}

/// Whether a cluster of an earlier run still works.
async fn is_alive(harness: &Harness, name: &str) -> bool {
    let Ok(client) = client(harness, name).await else { return false };
    let node: Api<Node> = Api::all(client);
    await_condition(&node, &control_plane(name), "ready", STILL_ALIVE_TIMEOUT, node_ready).await.is_ok()
}

fn control_plane(name: &str) -> String {
    format!("{name}-control-plane")
}

async fn client(harness: &Harness, name: &str) -> Result<Client> {
    crate::kit::cluster::client(&harness.paths.kubeconfig(name)).await
}

async fn create(
    harness: &Harness,
    log: &Log,
    engine: &Engine,
    kind: &PathBuf,
    name: &str,
    node_image: &NodeImage,
) -> Result<()> {
    let command = || {
        let mut command = Command::new(kind);
        engine.set_environment(&mut command);
        command
    };
    log.run(command().args(["delete", "cluster", "--name", name])).await?;
    let dir = harness.paths.cluster(name);
    remove_dir(&dir)?;
    std::fs::create_dir_all(&dir)?;
    let config = dir.join("kind.yaml");
    std::fs::write(&config, kind_config(node_image))?;
    let mut create = command();
    create.args(["create", "cluster", "--retain", "--name", name, "--image", &node_image.name]);
    create.arg("--config").arg(&config).arg("--kubeconfig").arg(harness.paths.kubeconfig(name));
    log.run(&mut create).await?;
    let node: Api<Node> = Api::all(client(harness, name).await?);
    await_condition(&node, &control_plane(name), "ready", READY_TIMEOUT, node_ready).await?;
    Ok(())
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

async fn equip(
    harness: &Harness,
    log: &Log,
    engine: &Engine,
    name: &str,
    archives: &[Archive],
    images: &Images,
) -> Result<()> {
    let node = control_plane(name);
    let loaded = {
        let mut list = engine.docker();
        list.args(["exec", &node, "ctr", "--namespace=k8s.io", "images", "ls", "-q"]);
        log.output(&mut list).await?
    };
    for archive in archives.iter().filter(|archive| !loaded.contains(&archive.name)) {
        let mut load = engine.docker();
        load.args(["exec", "--interactive", &node, "ctr", "--namespace=k8s.io", "images", "import"]);
        load.args(["--local", "--snapshotter=overlayfs", "-"]);
        log.run_with_input(&mut load, std::fs::File::open(&archive.path)?.into()).await?;
    }
    let manifests = manifests(images).await?;
    let kubectl = || {
        let mut kubectl = engine.docker();
        kubectl.args(["exec", "--interactive", &node, "kubectl", "--kubeconfig=/etc/kubernetes/admin.conf"]);
        kubectl
    };
    for part in &manifests.parts {
        let mut apply = kubectl();
        apply.args(["apply", "--server-side", "--force-conflicts", "--filename=-"]);
        log.run_with_text(&mut apply, part).await?;
        // Later parts have objects of kinds that earlier ones define.
        log.run(kubectl().args(["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"]))
            .await?;
    }
    let client = client(harness, name).await?;
    let system: Api<Deployment> = Api::namespaced(client.clone(), "kube-system");
    let snapshots: Api<Deployment> = Api::namespaced(client.clone(), NAMESPACE);
    let driver: Api<DaemonSet> = Api::namespaced(client.clone(), NAMESPACE);
    let nodes: Api<CSINode> = Api::all(client);
    tokio::try_join!(
        await_condition(&system, "coredns", "available", READY_TIMEOUT, deployment_available),
        await_condition(&snapshots, "snapshot-controller", "available", READY_TIMEOUT, deployment_available),
        await_condition(&driver, "csi-driver", "ready", READY_TIMEOUT, daemonset_ready),
        // The kubelet knows the driver: before that, pods with volumes fail and are tried again slowly.
        await_condition(
            &nodes,
            &node,
            "registered with the kubelet",
            READY_TIMEOUT,
            has_csi_driver(DRIVER_NAME)
        ),
    )?;
    Ok(())
}

/// Where the snapshot machinery runs.
const NAMESPACE: &str = "sts-backup-e2e";

/// What is applied to a cluster, in this order, and a key over all of it.
struct Manifests {
    parts: Vec<String>,
    key: String,
}

async fn manifests(images: &Images) -> Result<Manifests> {
    let crds =
        CSI.source("github.com/kubernetes-csi/external-snapshotter/client/v8").await?.join("config/crd");
    let mut crd_files: Vec<PathBuf> = std::fs::read_dir(&crds)
        .with_context(|| format!("read {}", crds.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|file| {
            file.file_name().is_some_and(|name| name.to_string_lossy().contains(".storage.k8s.io_"))
        })
        .collect();
    crd_files.sort();
    let mut crds = String::new();
    for file in crd_files {
        crds.push_str("---\n");
        crds.push_str(&std::fs::read_to_string(file)?);
    }
    let fill = |text: &str| {
        text.replace("@CSI_DRIVER@", &images.csi_driver).replace("@CSI_SIDECARS@", &images.csi_sidecars)
    };
    let read =
        |name: &str| std::fs::read_to_string(e2e_dir().join("manifests").join(name)).map(|text| fill(&text));
    let parts = vec![crds, read("snapshot-controller.yaml")?, read("csi-driver.yaml")?];
    let key = parts.iter().fold(Key::new(), Key::with).finish();
    Ok(Manifests { parts, key })
}

/// With an engine of ours, `down` restores the setting; a machine that has Docker is its owner's to set up.
fn allow_inotify_instances(may_set: bool) -> Result<()> {
    let file = "/proc/sys/fs/inotify/max_user_instances";
    let now: u32 = std::fs::read_to_string(file)?.trim().parse().with_context(|| format!("read {file}"))?;
    if now >= INOTIFY_INSTANCES {
        return Ok(());
    }
    if !may_set {
        bail!(
            "{file} is {now}, too few for several nodes: run, as root, \
             sysctl fs.inotify.max_user_instances={INOTIFY_INSTANCES}"
        );
    }
    std::fs::write(file, INOTIFY_INSTANCES.to_string()).with_context(|| format!("write {file}"))
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
fn size_of(dir: &std::path::Path) -> u64 {
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
