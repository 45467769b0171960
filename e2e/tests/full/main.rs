//! What the smoke tier has no time for: agents that die, hang, lose their lease or their API server, in every way and
//! again and again, and days that pass. `cargo e2e test --tier full` runs them one after the other, in the cluster
//! without a shared agent.

mod alerts;
mod api_faults;
mod crashes;
mod fleet;
mod hub;
mod kills;
mod leases;
mod link;
mod policies;
mod restore_crashes;
mod restores;
mod restores_admission;
mod restores_contested;
mod retention;
mod schedules;
mod snapshots;
mod storage;

use anyhow::{Context, Result};
use jiff::civil::Time;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, Unit};
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::ResourceExt;
use sts_backup_e2e::kit::agent::alone;
use sts_backup_e2e::kit::crds::apply_crds;
use sts_backup_e2e::kit::local_agent::{LocalAgent, LocalAgentConfig};
use sts_backup_e2e::kit::proxy::ApiProxy;
use sts_backup_e2e::kit::{App, Cluster, Namespace, RestoreDrill, with_temp_namespace};

/// Snapshots of a run that are still being cut when it is interrupted: they go once they are cut. What is deleted during a
/// call, which can be the repetition of one that failed, is something that csi-snapshotter comes back to only with its
/// next resync.
const UNCUT_FOR_A_WHILE: [(&str, &str); 1] = [("cutDelay", "6s")];

/// Runs a test alone in the cluster that has no shared agent.
async fn alone_in_namespace(prefix: &str, test: impl AsyncFnOnce(&Namespace) -> Result<()>) -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-2").await?;
    let _alone = alone(&cluster).await?;
    with_temp_namespace(&cluster, prefix, test).await
}

/// Runs a test with an application `app`, alone in the cluster that has no shared agent.
async fn alone_with_app(
    prefix: &str,
    replicas: i32,
    test: impl AsyncFnOnce(&Namespace) -> Result<()>,
) -> Result<()> {
    alone_in_namespace(prefix, async |ns| {
        apply_crds(ns.cluster()).await?;
        App::new(ns, "app").replicas(replicas).deploy().await?;
        test(ns).await
    })
    .await
}

/// Starts an agent whose clock is that many days ahead.
async fn start_agent(ns: &Namespace, days: i64) -> Result<LocalAgent> {
    let config = LocalAgentConfig::new(ns, "agent").steady_lease();
    LocalAgent::start(&config.clock_ahead(SignedDuration::from_hours(24 * days))).await
}

/// A time of day that has just passed, each day: when a backup of the application comes to exist it is over for that day,
/// and an agent of another day is late by minutes.
struct Daily {
    today: Timestamp,
}

impl Daily {
    /// Ten minutes before `app` was made.
    async fn just_passed(ns: &Namespace) -> Result<Self> {
        let set = ns.api::<StatefulSet>().get("app").await?;
        let made = set.creation_timestamp().context("the API server sets the creation time")?.0;
        Ok(Self { today: (made - SignedDuration::from_mins(11)).round(Unit::Minute)? })
    }

    /// As a schedule.
    fn schedule(&self) -> String {
        let time: Time = self.today.to_zoned(TimeZone::UTC).time();
        format!("{} {} * * *", time.minute(), time.hour())
    }

    /// The time so many days from now.
    fn day(&self, days: i64) -> Timestamp {
        self.today + SignedDuration::from_hours(24 * days)
    }
}

/// Runs a test with an agent, and an application `app` with a recovery point which has written on since, alone in the
/// cluster that has no shared agent. The agent reaches the API server by way of a proxy.
async fn alone_with_restore_drill(
    app: impl FnOnce(App) -> App,
    test: impl AsyncFnOnce(&Namespace, &RestoreDrill, &ApiProxy) -> Result<()>,
) -> Result<()> {
    alone_in_namespace("restores", async |ns| {
        apply_crds(ns.cluster()).await?;
        let proxy = ApiProxy::start(ns.cluster()).await?;
        let config = LocalAgentConfig::new(ns, "agent").steady_lease().kubeconfig(proxy.kubeconfig());
        let _agent = LocalAgent::start(&config).await?;
        let drill = RestoreDrill::deploy(ns, app(App::new(ns, "app"))).await?;
        test(ns, &drill, &proxy).await
    })
    .await
}
