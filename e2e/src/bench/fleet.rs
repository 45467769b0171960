//! What a hub needs for a fleet: memory for each agent, processor time at rest, how fast a policy is everywhere, how fast all
//! are back after it was killed, and how much status it takes.
//!
//! The agents are simulated, in a process of their own; each of the two has one processor. The database is on this machine's
//! disk, with its full sync. Load and disk of the machine are part of every figure, and there is no control but that.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use serde_json::json;
use tokio::time::sleep;

use super::clock;
use super::usage::{load_average, mebibytes, rounded};
use crate::kit::local_hub::LocalHub;
use crate::simulated::{Order, SimulatedAgents};

/// The hub's processor, and that of the agents.
const HUB: usize = 0;
const AGENTS: usize = 1;

/// After all are connected, for what they report at first to be written.
const SETTLE: Duration = Duration::from_secs(20);

/// How long the hub is watched while nothing happens.
const IDLE: Duration = Duration::from_mins(2);

/// How many backups each agent reports, all at once.
const REPORTED: usize = 20;

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Figures {
    bench: &'static str,
    /// Agents, each with a connection and a certificate of its own, and three backups with ten runs each.
    agents: usize,
    /// From the start of the first agent until all were connected: what an empty hub takes in.
    connect_s: f64,
    /// Resident memory of the hub for each of them: with all connected, less that of the hub before, a part each.
    hub_kib_per_agent: f64,
    /// Resident memory of the hub with all connected and at rest.
    hub_rss_mib: f64,
    /// The most resident memory of the hub until the end, as the kernel tells.
    hub_rss_peak_mib: f64,
    /// Of one core, with all connected and nothing to do but heartbeats.
    idle_cpu_percent: f64,
    /// From the writing of a policy's file until half of the agents had applied it.
    policy_p50_s: f64,
    /// The same: until 99 of 100 had.
    policy_p99_s: f64,
    /// The same: until all had.
    policy_max_s: f64,
    /// From SIGKILL of the hub, which is started again at once, until all agents were connected again.
    reconnect_s: f64,
    /// Backups that all agents reported at once, by the second until all were acknowledged: each with ten runs, one of which
    /// is new.
    status_items_per_s: f64,
    /// The machine's load average over the last minute, before the bench.
    load: f64,
}

/// Runs the bench with these programs.
///
/// # Errors
/// When hub or agents do not do their part.
pub async fn run(hub: &Path, simulated: &Path, agents: usize) -> Result<Figures> {
    let load = load_average()?;
    let mut hub = LocalHub::start(hub, Some(HUB)).await?;
    eprintln!("  · {agents} clusters are added");
    hub.add_clusters(agents).await?;
    let before = hub.memory()?;
    eprintln!("  · {agents} agents connect");
    let began = clock::now();
    let mut crowd = SimulatedAgents::start(simulated, &hub, &hub.link(), 0, agents, Some(AGENTS))?;
    let connect_s = seconds(began, crowd.ask(Order::AwaitConnected(agents)).await?.all);
    sleep(SETTLE).await;

    eprintln!("  · the hub is left alone for {IDLE:?}");
    let memory = hub.memory()?;
    let (cpu, idle_since) = (hub.cpu_seconds()?, clock::now());
    sleep(IDLE).await;
    let idle_cpu_percent = 100.0 * (hub.cpu_seconds()? - cpu) / seconds(idle_since, clock::now());

    eprintln!("  · a policy is written");
    crowd.ask(Order::CountApplied).await?;
    let written = clock::now();
    hub.write_policy("gold", &policy("0 2 * * *"))?;
    let applied = crowd.ask(Order::AwaitApplied).await?;

    eprintln!("  · the hub is killed");
    let killed = clock::now();
    hub.kill().await?;
    crowd.ask(Order::AwaitConnected(0)).await?;
    hub.restart().await?;
    let reconnect_s = seconds(killed, crowd.ask(Order::AwaitConnected(agents)).await?.all);
    sleep(SETTLE).await;

    eprintln!("  · all agents report {REPORTED} backups each, twice");
    // The second time, as it is day by day: each has one more run than the hub knows.
    crowd.ask(Order::Report(REPORTED)).await?;
    let asked = clock::now();
    let reported = seconds(asked, crowd.ask(Order::Report(REPORTED)).await?.all);
    Ok(Figures {
        bench: "fleet",
        agents,
        connect_s: rounded(connect_s),
        hub_kib_per_agent: rounded(
            (bytes(memory.resident) - bytes(before.resident)) / 1024.0 / count(agents),
        ),
        hub_rss_mib: mebibytes(bytes(memory.resident)),
        hub_rss_peak_mib: mebibytes(bytes(hub.memory()?.peak.max(memory.peak))),
        idle_cpu_percent: rounded(idle_cpu_percent),
        policy_p50_s: rounded(seconds(written, applied.half)),
        policy_p99_s: rounded(seconds(written, applied.nearly_all)),
        policy_max_s: rounded(seconds(written, applied.all)),
        reconnect_s: rounded(reconnect_s),
        status_items_per_s: rounded(count(agents * REPORTED) / reported),
        load,
    })
}

fn policy(schedule: &str) -> serde_json::Value {
    json!({ "policy": { "template": { "spec": { "schedule": schedule } } } })
}

fn seconds(from: Timestamp, to: Timestamp) -> f64 {
    SignedDuration::as_secs_f64(&to.duration_since(from))
}

#[expect(clippy::cast_precision_loss, reason = "memory is small")]
fn bytes(number: u64) -> f64 {
    number as f64
}

#[expect(clippy::cast_precision_loss, reason = "counts are small")]
fn count(number: usize) -> f64 {
    number as f64
}
