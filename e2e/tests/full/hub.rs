//! What a hub stands: that it dies under a large fleet, agents that are slow or gone without a word, two agents with one
//! identity. The hub is a process here, and the agents are simulated.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use sts_backup_e2e::harness::paths::Paths;
use sts_backup_e2e::kit::local_hub::LocalHub;
use sts_backup_e2e::kit::policy::NEVER;
use sts_backup_e2e::kit::poll::until_within;
use sts_backup_e2e::kit::tcp_proxy::{Line, TcpProxy};
use sts_backup_e2e::simulated::{Order, SimulatedAgents};

/// So many agents take an unoptimized hub some seconds.
const FLEET: usize = 2000;

/// A connection that is gone without a word is found within 90 s.
const FOUND: Duration = Duration::from_mins(2);

async fn hub() -> Result<LocalHub> {
    LocalHub::start(&Paths::find()?.program("sts-backup-hub"), None).await
}

fn agents(hub: &LocalHub, at: &str, first: usize, count: usize) -> Result<SimulatedAgents> {
    SimulatedAgents::start(&Paths::find()?.program("simulated-agents"), hub, at, first, count, None)
}

fn policy() -> Value {
    json!({ "policy": { "template": { "spec": { "schedule": NEVER } } } })
}

async fn await_state(hub: &LocalHub, cluster: &str, state: &str) -> Result<()> {
    let path = format!("/v1/clusters/{cluster}");
    until_within(FOUND, &format!("{cluster} is {state}"), async || {
        Ok(hub.ask("GET", &path, None).await?["state"] == state)
    })
    .await
}

#[tokio::test]
#[ignore = "needs cargo e2e up: cargo e2e test --tier full"]
async fn a_killed_hub_gets_all_of_a_large_fleet_back_and_knows_each_run_once() -> Result<()> {
    let mut hub = hub().await?;
    hub.add_clusters(FLEET).await?;
    hub.write_policy("gold", &policy())?;
    let mut fleet = agents(&hub, &hub.link(), 0, FLEET)?;
    fleet.ask(Order::AwaitConnected(FLEET)).await?;
    fleet.ask(Order::Report(4)).await?;
    let counted = |status: &Value| {
        let clusters = status["clusters"].as_array().cloned().unwrap_or_default();
        let is_well = |cluster: &&Value| {
            cluster["state"] == "Connected"
                && cluster["backups"] == 4
                && cluster["applied"]["outcome"] == "Active"
        };
        clusters.iter().filter(is_well).count()
    };
    let are_all_well = async || Ok(counted(&hub.ask("GET", "/v1/fleet", None).await?) == FLEET);
    until_within(FOUND, "all have reported", are_all_well).await?;

    hub.kill().await?;
    fleet.ask(Order::AwaitConnected(0)).await?;
    hub.restart().await?;
    fleet.ask(Order::AwaitConnected(FLEET)).await?;
    let are_all_well = async || Ok(counted(&hub.ask("GET", "/v1/fleet", None).await?) == FLEET);
    until_within(FOUND, "all are back", are_all_well).await?;
    fleet.ask(Order::Report(4)).await?;
    // Ten runs of each backup at first, and one more in each of two rounds.
    let path = "/v1/runs?cluster=cluster-7&limit=1000";
    let runs = hub.ask("GET", path, None).await?;
    let mut ids: Vec<_> =
        runs.as_array().into_iter().flatten().map(|run| format!("{}/{}", run["backup"], run["id"])).collect();
    ensure!(ids.len() == 3 * 12 + 11, "{}: {ids:?}", ids.len());
    ids.sort_unstable();
    ids.dedup();
    ensure!(ids.len() == 3 * 12 + 11, "{}: {ids:?}", ids.len());
    // It holds for ten thousand, and this is a fifth of them.
    ensure!(hub.memory()?.peak < 800 << 20, "{:?}", hub.memory()?);
    Ok(())
}

#[tokio::test]
#[ignore = "needs cargo e2e up: cargo e2e test --tier full"]
async fn agents_that_are_slow_or_gone_without_a_word_are_let_go_and_others_do_not_notice() -> Result<()> {
    let hub = hub().await?;
    hub.add_clusters(12).await?;
    let (slow, gone) = (TcpProxy::start(hub.link()).await?, TcpProxy::start(hub.link()).await?);
    let mut at_slow = agents(&hub, &slow.address(), 0, 1)?;
    let mut at_gone = agents(&hub, &gone.address(), 1, 1)?;
    let mut others = agents(&hub, &hub.link(), 2, 10)?;
    at_slow.ask(Order::AwaitConnected(1)).await?;
    at_gone.ask(Order::AwaitConnected(1)).await?;
    others.ask(Order::AwaitConnected(10)).await?;

    slow.become_(Line::Trickling);
    gone.become_(Line::Dead);
    others.ask(Order::CountApplied).await?;
    hub.write_policy("gold", &policy())?;
    others.ask(Order::AwaitApplied).await?;
    others.ask(Order::Report(5)).await?;
    await_state(&hub, "cluster-0", "Unknown").await?;
    await_state(&hub, "cluster-1", "Unknown").await?;
    // The agent has found out as well, or it would not come back.
    at_gone.ask(Order::AwaitConnected(0)).await?;
    others.ask(Order::AwaitConnected(10)).await?;
    ensure!(hub.log()?.matches("the session ends").count() == 2, "{}", hub.log()?);

    slow.become_(Line::Fine);
    gone.become_(Line::Fine);
    await_state(&hub, "cluster-0", "Connected").await?;
    await_state(&hub, "cluster-1", "Connected").await
}

#[tokio::test]
#[ignore = "needs cargo e2e up: cargo e2e test --tier full"]
async fn two_agents_with_one_identity_are_told_of() -> Result<()> {
    let hub = hub().await?;
    hub.add_clusters(2).await?;
    let mut one = agents(&hub, &hub.link(), 0, 2)?;
    one.ask(Order::AwaitConnected(2)).await?;
    let _other = agents(&hub, &hub.link(), 0, 1)?;
    until_within(FOUND, "the alarm", async || {
        Ok(hub.get("/metrics").await?.contains("sts_backup_hub_clusters_flapping 1"))
    })
    .await?;
    ensure!(hub.log()?.contains("two agents connect as one cluster"), "{}", hub.log()?);
    let show = hub.ask("GET", "/v1/clusters/cluster-0", None).await?;
    ensure!(show["flapping"] == true, "{show:#}");
    let other = hub.ask("GET", "/v1/clusters/cluster-1", None).await?;
    ensure!(other["flapping"] == false && other["state"] == "Connected", "{other:#}");
    Ok(())
}

#[tokio::test]
#[ignore = "needs cargo e2e up: cargo e2e test --tier full"]
async fn another_authority_is_used_without_a_restart_and_without_a_session_lost() -> Result<()> {
    let mut hub = hub().await?;
    hub.add_clusters(2).await?;
    let mut before = agents(&hub, &hub.link(), 0, 1)?;
    before.ask(Order::AwaitConnected(1)).await?;
    hub.replace_authority().await?;
    let mut after = agents(&hub, &hub.link(), 1, 1)?;
    after.ask(Order::AwaitConnected(1)).await?;

    before.ask(Order::CountApplied).await?;
    hub.write_policy("gold", &policy())?;
    before.ask(Order::AwaitApplied).await?;
    ensure!(!hub.log()?.contains("the session ends"), "{}", hub.log()?);
    ensure!(hub.get("/metrics").await?.contains("sts_backup_hub_clusters_connected 2\n"));
    Ok(())
}
