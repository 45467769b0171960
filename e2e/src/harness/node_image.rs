//! What a node of a cluster runs: kind's official image where it can be pulled, else one built here from
//! Debian packages and Kubernetes' Go modules, with the control plane's images unpacked in its store.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::process::Command;

use super::Harness;
use super::archive::Image;
use super::cache::{self, Key, remove_dir};
use super::debian::{IPTABLES, Packages};
use super::engine::Engine;
use super::paths::e2e_dir;
use super::programs::{CONTAINERD, KUBERNETES, KUBERNETES_VERSION};
use super::step::Log;

/// The default node image of the kind version that `programs/kind/go.mod` pins
/// (`pkg/apis/config/defaults/image.go`).
const OFFICIAL: &str =
    "kindest/node:v1.37.0@sha256:a1ed56cfb0e7b93589bdf97c8cd566405a265939e3620fc4f5de89adff580ae5";
/// A pull that takes longer is given up, and the image built.
const PULL_TIMEOUT: Duration = Duration::from_mins(10);
/// Name of the images built here; the tag is the key over all that went into one.
const REPOSITORY: &str = "sts-backup-e2e/node";

/// The etcd that `programs/kubernetes/go.mod` pins; kubeadm is told so, as it would look for its own default.
pub const ETCD_VERSION: &str = "3.6.16";
/// As kubeadm of this Kubernetes version names them (`cmd/kubeadm/app/constants/constants.go`).
const COREDNS_IMAGE: &str = "registry.k8s.io/coredns/coredns:v1.14.2";
const PAUSE_IMAGE: &str = "registry.k8s.io/pause:3.10.2";

/// What the node's root file system is made of.
const ROOT_PACKAGES: &str = "systemd,systemd-sysv,dbus,iproute2,iptables,kmod,ethtool,util-linux,procps,mount,\
                             conntrack,ipset,socat,curl,ca-certificates,bash,jq,hostname,nftables";
const CNI_PLUGINS: [&str; 5] = ["bridge", "host-local", "loopback", "portmap", "ptp"];

/// An image that kind can make nodes of, in the engine's store.
#[derive(Clone, Debug)]
pub struct NodeImage {
    /// Its full name.
    pub name: String,
    /// Whether it was built here and wants our settings for kubeadm and networking.
    pub ours: bool,
}

/// Finds the image, pulls it or builds it.
///
/// # Errors
/// When it can neither be pulled nor built.
pub async fn find_or_make(harness: &Harness, engine: &Engine) -> Result<NodeImage> {
    if engine.has_image(OFFICIAL).await {
        return Ok(NodeImage { name: OFFICIAL.to_owned(), ours: false });
    }
    let ours = NodeImage { name: format!("{REPOSITORY}:{}", key().await?), ours: true };
    if engine.has_image(&ours.name).await {
        return Ok(ours);
    }
    eprintln!("  … pull the official node image");
    let Err(refusal) = pull(engine).await else {
        eprintln!("  ✓ pull the official node image");
        return Ok(NodeImage { name: OFFICIAL.to_owned(), ours: false });
    };
    eprintln!("  · it cannot be pulled, so one is built: {refusal}");
    if !rustix::process::geteuid().is_root() {
        bail!(
            "{OFFICIAL} cannot be pulled ({refusal}), and only root can build a node image: let Docker reach its \
             registry, or run as root"
        );
    }
    build(harness, engine, &ours.name).await?;
    remove_older(engine, &ours.name).await;
    Ok(ours)
}

async fn key() -> Result<String> {
    let go = super::programs::go_version(&KUBERNETES.dir()).await?;
    let key = Key::new().with(go).with(debian_release()?).with(ROOT_PACKAGES);
    let key = key
        .with_files(&KUBERNETES.dir())?
        .with_files(&CONTAINERD.dir())?
        .with_files(&e2e_dir().join("node"))?;
    // These files decide what goes in. Debian's packages are taken as they are when it is built.
    let code = [include_str!("node_image.rs"), include_str!("archive.rs"), include_str!("programs.rs")];
    Ok(code.into_iter().fold(key, Key::with).finish())
}

/// Pulls the official image, or says why that is not possible.
async fn pull(engine: &Engine) -> Result<(), String> {
    let mut command = engine.docker();
    command.args(["pull", "--quiet", OFFICIAL]).kill_on_drop(true);
    match tokio::time::timeout(PULL_TIMEOUT, command.output()).await {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("not done after {} min", PULL_TIMEOUT.as_secs() / 60)),
    }
}

/// Removes the images built here, but `newest` and those that a cluster runs.
pub async fn remove_older(engine: &Engine, newest: &str) {
    let listed =
        engine.docker().args(["images", "--format", "{{.Repository}}:{{.Tag}}", REPOSITORY]).output().await;
    let Ok(listed) = listed else { return };
    for old in String::from_utf8_lossy(&listed.stdout).lines().filter(|name| *name != newest) {
        // One that a cluster runs is refused, and goes the next time.
        let _ = engine.docker().args(["image", "rm", old]).output().await;
    }
}

/// `bookworm`, where the machine runs Debian 12.
///
/// # Errors
/// When `/etc/os-release` names no release.
pub fn debian_release() -> Result<String> {
    let release = std::fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .context("/etc/os-release names no release: the node image is built from Debian packages, use Debian")
}

async fn build(harness: &Harness, engine: &Engine, name: &str) -> Result<()> {
    let packages =
        Packages::get(harness, "node", &["debootstrap", "wget", "runc", "containernetworking-plugins"])
            .await?;
    let tools = super::engine::packages(harness).await?;
    // One wants the processors, the other the network.
    // Both run to their end also when one fails: a killed debootstrap would leave its mounts.
    let (root, programs) = tokio::join!(debian_root(harness, &packages), async {
        Ok::<_, anyhow::Error>((KUBERNETES.build(harness).await?, CONTAINERD.build(harness).await?))
    });
    let (root, (kubernetes, containerd)) = (root?, programs?);
    let work = harness.paths.making("node");
    std::fs::create_dir_all(work.join("images"))?;
    harness
        .steps
        .run("make the node image", "read the log; free disk space if it ran out", async |log| {
            control_plane_images(log, &tools, &kubernetes, &work.join("images")).await?;
            let node = work.join("root");
            lay_out(log, &root, &node, &packages, &kubernetes, &containerd).await?;
            preload(log, &containerd, &work, &node).await?;
            import(log, engine, &node, name).await
        })
        .await?;
    remove_dir(&work)
}

/// Debian's base system, once per release and list of packages.
async fn debian_root(harness: &Harness, packages: &Packages) -> Result<PathBuf> {
    let release = debian_release()?;
    let key = Key::new().with(&release).with(ROOT_PACKAGES).finish();
    cache::entry(&harness.paths, "debian-root", &key, async |dir| {
        let remedy = "check that the machine's apt mirror answers: apt-get update";
        harness
            .steps
            .run("install Debian for the node image", remedy, async |log| {
                let mirror = mirror(log, &release).await?;
                let mut debootstrap = packages.command("debootstrap")?;
                if let Some(scripts) = packages.file("usr/share/debootstrap") {
                    debootstrap.env("DEBOOTSTRAP_DIR", scripts);
                }
                debootstrap.args(["--variant=minbase", &format!("--include={ROOT_PACKAGES}"), &release]);
                log.run(debootstrap.arg(dir).arg(mirror)).await
            })
            .await
    })
    .await
}

/// The machine's own mirror of its release.
async fn mirror(log: &Log, release: &str) -> Result<String> {
    let mut command = Command::new("apt-get");
    command.args(["indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"]);
    let targets = log.output(&mut command).await?;
    targets
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{release} main ")))
        .map(str::to_owned)
        .with_context(|| {
            format!("apt has no source for {release} main: add one to /etc/apt and run apt-get update")
        })
}

/// Writes the archives of what kubeadm runs as pods.
async fn control_plane_images(log: &Log, tools: &Packages, kubernetes: &Path, out: &Path) -> Result<()> {
    for program in ["kube-apiserver", "kube-controller-manager", "kube-scheduler"] {
        let mut image = Image::new(&[]);
        image.file(format!("/usr/local/bin/{program}"), &kubernetes.join(program))?;
        let name = format!("registry.k8s.io/{program}:{KUBERNETES_VERSION}");
        image.write(&name, &out.join(format!("{program}.tar")))?;
    }

    let mut etcd = Image::new(&[]);
    // The main package is the module's root, so Go names the program after the module.
    etcd.file("/usr/local/bin/etcd", &kubernetes.join("server"))?;
    etcd.write(&format!("registry.k8s.io/etcd:{ETCD_VERSION}"), &out.join("etcd.tar"))?;

    let mut coredns = Image::new(&["/coredns"]);
    coredns.file("/coredns", &kubernetes.join("coredns"))?;
    coredns.write(COREDNS_IMAGE, &out.join("coredns.tar"))?;

    let mut proxy = Image::new(&[]);
    proxy.file("/usr/local/bin/kube-proxy", &kubernetes.join("kube-proxy"))?;
    proxy.program(tools, "xtables-nft-multi").await?;
    proxy.program(tools, "nft").await?;
    for name in IPTABLES {
        proxy.link(format!("/usr/sbin/{name}"), "xtables-nft-multi");
    }
    // Extensions are loaded when a rule names them, so ldd on the program does not show them, and they need
    // libraries of their own: without libm for `statistic`, Services with two endpoints silently fail.
    let extensions =
        tools.file("usr/lib/x86_64-linux-gnu/xtables").context("the package iptables has no extensions")?;
    for extension in std::fs::read_dir(&extensions)? {
        let extension = extension?.path();
        let name = extension.file_name().context("a file has a name")?;
        proxy.binary(tools, &Path::new("/usr/lib/x86_64-linux-gnu/xtables").join(name), &extension).await?;
    }
    proxy.write(&format!("registry.k8s.io/kube-proxy:{KUBERNETES_VERSION}"), &out.join("kube-proxy.tar"))?;

    let source = KUBERNETES.source("k8s.io/kubernetes").await?.join("build/pause/linux/pause.c");
    let binary = out.join("pause");
    log.run(Command::new("cc").args(["-Os", "-static", "-DVERSION=e2e", "-o"]).arg(&binary).arg(source))
        .await?;
    let mut pause = Image::new(&["/pause"]);
    pause.file("/pause", &binary)?;
    pause.write(PAUSE_IMAGE, &out.join("pause.tar"))?;
    Ok(std::fs::remove_file(binary)?)
}

/// Debian's root with our files, the programs of a node, and without what a container has no use for.
async fn lay_out(
    log: &Log,
    debian: &Path,
    node: &Path,
    packages: &Packages,
    kubernetes: &Path,
    containerd: &Path,
) -> Result<()> {
    log.run(Command::new("cp").arg("--archive").arg(debian).arg(node)).await?;
    // In a privileged node Debian's sysctl files would write to the machine; the rest is never read.
    for waste in [
        "usr/lib/sysctl.d",
        "var/cache/apt",
        "var/lib/apt/lists",
        "usr/share/doc",
        "usr/share/man",
        "usr/share/locale",
        "usr/share/info",
    ] {
        remove_dir(&node.join(waste))?;
    }
    for file in ["etc/resolv.conf", "etc/hostname", "etc/sysctl.d/99-sysctl.conf"] {
        let _ = std::fs::remove_file(node.join(file));
    }
    let ours = e2e_dir().join("node");
    log.run(Command::new("cp").arg("--recursive").arg(ours.join("rootfs/.")).arg(node)).await?;
    std::fs::write(node.join("kind/version"), KUBERNETES_VERSION)?;

    let units = node.join("etc/systemd/system");
    for unit in std::fs::read_to_string(ours.join("masked-units"))?.lines() {
        let _ = std::fs::remove_file(units.join(unit));
        std::os::unix::fs::symlink("/dev/null", units.join(unit))?;
    }
    let _ = std::fs::remove_file(units.join("default.target"));
    std::os::unix::fs::symlink("/lib/systemd/system/multi-user.target", units.join("default.target"))?;
    let wants = units.join("multi-user.target.wants");
    std::fs::create_dir_all(&wants)?;
    for service in ["containerd.service", "kubelet.service"] {
        std::os::unix::fs::symlink(format!("../{service}"), wants.join(service))?;
    }

    for dir in ["etc/kubernetes/manifests", "var/lib/kubelet", "opt/cni/bin", "var/lib/containerd"] {
        std::fs::create_dir_all(node.join(dir))?;
    }
    let copy = |from: PathBuf, to: &str| {
        let to = node.join(to);
        std::fs::copy(&from, &to).with_context(|| format!("copy {} to {}", from.display(), to.display()))
    };
    for program in ["containerd", "containerd-shim-runc-v2", "ctr"] {
        copy(containerd.join(program), &format!("usr/local/bin/{program}"))?;
    }
    for program in ["kubelet", "kubectl", "kubeadm"] {
        copy(kubernetes.join(program), &format!("usr/bin/{program}"))?;
    }
    let runc = packages.program("runc")?;
    for library in packages.libraries(&runc).await? {
        let to = packages.path_in_image(&library);
        if !node.join(to.strip_prefix("/")?).exists() {
            copy(library, &to.strip_prefix("/")?.to_string_lossy())?;
        }
    }
    copy(runc, "usr/sbin/runc")?;
    for plugin in CNI_PLUGINS {
        let source = packages.file(&format!("usr/lib/cni/{plugin}"));
        copy(source.with_context(|| format!("no CNI plugin {plugin}"))?, &format!("opt/cni/bin/{plugin}"))?;
    }
    Ok(())
}

/// Unpacks the images into the node's containerd store: kubeadm needs them before anything could load them.
async fn preload(log: &Log, containerd: &Path, work: &Path, node: &Path) -> Result<()> {
    let scratch = work.join("preload");
    std::fs::create_dir_all(&scratch)?;
    let config = scratch.join("config.toml");
    let text = std::fs::read_to_string(e2e_dir().join("node/containerd-preload.toml"))?;
    std::fs::write(&config, text.replace("@DIR@", &scratch.display().to_string()))?;
    let output = log.open()?;
    let mut daemon = Command::new(containerd.join("containerd"))
        .arg("--config")
        .arg(&config)
        .stdout(output.try_clone()?)
        .stderr(output)
        .kill_on_drop(true)
        .spawn()
        .context("start containerd")?;
    let ctr = || {
        let mut ctr = Command::new(containerd.join("ctr"));
        ctr.arg("--address").arg(scratch.join("containerd.sock")).args(["--namespace", "k8s.io"]);
        ctr
    };
    tokio::time::timeout(Duration::from_secs(30), async {
        while log.run(ctr().arg("version")).await.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await
    .context("containerd does not answer")?;
    for archive in std::fs::read_dir(work.join("images"))? {
        let mut import = ctr();
        import.args([
            "images",
            "import",
            "--local",
            "--snapshotter",
            "overlayfs",
            "--discard-unpacked-layers",
        ]);
        log.run(import.arg(archive?.path())).await?;
    }
    let pid = i32::try_from(daemon.id().context("containerd ended")?)?;
    super::engine::end_process(pid, Duration::from_secs(20)).await?;
    daemon.wait().await?;
    log.run(
        Command::new("cp").arg("--archive").arg(scratch.join("root/.")).arg(node.join("var/lib/containerd")),
    )
    .await
}

/// Hands the root to the engine as an image.
async fn import(log: &Log, engine: &Engine, node: &Path, name: &str) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.args(["--create", "--numeric-owner", "--directory"]).arg(node).arg(".");
    let mut tar = tar.stdout(std::process::Stdio::piped()).stderr(log.open()?).kill_on_drop(true).spawn()?;
    let stream: std::process::Stdio = tar.stdout.take().context("tar has no output")?.try_into()?;
    let mut import = engine.docker();
    import.args(["import", "--change", r#"ENTRYPOINT ["/usr/local/bin/entrypoint","/sbin/init"]"#]);
    import.args(["--change", "ENV container=docker"]);
    import.args(["--change", "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]);
    // The engine cannot tell the end of a stream from its breaking off: the name comes when tar has succeeded.
    let draft = format!("{REPOSITORY}:draft");
    log.run_with_input(import.args(["-", &draft]), stream).await?;
    let status = tar.wait().await?;
    anyhow::ensure!(status.success(), "tar ended with {status}");
    log.run(engine.docker().args(["tag", &draft, name])).await?;
    log.run(engine.docker().args(["image", "rm", &draft])).await
}
