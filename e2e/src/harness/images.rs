//! The images that pods run from, made of Debian packages, Go modules and our own binaries, and loaded into
//! clusters, never pulled.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::Harness;
use super::archive::{Archive, Image};
use super::cache::{self, Key};
use super::debian::Packages;
use super::engine::Engine;
use super::paths::Paths;
use super::programs::CSI;
use super::step::Log;

const PACKAGES: [&str; 5] = ["postgresql-15", "redis-server", "busybox-static", "btrfs-progs", "mount"];

/// Full names of the images, as pods write them (with `imagePullPolicy: Never`). The tag changes with the
/// content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Images {
    /// PostgreSQL 15 and a shell; users `root` and `postgres` (999).
    pub postgres: String,
    /// Redis 7.0 with `redis-cli`, and a shell.
    pub redis: String,
    /// busybox: `sh` and its applets.
    pub shell: String,
    /// The test CSI driver with the btrfs tools.
    pub csi_driver: String,
    /// csi-provisioner, csi-snapshotter and snapshot-controller.
    pub csi_sidecars: String,
    /// The conformance test of CSI drivers.
    pub csi_sanity: String,
    /// The agent of this checkout, with its failpoints.
    pub agent: String,
    /// The hub of this checkout.
    pub hub: String,
}

impl Images {
    fn file(paths: &Paths) -> PathBuf {
        paths.state().join("images.json")
    }

    /// The images of the last [`make`].
    ///
    /// # Errors
    /// When there was none.
    pub fn load(paths: &Paths) -> Result<Self> {
        let file = Self::file(paths);
        let text =
            std::fs::read(&file).with_context(|| format!("read {}: run cargo e2e up", file.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("parse {}: run cargo e2e up", file.display()))
    }
}

/// Makes the images that are not made yet.
///
/// # Errors
/// When a package or module cannot be had, or a build fails.
pub async fn make(harness: &Harness) -> Result<(Images, Vec<Archive>)> {
    let packages = Packages::get(harness, "images", &PACKAGES).await?;
    let csi = CSI.build(harness).await?;
    let driver = build_ours(harness, "test CSI driver", "csi-driver", &["sts-backup-e2e"]).await?;
    build_ours(
        harness,
        "kubectl plugin",
        "kubectl-stsbackup",
        &["sts-backup-agent", "--features=failpoints"],
    )
    .await?;
    build_ours(harness, "simulated agents", "simulated-agents", &["sts-backup-e2e"]).await?;
    let hub_program = build_ours(harness, "hub", "sts-backup-hub", &["sts-backup-hub"]).await?;

    let sidecars = ["csi-provisioner", "csi-snapshotter", "snapshot-controller"];
    let driver_key = Key::new().with(packages.key()).with(std::fs::read(&driver)?).finish();
    let csi_key = csi.to_string_lossy();

    let postgres = image(harness, "postgres", packages.key(), async || postgres(&packages).await).await?;
    let redis = image(harness, "redis", packages.key(), async || redis(&packages).await).await?;
    let shell = image(harness, "shell", packages.key(), async || shell(&packages)).await?;
    let csi_driver = async || csi_driver(&packages, &driver).await;
    let csi_driver = image(harness, "csi-driver", &driver_key, csi_driver).await?;
    let csi_sidecars =
        image(harness, "csi-sidecars", &csi_key, async || go_programs(&csi, &sidecars)).await?;
    let csi_sanity =
        image(harness, "csi-sanity", &csi_key, async || go_programs(&csi, &["csi-sanity"])).await?;

    let agent = make_agent_of(harness, &packages).await?;
    let hub_key = Key::new().with(packages.key()).with(std::fs::read(&hub_program)?).finish();
    let hub = async || own_image(&packages, &hub_program, "sts-backup-hub").await;
    let hub = image(harness, "hub", &hub_key, hub).await?;

    let images = Images {
        postgres: postgres.name.clone(),
        redis: redis.name.clone(),
        shell: shell.name.clone(),
        csi_driver: csi_driver.name.clone(),
        csi_sidecars: csi_sidecars.name.clone(),
        csi_sanity: csi_sanity.name.clone(),
        agent: agent.name.clone(),
        hub: hub.name.clone(),
    };
    std::fs::write(Images::file(&harness.paths), serde_json::to_vec_pretty(&images)?)?;
    Ok((images, vec![postgres, redis, shell, csi_driver, csi_sidecars, csi_sanity, agent, hub]))
}

/// Builds the hub and the simulated agents alone: where they are.
///
/// # Errors
/// When they do not build.
pub async fn make_fleet(harness: &Harness) -> Result<(PathBuf, PathBuf)> {
    let how =
        |package: &'static str| if harness.release { vec![package, "--release"] } else { vec![package] };
    let hub = build_ours(harness, "hub", "sts-backup-hub", &how("sts-backup-hub")).await?;
    let simulated =
        build_ours(harness, "simulated agents", "simulated-agents", &how("sts-backup-e2e")).await?;
    Ok((hub, simulated))
}

/// Makes the agent's image alone.
///
/// # Errors
/// When the agent does not build, or a package cannot be had.
pub async fn make_agent(harness: &Harness) -> Result<Archive> {
    make_agent_of(harness, &Packages::get(harness, "images", &PACKAGES).await?).await
}

async fn make_agent_of(harness: &Harness, packages: &Packages) -> Result<Archive> {
    let for_tests = ["sts-backup-agent", "--features=failpoints"];
    let for_release = ["sts-backup-agent", "--release"];
    let how = if harness.release { &for_release } else { &for_tests };
    let agent = build_ours(harness, "agent", "sts-backup-agent", how).await?;
    let key = Key::new().with(packages.key()).with(std::fs::read(&agent)?).finish();
    image(harness, "agent", &key, async || own_image(packages, &agent, "sts-backup-agent").await).await
}

/// Loads the images into a node that it does not have yet.
///
/// # Errors
/// When the node does not take them.
pub async fn load(log: &Log, engine: &Engine, node: &str, archives: &[Archive]) -> Result<()> {
    let had = in_node(log, engine, node).await?;
    for archive in archives.iter().filter(|archive| !had.contains(&in_store(&archive.name))) {
        let mut import = ctr(engine, node);
        import.args(["images", "import", "--local", "--snapshotter=overlayfs", "-"]);
        log.run_with_input(&mut import, std::fs::File::open(&archive.path)?.into()).await?;
    }
    Ok(())
}

/// Removes what a node has of these images by other tags: each build of the agent would stay for ever. Containers
/// that run from one go on.
///
/// # Errors
/// When the node does not let go of one.
pub async fn unload_older(log: &Log, engine: &Engine, node: &str, archives: &[Archive]) -> Result<()> {
    let repository = |name: &str| name.rsplit_once(':').map(|(repository, _)| repository.to_owned());
    let newest: Vec<String> = archives.iter().map(|archive| in_store(&archive.name)).collect();
    for name in in_node(log, engine, node).await? {
        if !newest.contains(&name) && newest.iter().any(|newest| repository(newest) == repository(&name)) {
            log.run(ctr(engine, node).args(["images", "rm", "--sync", &name])).await?;
        }
    }
    Ok(())
}

/// The names of all images that a node has.
async fn in_node(log: &Log, engine: &Engine, node: &str) -> Result<Vec<String>> {
    let list = log.output(ctr(engine, node).args(["images", "ls", "--quiet"])).await?;
    Ok(list.lines().map(str::to_owned).collect())
}

/// containerd's name of an image that pods name without a registry.
fn in_store(name: &str) -> String {
    format!("docker.io/{name}")
}

/// containerd's `ctr` in a node, where the kubelet's containers and images are.
#[must_use]
pub fn ctr(engine: &Engine, node: &str) -> Command {
    let mut ctr = engine.docker();
    ctr.args(["exec", "--interactive", node, "ctr", "--namespace=k8s.io"]);
    ctr
}

/// One image by the key of what goes in; this file decides what does.
async fn image(
    harness: &Harness,
    name: &str,
    key: &str,
    make: impl AsyncFnOnce() -> Result<Image>,
) -> Result<Archive> {
    let key = Key::new().with(key).with(include_str!("images.rs")).with(include_str!("archive.rs")).finish();
    let entry = format!("image-{name}");
    let dir = cache::entry(&harness.paths, &entry, &key, async |dir| {
        harness
            .steps
            .run(
                &format!("make the image {name}"),
                "read the log; free disk space if it ran out",
                async |_| {
                    let archive =
                        make().await?.write(&format!("sts-backup-e2e/{name}"), &dir.join("image.tar"))?;
                    Ok(std::fs::write(dir.join("name"), archive.name)?)
                },
            )
            .await
    })
    .await?;
    let name =
        std::fs::read_to_string(dir.join("name")).with_context(|| format!("read {}/name", dir.display()))?;
    Ok(Archive { name, path: dir.join("image.tar") })
}

/// A binary of ours, built from the checkout by the cargo that runs us, without its debug info.
async fn build_ours(harness: &Harness, what: &str, name: &str, package: &[&str]) -> Result<PathBuf> {
    let mut built = std::env::current_exe()?.with_file_name(name);
    if package.contains(&"--release") {
        let target = built.ancestors().nth(2).context("cargo builds in a folder by profile")?;
        built = target.join("release").join(name);
    }
    let stripped = harness.paths.program(name);
    let remedy = "mend what the compiler says in the log";
    harness
        .steps
        .run(&format!("build the {what}"), remedy, async |log| {
            let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
            let mut command = Command::new(cargo);
            command.args(["build", "--quiet", "--bin", name, "--package"]).args(package);
            log.run(command.current_dir(super::paths::e2e_dir())).await?;
            log.run(Command::new("strip").arg("-o").arg(&stripped).arg(&built)).await
        })
        .await?;
    Ok(stripped)
}

fn add_shell(image: &mut Image, packages: &Packages) -> Result<()> {
    let busybox = packages.program("busybox")?;
    image.file("/bin/busybox", &busybox)?;
    let list =
        std::process::Command::new(&busybox).arg("--list").output().context("list busybox' applets")?;
    for applet in String::from_utf8_lossy(&list.stdout).lines().filter(|applet| *applet != "busybox") {
        image.link(format!("/bin/{applet}"), "busybox");
    }
    Ok(())
}

fn shell(packages: &Packages) -> Result<Image> {
    let mut image = Image::new(&["/bin/sh"]);
    add_shell(&mut image, packages)?;
    Ok(image)
}

fn go_programs(dir: &Path, names: &[&str]) -> Result<Image> {
    let mut image = Image::new(&[]);
    for name in names {
        image.file(format!("/usr/local/bin/{name}"), &dir.join(name))?;
    }
    Ok(image)
}

async fn postgres(packages: &Packages) -> Result<Image> {
    let mut image = Image::new(&["/bin/sh"]);
    add_shell(&mut image, packages)?;
    // LLVM is large, and only the just-in-time compiler needs it.
    let skip = |path: &Path| {
        path.ends_with("llvmjit.so")
            || path.ends_with("bitcode")
            || path.ends_with("pgxs")
            || path.ends_with("man")
    };
    let mut add = |path: &str| -> Result<Vec<PathBuf>> {
        let found = packages.files(path);
        for dir in &found {
            image.tree(&Path::new("/").join(path), dir, &skip)?;
        }
        Ok(found)
    };
    let programs = add("usr/lib/postgresql/15/bin")?;
    let libraries = add("usr/lib/postgresql/15/lib")?;
    let data = add("usr/share/postgresql/15")?;
    anyhow::ensure!(!programs.is_empty() && !data.is_empty(), "the package postgresql-15 is not whole");
    add("usr/share/zoneinfo")?;
    add("usr/lib/locale/C.utf8")?;
    for dir in programs.iter().chain(&libraries) {
        for file in std::fs::read_dir(dir)? {
            let file = file?.path();
            let is_library = file.extension().is_some_and(|extension| extension == "so");
            if file.is_file() && !skip(&file) && (is_library || programs.contains(dir)) {
                image.libraries_of(packages, &file).await?;
            }
        }
    }
    Ok(image)
}

async fn redis(packages: &Packages) -> Result<Image> {
    let mut image = Image::new(&["/bin/sh"]);
    add_shell(&mut image, packages)?;
    for program in ["redis-server", "redis-cli"] {
        image.program(packages, program).await?;
    }
    Ok(image)
}

async fn csi_driver(packages: &Packages, driver: &Path) -> Result<Image> {
    let mut image = Image::new(&["/usr/local/bin/csi-driver"]);
    add_shell(&mut image, packages)?;
    for program in ["mkfs.btrfs", "btrfs", "mount", "umount", "losetup"] {
        image.program(packages, program).await?;
    }
    image.binary(packages, Path::new("/usr/local/bin/csi-driver"), driver).await?;
    Ok(image)
}

/// An image of one program of ours, and nothing else.
async fn own_image(packages: &Packages, program: &Path, name: &str) -> Result<Image> {
    let path = format!("/usr/local/bin/{name}");
    let mut image = Image::new(&[&path]);
    image.binary(packages, Path::new(&path), program).await?;
    Ok(image)
}
