//! Whether this machine can run the harness. What is wrong is told all at once, each with its remedy, before
//! anything is changed.

use std::path::Path;

use anyhow::{Context, Result, bail};

use super::engine::Engine;
use super::images::Images;
use super::paths::{Paths, e2e_dir};
use super::{node_image, programs};

const GIB: u64 = 1 << 30;
/// What a first `up` writes below the cache folder and Go's own, measured and rounded up.
const DISK_FOR_BUILDING: u64 = 16 * GIB;
/// What a cluster writes while tests run on it.
const DISK_FOR_RUNNING: u64 = 4 * GIB;
/// A node with a test's workloads.
const MEMORY_OF_A_CLUSTER: u64 = 3 * GIB / 2;
/// The release whose packages the images are made of; it has PostgreSQL 15.
const DEBIAN_RELEASE: &str = "bookworm";
/// Three nodes exhaust the kernel's default of 128, and kind then still reports success.
pub const INOTIFY_INSTANCES: u32 = 1024;

/// What was found on the machine.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is one independent fact of a check list")]
pub struct Machine {
    /// Runs as root.
    pub root: bool,
    /// A Docker daemon answers.
    pub docker: bool,
    /// It is the one that the harness started.
    pub ours: bool,
    /// The processor, as Rust names it.
    pub architecture: String,
    /// The release of Debian, such as `bookworm`.
    pub release: Option<String>,
    /// What `go version` prints, where there is a Go.
    pub go: Option<String>,
    /// Whether the expensive things were built before.
    pub warm: bool,
    /// How many clusters must be made.
    pub new_clusters: u64,
    /// The kernel's `fs.inotify.max_user_instances`.
    pub inotify_instances: u32,
    /// Free bytes where the cache is.
    pub free_disk: u64,
    /// Bytes of memory that can be had.
    pub free_memory: u64,
}

impl Machine {
    /// Looks at the machine.
    ///
    /// # Errors
    /// When the cache's file system or `/proc` cannot be read.
    pub async fn look(paths: &Paths, engine: Option<&Engine>, new_clusters: u64) -> Result<Self> {
        let existing = paths.root().ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
        let disk = rustix::fs::statvfs(existing).with_context(|| format!("read {}", existing.display()))?;
        Ok(Self {
            root: rustix::process::geteuid().is_root(),
            docker: engine.is_some(),
            ours: engine.is_some_and(|engine| engine.ours),
            architecture: std::env::consts::ARCH.to_owned(),
            release: node_image::debian_release().ok(),
            go: programs::go_version(e2e_dir()).await.ok(),
            // The images for pods are made last of all.
            warm: Images::load(paths).is_ok(),
            new_clusters,
            inotify_instances: inotify_instances()?,
            free_disk: disk.f_bavail * disk.f_frsize,
            free_memory: available_memory(
                &std::fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?,
            ),
        })
    }

    /// What keeps the harness from working here; empty when nothing does.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if !self.docker && !self.root {
            problems.push(
                "no Docker daemon answers, and only root can start one: start Docker (or join its group), or run \
                 as root"
                    .to_owned(),
            );
        }
        if self.architecture != "x86_64" {
            problems.push(format!(
                "the processor is {}: the images are made for x86_64, use such a machine",
                self.architecture
            ));
        }
        if self.release.as_deref() != Some(DEBIAN_RELEASE) {
            problems.push(format!(
                "this is {}, not Debian 12 ({DEBIAN_RELEASE}), from whose packages the images are made: use a machine \
                 or a container with Debian 12",
                self.release.as_deref().unwrap_or("an unknown system")
            ));
        }
        // With an engine of ours, `up` raises the setting and `down` restores it; a machine that has Docker is its
        // owner's to set up.
        if self.docker && !self.ours && self.new_clusters > 1 && self.inotify_instances < INOTIFY_INSTANCES {
            problems.push(format!(
                "fs.inotify.max_user_instances is {}, too few for several clusters: run, as root, sysctl \
                 fs.inotify.max_user_instances={INOTIFY_INSTANCES}",
                self.inotify_instances
            ));
        }
        match self.go.as_deref().map(go_minor) {
            Some(Some(minor)) if minor >= 21 => {}
            Some(_) => problems.push(format!(
                "Go is too old ({}): install Go 1.26 or newer from https://go.dev/dl",
                self.go.as_deref().unwrap_or_default()
            )),
            None => problems.push(
                "Go is missing: install Go 1.26 or newer from https://go.dev/dl and put its bin folder on PATH"
                    .to_owned(),
            ),
        }
        let disk = if self.warm { DISK_FOR_RUNNING } else { DISK_FOR_BUILDING };
        if self.free_disk < disk {
            problems.push(format!(
                "the disk is nearly full: {} free of the {} needed; free some, or set XDG_CACHE_HOME to a folder on \
                 a larger disk",
                gib(self.free_disk),
                gib(disk)
            ));
        }
        let memory = self.new_clusters * MEMORY_OF_A_CLUSTER;
        if self.free_memory < memory {
            problems.push(format!(
                "too little memory: {} free of the {} that {} new clusters need; end other programs",
                gib(self.free_memory),
                gib(memory),
                self.new_clusters
            ));
        }
        problems
    }

    /// # Errors
    /// When the machine cannot be used, with all reasons.
    pub fn check(&self) -> Result<()> {
        let problems = self.problems();
        if problems.is_empty() {
            return Ok(());
        }
        bail!("this machine cannot make clusters yet; nothing was changed\n  - {}", problems.join("\n  - "))
    }
}

/// The kernel's setting now.
///
/// # Errors
/// When it cannot be read.
pub fn inotify_instances() -> Result<u32> {
    let value = std::fs::read_to_string(INOTIFY_FILE).with_context(|| format!("read {INOTIFY_FILE}"))?;
    value.trim().parse().with_context(|| format!("parse {INOTIFY_FILE}"))
}

/// Where the kernel has the setting.
pub const INOTIFY_FILE: &str = "/proc/sys/fs/inotify/max_user_instances";

/// The `26` of `go version go1.26.8 linux/amd64`.
fn go_minor(version: &str) -> Option<u32> {
    version.split_once("go1.")?.1.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn available_memory(meminfo: &str) -> u64 {
    meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024)
}

/// Bytes for a person: `1.5 GiB`.
#[must_use]
pub fn gib(bytes: u64) -> String {
    let tenths = bytes * 10 / GIB;
    format!("{}.{} GiB", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Machine {
        Machine {
            root: true,
            docker: false,
            ours: false,
            architecture: "x86_64".to_owned(),
            release: Some("bookworm".to_owned()),
            go: Some("go version go1.26.8 linux/amd64".to_owned()),
            warm: false,
            new_clusters: 2,
            inotify_instances: 128,
            free_disk: 80 * GIB,
            free_memory: 20 * GIB,
        }
    }

    #[test]
    fn a_good_machine_has_no_problems_and_docker_makes_up_for_root() {
        assert_eq!(good().problems(), Vec::<String>::new());
        let with_docker = Machine { root: false, docker: true, inotify_instances: 8192, ..good() };
        assert_eq!(with_docker.problems(), Vec::<String>::new());
    }

    #[test]
    fn each_problem_says_what_to_install_or_free() {
        let cases = [
            (Machine { root: false, ..good() }, "start Docker"),
            (Machine { architecture: "aarch64".to_owned(), ..good() }, "use such a machine"),
            (Machine { release: Some("trixie".to_owned()), ..good() }, "this is trixie, not Debian 12"),
            (Machine { release: None, ..good() }, "use a machine or a container with Debian 12"),
            (Machine { docker: true, ..good() }, "sysctl fs.inotify.max_user_instances=1024"),
            (Machine { go: None, ..good() }, "install Go 1.26"),
            (Machine { go: Some("go version go1.19.8 linux/amd64".to_owned()), ..good() }, "install Go 1.26"),
            (Machine { free_disk: 8 * GIB, ..good() }, "8.0 GiB free of the 16.0 GiB needed"),
            (Machine { free_disk: 3 * GIB, warm: true, ..good() }, "3.0 GiB free of the 4.0 GiB needed"),
            (Machine { free_memory: GIB, ..good() }, "end other programs"),
        ];
        for (machine, remedy) in cases {
            let problems = machine.problems();
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert!(problems[0].contains(remedy), "{problems:?}");
        }
    }

    #[test]
    fn a_warm_machine_needs_less_room_and_running_clusters_no_more_memory() {
        assert_eq!(Machine { free_disk: 5 * GIB, warm: true, ..good() }.problems(), Vec::<String>::new());
        assert_eq!(Machine { free_memory: GIB, new_clusters: 0, ..good() }.problems(), Vec::<String>::new());
    }
}
