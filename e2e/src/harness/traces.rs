//! What clusters leave on the machine outside of the cache, and how it goes away: processes, mounts, loop
//! devices, network links, firewall rules, cgroups and kernel settings.
//!
//! A trace is ours when it is of a kind that Docker or a node makes *and* was not there [`Before`] our engine
//! first started: neither what others had nor what they made meanwhile is reported or touched. Where the engine
//! is the machine's own, none of this applies.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::mount::{UnmountFlags, unmount};
use serde::{Deserialize, Serialize};

use super::Harness;
use super::cache::remove_dir;
use super::debian::Packages;
use super::engine::{self, end_process, engine_dir};
use super::firewall::{self, Firewall};
use super::paths::Paths;
use crate::csi::POOL_FILE;

/// Kernel settings that Docker, kubelet, systemd in a node or the harness change, below `/proc/sys`.
const SETTINGS: [&str; 10] = [
    "fs/file-max",
    "fs/inotify/max_user_instances",
    "fs/nr_open",
    "kernel/keys/root_maxbytes",
    "kernel/keys/root_maxkeys",
    "kernel/panic",
    "kernel/panic_on_oops",
    "net/ipv4/ip_forward",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
];
/// The same, of each network link.
const LINK_SETTINGS: [&str; 2] = ["accept_redirects", "forwarding"];

/// Folders that Docker and its containerd make, wherever their own folders are told to be.
const DIRS: [&str; 3] = ["/opt/containerd", "/run/containerd", "/run/docker"];

/// The state of the machine before our engine first started.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Before {
    /// After a reboot the record is void.
    boot_id: String,
    /// Values by their path below `/proc/sys`.
    settings: BTreeMap<String, String>,
    links: BTreeSet<String>,
    firewall: Firewall,
    /// Docker's folders in the cgroup hierarchies.
    cgroups: BTreeSet<PathBuf>,
    /// Those of [`DIRS`] that exist.
    dirs: BTreeSet<PathBuf>,
}

impl Before {
    fn file(paths: &Paths) -> PathBuf {
        paths.state().join("before.json")
    }

    /// Records the machine's state, unless a record of this boot exists: a repeated run must not take what an
    /// interrupted one changed for the original.
    ///
    /// # Errors
    /// When the state cannot be read or written.
    pub async fn record(paths: &Paths, packages: &Packages) -> Result<()> {
        if Self::load(paths).is_some() {
            return Ok(());
        }
        let before = Self {
            boot_id: boot_id()?,
            settings: settings(),
            links: links()?,
            firewall: Firewall::read(packages).await?,
            cgroups: cgroups(),
            dirs: dirs(),
        };
        let file = Self::file(paths);
        let draft = file.with_extension("json.new");
        std::fs::write(&draft, serde_json::to_vec_pretty(&before)?)?;
        std::fs::rename(&draft, &file).with_context(|| format!("write {}", file.display()))
    }

    fn load(paths: &Paths) -> Option<Self> {
        let before: Self = serde_json::from_slice(&std::fs::read(Self::file(paths)).ok()?).ok()?;
        (before.boot_id == boot_id().ok()?).then_some(before)
    }
}

/// What is left of our engine and its clusters, a line each; empty when nothing is.
///
/// # Errors
/// When the machine cannot be read.
pub async fn list(harness: &Harness) -> Result<Vec<String>> {
    let dir = engine_dir(&harness.paths);
    let mut left = Vec::new();
    left.extend(processes(&harness.paths)?.into_iter().map(|(pid, name)| format!("process {pid}: {name}")));
    left.extend(mounts(&dir)?.iter().map(|mount| format!("mount {}", mount.display())));
    if let Some(before) = Before::load(&harness.paths) {
        let packages = engine::packages(harness).await?;
        left.extend(loop_devices(&dir)?.iter().map(|device| format!("loop device {device}")));
        left.extend(links()?.difference(&before.links).map(|link| format!("network link {link}")));
        let rules = firewall::list(&packages, &before.firewall).await?;
        left.extend(rules.iter().map(|line| format!("firewall rule {line}")));
        left.extend(dirs().difference(&before.dirs).map(|dir| format!("folder {}", dir.display())));
        left.extend(cgroups().difference(&before.cgroups).map(|group| format!("cgroup {}", group.display())));
        let now = settings();
        left.extend(changed_settings(&before.settings, &now).map(|(name, value)| {
            format!("kernel setting {name}: {} instead of {value}", now.get(name).map_or("", String::as_str))
        }));
    }
    Ok(left)
}

/// Removes all that [`list`] lists. The engine is stopped already, or cannot be.
///
/// # Errors
/// When something cannot be removed; what was removed before that stays removed, and a repeated call goes on.
pub async fn clear(harness: &Harness) -> Result<()> {
    let dir = engine_dir(&harness.paths);
    for (pid, _) in processes(&harness.paths)? {
        end_process(pid, Duration::from_secs(2)).await?;
    }
    unmount_below(&dir)?;
    clear_making(&harness.paths).await?;
    let Some(before) = Before::load(&harness.paths) else {
        return Ok(());
    };
    let packages = engine::packages(harness).await?;
    for device in loop_devices(&dir)? {
        packages.output("losetup", &["--detach", &format!("/dev/{device}")]).await?;
    }
    for link in links()?.difference(&before.links) {
        packages.output("ip", &["link", "delete", link]).await?;
    }
    firewall::restore(&harness.paths, &packages, &before.firewall).await?;
    for dir in dirs().difference(&before.dirs) {
        remove_dir(dir)?;
    }
    for group in cgroups().difference(&before.cgroups) {
        remove_cgroup(group)?;
    }
    // Writing net.ipv4.ip_forward changes the setting of every link, so those are looked at once more.
    for _ in 0..2 {
        for (name, value) in changed_settings(&before.settings, &settings()) {
            let file = Path::new("/proc/sys").join(name);
            std::fs::write(&file, value).with_context(|| format!("write {value} to {}", file.display()))?;
        }
    }
    Ok(())
}

/// Ends what a killed run was still making for the cache, and removes it. The caller holds the harness's lock.
///
/// # Errors
/// When something cannot be removed.
pub async fn clear_making(paths: &Paths) -> Result<()> {
    let making = paths.making("").to_string_lossy().into_owned();
    for (pid, program, command) in all_processes()? {
        // kind outlives a killed harness too, and would go on with a cluster that is made anew.
        let is_kind = program.starts_with(paths.cache()) && program.ends_with("kind");
        if is_kind || command.contains(&making) {
            end_process(pid, Duration::from_secs(2)).await?;
        }
    }
    for entry in
        std::fs::read_dir(paths.cache()).with_context(|| format!("read {}", paths.cache().display()))?
    {
        let entry = entry?.path();
        if entry.to_string_lossy().starts_with(&making) {
            // debootstrap mounts /proc in what it makes.
            unmount_below(&entry)?;
            remove_dir(&entry)?;
        }
    }
    Ok(())
}

/// Unmounts all that lies in a folder, the innermost first: later lines of the mount table lie on earlier ones.
fn unmount_below(dir: &Path) -> Result<()> {
    for mount in mounts(dir)?.iter().rev() {
        unmount(mount, UnmountFlags::DETACH).with_context(|| format!("unmount {}", mount.display()))?;
    }
    Ok(())
}

/// Whether our engine changed the machine and that has not been taken back.
#[must_use]
pub fn are_recorded(paths: &Paths) -> bool {
    Before::load(paths).is_some()
}

/// Forgets the state before: the machine is as it was.
///
/// # Errors
/// When the record cannot be removed.
pub fn forget(paths: &Paths) -> Result<()> {
    match std::fs::remove_file(Before::file(paths)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).context("remove the record"),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn boot_id() -> Result<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").context("read the kernel's boot id")
}

/// Processes of our engine: their program lies in the harness's cache, their command names the engine's folder,
/// or they run in one of its containers.
fn processes(paths: &Paths) -> Result<Vec<(i32, String)>> {
    let dir = engine_dir(paths).to_string_lossy().into_owned();
    let containers = container_ids(&dir);
    let mut found = all_processes()?;
    found.retain(|(pid, program, command)| {
        let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let in_container = containers.iter().any(|id| groups.contains(id.as_str()));
        in_container || program.starts_with(paths.cache()) || is_engine_command(command, &dir)
    });
    Ok(found.into_iter().map(|(pid, _, command)| (pid, command)).collect())
}

/// All processes but ourselves: number, program and command.
fn all_processes() -> Result<Vec<(i32, PathBuf, String)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").context("read /proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        if u32::try_from(pid) != Ok(std::process::id()) {
            found.push((pid, program, command.trim().to_owned()));
        }
    }
    Ok(found)
}

/// Programs of the engine carry its folder in an argument. Others may too, such as a pager on its log.
fn is_engine_command(command: &str, dir: &str) -> bool {
    let program = command.split(' ').next().unwrap_or_default();
    let program = program.rsplit('/').next().unwrap_or_default();
    command.contains(dir) && (program.starts_with("containerd") || ["dockerd", "runc"].contains(&program))
}

/// Ids of the containers in our engine's store.
fn container_ids(dir: &str) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(Path::new(dir).join("data/containers")) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

fn mounts(dir: &Path) -> Result<Vec<PathBuf>> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").context("read the mount table")?;
    Ok(table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .filter(|mount| mount.starts_with(dir))
        .collect())
}

fn loop_devices(dir: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/sys/block").context("read /sys/block")? {
        let entry = entry?;
        let backing = std::fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        // A volume's file is seen by its path inside of the node, so its place in the engine's store does not
        // show: the pool's own name does.
        let backing = backing.trim().trim_end_matches(" (deleted)");
        if Path::new(backing).starts_with(dir) || backing.ends_with(POOL_FILE) {
            found.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(found)
}

/// Network links with names that Docker gives.
fn links() -> Result<BTreeSet<String>> {
    let entries = std::fs::read_dir("/sys/class/net").context("read /sys/class/net")?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.filter(|name| name == "docker0" || name.starts_with("veth") || is_bridge(name)).collect())
}

fn settings() -> BTreeMap<String, String> {
    let mut names: Vec<String> = SETTINGS.map(str::to_owned).into();
    for links in ["net/ipv4/conf", "net/ipv6/conf"] {
        for link in std::fs::read_dir(Path::new("/proc/sys").join(links)).into_iter().flatten().flatten() {
            names.extend(LINK_SETTINGS.map(|name| format!("{links}/{}/{name}", link.file_name().display())));
        }
    }
    let read = |name: &String| std::fs::read_to_string(Path::new("/proc/sys").join(name));
    names
        .into_iter()
        .filter_map(|name| {
            let value = read(&name).ok()?;
            Some((name, value.trim().to_owned()))
        })
        .collect()
}

/// Settings of before that have another value now; those whose file is gone went with what made them.
fn changed_settings<'a>(
    before: &'a BTreeMap<String, String>,
    now: &'a BTreeMap<String, String>,
) -> impl Iterator<Item = (&'a String, &'a String)> {
    before.iter().filter(|(name, value)| now.get(*name).is_some_and(|current| current != *value))
}

fn cgroups() -> BTreeSet<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    // Version 1 has a hierarchy per controller below the root; in version 2 the root is the hierarchy.
    let hierarchies: Vec<PathBuf> = if root.join("cgroup.controllers").exists() {
        vec![root.to_path_buf()]
    } else {
        std::fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    };
    hierarchies
        .iter()
        .flat_map(|hierarchy| std::fs::read_dir(hierarchy).into_iter().flatten().flatten())
        .map(|entry| entry.path())
        .filter(|group| group.ends_with("docker") && group.is_dir())
        .collect()
}

fn dirs() -> BTreeSet<PathBuf> {
    DIRS.iter().map(PathBuf::from).filter(|dir| dir.exists()).collect()
}

fn remove_cgroup(group: &Path) -> Result<()> {
    for entry in std::fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path())?;
        }
    }
    std::fs::remove_dir(group).with_context(|| format!("remove cgroup {}", group.display()))
}

/// Docker names a network's bridge `br-` and 12 hex digits of its id.
pub(super) fn is_bridge(word: &str) -> bool {
    word.strip_prefix("br-").is_some_and(|id| id.len() == 12 && id.bytes().all(|b| b.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_that_vanished_is_not_a_change() {
        let before = BTreeMap::from([("a".to_owned(), "1".to_owned()), ("b".to_owned(), "1".to_owned())]);
        let now = BTreeMap::from([("b".to_owned(), "2".to_owned())]);
        assert_eq!(changed_settings(&before, &now).map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["b"]);
    }

    #[test]
    fn a_pager_on_the_engines_log_is_not_the_engine() {
        assert!(is_engine_command(
            "/usr/bin/containerd-shim-runc-v2 -address /c/engine/exec/containerd.sock",
            "/c/engine"
        ));
        assert!(!is_engine_command("less /c/engine/dockerd.log", "/c/engine"));
    }
}
