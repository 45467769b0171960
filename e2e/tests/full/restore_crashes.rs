//! A restore whose agent dies before any one of its writes, and those after it: the next one finishes it, or takes it back.
//!
//! The writes are counted in a proxy before the API server, so that none is forgotten. Those that the agent sends at
//! once arrive in any order.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sts_backup_api::restore::{RestorePhase, StatefulSetRestoreStatus};
use sts_backup_api::swap::SwapStep;
use sts_backup_e2e::kit::crds::apply_crds;
use sts_backup_e2e::kit::local_agent::{LocalAgent, LocalAgentConfig};
use sts_backup_e2e::kit::proxy::{ApiProxy, is_write_of_restore};
use sts_backup_e2e::kit::restore_drill::{LATER, POINT, ensure_released};
use sts_backup_e2e::kit::{App, Namespace, Restore, RestoreDrill};

use crate::alone_in_namespace;

/// More than a restore of one claim has.
const MOST_WRITES: u64 = 60;

/// Fewer than it has: the finalizer, the status at each step, and each of the steps of a swap.
const FEWEST_WRITES: u64 = 12;

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_restore_is_finished_after_the_death_of_its_agent_at_every_write() -> Result<()> {
    // Nobody rolls back: the old volume goes at once, and all that is left over can be told.
    let window = Duration::from_secs(1);
    at_every_write(window, async |ns, drill, restore, _| {
        restore.await_completed().await?;
        drill.ensure_serves(POINT).await?;
        drill.volumes().await_only_those_of_claims().await?;
        ensure_released(ns, drill.volumes()).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_restore_is_taken_back_after_the_death_of_its_agent_at_every_write() -> Result<()> {
    at_every_write(Duration::from_hours(1), async |ns, drill, restore, at_death| {
        if at_death.swap.is_none() {
            // There was nothing to bring back when the agent died.
            restore.await_completed().await?;
        }
        restore.request_rollback().await?;
        let is_back = |status: &StatefulSetRestoreStatus| {
            matches!(status.phase, Some(RestorePhase::Failed | RestorePhase::RolledBack))
        };
        restore.await_status("taken back", is_back).await?;
        drill.ensure_serves(LATER).await?;
        ensure_released(ns, drill.volumes()).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn an_old_volume_whose_time_has_come_goes_although_the_agent_dies_at_it() -> Result<()> {
    alone_in_namespace("crash", async |ns| {
        apply_crds(ns.cluster()).await?;
        let dying = LocalAgentConfig::new(ns, "dying").steady_lease();
        let mut dying = LocalAgent::start(&dying.failpoints("after-restore-expiry=return")).await?;
        let drill = RestoreDrill::deploy(ns, App::new(ns, "app").replicas(3)).await?;
        let window = Duration::from_secs(1);
        let restore = drill.restore("back", |spec| spec.rollback_window = window.into()).await?;
        let status = dying.wait_exit().await?;
        ensure!(status.code().is_none(), "the agent did not die at the end of a volume: {status}");
        let next = LocalAgent::start(&LocalAgentConfig::new(ns, "next").steady_lease()).await?;
        next.await_leads().await?;
        restore.await_completed().await?;
        drill.ensure_serves(POINT).await?;
        drill.volumes().await_only_those_of_claims().await
    })
    .await
}

/// Restores an application again and again. Each time the agent gets one write further before all of its writes fail and
/// it is killed; `check` says what the next agent must make of that. Ends when a restore has completed before that.
async fn at_every_write(
    window: Duration,
    check: impl AsyncFn(&Namespace, &RestoreDrill, &Restore, &StatefulSetRestoreStatus) -> Result<()>,
) -> Result<()> {
    alone_in_namespace("crash", async |ns| {
        apply_crds(ns.cluster()).await?;
        let proxy = ApiProxy::start(ns.cluster()).await?;
        let sound = LocalAgentConfig::new(ns, "sound").steady_lease();
        let first = LocalAgent::start(&sound).await?;
        let drill = RestoreDrill::deploy(ns, App::new(ns, "app")).await?;
        end(first).await?;

        let mut steps = BTreeSet::new();
        for writes in 0..MOST_WRITES {
            drill.write_later().await?;
            let name = format!("after-{writes}");
            let restore = drill.restore(&name, |spec| spec.rollback_window = window.into()).await?;
            let dying = LocalAgentConfig::new(ns, "dying").short_lease().kubeconfig(proxy.kubeconfig());
            let died = die_after(&proxy, &dying, &restore, writes).await?;
            let at_death = restore.status().await?;
            steps.extend(at_death.swap.as_ref().map(|swap| swap.step));
            eprintln!("after {writes} writes: {:?}", at_death.swap.as_ref().map(|swap| swap.step));

            let next = LocalAgent::start(&sound).await?;
            let outcome = check(ns, &drill, &restore, &at_death).await;
            outcome.with_context(|| format!("the agent died after {writes} writes of a restore"))?;
            restore.remove().await?;
            end(next).await?;
            if !died {
                ensure!(writes >= FEWEST_WRITES, "a restore had only {writes} writes");
                let swap = [
                    SwapStep::Protecting,
                    SwapStep::Staging,
                    SwapStep::ScalingDown,
                    SwapStep::Swapping,
                    SwapStep::ScalingUp,
                    SwapStep::Releasing,
                ];
                ensure!(steps.is_superset(&swap.into()), "no agent died at some steps: {steps:?}");
                return Ok(());
            }
        }
        anyhow::bail!("a restore of one claim has not completed after {MOST_WRITES} writes")
    })
    .await
}

/// Runs an agent until it has written so often, or the restore has completed before; then kills it. Whether it was
/// about to write more.
async fn die_after(
    proxy: &ApiProxy,
    config: &LocalAgentConfig,
    restore: &Restore,
    writes: u64,
) -> Result<bool> {
    let written = Arc::new(AtomicU64::new(0));
    let fault = proxy.fail(move |method, uri| {
        let is_too_many = || written.fetch_add(1, Ordering::SeqCst) >= writes;
        (is_write_of_restore(method, uri) && is_too_many()).then_some(500)
    });
    let agent = LocalAgent::start(config).await?;
    let died = tokio::select! {
        () = fault.await_hits(1) => true,
        completed = restore.await_completed() => completed.map(|_| false)?,
    };
    agent.kill().await?;
    Ok(died)
}

/// Ends an agent in order: the next one leads at once.
async fn end(mut agent: LocalAgent) -> Result<()> {
    agent.terminate()?;
    let status = agent.wait_exit().await?;
    ensure!(status.success(), "an idle agent ended with {status}");
    Ok(())
}
