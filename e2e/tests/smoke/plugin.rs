//! The kubectl plugin, as a person runs it.

use std::fs::File;
use std::io::Write;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use serde::de::DeserializeOwned;
use serde_json::Value;
use sts_backup_api::backup::StatefulSetBackupSpec;
use sts_backup_e2e::harness::paths::Paths;
use sts_backup_e2e::kit::{App, Backup, Cluster, Namespace, with_temp_namespace};
use tokio::process::Command;

/// What the plugin printed, and how it ended.
pub(crate) struct Said {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    code: Option<i32>,
}

/// Runs the plugin where nobody answers it.
pub(crate) async fn plugin(ns: &Namespace, arguments: &[&str]) -> Result<Said> {
    run(ns, arguments, Stdio::null()).await
}

/// Runs the plugin at a terminal where somebody answers its question.
pub(crate) async fn plugin_answered(ns: &Namespace, arguments: &[&str], answer: &str) -> Result<Said> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
    let person = openpt(flags).context("open a terminal")?;
    unlockpt(&person)?;
    let program = ioctl_tiocgptpeer(&person, flags).context("open the program's side of the terminal")?;
    // The terminal keeps the line until it is read.
    let mut person = File::from(person);
    writeln!(person, "{answer}")?;
    run(ns, arguments, program.into()).await
}

async fn run(ns: &Namespace, arguments: &[&str], stdin: Stdio) -> Result<Said> {
    let mut command = Command::new(Paths::find()?.program("kubectl-stsbackup"));
    command.args(["--namespace", ns.name()]).args(arguments);
    command.env("KUBECONFIG", ns.cluster().kubeconfig()).stdin(stdin);
    let output = command.kill_on_drop(true).output().await.context("start the plugin")?;
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).context("the plugin prints UTF-8");
    Ok(Said { stdout: text(output.stdout)?, stderr: text(output.stderr)?, code: output.status.code() })
}

impl Said {
    pub(crate) fn ended_with(self, code: i32) -> Result<Self> {
        let Self { stdout, stderr, code: found } = &self;
        ensure!(*found == Some(code), "{code} expected, not {found:?}\n{stdout}\n{stderr}");
        Ok(self)
    }

    /// The list that `-o json` prints under that name.
    pub(crate) fn list<T: DeserializeOwned>(&self, name: &str) -> Result<Vec<T>> {
        let mut data: Value = serde_json::from_str(&self.stdout).context("the plugin prints JSON")?;
        serde_json::from_value(data[name].take()).with_context(|| format!("{name} of {}", self.stdout))
    }
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn the_plugin_takes_a_backup_and_shows_it() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "plugin", async |ns| {
        plugin(ns, &["run", "none"]).await?.ended_with(2)?;

        App::new(ns, "app").replicas(2).deploy().await?;
        let backup = Backup::create(ns, "nightly", StatefulSetBackupSpec::new("app")).await?;
        backup.await_runs(1).await?;

        let run = plugin(ns, &["run", "nightly", "--wait"]).await?.ended_with(0)?;
        let line = run.stdout.lines().last().unwrap_or_default();
        assert!(line.starts_with("recovery point ") && line.contains(": 2/2 volumes"), "{}", run.stdout);

        let record = plugin(ns, &["run", "nightly", "--wait", "-o", "json"]).await?.ended_with(0)?;
        let record: Value = serde_json::from_str(&record.stdout)?;
        assert_eq!(record["result"], "Completed");
        let id = record["id"].as_str().context("a run has an id")?;

        let list = plugin(ns, &["list"]).await?.ended_with(0)?;
        assert!(list.stdout.contains("nightly") && list.stdout.contains("Ready"), "{}", list.stdout);
        let described = plugin(ns, &["describe", "nightly"]).await?.ended_with(0)?;
        for part in [id, "BackupCompleted", "CrashPerVolume"] {
            assert!(described.stdout.contains(part), "{part} expected:\n{}", described.stdout);
        }
        backup.remove().await?;
        let points = plugin(ns, &["points"]).await?.ended_with(0)?;
        assert!(points.stdout.contains(id), "points outlive their backup:\n{}", points.stdout);
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn the_plugin_says_why_a_run_failed() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "plugin", async |ns| {
        App::new(ns, "app").deploy().await?;
        let mut spec = StatefulSetBackupSpec::new("app");
        spec.volume_claim_templates = vec!["none".to_owned()];
        let backup = Backup::create(ns, "nightly", spec).await?;
        backup.await_runs(1).await?;

        let run = plugin(ns, &["run", "nightly", "--wait"]).await?.ended_with(1)?;
        assert!(run.stderr.contains("UnknownTemplate") && run.stderr.contains("none"), "{}", run.stderr);
        let doctor = plugin(ns, &["doctor", "nightly"]).await?.ended_with(1)?;
        assert!(doctor.stdout.contains("UnknownTemplate"), "{}", doctor.stdout);
        Ok(())
    })
    .await
}
