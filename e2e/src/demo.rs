//! `cargo e2e demo`: a backup of PostgreSQL under load, for people who see the product for the first time.
//!
//! It leaves the cluster, the database and the backup, and says what to try on them.

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use futures::future::try_join_all;
use kube::runtime::{WatchStreamExt, watcher};
use serde_json::json;
use sts_backup_api::backup::StatefulSetBackupStatus;
use sts_backup_api::conditions::{PROGRESSING, find};
use sts_backup_api::run::RunResult;

use crate::harness::Harness;
use crate::harness::clusters::cluster_name;
use crate::kit::{Backup, Cluster, Namespace, Postgres, WriteLoad};

const NAMESPACE: &str = "demo";
const REPLICAS: i32 = 3;

/// How long the demo waits for the backup.
const PATIENCE: Duration = Duration::from_mins(5);

/// Takes the backup in the first cluster.
///
/// # Errors
/// When a part of the cluster does not do what it should, or the backup fails.
pub async fn run(harness: &Harness) -> Result<()> {
    let mut out = std::io::stdout();
    let cluster = Cluster::connect(&cluster_name(1)).await?;
    let ns = Namespace::fresh(&cluster, NAMESPACE).await?;

    writeln!(out, "\nPostgreSQL, {REPLICAS} replicas, in namespace {NAMESPACE}")?;
    let database = Postgres::new(&ns, "db").replicas(REPLICAS);
    database.deploy().await?;
    let mut load =
        try_join_all((0..REPLICAS.unsigned_abs()).map(|ordinal| WriteLoad::start(&database, ordinal)))
            .await?;
    for load in &mut load {
        load.wait_until(100).await?;
    }
    writeln!(out, "  a client writes to each replica: {} rows are committed", committed(&load))?;

    writeln!(out, "\nA StatefulSetBackup of it, with the hooks of docs/hooks.md")?;
    let hooks = Postgres::freeze_hooks(180)?;
    let mut spec = json!({ "statefulSetRef": { "name": "db" } });
    if let (Some(spec), Some(hooks)) = (spec.as_object_mut(), hooks.spec().as_object()) {
        spec.extend(hooks.clone());
    }
    let backup = Backup::create(&ns, "db", serde_json::from_value(spec)?).await?;
    let status = tokio::time::timeout(PATIENCE, follow(&backup, &mut out)).await;
    let status = status.context("the backup did not end in time")??;
    let run = status.history.first().context("a run has ended")?;
    ensure!(run.result == RunResult::Completed, "the run failed: {}: {}", run.reason, run.message);
    let point = status.recovery_points.first().context("a completed run leaves a recovery point")?;

    let at_thaw = committed(&load);
    for load in &mut load {
        load.wait_until(load.committed() + 50).await?;
    }
    writeln!(out, "  the clients go on: {} more rows are committed", committed(&load) - at_thaw)?;
    for load in &mut load {
        load.stop().await?;
    }

    let ms = |value: Option<i64>| value.map_or_else(|| "unknown".to_owned(), |ms| format!("{ms} ms"));
    writeln!(out, "\nRecovery point {}", point.id)?;
    writeln!(out, "  volumes      {}/{}", point.ready_volumes, point.expected_volumes)?;
    writeln!(out, "  frozen for   {}", ms(run.freeze_ms))?;
    writeln!(out, "  cut skew     {}", ms(run.cut_skew_ms))?;
    writeln!(out, "  consistency  {}", point.consistency.as_str())?;
    let kubeconfig = harness.paths.kubeconfig(cluster.name());
    writeln!(
        out,
        "\nTry next\n  \
         export KUBECONFIG={}\n  \
         kubectl -n {NAMESPACE} get statefulsetbackups,volumesnapshots\n  \
         kubectl -n {NAMESPACE} describe statefulsetbackup db\n  \
         cargo install --locked --path agent --bin kubectl-stsbackup\n  \
         kubectl stsbackup -n {NAMESPACE} run db --wait\n  \
         cargo e2e down",
        kubeconfig.display()
    )?;
    Ok(())
}

fn committed(load: &[WriteLoad]) -> u64 {
    load.iter().map(WriteLoad::committed).sum()
}

/// Prints how far the run at creation is until it has ended.
async fn follow(backup: &Backup, out: &mut impl Write) -> Result<StatefulSetBackupStatus> {
    let config = watcher::Config::default().fields(&format!("metadata.name={}", backup.name()));
    let mut changes = std::pin::pin!(watcher(backup.api(), config).default_backoff().applied_objects());
    let mut said = String::new();
    while let Some(change) = changes.next().await {
        let Ok(change) = change else { continue };
        let Some(status) = change.status else { continue };
        let progress = find(&status.conditions, PROGRESSING).map(|condition| condition.message.clone());
        let progress = progress.filter(|_| status.current_run.is_some());
        if let Some(progress) = progress.filter(|progress| *progress != said) {
            writeln!(out, "  {progress}")?;
            said = progress;
        }
        if status.current_run.is_none() && !status.history.is_empty() {
            return Ok(status);
        }
    }
    anyhow::bail!("the watch of the backup ended")
}
