//! The harness takes the machine from state to state and back. These tests remake the clusters, so they run
//! alone, one after the other, after all others: `cargo e2e test --tier full`. They need root.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use sts_backup_e2e::harness::{Harness, engine};
use sts_backup_e2e::kit::shell::run_shell;
use sts_backup_e2e::kit::{Cluster, with_temp_namespace};
use tokio::io::AsyncBufReadExt;

const E2E: &str = env!("CARGO_BIN_EXE_e2e");

fn e2e(arguments: &[&str]) -> Result<String> {
    let output = Command::new(E2E).args(arguments).output().context("start the harness")?;
    ensure!(
        output.status.success(),
        "cargo e2e {} failed:\n{}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}

/// The states of all clusters by their names.
fn states() -> Result<Vec<(String, String)>> {
    let status: serde_json::Value = serde_json::from_str(&e2e(&["status", "--output", "json"])?)?;
    let clusters = status["clusters"].as_array().context("status has no clusters")?;
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    Ok(clusters.iter().map(|cluster| (text(&cluster["name"]), text(&cluster["state"]))).collect())
}

async fn ensure_a_pod_runs() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "harness", async |ns| {
        let said = run_shell(ns, "hello", "echo hello").await?;
        ensure!(said == "hello\n", "the pod said {said:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "remakes the clusters: cargo e2e test --tier full"]
async fn a_killed_daemon_and_its_clusters_come_back_with_the_next_up() -> Result<()> {
    e2e(&["down"])?;
    e2e(&["up"])?;
    let pid_file = engine::engine_dir(&Harness::open()?.paths).join("dockerd.pid");
    let pid =
        std::fs::read_to_string(&pid_file).context("the engine is not ours: stop the machine's Docker")?;
    run("kill", &["-KILL", pid.trim()])?;
    e2e(&["up"])?;
    ensure_a_pod_runs().await
}

#[tokio::test]
#[ignore = "remakes the clusters: cargo e2e test --tier full"]
async fn an_up_that_was_killed_while_it_made_a_cluster_is_finished_by_the_next() -> Result<()> {
    e2e(&["down"])?;
    e2e(&["node-image"])?;
    let engine = engine::Engine::find(&Harness::open()?).await.context("node-image left no engine")?;
    let mut starts = engine.docker();
    starts.args(["events", "--filter", "event=start", "--format", "{{.Actor.Attributes.name}}"]);
    let mut starts = starts.stdout(Stdio::piped()).kill_on_drop(true).spawn()?;
    let mut started = tokio::io::BufReader::new(starts.stdout.take().context("no output")?).lines();

    let mut first = Command::new(E2E).arg("up").stderr(Stdio::null()).stdout(Stdio::null()).spawn()?;
    while started.next_line().await?.context("docker events ended")? != "stsb-e2e-1-control-plane" {}
    first.kill()?;
    first.wait()?;
    ensure!(
        states()? == [("stsb-e2e-1".to_owned(), "not answering".to_owned())],
        "it is no half-made cluster"
    );

    e2e(&["up"])?;
    ensure_a_pod_runs().await
}

#[tokio::test]
#[ignore = "remakes the clusters: cargo e2e test --tier full"]
async fn down_leaves_nothing_on_the_machine() -> Result<()> {
    e2e(&["down"])?;
    let before = machine_state().await?;
    e2e(&["up", "--clusters", "2"])?;
    let during = machine_state().await?;
    for trace in ["mount ", "link ", "table ", "process ", "cgroup ", "loop "] {
        ensure!(
            during.difference(&before).any(|line| line.starts_with(trace)),
            "clusters show no {trace:?}: this test would not see one that is left"
        );
    }
    e2e(&["down"])?;
    let after = machine_state().await?;
    let left: Vec<_> = after.difference(&before).collect();
    let gone: Vec<_> = before.difference(&after).collect();
    ensure!(left.is_empty() && gone.is_empty(), "left: {left:#?}\ngone: {gone:#?}");
    Ok(())
}

/// Everything that clusters could change on a machine, a line each, read without the harness's own eyes.
async fn machine_state() -> Result<BTreeSet<String>> {
    let mut state = BTreeSet::new();
    for line in std::fs::read_to_string("/proc/self/mountinfo")?.lines() {
        state.insert(format!("mount {}", line.split(' ').nth(4).unwrap_or_default()));
    }
    for name in names_in("/sys/class/net")? {
        state.insert(format!("link {name}"));
    }
    for dir in ["/etc", "/opt", "/run", "/var/lib"] {
        for name in names_in(dir)? {
            state.insert(format!("file {dir}/{name}"));
        }
    }
    for name in names_in("/sys/block")? {
        let file = std::fs::read_to_string(format!("/sys/block/{name}/loop/backing_file"));
        if let Ok(file) = file {
            state.insert(format!("loop {name} {}", file.trim()));
        }
    }
    for hierarchy in names_in("/sys/fs/cgroup")? {
        for group in names_in(&format!("/sys/fs/cgroup/{hierarchy}")).unwrap_or_default() {
            if Path::new(&format!("/sys/fs/cgroup/{hierarchy}/{group}")).is_dir() {
                state.insert(format!("cgroup {hierarchy}/{group}"));
            }
        }
    }
    for pid in names_in("/proc")? {
        let command = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        // One that has ended and is not reaped yet has no program.
        if std::fs::read_link(format!("/proc/{pid}/exe")).is_err() {
            continue;
        }
        if ["docker", "containerd", "kube", "etcd", "systemd", "pause"]
            .iter()
            .any(|word| command.contains(word))
        {
            state.insert(format!("process {} {pid}", command.trim()));
        }
    }
    let packages = engine::packages(&Harness::open()?).await?;
    let rules = packages.command("nft")?.args(["--stateless", "list", "ruleset"]).output().await?;
    let mut table = String::new();
    for line in String::from_utf8_lossy(&rules.stdout).lines() {
        if line.starts_with("table ") {
            line.clone_into(&mut table);
        }
        state.insert(format!("{table} {}", line.trim()));
    }
    for root in ["fs", "kernel", "net", "vm"] {
        settings(&Path::new("/proc/sys").join(root), &mut state);
    }
    Ok(state)
}

/// Kernel settings, but those that are measurements or come and go with the machine's work.
fn settings(path: &Path, state: &mut BTreeSet<String>) {
    const NOT_SETTINGS: [&str; 12] = [
        "-nr",
        "-state",
        "pty/nr",
        "binfmt_misc",
        "compact_memory",
        "drop_caches",
        "nf_conntrack_count",
        "ns_last_pid",
        "quota",
        "random",
        "stable_secret",
        "stat_refresh",
    ];
    if NOT_SETTINGS.iter().any(|name| path.to_string_lossy().contains(name)) {
        return;
    }
    if path.is_dir() {
        for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
            settings(&entry.path(), state);
        }
    } else if path.metadata().is_ok_and(|file| file.permissions().mode() & 0o444 != 0)
        && let Ok(value) = std::fs::read_to_string(path)
    {
        state.insert(format!("setting {} {}", path.display(), value.trim()));
    }
}

fn names_in(dir: &str) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("read {dir}"))?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
}

#[test]
#[ignore = "needs root to make the bad machines: cargo e2e test --tier full"]
fn a_full_disk_is_named_before_anything_is_changed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let disk = dir.path().to_path_buf();
    run("mount", &["-t", "tmpfs", "-o", "size=64m", "tmpfs", &disk.to_string_lossy()])?;
    let output = Command::new(E2E).arg("up").env("XDG_CACHE_HOME", &disk).output();
    run("umount", &[&disk.to_string_lossy()])?;
    ensure_refused(&output?, "the disk is nearly full")
}

#[test]
#[ignore = "needs root to make the bad machines: cargo e2e test --tier full"]
fn a_user_without_docker_is_told_to_start_it_or_to_be_root() -> Result<()> {
    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777))?;
    // The build's own folder may be closed to others.
    let program: PathBuf = dir.path().join("e2e");
    std::fs::copy(E2E, &program)?;
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&program)
        .arg("up")
        .env("XDG_CACHE_HOME", dir.path())
        .env("DOCKER_HOST", "unix:///nonexistent.sock")
        .output()?;
    ensure_refused(&output, "start Docker (or join its group), or run as root")
}

fn ensure_refused(output: &Output, remedy: &str) -> Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success(), "it was not refused: {said}");
    ensure!(
        said.contains("nothing was changed") && said.contains(remedy),
        "it does not say {remedy:?}: {said}"
    );
    Ok(())
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let status =
        Command::new(program).args(arguments).status().with_context(|| format!("start {program}"))?;
    ensure!(status.success(), "{program} ended with {status}");
    Ok(())
}
