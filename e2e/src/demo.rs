//! `cargo e2e demo`: a fleet of two clusters and its hub, with PostgreSQL under load, for people who see the product for the
//! first time.
//!
//! It leaves the clusters, the hub, the databases and the backups, and says what to try on them.

use std::io::{Stdout, Write};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use futures::future::try_join_all;
use kube::runtime::{WatchStreamExt, watcher};
use serde_json::{Value, json};
use sts_backup_api::backup::StatefulSetBackupStatus;
use sts_backup_api::conditions::{PROGRESSING, find};
use sts_backup_api::names::policy_backup_name;
use sts_backup_api::run::{RunRecord, RunResult};

use crate::condition::await_condition;
use crate::harness::Harness;
use crate::harness::clusters::cluster_name;
use crate::kit::agent::{self, Agent};
use crate::kit::hub::{Hub, fleet_policy};
use crate::kit::{Backup, Cluster, Namespace, Postgres, WriteLoad};

/// How many clusters it takes.
pub const CLUSTERS: usize = 2;

const NAMESPACE: &str = "demo";
const REPLICAS: i32 = 3;
const POLICY: &str = "gold";

/// Where agents reach the hub on the first cluster's node.
const NODE_PORT: u16 = 30_944;

/// How long the demo waits for a backup.
const PATIENCE: Duration = Duration::from_mins(5);

/// Runs the demo.
///
/// # Errors
/// When a part of the clusters does not do what it should, or a backup fails.
pub async fn run(harness: &Harness) -> Result<()> {
    let mut out = std::io::stdout();
    let connected = (1..=CLUSTERS).map(async |n| {
        let cluster = Cluster::connect(&cluster_name(n)).await?;
        Namespace::fresh(&cluster, NAMESPACE).await
    });
    let namespaces = try_join_all(connected).await?;
    let [first, second] = &namespaces[..] else { anyhow::bail!("there are {CLUSTERS} clusters") };

    writeln!(out, "\nA hub in {}, with the fleet policy {POLICY}", first.cluster().name())?;
    let hub =
        Hub::install(first, NODE_PORT, &json!({ "gold.yaml": fleet_policy(POLICY, &policy()) })).await?;
    let values = agent_values(&hub)?;
    try_join_all([(first, "frankfurt"), (second, "oslo")].map(async |(ns, name)| {
        agent::ensure_namespace(ns.cluster()).await?;
        hub.let_in(name, &["env=production"], ns.cluster(), agent::NAMESPACE).await?;
        Agent::install_shared(ns.cluster(), &values).await
    }))
    .await?;
    let both = |answer: &Value| {
        let clusters = answer.as_array().into_iter().flatten();
        clusters.filter(|cluster| cluster["applied"]["outcome"] == "Active").count() == CLUSTERS
    };
    hub.await_answer(&["clusters", "list"], both).await?;
    writeln!(out, "  frankfurt and oslo are linked, and have it")?;

    writeln!(out, "\nPostgreSQL in both: {REPLICAS} replicas in frankfurt, one in oslo")?;
    let database = Postgres::new(first, "db").replicas(REPLICAS);
    let other = Postgres::new(second, "db").replicas(1);
    tokio::try_join!(database.deploy(), other.deploy())?;
    let mut load =
        try_join_all((0..REPLICAS.unsigned_abs()).map(|ordinal| WriteLoad::start(&database, ordinal)))
            .await?;
    for load in &mut load {
        load.wait_until(100).await?;
    }
    writeln!(out, "  a client writes to each replica in frankfurt: {} rows are committed", committed(&load))?;

    writeln!(out, "\nThe policy protects them; a run of each is asked for")?;
    let (here, there) = (protected(first, "db").await?, protected(second, "db").await?);
    there.request("demo").await?;
    let backup = here.clone();
    let asked = async {
        let status = follow(&backup, &mut out);
        let (status, ()) = tokio::try_join!(status, here.request("demo"))?;
        anyhow::Ok(status)
    };
    let status = tokio::time::timeout(PATIENCE, asked).await.context("the backup did not end in time")??;
    let run = completed(&status)?;
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
    writeln!(out, "\nRecovery point {} in frankfurt", point.id)?;
    writeln!(out, "  volumes      {}/{}", point.ready_volumes, point.expected_volumes)?;
    writeln!(out, "  frozen for   {}", ms(run.freeze_ms))?;
    writeln!(out, "  cut skew     {}", ms(run.cut_skew_ms))?;
    writeln!(out, "  consistency  {}", point.consistency.as_str())?;
    there.await_runs(1).await?;
    hub.await_answer(&["fleet", "runs"], |answer| answer.as_array().is_some_and(|runs| runs.len() == 2))
        .await?;
    show(&hub, &["fleet", "status"], &mut out).await?;

    writeln!(out, "\nThe hub is stopped. A new database in oslo:")?;
    hub.stop().await?;
    Postgres::new(second, "orders").replicas(1).deploy().await?;
    let orders = protected(second, "orders").await?;
    writeln!(out, "  the policy in oslo protects it without the hub")?;
    orders.request("demo").await?;
    let run = orders.await_runs(1).await?;
    writeln!(out, "  its first run: {:?}, frozen for {}", run.result, ms(run.freeze_ms))?;

    writeln!(out, "\nThe hub is back, and knows everything:")?;
    hub.start().await?;
    hub.await_answer(&["fleet", "runs"], |answer| answer.as_array().is_some_and(|runs| runs.len() == 3))
        .await?;
    let are_connected = |answer: &Value| {
        let clusters = answer.as_array().into_iter().flatten();
        clusters.filter(|cluster| cluster["state"] == "Connected").count() == CLUSTERS
    };
    hub.await_answer(&["clusters", "list"], are_connected).await?;
    show(&hub, &["fleet", "runs"], &mut out).await?;
    show(&hub, &["fleet", "status"], &mut out).await?;

    writeln!(
        out,
        "\nTry next\n  \
         export KUBECONFIG={}\n  \
         kubectl -n {NAMESPACE} exec sts-backup-hub-0 -- sts-backup-hub policies show {POLICY}\n  \
         kubectl get statefulsetbackuppolicies\n  \
         kubectl -n {NAMESPACE} get statefulsetbackups,volumesnapshots\n  \
         cargo install --locked --path agent --bin kubectl-stsbackup\n  \
         kubectl stsbackup -n {NAMESPACE} points\n  \
         cargo e2e down",
        harness.paths.kubeconfig(first.cluster().name()).display()
    )?;
    Ok(())
}

/// The databases of the demo, and not the hub beside them.
fn policy() -> Value {
    json!({
        "clusterSelector": { "matchLabels": { "env": "production" } },
        "policy": {
            "namespaceSelector": { "matchLabels": { "kubernetes.io/metadata.name": NAMESPACE } },
            "exclude": ["sts-backup-hub"],
            "rpo": "26h",
            "template": {
                "hookProfile": "postgres",
                "spec": { "schedule": "0 2 * * *", "retentionPolicy": { "keepDaily": 7, "keepWeekly": 4 } },
            },
        },
    })
}

/// The hooks of docs/hooks.md are each cluster's own: the hub only names them.
fn agent_values(hub: &Hub) -> Result<Value> {
    let hooks = Postgres::freeze_hooks(180)?;
    let hook = |which: &str, field: &str| hooks.spec()[which][field].clone();
    let mut profile = json!({
        "pre": hook("preBackupHook", "command"),
        "post": hook("postBackupHook", "command"),
        "container": hook("preBackupHook", "containerName"),
        "timeout_seconds": hook("preBackupHook", "timeoutSeconds"),
    });
    // What the page leaves to the default.
    profile.as_object_mut().context("it is an object")?.retain(|_, value| !value.is_null());
    Ok(json!({
        "config": { "hook_profiles": { "postgres": profile } },
        "link": { "hub": hub.link() },
    }))
}

/// The backup that the policy makes of a `StatefulSet`.
async fn protected(ns: &Namespace, set: &str) -> Result<Backup> {
    let backup = Backup::existing(ns, &policy_backup_name(POLICY, set));
    await_condition(&backup.api(), backup.name(), "there", PATIENCE, |_| true).await?;
    Ok(backup)
}

async fn show(hub: &Hub, command: &[&str], out: &mut Stdout) -> Result<()> {
    let answer = hub.run(command).await?;
    writeln!(out, "\n$ sts-backup-hub {}\n{}", command.join(" "), answer.trim_end())?;
    Ok(())
}

fn committed(load: &[WriteLoad]) -> u64 {
    load.iter().map(WriteLoad::committed).sum()
}

fn completed(status: &StatefulSetBackupStatus) -> Result<&RunRecord> {
    let run = status.history.first().context("a run has ended")?;
    ensure!(run.result == RunResult::Completed, "the run failed: {}: {}", run.reason, run.message);
    Ok(run)
}

/// Prints how far the first run is until it has ended.
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
