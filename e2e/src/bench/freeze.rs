//! How long a backup of ten claims freezes its application.
//!
//! The control is the least that is possible: the same ten `VolumeSnapshots`, created at once by hand, until all of
//! them are seen to be cut. The claims are of one pod, so that its hook costs a single exec. Both are measured in turns,
//! and the means compared; then again with snapshots that become ready 20 s after their cut, which must make no
//! difference. A single cut varies by a sixth and more: a ratio is told with its standard error.

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

/// Rounds of each kind.
const ROUNDS: usize = 40;

/// Rounds with snapshots that are ready late, which take half a minute each.
const SLOW_ROUNDS: usize = 8;

/// How long the agent is watched while it has nothing to do.
const IDLE: Duration = Duration::from_mins(1);

/// What was measured. Times are means.
#[derive(Debug, Serialize)]
pub struct Figures {
    bench: &'static str,
    /// Claims of one pod, whose hook does nothing.
    pvcs: i32,
    /// From the first preBackupHook to the last cut, as the agent records it.
    freeze_ms: f64,
    /// From the first creation by hand to the last cut.
    raw_ms: f64,
    ratio: f64,
    /// The ratio's standard error.
    ratio_error: f64,
    /// A command that does nothing, run in the pod by hand: it is part of the freeze and not of the control.
    hook_ms: f64,
    /// The freeze by the control with such a command before it.
    ratio_with_hook: f64,
    /// From the first to the last cut by the storage's clock.
    cut_spread_ms: f64,
    /// The same where snapshots are ready 20 s after their cut.
    ready_20s: Ready20s,
    /// The whole run by the agent's record.
    run_ms: f64,
    agent_rss_mib: f64,
    agent_idle_cpu_percent: f64,
    agent_cpu_ms_per_run: f64,
    /// The machine's load average over the last minute, before the bench.
    load: f64,
}

#[derive(Debug, Serialize)]
struct Ready20s {
    freeze_ms: f64,
    raw_ms: f64,
    ratio: f64,
    ratio_error: f64,
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
    let fast = rounds(&ns, "fast", "stsb-e2e", ROUNDS).await?;
    let after = Usage::of(&agent, &leader).await?;
    eprintln!("  · the same with snapshots that are ready 20 s after the cut");
    let slow = create_snapshot_class(&ns, &[("readyDelay", "20s")]).await?;
    let slow = rounds(&ns, "slow", &slow, SLOW_ROUNDS).await?;

    eprintln!("  · the agent at rest, for {} s", IDLE.as_secs());
    let resting = Usage::of(&agent, &leader).await?;
    tokio::time::sleep(IDLE).await;
    let rested = Usage::of(&agent, &leader).await?;

    let (freeze, raw, hook) = (fast.freeze(), Mean::of(&fast.raw), Mean::of(&fast.hook));
    let (ratio, ratio_error) = freeze.to(&raw);
    let (slow_freeze, slow_raw) = (slow.freeze(), Mean::of(&slow.raw));
    let (slow_ratio, slow_ratio_error) = slow_freeze.to(&slow_raw);
    let of_runs = |value: fn(&RunRecord) -> Option<i64>| {
        Mean::of(&fast.runs.iter().filter_map(value).collect::<Vec<_>>())
    };
    Ok(Figures {
        bench: "freeze",
        pvcs: CLAIMS,
        freeze_ms: freeze.value.round(),
        raw_ms: raw.value.round(),
        ratio,
        ratio_error,
        hook_ms: hook.value.round(),
        ratio_with_hook: rounded(freeze.value / (raw.value + hook.value)),
        cut_spread_ms: of_runs(|run| run.cut_skew_ms).value.round(),
        ready_20s: Ready20s {
            freeze_ms: slow_freeze.value.round(),
            raw_ms: slow_raw.value.round(),
            ratio: slow_ratio,
            ratio_error: slow_ratio_error,
        },
        run_ms: of_runs(|run| Some(run.duration_ms)).value.round(),
        agent_rss_mib: mebibytes(after.rss_bytes),
        agent_idle_cpu_percent: rounded(
            (rested.cpu_seconds - resting.cpu_seconds) / IDLE.as_secs_f64() * 100.0,
        ),
        agent_cpu_ms_per_run: rounded(
            (after.cpu_seconds - before.cpu_seconds) * 1000.0 / f64::from(u32::try_from(ROUNDS)?),
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
async fn rounds(ns: &Namespace, name: &str, class: &str, count: usize) -> Result<Rounds> {
    let mut spec = StatefulSetBackupSpec::new("app");
    spec.volume_snapshot_class_name = Some(class.to_owned());
    let hook = json!({ "command": ["true"] });
    spec.pre_backup_hook = Some(serde_json::from_value(hook.clone())?);
    spec.post_backup_hook = Some(serde_json::from_value(hook)?);
    // Rounds are counted by the history.
    spec.history_limit = i32::try_from(count + 1)?;
    // The run at creation fills the caches of all parts, and does not count.
    let backup = Backup::create(ns, name, spec).await?;
    backup.await_runs(1).await?;

    let mut rounds = Rounds::default();
    for round in 1..=count {
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

impl Rounds {
    fn freeze(&self) -> Mean {
        Mean::of(&self.runs.iter().filter_map(|run| run.freeze_ms).collect::<Vec<_>>())
    }
}

/// A mean and its standard error.
struct Mean {
    value: f64,
    error: f64,
}

impl Mean {
    #[expect(clippy::cast_precision_loss, reason = "milliseconds of a bench")]
    fn of(values: &[i64]) -> Self {
        let count = values.len() as f64;
        let value = values.iter().sum::<i64>() as f64 / count;
        let squares = values.iter().map(|each| (*each as f64 - value).powi(2)).sum::<f64>();
        Self { value, error: (squares / (count - 1.0) / count).sqrt() }
    }

    /// The ratio of two means, and its standard error.
    fn to(&self, other: &Self) -> (f64, f64) {
        let ratio = self.value / other.value;
        let relative = (self.error / self.value).hypot(other.error / other.value);
        (rounded(ratio), rounded(ratio * relative))
    }
}
