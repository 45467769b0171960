//! What a cluster does without its hub, and with one that is not what it was: agent and hub as processes, on a real cluster.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use jiff::SignedDuration;
use kube::api::{DeleteParams, ListParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use sts_backup_api::names::{FROM_HUB_LABEL, policy_backup_name};
use sts_backup_api::policy::StatefulSetBackupPolicy;
use sts_backup_api::run::RunResult;
use sts_backup_e2e::condition::await_condition;
use sts_backup_e2e::harness::paths::Paths;
use sts_backup_e2e::kit::local_agent::{LocalAgent, LocalAgentConfig};
use sts_backup_e2e::kit::local_hub::LocalHub;
use sts_backup_e2e::kit::policy::NEVER;
use sts_backup_e2e::kit::poll::until_within;
use sts_backup_e2e::kit::{App, Backup, Namespace};

use crate::{Daily, alone_with_app};

const TIMEOUT: Duration = Duration::from_mins(2);

/// Days without a hub.
const WEEK: usize = 7;

/// The day on which another application comes.
const ANOTHER: usize = 4;

async fn start_hub() -> Result<LocalHub> {
    LocalHub::start(&Paths::find()?.program("sts-backup-hub"), None).await
}

async fn start_agent(ns: &Namespace, config: &Path, day: usize) -> Result<LocalAgent> {
    let ahead = SignedDuration::from_hours(24 * i64::try_from(day)?);
    let agent = LocalAgentConfig::new(ns, "agent").steady_lease().config(config).clock_ahead(ahead);
    LocalAgent::start(&agent).await
}

async fn await_backup(ns: &Namespace, policy: &str, app: &str) -> Result<Backup> {
    let backup = Backup::existing(ns, &policy_backup_name(policy, app));
    await_condition(&backup.api(), backup.name(), "there", TIMEOUT, |_| true).await?;
    backup.await_status("announced", |status| status.next_schedule_time.is_some()).await?;
    Ok(backup)
}

/// The hub's policies of the cluster: what a test that failed has left would be the next agent's to keep.
async fn clear(ns: &Namespace) -> Result<Api<StatefulSetBackupPolicy>> {
    let all: Api<StatefulSetBackupPolicy> = Api::all(ns.cluster().client());
    all.delete_collection(&DeleteParams::default(), &of_hubs()).await?;
    Ok(all)
}

fn of_hubs() -> ListParams {
    ListParams::default().labels(FROM_HUB_LABEL)
}

async fn await_cluster(hub: &LocalHub, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    let show = async || hub.ask("GET", "/v1/clusters/one", None).await;
    let done = until_within(TIMEOUT, what, async || Ok(wanted(&show().await?))).await;
    let last = show().await?;
    done.with_context(|| format!("the hub says {last:#}"))?;
    Ok(last)
}

fn outcome(cluster: &Value) -> Option<&str> {
    cluster["applied"]["outcome"].as_str()
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_cluster_works_alone_for_a_week_and_its_hub_knows_all_of_it_afterwards() -> Result<()> {
    alone_with_app("week", 1, async |ns| {
        clear(ns).await?;
        let mut hub = start_hub().await?;
        let daily = Daily::just_passed(ns).await?;
        let gold = format!("{}-gold", ns.name());
        let spec = json!({ "schedule": daily.schedule(), "startingDeadlineSeconds": 3600 });
        hub.write_policy(&gold, &json!({ "policy": { "template": { "spec": spec } } }))?;
        let config = hub.let_in("one", ns.name()).await?;
        let agent = start_agent(ns, &config, 0).await?;
        let app = await_backup(ns, &gold, "app").await?;
        hub.kill().await?;
        agent.end().await?;

        let mut another = None;
        for day in 1..=WEEK {
            if day == ANOTHER {
                App::new(ns, "another").deploy().await?;
            }
            let agent = start_agent(ns, &config, day).await?;
            let run = app.await_runs(day).await?;
            ensure!(run.result == RunResult::Completed, "{run:?}");
            ensure!(run.slot.scheduled() == Some(daily.day(i64::try_from(day)?)), "{run:?}");
            if day == ANOTHER {
                another = Some(await_backup(ns, &gold, "another").await?);
            }
            if let Some(another) = &another {
                // From its first day on: it was there before that day's time for the cluster's own clock.
                another.await_runs(day - ANOTHER + 1).await?;
            }
            ensure!(app.status().await?.missed_runs == 0, "{:?}", app.status().await?);
            agent.end().await?;
        }

        hub.restart().await?;
        let agent = start_agent(ns, &config, WEEK).await?;
        let runs = async || -> Result<Vec<String>> {
            let runs = hub.ask("GET", "/v1/runs?cluster=one", None).await?;
            let runs = runs.as_array().into_iter().flatten();
            let name = |run: &Value| Some(format!("{}/{}", run["backup"].as_str()?, run["id"].as_str()?));
            let mut runs: Vec<_> = runs.filter_map(name).collect();
            runs.sort_unstable();
            Ok(runs)
        };
        let mut all = Vec::new();
        for backup in [&app, another.as_ref().context("another one is protected")?] {
            let status = backup.status().await?;
            all.extend(status.history.iter().map(|run| format!("{}/{}", backup.name(), run.id)));
        }
        all.sort_unstable();
        ensure!(all.len() == WEEK + WEEK - ANOTHER + 1, "{all:?}");
        until_within(TIMEOUT, "the hub knows all runs", async || Ok(runs().await? == all)).await?;
        await_cluster(&hub, "linked", |one| one["state"] == "Connected" && outcome(one) == Some("Active"))
            .await?;
        // Told again, nothing is doubled.
        agent.end().await?;
        let agent = start_agent(ns, &config, WEEK).await?;
        await_cluster(&hub, "linked again", |one| one["state"] == "Connected").await?;
        ensure!(runs().await? == all, "{:?}", runs().await?);
        agent.end().await?;
        clear(ns).await.map(drop)
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_hub_with_an_older_copy_of_its_database_removes_nothing() -> Result<()> {
    alone_with_app("copy", 1, async |ns| {
        let all = clear(ns).await?;
        let mut hub = start_hub().await?;
        let name = |suffix: &str| format!("{}-{suffix}", ns.name());
        let spec = json!({ "policy": { "template": { "spec": { "schedule": NEVER } } } });
        hub.write_policy(&name("a"), &spec)?;
        let config = hub.let_in("one", ns.name()).await?;
        let agent = start_agent(ns, &config, 0).await?;
        await_cluster(&hub, "active", |one| outcome(one) == Some("Active")).await?;
        hub.kill().await?;
        let copy = hub.copy_database()?;
        hub.restart().await?;
        hub.write_policy(&name("b"), &spec)?;
        let is_new =
            |one: &Value| outcome(one) == Some("Active") && one["applied"]["revision"] == one["revision"];
        await_cluster(&hub, "active with both", |one| is_new(one) && one["policies"][&name("b")].is_object())
            .await?;
        let there = async || {
            anyhow::Ok(all.list(&of_hubs()).await?.iter().map(ResourceExt::name_any).collect::<Vec<_>>())
        };
        ensure!(there().await? == [name("a"), name("b")], "{:?}", there().await?);

        hub.kill().await?;
        hub.put_back(&copy)?;
        hub.remove_policy(&name("b"))?;
        hub.restart().await?;
        let held = await_cluster(&hub, "held back", |one| outcome(one) == Some("Held")).await?;
        let why = held["applied"]["detail"].as_str().unwrap_or_default();
        ensure!(why.contains("its database is an older copy"), "{held:#}");
        ensure!(there().await? == [name("a"), name("b")], "{:?}", there().await?);
        agent.end().await?;
        clear(ns).await.map(drop)
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn who_is_revoked_is_let_go_at_once_and_new_certificates_are_used_without_a_restart() -> Result<()> {
    alone_with_app("identity", 1, async |ns| {
        clear(ns).await?;
        let hub = start_hub().await?;
        let config = hub.let_in("one", ns.name()).await?;
        let agent = start_agent(ns, &config, 0).await?;
        let first = await_cluster(&hub, "linked", |one| one["state"] == "Connected").await?;

        // A certificate of the same authority, into the files of an agent that is connected.
        hub.issue_again("one").await?;
        let renewed = |one: &Value| one["state"] == "Connected" && one["address"] != first["address"];
        await_cluster(&hub, "linked with another certificate", renewed).await?;
        ensure!(agent.log()?.contains("the link's certificate is another one"), "{}", agent.log()?);

        hub.ask("POST", "/v1/clusters/one/revoke", None).await?;
        until_within(TIMEOUT, "the agent is told", async || {
            Ok(agent.log()?.contains("the cluster is revoked"))
        })
        .await?;
        until_within(TIMEOUT, "the agent is refused", async || Ok(agent.log()?.contains("was revoked at")))
            .await?;
        let show = hub.ask("GET", "/v1/clusters/one", None).await?;
        ensure!(show["state"] == "Revoked", "{show:#}");
        agent.end().await
    })
    .await
}
