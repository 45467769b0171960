//! What clusters leave on the machine outside of the cache, and how it goes away: processes, mounts, loop
//! devices, network links, firewall rules, cgroups and kernel settings.
//!
//! Everything is judged against what was there [`Before`] our engine first started, so what belongs to others
//! is neither reported nor touched. Where the engine is the machine's own, none of this applies.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::mount::{UnmountFlags, unmount};
use serde::{Deserialize, Serialize};

use super::Harness;
use super::cache::remove_dir;
use super::debian::Packages;
use super::engine::{end_process, engine_dir};
use super::paths::Paths;
use crate::csi::pool::POOL_FILE;

/// Kernel settings that Docker, kubelet, kube-proxy or the harness change: files or folders below `/proc/sys`.
const SETTINGS: [&str; 13] = [
    "fs/file-max",
    "fs/inotify",
    "fs/nr_open",
    "kernel/keys",
    "kernel/panic",
    "kernel/panic_on_oops",
    "net/bridge",
    "net/ipv4/conf",
    "net/ipv4/ip_forward",
    "net/ipv6/conf",
    "net/netfilter",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
];

/// Folders that Docker and its containerd make, wherever their own folders are told to be.
const RUN_DIRS: [&str; 2] = ["/run/containerd", "/run/docker"];

/// The state of the machine before our engine first started.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Before {
    /// After a reboot the record is void.
    boot_id: String,
    /// Values by their path below `/proc/sys`.
    settings: BTreeMap<String, String>,
    links: BTreeSet<String>,
    /// As `nft list tables` names them.
    tables: BTreeSet<String>,
    /// Chain policies of iptables, by table and chain.
    policies: BTreeMap<String, String>,
    /// Folders directly below the cgroup hierarchies.
    cgroups: BTreeSet<PathBuf>,
    /// Those of [`RUN_DIRS`] that exist.
    run_dirs: BTreeSet<PathBuf>,
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
            tables: tables(packages).await?,
            policies: policies(&iptables_save(packages).await?),
            cgroups: cgroups(),
            run_dirs: run_dirs(),
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
    let mut left: Vec<String> =
        processes(&harness.paths)?.into_iter().map(|(pid, name)| format!("process {pid}: {name}")).collect();
    left.extend(mounts(harness.paths.root())?.iter().map(|mount| format!("mount {}", mount.display())));
    left.extend(loop_devices(&dir)?.iter().map(|device| format!("loop device {device}")));
    if let Some(before) = Before::load(&harness.paths) {
        let packages = engine_packages(harness).await?;
        left.extend(links()?.difference(&before.links).map(|link| format!("network link {link}")));
        left.extend(
            tables(&packages)
                .await?
                .difference(&before.tables)
                .map(|table| format!("firewall table {table}")),
        );
        let rules = iptables_save(&packages).await?;
        left.extend(rules.lines().filter(|line| is_ours(line)).map(|line| format!("firewall rule {line}")));
        left.extend(run_dirs().difference(&before.run_dirs).map(|dir| format!("folder {}", dir.display())));
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
    // The innermost first: later lines of the mount table lie on earlier ones.
    for mount in mounts(harness.paths.root())?.iter().rev() {
        unmount(mount, UnmountFlags::DETACH).with_context(|| format!("unmount {}", mount.display()))?;
    }
    let Some(before) = Before::load(&harness.paths) else {
        return Ok(());
    };
    let packages = engine_packages(harness).await?;
    for device in loop_devices(&dir)? {
        run(&packages, "losetup", &["--detach", &format!("/dev/{device}")]).await?;
    }
    for link in links()?.difference(&before.links) {
        run(&packages, "ip", &["link", "delete", link]).await?;
    }
    restore_firewall(&packages, &before).await?;
    for dir in run_dirs().difference(&before.run_dirs) {
        remove_dir(dir)?;
    }
    for group in cgroups().difference(&before.cgroups) {
        remove_cgroup(group)?;
    }
    for (name, value) in changed_settings(&before.settings, &settings()) {
        let file = Path::new("/proc/sys").join(name);
        std::fs::write(&file, value).with_context(|| format!("write {value} to {}", file.display()))?;
    }
    Ok(())
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

async fn engine_packages(harness: &Harness) -> Result<Packages> {
    super::engine::packages(harness).await
}

fn boot_id() -> Result<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").context("read the kernel's boot id")
}

/// Processes of our engine: their program lies in the harness's folder, their command names the engine's
/// folder, or they run in one of its containers.
fn processes(paths: &Paths) -> Result<Vec<(i32, String)>> {
    let dir = engine_dir(paths).to_string_lossy().into_owned();
    let containers = container_ids(&dir);
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").context("read /proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let in_container = containers.iter().any(|id| groups.contains(id.as_str()));
        if in_container || program.starts_with(paths.root()) || is_engine_command(&command, &dir) {
            found.push((pid, command.trim().to_owned()));
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

fn links() -> Result<BTreeSet<String>> {
    let entries = std::fs::read_dir("/sys/class/net").context("read /sys/class/net")?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
}

fn settings() -> BTreeMap<String, String> {
    fn read(path: &Path, into: &mut BTreeMap<String, String>) {
        if path.is_dir() {
            for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
                read(&entry.path(), into);
            }
        } else if let Ok(value) = std::fs::read_to_string(path)
            && let Ok(name) = path.strip_prefix("/proc/sys")
        {
            into.insert(name.to_string_lossy().into_owned(), value.trim().to_owned());
        }
    }
    let mut found = BTreeMap::new();
    for name in SETTINGS {
        read(&Path::new("/proc/sys").join(name), &mut found);
    }
    found.retain(|name, _| !is_counter(name));
    found
}

/// Settings files that hold a measurement.
fn is_counter(name: &str) -> bool {
    name.ends_with("nf_conntrack_count") || name.ends_with("/stable_secret")
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
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn run_dirs() -> BTreeSet<PathBuf> {
    RUN_DIRS.iter().map(PathBuf::from).filter(|dir| dir.exists()).collect()
}

fn remove_cgroup(group: &Path) -> Result<()> {
    for entry in std::fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path())?;
        }
    }
    std::fs::remove_dir(group).with_context(|| format!("remove cgroup {}", group.display()))
}

async fn tables(packages: &Packages) -> Result<BTreeSet<String>> {
    let tables = output(packages, "nft", &["list", "tables"]).await?;
    Ok(tables.lines().filter_map(|line| line.strip_prefix("table ")).map(str::to_owned).collect())
}

async fn iptables_save(packages: &Packages) -> Result<String> {
    output(packages, "iptables-save", &[]).await
}

/// Policies of the built-in chains in the output of iptables-save, as `filter FORWARD` → `ACCEPT`.
fn policies(saved: &str) -> BTreeMap<String, String> {
    let mut table = "";
    let mut found = BTreeMap::new();
    for line in saved.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        } else if let Some((chain, rest)) = line.strip_prefix(':').and_then(|line| line.split_once(' '))
            && let Some(policy) = rest.split(' ').next()
            && policy != "-"
        {
            found.insert(format!("{table} {chain}"), policy.to_owned());
        }
    }
    found
}

/// Whether a line of iptables-save is Docker's: it names one of its chains or bridges.
fn is_ours(line: &str) -> bool {
    line.split([' ', ':']).any(|word| word.starts_with("DOCKER") || word == "docker0" || is_bridge(word))
        || line.contains("MASQUERADE") && line.contains("! -o br-")
}

/// Docker names a network's bridge `br-` and 12 hex digits of its id.
fn is_bridge(word: &str) -> bool {
    word.strip_prefix("br-").is_some_and(|id| id.len() == 12 && id.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// The output of iptables-save without Docker's lines and with the policies of before.
fn without_docker(saved: &str, before: &BTreeMap<String, String>) -> String {
    let mut table = String::new();
    let mut kept = String::new();
    for line in saved.lines().filter(|line| !is_ours(line)) {
        if let Some(name) = line.strip_prefix('*') {
            name.clone_into(&mut table);
        }
        let policy = line.strip_prefix(':').and_then(|line| line.split_once(' ')).and_then(|(chain, _)| {
            let policy = before.get(&format!("{table} {chain}")).map_or("ACCEPT", String::as_str);
            (!line.contains(" - ")).then(|| format!(":{chain} {policy} [0:0]"))
        });
        kept.push_str(policy.as_deref().unwrap_or(line));
        kept.push('\n');
    }
    kept
}

async fn restore_firewall(packages: &Packages, before: &Before) -> Result<()> {
    let saved = iptables_save(packages).await?;
    if saved.lines().any(is_ours) {
        let file = std::env::temp_dir().join(format!("sts-backup-e2e-rules-{}", std::process::id()));
        std::fs::write(&file, without_docker(&saved, &before.policies))?;
        let restored = run(packages, "iptables-restore", &[&file.to_string_lossy()]).await;
        std::fs::remove_file(&file)?;
        restored?;
    }
    for table in tables(packages).await?.difference(&before.tables) {
        let rules = output(
            packages,
            "nft",
            &[&["list", "table"], table.split(' ').collect::<Vec<_>>().as_slice()].concat(),
        )
        .await?;
        if is_empty_table(&rules) {
            run(
                packages,
                "nft",
                &[&["delete", "table"], table.split(' ').collect::<Vec<_>>().as_slice()].concat(),
            )
            .await?;
        }
    }
    Ok(())
}

/// Whether the listing of an nft table has no rule: only the table, chains and their hooks.
fn is_empty_table(listing: &str) -> bool {
    listing.lines().map(str::trim).all(|line| {
        line.is_empty()
            || line == "}"
            || line.starts_with('#')
            || line.ends_with('{')
            || line.starts_with("type ")
    })
}

async fn output(packages: &Packages, program: &str, arguments: &[&str]) -> Result<String> {
    let output = packages
        .command(program)?
        .args(arguments)
        .output()
        .await
        .with_context(|| format!("start {program}"))?;
    anyhow::ensure!(
        output.status.success(),
        "{program} {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

async fn run(packages: &Packages, program: &str, arguments: &[&str]) -> Result<()> {
    output(packages, program, arguments).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "*nat\n:PREROUTING ACCEPT [0:0]\n:DOCKER - [0:0]\n-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n\
         -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE\n-A POSTROUTING -s 10.9.0.0/16 -j MASQUERADE\nCOMMIT\n\
         *filter\n:FORWARD DROP [0:0]\n:DOCKER-USER - [0:0]\n:MINE - [0:0]\n-A FORWARD -j DOCKER-USER\n\
         -A FORWARD -i br-0123456789ab -o br-0123456789ab -j ACCEPT\n-A MINE -j RETURN\nCOMMIT\n";

    #[test]
    fn only_dockers_rules_are_removed_and_policies_go_back() {
        let before = BTreeMap::from([("filter FORWARD".to_owned(), "ACCEPT".to_owned())]);
        assert_eq!(
            without_docker(SAVED, &before),
            "*nat\n:PREROUTING ACCEPT [0:0]\n-A POSTROUTING -s 10.9.0.0/16 -j MASQUERADE\nCOMMIT\n\
             *filter\n:FORWARD ACCEPT [0:0]\n:MINE - [0:0]\n-A MINE -j RETURN\nCOMMIT\n"
        );
    }

    #[test]
    fn policies_of_built_in_chains_are_read_by_table() {
        let policies = policies(SAVED);
        assert_eq!(policies.get("filter FORWARD").map(String::as_str), Some("DROP"));
        assert!(!policies.contains_key("filter MINE"));
    }

    #[test]
    fn a_table_with_a_rule_is_not_empty() {
        let empty = "table ip nat {\n\tchain PREROUTING {\n\t\ttype nat hook prerouting priority dstnat; policy accept;\n\t}\n}\n";
        assert!(is_empty_table(empty));
        assert!(!is_empty_table(&empty.replace("accept;\n", "accept;\n\t\tip daddr 10.0.0.1 drop\n")));
    }

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
