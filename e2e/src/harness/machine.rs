//! Whether this machine can run the harness. What is wrong is told all at once, each with its remedy, before
//! anything is changed.

use std::path::Path;

use anyhow::{Context, Result, bail};
use tokio::process::Command;

use super::paths::Paths;

const GIB: u64 = 1 << 30;
/// What a first `up` writes below the cache folder and Go's own, measured and rounded up.
const DISK_FOR_BUILDING: u64 = 16 * GIB;
/// What a cluster writes while tests run on it.
const DISK_FOR_RUNNING: u64 = 4 * GIB;
/// Two clusters with a test's workloads.
const MEMORY: u64 = 4 * GIB;

/// What was found on the machine.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is one independent fact of a check list")]
pub struct Machine {
    /// Runs as root.
    pub root: bool,
    /// A Docker daemon answers.
    pub docker: bool,
    /// `apt-get` is there.
    pub apt: bool,
    /// A C compiler is there.
    pub cc: bool,
    /// What `go version` prints, where there is a Go.
    pub go: Option<String>,
    /// Whether the expensive things were built before.
    pub warm: bool,
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
    pub async fn look(paths: &Paths, docker: bool) -> Result<Self> {
        let existing = paths.root().ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
        let disk = rustix::fs::statvfs(existing).with_context(|| format!("read {}", existing.display()))?;
        let warm = std::fs::read_dir(paths.cache())
            .is_ok_and(|mut entries| entries.any(|entry| entry.is_ok_and(|e| is_programs(&e.file_name()))));
        Ok(Self {
            root: rustix::process::geteuid().is_root(),
            docker,
            apt: runs("apt-get", "--version").await,
            cc: runs("cc", "--version").await,
            go: super::programs::go_version().await.ok(),
            warm,
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
        if !self.apt {
            problems.push(
                "apt-get is missing: the images for tests come from Debian packages, so use Debian 12 or newer"
                    .to_owned(),
            );
        }
        if !self.cc {
            problems.push("no C compiler: install one, as in apt-get install gcc libc6-dev".to_owned());
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
        if self.free_memory < MEMORY {
            problems.push(format!(
                "too little memory: {} free of the {} needed; end other programs",
                gib(self.free_memory),
                gib(MEMORY)
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

fn is_programs(name: &std::ffi::OsStr) -> bool {
    name.to_string_lossy().starts_with("programs-")
}

async fn runs(program: &str, argument: &str) -> bool {
    Command::new(program).arg(argument).output().await.is_ok_and(|output| output.status.success())
}

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
            apt: true,
            cc: true,
            go: Some("go version go1.26.8 linux/amd64".to_owned()),
            warm: false,
            free_disk: 80 * GIB,
            free_memory: 20 * GIB,
        }
    }

    #[test]
    fn a_good_machine_has_no_problems_and_docker_makes_up_for_root() {
        assert_eq!(good().problems(), Vec::<String>::new());
        assert_eq!(Machine { root: false, docker: true, ..good() }.problems(), Vec::<String>::new());
    }

    #[test]
    fn each_problem_says_what_to_install_or_free() {
        let cases = [
            (Machine { root: false, ..good() }, "start Docker"),
            (Machine { apt: false, ..good() }, "use Debian"),
            (Machine { cc: false, ..good() }, "apt-get install gcc"),
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
    fn a_warm_machine_needs_less_room() {
        assert_eq!(Machine { free_disk: 5 * GIB, warm: true, ..good() }.problems(), Vec::<String>::new());
    }
}
