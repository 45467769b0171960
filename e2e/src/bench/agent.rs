//! What the agent uses in a cluster full of backups, and how it stands many runs that are due at once.
//!
//! A thousand backups have five recovery points each. The agent starts anew with all of them, is left alone for a
//! while, and then has 200 runs due in one minute. The control is the least that is possible: the same 200
//! `VolumeSnapshots`, created at once by hand.
//!
//! Requests are counted by the API server itself, which keeps a count for each `FlowSchema`: the agent gets one of its
//! own, with the priority that it has without.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use k8s_openapi::api::flowcontrol::v1::FlowSchema;
use kube::Api;
use kube::ResourceExt;
use kube::api::{ListParams, PostParams};
use serde::Serialize;
use serde_json::json;
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::names::snapshot_name;
use sts_backup_api::points::is_ready;
use sts_backup_api::run::{RunRecord, RunResult, Slot};
use sts_backup_api::snapshot::{VolumeSnapshot, VolumeSnapshotContent};
use tokio::time::Instant;

use super::clock;
use super::full_cluster::{self, BACKUPS, CLASS, FullCluster, POINTS, RUNS, app, at_once, claim};
use super::usage::{Usage, load_average, mebibytes, rounded};
use crate::condition::await_none;
use crate::harness::clusters::cluster_name;
use crate::kit::Cluster;
use crate::kit::agent::{Agent, NAMESPACE, RELEASE};
use crate::kit::snapshot::take_snapshot;
use crate::kit::snapshot_controller;

/// As the chart has them.
const REPLICAS: i32 = 2;

/// All of it but the removal.
const LIMIT: Duration = Duration::from_mins(12);

/// From the start of the agent until every backup has its first status.
const SETTLE_TIMEOUT: Duration = Duration::from_mins(2);

/// For 200 snapshots to be cut, or to go.
const SNAPSHOTS_TIMEOUT: Duration = Duration::from_mins(1);

/// From the scheduled time until all runs have ended.
const RUNS_TIMEOUT: Duration = Duration::from_mins(3);

/// How long the agent is watched while it has nothing to do.
const IDLE: Duration = Duration::from_mins(1);

/// The agent rests when it uses less than a hundredth of a core for so long.
const REST: Duration = Duration::from_secs(5);

/// So many times it is looked at; after that it counts as it is.
const LOOKS: u32 = 8;

/// The `FlowSchema` by which the API server counts the agent's requests.
const FLOW: &str = "stsb-bench-agent";

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Figures {
    bench: &'static str,
    /// `StatefulSetBackups`, each of a `StatefulSet` with one claim.
    backups: usize,
    /// `VolumeSnapshots` that were there before the runs.
    snapshots: usize,
    /// Runs that were due in the same minute, without spread.
    runs: usize,
    /// Those of them that completed.
    completed: usize,
    /// From the lease of a new agent until all backups had their status.
    settle_s: f64,
    /// Resident memory at the end of a time without work.
    rss_mib: f64,
    /// The most resident memory from the start of the agent to the end of the runs, as the kernel tells.
    rss_peak_mib: f64,
    /// Of one core, in a time without work.
    idle_cpu_percent: f64,
    /// In the same time; renewing the lease is most of it.
    idle_requests_per_minute: f64,
    /// From the scheduled time to the start of a run by the agent's record: the median.
    start_p50_s: f64,
    /// The same: 99 of 100 were faster, or as fast.
    start_p99_s: f64,
    /// The same of the last one.
    start_max_s: f64,
    /// From the start of a run to its end by the agent's record: 99 of 100 were faster, or as fast.
    run_p99_s: f64,
    /// Requests that the agent made for a run: all from the scheduled time until it was at rest again, without those that
    /// it makes at rest. Commands in pods would not count, and there are none.
    requests_per_run: f64,
    /// The agent's CPU time for a run, in the same way.
    cpu_ms_per_run: f64,
    /// From the scheduled time until the storage had cut the last snapshot of all runs.
    runs_s: f64,
    /// From the first creation by hand until the storage had cut the last of as many snapshots.
    raw_s: f64,
    /// The machine's load average over the last minute, before the bench.
    load: f64,
}

/// Runs the bench in the first cluster. Nothing else may be in need of its agent or its snapshot-controller meanwhile.
///
/// # Errors
/// When the cluster or the agent in it does not do its part.
pub async fn run() -> Result<Figures> {
    let load = load_average()?;
    let cluster = Cluster::connect(&cluster_name(1)).await?;
    let agent = Agent::shared(&cluster);
    // What a bench that was killed has left.
    snapshot_controller::restore(&cluster).await?;
    clear(&cluster).await.context("remove what an earlier bench has left")?;

    let measured = tokio::time::timeout(LIMIT, Box::pin(measure(&cluster, &agent, load))).await;
    let measured =
        measured.unwrap_or_else(|_| Err(anyhow::anyhow!("the bench did not end within {LIMIT:?}")));
    eprintln!("  · everything is removed");
    // The removal needs it, and the next user of the cluster too.
    let restored = agent.scale(REPLICAS).await;
    let removed = match restored {
        Ok(()) => clear(&cluster).await,
        Err(err) => Err(err),
    };
    if let Err(err) = removed {
        // The figures are no worse for it.
        eprintln!("  ! not all of it is gone, the next cargo e2e bench agent removes it: {err:#}");
    }
    measured
}

async fn measure(cluster: &Cluster, agent: &Agent, load: f64) -> Result<Figures> {
    eprintln!("  · {BACKUPS} backups and {} snapshots are made, without an agent", BACKUPS * POINTS);
    agent.scale(0).await?;
    agent.await_rolled_out().await?;
    count_requests(cluster).await?;
    let fleet = FullCluster::make(cluster, clock::now()).await?;

    eprintln!("  · a new agent starts");
    agent.scale(REPLICAS).await?;
    agent.await_rolled_out().await?;
    let leader = agent.await_present_leader().await?;
    let led = Instant::now();
    fleet.await_backups(BACKUPS, "planned, with all points", SETTLE_TIMEOUT, is_settled).await?;
    let settle_s = rounded(led.elapsed().as_secs_f64());
    let observed = Observed { cluster, agent, leader };

    let resting = observed.at_rest().await?;
    eprintln!("  · the agent at rest, for {} s", IDLE.as_secs());
    tokio::time::sleep(IDLE).await;
    let idle = observed.since(&resting).await?;
    let rss_mib = mebibytes(idle.now.usage.rss_bytes);

    eprintln!("  · {RUNS} snapshots by hand");
    let raw_s = by_hand(cluster, &fleet).await?;

    let slot = minute_after_next(clock::now())?;
    eprintln!("  · {RUNS} runs are due at {slot}");
    fleet.schedule(&slot.strftime("%-M %-H * * *").to_string()).await?;
    let is_planned = |backup: &StatefulSetBackup| {
        let next = backup.status.as_ref().and_then(|status| status.next_schedule_time.as_ref());
        next.is_some_and(|next| next.0 == slot)
    };
    fleet.await_backups(RUNS, &format!("planned for {slot}"), from_now_to(slot), is_planned).await?;
    observed.at_rest().await?;
    ensure!(clock::now() < slot, "the agent was not at rest before {slot}: the machine is too busy");
    tokio::time::sleep(from_now_to(slot).saturating_sub(REST)).await;
    let before = observed.account().await?;
    let is_over = |backup: &StatefulSetBackup| run_of(backup, slot).is_some();
    fleet.await_backups(RUNS, "run", from_now_to(slot) + RUNS_TIMEOUT, is_over).await?;
    observed.at_rest().await?;
    let busy = observed.since(&before).await?;
    let backups = fleet.backups(RUNS).await?;
    let record = |(number, backup)| Some((number, run_of(backup, slot)?));
    let (numbers, records): (Vec<_>, Vec<_>) = backups.iter().enumerate().filter_map(record).unzip();
    ensure!(records.len() == RUNS, "only {} of {RUNS} backups have their run in the history", records.len());

    let mut starts: Vec<_> = records.iter().map(|run| seconds(slot, run.started.0)).collect();
    let mut lengths: Vec<_> = records
        .iter()
        .map(|run| Duration::from_millis(run.duration_ms.unsigned_abs()).as_secs_f64())
        .collect();
    starts.sort_by(f64::total_cmp);
    lengths.sort_by(f64::total_cmp);
    let failed = records.iter().find(|run| run.result != RunResult::Completed);
    if let Some(failed) = failed {
        eprintln!("  ! not every run completed: {}: {}", failed.reason, failed.message);
    }
    let is_complete = |run: &RunRecord| run.result == RunResult::Completed;
    let complete = numbers.into_iter().zip(&records).filter(|(_, run)| is_complete(run));
    let cut: BTreeSet<_> = complete.map(|(number, run)| snapshot_name(&claim(number), &run.id)).collect();

    let runs = f64::from(u32::try_from(RUNS)?);
    // What it would have used without any run.
    let share = busy.seconds / idle.seconds;
    Ok(Figures {
        bench: "agent",
        backups: BACKUPS,
        snapshots: BACKUPS * POINTS,
        runs: RUNS,
        completed: cut.len(),
        settle_s,
        rss_mib,
        rss_peak_mib: mebibytes(observed.peak_memory().await?),
        idle_cpu_percent: rounded(idle.cpu_seconds / idle.seconds * 100.0),
        idle_requests_per_minute: rounded(idle.requests / idle.seconds * 60.0),
        start_p50_s: percentile(&starts, 50),
        start_p99_s: percentile(&starts, 99),
        start_max_s: percentile(&starts, 100),
        run_p99_s: percentile(&lengths, 99),
        requests_per_run: rounded((busy.requests - idle.requests * share) / runs),
        cpu_ms_per_run: rounded((busy.cpu_seconds - idle.cpu_seconds * share) * 1000.0 / runs),
        runs_s: rounded(seconds(slot, last_cut(cluster, &cut).await?)),
        raw_s,
        load,
    })
}

/// Every point is counted, and the next run is known.
fn is_settled(backup: &StatefulSetBackup) -> bool {
    backup.status.as_ref().is_some_and(|status| {
        usize::try_from(status.recovery_point_count) == Ok(POINTS) && status.next_schedule_time.is_some()
    })
}

/// The finished run of a scheduled time.
fn run_of(backup: &StatefulSetBackup, slot: Timestamp) -> Option<&RunRecord> {
    let Slot { due, value, attempt: _ } = Slot::schedule(slot);
    let status = backup.status.as_ref().filter(|status| status.current_run.is_none())?;
    status.history.iter().find(|run| run.slot.due == due && run.slot.value == value)
}

/// Creates a snapshot of each claim at once; the seconds until the last is cut.
async fn by_hand(cluster: &Cluster, fleet: &FullCluster) -> Result<f64> {
    let name = |number| format!("raw-{}", app(number));
    let began = clock::now();
    let take =
        async |number| take_snapshot(fleet.namespace(number), &name(number), &claim(number), CLASS).await;
    at_once((0..RUNS).map(take)).await?;
    let names: BTreeSet<_> = (0..RUNS).map(name).collect();
    let snapshots: Api<VolumeSnapshot> = Api::all(cluster.client());
    let is_one = |snapshot: &VolumeSnapshot| names.contains(&snapshot.name_any());
    let is_unready = |snapshot: &VolumeSnapshot| is_one(snapshot) && !is_ready(snapshot);
    await_none(&snapshots, "snapshots by hand that are not ready", SNAPSHOTS_TIMEOUT, is_unready).await?;
    let took = rounded(seconds(began, last_cut(cluster, &names).await?));

    let forget = async |number| {
        full_cluster::delete(&fleet.namespace(number).api::<VolumeSnapshot>(), &name(number)).await
    };
    at_once((0..RUNS).map(forget)).await?;
    await_none(&snapshots, "snapshots by hand", SNAPSHOTS_TIMEOUT, is_one).await?;
    Ok(took)
}

/// When the storage cut the last of these snapshots.
async fn last_cut(cluster: &Cluster, snapshots: &BTreeSet<String>) -> Result<Timestamp> {
    let contents: Api<VolumeSnapshotContent> = Api::all(cluster.client());
    let contents = contents.list(&ListParams::default()).await.context("list the contents")?;
    let of_one = contents.items.into_iter().filter(|content| {
        content.spec.volume_snapshot_ref.name.as_ref().is_some_and(|name| snapshots.contains(name))
    });
    let cuts: Vec<_> = of_one.filter_map(|content| content.status?.creation_time).collect();
    ensure!(cuts.len() == snapshots.len(), "{} of {} snapshots are cut", cuts.len(), snapshots.len());
    let last = cuts.into_iter().max().context("no snapshot was taken")?;
    Ok(Timestamp::from_nanosecond(last.into())?)
}

/// The agent under watch.
struct Observed<'a> {
    cluster: &'a Cluster,
    agent: &'a Agent,
    leader: String,
}

/// What the agent has used up to a moment.
struct Account {
    usage: Usage,
    requests: f64,
    at: Instant,
}

/// What the agent has used between two moments.
struct Spent {
    cpu_seconds: f64,
    requests: f64,
    seconds: f64,
    now: Account,
}

impl Observed<'_> {
    async fn account(&self) -> Result<Account> {
        let usage = Usage::of(self.agent, &self.leader).await?;
        Ok(Account { usage, requests: requests(self.cluster).await?, at: Instant::now() })
    }

    async fn since(&self, then: &Account) -> Result<Spent> {
        let now = self.account().await?;
        let cpu_seconds = now.usage.cpu_seconds - then.usage.cpu_seconds;
        let requests = now.requests - then.requests;
        // It renews its lease, if nothing else.
        ensure!(
            requests > 0.0,
            "the API server does not count the agent's requests by the FlowSchema {FLOW}"
        );
        ensure!(cpu_seconds >= 0.0, "the agent was started again: {}", self.leader);
        Ok(Spent { cpu_seconds, requests, seconds: (now.at - then.at).as_secs_f64(), now })
    }

    /// Waits until the agent has nothing to do, or has been given time enough.
    async fn at_rest(&self) -> Result<Account> {
        let mut last = self.account().await?;
        for _ in 0..LOOKS {
            tokio::time::sleep(REST).await;
            let spent = self.since(&last).await?;
            last = spent.now;
            if spent.cpu_seconds < spent.seconds / 100.0 {
                break;
            }
        }
        Ok(last)
    }

    /// The most memory that the agent has held; another one may not have taken its place.
    async fn peak_memory(&self) -> Result<f64> {
        let leader = self.agent.await_leader(None).await?;
        ensure!(leader == self.leader, "{} lost the lease to {leader} during the bench", self.leader);
        self.agent.peak_memory(&leader).await
    }
}

/// Lets the API server count the requests of the shared agent apart from all others.
async fn count_requests(cluster: &Cluster) -> Result<()> {
    let flow = json!({
        "metadata": { "name": FLOW },
        "spec": {
            // Before `service-accounts`, 9000, of which it has all the rest.
            "matchingPrecedence": 8000,
            "priorityLevelConfiguration": { "name": "workload-low" },
            "distinguisherMethod": { "type": "ByUser" },
            "rules": [{
                "subjects": [{
                    "kind": "ServiceAccount",
                    "serviceAccount": { "namespace": NAMESPACE, "name": RELEASE },
                }],
                "resourceRules": [{
                    "verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "namespaces": ["*"],
                    "clusterScope": true,
                }],
                "nonResourceRules": [{ "verbs": ["*"], "nonResourceURLs": ["*"] }],
            }],
        },
    });
    let flows: Api<FlowSchema> = Api::all(cluster.client());
    let created = flows.create(&PostParams::default(), &serde_json::from_value(flow)?).await;
    created.with_context(|| format!("create the FlowSchema {FLOW}"))?;
    Ok(())
}

/// How many requests the API server has carried out for the agent, watches included.
async fn requests(cluster: &Cluster) -> Result<f64> {
    let request = hyper::Request::get("/metrics").body(Vec::new())?;
    let metrics = cluster.client().request_text(request).await.context("read the API server's metrics")?;
    carried_out(&metrics)
}

/// The requests of the agent in an API server's metrics, of all priority levels; none when there is no count yet.
fn carried_out(metrics: &str) -> Result<f64> {
    let flow = format!("flow_schema=\"{FLOW}\"");
    let counts = metrics.lines().filter_map(|line| {
        let (labels, count) =
            line.strip_prefix("apiserver_flowcontrol_dispatched_requests_total{")?.rsplit_once("} ")?;
        labels.split(',').any(|label| label == flow).then_some(count)
    });
    counts.map(|count| Ok(count.parse::<f64>()?)).sum()
}

/// Removes all that the bench has made.
async fn clear(cluster: &Cluster) -> Result<()> {
    full_cluster::delete(&Api::<FlowSchema>::all(cluster.client()), FLOW).await?;
    full_cluster::clear(cluster).await
}

/// One to two minutes from now.
fn minute_after_next(now: Timestamp) -> Result<Timestamp> {
    Ok(Timestamp::from_second((now.as_second() / 60 + 2) * 60)?)
}

/// Nothing, when it is over.
fn from_now_to(time: Timestamp) -> Duration {
    Duration::try_from(time.duration_since(clock::now())).unwrap_or_default()
}

fn seconds(from: Timestamp, to: Timestamp) -> f64 {
    to.duration_since(from).as_secs_f64()
}

/// The smallest of sorted values that so many of a hundred are not above.
fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100);
    rounded(sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_s_requests_are_told_from_those_of_others() {
        let metrics = "# TYPE apiserver_flowcontrol_dispatched_requests_total counter\n\
            apiserver_flowcontrol_dispatched_requests_total{flow_schema=\"service-accounts\",priority_level=\"workload-low\"} 7\n\
            apiserver_flowcontrol_dispatched_requests_total{flow_schema=\"stsb-bench-agent\",priority_level=\"workload-low\"} 1.5e+03\n\
            apiserver_flowcontrol_rejected_requests_total{flow_schema=\"stsb-bench-agent\",reason=\"queue-full\"} 9\n";
        assert!((carried_out(metrics).unwrap() - 1500.0).abs() < f64::EPSILON);
        assert!(carried_out("").unwrap().abs() < f64::EPSILON);
    }

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        let of = |percent| percentile(&values, percent).to_string();
        assert_eq!([of(50), of(99), of(100)], ["100", "198", "200"]);
        assert_eq!(percentile(&[], 99).to_string(), "0");
    }

    #[test]
    fn the_minute_after_next_is_one_to_two_minutes_away() {
        for (now, slot) in [
            ("2026-01-02T23:58:00Z", "2026-01-03T00:00:00Z"),
            ("2026-01-02T23:58:59.9Z", "2026-01-03T00:00:00Z"),
        ] {
            assert_eq!(minute_after_next(now.parse().unwrap()).unwrap().to_string(), slot);
        }
    }
}
