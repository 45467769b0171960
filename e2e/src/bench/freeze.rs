//! How long a backup of ten claims freezes its application.
//!
//! The control is the least that is possible: the same ten `VolumeSnapshots`, created at once by hand, until all of
//! them are seen to be cut. The claims are of one pod, so that its hook costs a single exec. Both are measured in turns, several times, and the medians compared; then again with
//! snapshots that become ready 20 s after their cut, which must make no difference.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use futures::future::try_join_all;
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, ResourceExt};
use serde::Serialize;
use serde_json::json;
use sts_backup_api::backup::StatefulSetBackupSpec;
use sts_backup_api::points::is_cut;
use sts_backup_api::run::RunRecord;
use sts_backup_api::snapshot::VolumeSnapshot;
use tokio::time::Instant;

use super::usage::{Usage, load_average, mebibytes, rounded};
use crate::condition::{await_condition, await_none, statefulset_ready};
use crate::harness::clusters::cluster_name;
use crate::kit::agent::Agent;
use crate::kit::class::create_snapshot_class;
use crate::kit::exec::exec;
use crate::kit::snapshot::take_snapshot;
use crate::kit::{Backup, Cluster, Namespace};

const CLAIMS: i32 = 10;

/// Rounds of each kind; the median counts.
const ROUNDS: usize = 9;

/// How long the agent is watched while it has nothing to do.
const IDLE: Duration = Duration::from_mins(1);

/// What was measured. Times are medians.
#[derive(Debug, Serialize)]
pub struct Figures {
    bench: &'static str,
    /// Claims of one pod, whose hook does nothing.
    pvcs: i32,
    /// From the first preBackupHook to the last cut, as the agent records it.
    freeze_ms: i64,
    /// From the first creation by hand to the last cut.
    raw_ms: i64,
    ratio: f64,
    /// A command that does nothing, run in the pod by hand: it is part of the freeze and not of the control.
    hook_ms: i64,
    /// The freeze by the control with such a command before it.
    ratio_with_hook: f64,
    /// From the first to the last cut by the storage's clock.
    cut_spread_ms: i64,
    /// The same where snapshots are ready 20 s after their cut.
    ready_20s: Ready20s,
    /// The whole run by the agent's record.
    run_ms: i64,
    agent_rss_mib: f64,
    agent_idle_cpu_percent: f64,
    agent_cpu_ms_per_run: f64,
    /// The machine's load average over the last minute, before the bench.
    load: f64,
}

#[derive(Debug, Serialize)]
struct Ready20s {
    freeze_ms: i64,
    raw_ms: i64,
    ratio: f64,
}

/// Runs the bench in the first cluster.
///
/// # Errors
/// When the cluster or the agent in it does not do its part.
pub async fn run() -> Result<Figures> {
    let load = load_average()?;
    let cluster = Cluster::connect(&cluster_name(1)).await?;
    let agent = Agent::shared(&cluster);
    let leader = agent.await_leader(None).await?;
    let ns = Namespace::fresh(&cluster, "bench-freeze").await?;
    deploy(&ns).await?;

    eprintln!("  · {ROUNDS} rounds by hand and by the agent, in turns");
    let before = Usage::of(&agent, &leader).await?;
    let Rounds { raw, hook, runs } = rounds(&ns, "fast", "stsb-e2e").await?;
    let after = Usage::of(&agent, &leader).await?;
    eprintln!("  · the same with snapshots that are ready 20 s after the cut");
    let slow = create_snapshot_class(&ns, &[("readyDelay", "20s")]).await?;
    let slow = rounds(&ns, "slow", &slow).await?;

    eprintln!("  · the agent at rest, for {} s", IDLE.as_secs());
    let resting = Usage::of(&agent, &leader).await?;
    tokio::time::sleep(IDLE).await;
    let rested = Usage::of(&agent, &leader).await?;

    let freezes = |runs: &[RunRecord]| median(runs.iter().filter_map(|run| run.freeze_ms).collect());
    let (freeze_ms, raw_ms, hook_ms) = (freezes(&runs), median(raw), median(hook));
    let (slow_freeze_ms, slow_raw_ms) = (freezes(&slow.runs), median(slow.raw));
    Ok(Figures {
        bench: "freeze",
        pvcs: CLAIMS,
        freeze_ms,
        raw_ms,
        ratio: ratio(freeze_ms, raw_ms),
        hook_ms,
        ratio_with_hook: ratio(freeze_ms, raw_ms + hook_ms),
        cut_spread_ms: median(runs.iter().filter_map(|run| run.cut_skew_ms).collect()),
        ready_20s: Ready20s {
            freeze_ms: slow_freeze_ms,
            raw_ms: slow_raw_ms,
            ratio: ratio(slow_freeze_ms, slow_raw_ms),
        },
        run_ms: median(runs.iter().map(|run| run.duration_ms).collect()),
        agent_rss_mib: mebibytes(after.rss_bytes),
        agent_idle_cpu_percent: rounded(
            (rested.cpu_seconds - resting.cpu_seconds) / IDLE.as_secs_f64() * 100.0,
        ),
        agent_cpu_ms_per_run: rounded(
            (after.cpu_seconds - before.cpu_seconds) * 1000.0 / f64::from(u32::try_from(runs.len())?),
        ),
        load,
    })
}

/// A pod that does nothing, with ten claims.
async fn deploy(ns: &Namespace) -> Result<()> {
    let mounts =
        (0..CLAIMS).map(|at| json!({ "name": format!("data{at}"), "mountPath": format!("/data{at}") }));
    let template = |at: i32| {
        json!({
            "metadata": { "name": format!("data{at}") },
            "spec": {
                "accessModes": ["ReadWriteOnce"],
                "storageClassName": "stsb-e2e",
                "resources": { "requests": { "storage": "64Mi" } },
            },
        })
    };
    let set = json!({
        "metadata": { "name": "app" },
        "spec": {
            "replicas": 1,
            "serviceName": "app",
            "podManagementPolicy": "Parallel",
            "selector": { "matchLabels": { "app": "app" } },
            "template": {
                "metadata": { "labels": { "app": "app" } },
                "spec": {
                    "terminationGracePeriodSeconds": 0,
                    "containers": [{
                        "name": "app",
                        "image": ns.cluster().images().shell,
                        "imagePullPolicy": "Never",
                        "command": ["sleep", "infinity"],
                        "volumeMounts": mounts.collect::<Vec<_>>(),
                    }],
                },
            },
            "volumeClaimTemplates": (0..CLAIMS).map(template).collect::<Vec<_>>(),
        },
    });
    let sets: Api<StatefulSet> = ns.api();
    sets.create(&PostParams::default(), &serde_json::from_value(set)?).await?;
    await_condition(&sets, "app", "ready", Duration::from_mins(3), statefulset_ready(1)).await?;
    Ok(())
}

/// The times by hand in milliseconds, and the agent's runs.
#[derive(Default)]
struct Rounds {
    raw: Vec<i64>,
    hook: Vec<i64>,
    runs: Vec<RunRecord>,
}

/// Takes turns.
async fn rounds(ns: &Namespace, name: &str, class: &str) -> Result<Rounds> {
    let mut spec = StatefulSetBackupSpec::new("app");
    spec.volume_snapshot_class_name = Some(class.to_owned());
    let hook = json!({ "command": ["true"] });
    spec.pre_backup_hook = Some(serde_json::from_value(hook.clone())?);
    spec.post_backup_hook = Some(serde_json::from_value(hook)?);
    // The run at creation fills the caches of all parts, and does not count.
    let backup = Backup::create(ns, name, spec).await?;
    backup.await_runs(1).await?;

    let mut rounds = Rounds::default();
    for round in 1..=ROUNDS {
        forget_snapshots(ns).await?;
        rounds.raw.push(by_hand(ns, &format!("{name}-{round}"), class).await?);
        forget_snapshots(ns).await?;
        backup.request(&format!("round {round}")).await?;
        let run = backup.await_runs(round + 1).await?;
        ensure!(run.freeze_ms.is_some(), "run {} did not freeze: {}", run.id, run.message);
        rounds.runs.push(run);
        let began = Instant::now();
        exec(ns.cluster(), ns.name(), "app-0", "app", &["true"]).await?.success()?;
        rounds.hook.push(i64::try_from(began.elapsed().as_millis())?);
    }
    forget_snapshots(ns).await?;
    Ok(rounds)
}

/// Creates a snapshot of each claim at once; the milliseconds until all are seen to be cut.
async fn by_hand(ns: &Namespace, prefix: &str, class: &str) -> Result<i64> {
    let snapshots: Api<VolumeSnapshot> = ns.api();
    let mut changes =
        pin!(watcher(snapshots, watcher::Config::default()).default_backoff().applied_objects());
    let began = Instant::now();
    let names: Vec<_> = (0..CLAIMS).map(|ordinal| format!("{prefix}-{ordinal}")).collect();
    let claims: Vec<_> = (0..CLAIMS).map(|ordinal| format!("data{ordinal}-app-0")).collect();
    let creating = names.iter().zip(&claims).map(|(name, claim)| take_snapshot(ns, name, claim, class));
    let mut uncut: Vec<_> = names.clone();
    let cutting = async {
        while !uncut.is_empty() {
            let snapshot = changes.next().await.context("a watch does not end")??;
            if is_cut(&snapshot) {
                uncut.retain(|name| *name != snapshot.name_any());
            }
        }
        anyhow::Ok(began.elapsed())
    };
    let (_, took) = tokio::try_join!(try_join_all(creating), cutting)?;
    Ok(i64::try_from(took.as_millis())?)
}

/// Deletes every snapshot and waits until none is left: the next round starts as this one did.
async fn forget_snapshots(ns: &Namespace) -> Result<()> {
    let snapshots: Api<VolumeSnapshot> = ns.api();
    snapshots.delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
    await_none(&snapshots, "snapshots", Duration::from_mins(2), |_| true).await?;
    Ok(())
}

fn median(mut values: Vec<i64>) -> i64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or_default()
}

#[expect(clippy::cast_precision_loss, reason = "milliseconds of a bench")]
fn ratio(of: i64, to: i64) -> f64 {
    rounded(of as f64 / to as f64)
}
