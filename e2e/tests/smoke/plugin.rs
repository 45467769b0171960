//! The kubectl plugin, as a person runs it.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sts_backup_api::backup::StatefulSetBackupSpec;
use sts_backup_e2e::harness::paths::Paths;
use sts_backup_e2e::kit::{App, Backup, Cluster, Namespace, with_temp_namespace};
use tokio::process::Command;

/// What the plugin printed, and how it ended.
struct Said {
    stdout: String,
    stderr: String,
    code: Option<i32>,
}

async fn plugin(ns: &Namespace, arguments: &[&str]) -> Result<Said> {
    let mut command = Command::new(Paths::find()?.program("kubectl-stsbackup"));
    command.args(["--namespace", ns.name()]).args(arguments);
    command.env("KUBECONFIG", ns.cluster().kubeconfig());
    let output = command.kill_on_drop(true).output().await.context("start the plugin")?;
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).context("the plugin prints UTF-8");
    Ok(Said { stdout: text(output.stdout)?, stderr: text(output.stderr)?, code: output.status.code() })
}

impl Said {
    fn ended_with(self, code: i32) -> Result<Self> {
        let Self { stdout, stderr, code: found } = &self;
        ensure!(*found == Some(code), "{code} expected, not {found:?}\n{stdout}\n{stderr}");
        Ok(self)
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
        plugin(ns, &["doctor", "nightly"]).await?.ended_with(0)?;

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
