//! An API server that fails, refuses or is slow, in every step of a run.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Result, ensure};
use sts_backup_api::conditions::{self, THAWED};
use sts_backup_api::run::RunStep;
use sts_backup_e2e::kit::drill::Drill;
use sts_backup_e2e::kit::local_agent::LocalAgent;
use sts_backup_e2e::kit::proxy::{ApiProxy, is_create_of_snapshot, is_post_hook, is_status_write};

use crate::alone_in_namespace;

/// A drill with an agent behind a proxy.
async fn with_proxy(
    faults: &[(&str, &str)],
    max_freeze_seconds: i64,
    test: impl AsyncFnOnce(&mut Drill, &ApiProxy) -> Result<()>,
) -> Result<()> {
    alone_in_namespace("faults", async |ns| {
        let proxy = ApiProxy::start(ns.cluster()).await?;
        let mut drill =
            Drill::deploy(ns, faults, |spec| spec.max_freeze_seconds = max_freeze_seconds).await?;
        test(&mut drill, &proxy).await
    })
    .await
}

/// Its lease is of the default length: here it keeps it.
async fn start(drill: &Drill, proxy: &ApiProxy) -> Result<LocalAgent> {
    LocalAgent::start(&drill.steady_agent("agent").kubeconfig(proxy.kubeconfig())).await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn snapshots_that_cannot_be_created_for_a_while_are_created_in_the_same_freeze() -> Result<()> {
    with_proxy(&[], 60, async |drill, proxy| {
        let _agent = start(drill, proxy).await?;
        drill.ensure_completed().await?;
        for status in [500, 429] {
            let fault = proxy.fail(move |method, uri| is_create_of_snapshot(method, uri).then_some(status));
            drill.request().await?;
            // Each of three was tried three times.
            fault.await_hits(9).await;
            ensure!(drill.is_frozen().await?, "it was thawed before anything was cut");
            drop(fault);
            let attempts = drill.ensure_completed().await?;
            ensure!(attempts.len() == 1, "it took {attempts:#?}");
        }
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_freeze_whose_snapshots_cannot_all_be_created_ends_with_its_budget_and_leaves_none() -> Result<()> {
    with_proxy(&[], 6, async |drill, proxy| {
        let passed = AtomicU32::new(0);
        let fault = proxy.fail(move |method, uri| {
            let first = || passed.fetch_add(1, Ordering::SeqCst) == 0;
            (is_create_of_snapshot(method, uri) && !first()).then_some(500)
        });
        let _agent = start(drill, proxy).await?;
        drill.ensure_failed("FrozenTooLong").await?;
        drop(fault);
        drill.request().await?;
        drill.ensure_completed().await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn snapshots_that_a_slow_api_server_creates_after_their_run_has_failed_do_not_stay() -> Result<()> {
    with_proxy(&[], 6, async |drill, proxy| {
        let slow = proxy.hold(is_create_of_snapshot);
        let _agent = start(drill, proxy).await?;
        drill.ensure_failed("FrozenTooLong").await?;
        let held = u32::try_from(slow.hits())?;
        ensure!(held >= 3, "only {held} requests were held up");
        drop(slow);
        // Another run, whose snapshots come after those.
        drill.request().await?;
        drill.ensure_completed().await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn snapshots_that_a_slow_api_server_creates_for_an_agent_that_is_dead_do_not_stay() -> Result<()> {
    with_proxy(&[], 60, async |drill, proxy| {
        let slow = proxy.hold(is_create_of_snapshot);
        let first = LocalAgent::start(&drill.agent("first").kubeconfig(proxy.kubeconfig())).await?;
        slow.await_hits(3).await;
        first.kill().await?;
        let _second = LocalAgent::start(&drill.steady_agent("second")).await?;
        let attempts = drill.ensure_completed().await?;
        ensure!(attempts.len() == 2, "it took {attempts:#?}");
        drop(slow);
        // Another run, whose snapshots come after those.
        drill.request().await?;
        drill.ensure_completed().await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_status_that_cannot_be_written_for_a_while_holds_up_no_thaw() -> Result<()> {
    with_proxy(&[("cutDelay", "3s")], 60, async |drill, proxy| {
        let _agent = start(drill, proxy).await?;
        for status in [500, 429] {
            drill.await_frozen(1).await?;
            let fault = proxy.fail(move |method, uri| is_status_write(method, uri).then_some(status));
            fault.await_hits(2).await;
            drill.ensure_writable().await?;
            drop(fault);
            let attempts = drill.ensure_completed().await?;
            ensure!(attempts.len() == 1, "it took {attempts:#?}");
            drill.request().await?;
        }
        drill.ensure_completed().await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_thaw_that_fails_is_said_and_repeated_until_it_succeeds() -> Result<()> {
    with_proxy(&[], 60, async |drill, proxy| {
        let _agent = start(drill, proxy).await?;
        drill.ensure_completed().await?;
        for status in [500, 429] {
            let fault = proxy.fail(move |method, uri| is_post_hook(method, uri).then_some(status));
            drill.request().await?;
            drill
                .backup()
                .await_status("said to have failed to thaw", |status| {
                    let thawed = conditions::find(&status.conditions, THAWED);
                    thawed.is_some_and(|thawed| thawed.status == "False" && thawed.reason == "ThawFailed")
                })
                .await?;
            ensure!(drill.is_frozen().await?, "it was thawed by something else");
            fault.await_hits(7).await;
            drop(fault);
            let attempts = drill.ensure_completed().await?;
            ensure!(attempts.len() == 1, "it took {attempts:#?}");
        }
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_preflight_that_cannot_read_pods_waits_and_goes_on() -> Result<()> {
    with_proxy(&[], 60, async |drill, proxy| {
        let _agent = start(drill, proxy).await?;
        drill.ensure_completed().await?;
        for status in [500, 429] {
            let fault = proxy.fail(move |method, uri| {
                (method == "GET" && uri.path().ends_with("/pods")).then_some(status)
            });
            drill.request().await?;
            fault.await_hits(2).await;
            let run = drill.await_step(RunStep::Preflight, 1).await?;
            ensure!(run.pods.is_empty(), "it planned without its pods: {run:?}");
            drop(fault);
            let attempts = drill.ensure_completed().await?;
            ensure!(attempts.len() == 1, "it took {attempts:#?}");
        }
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn an_api_server_that_fails_every_request_in_mid_freeze_ends_no_agent_within_its_lease() -> Result<()> {
    with_proxy(&[("cutDelay", "3s")], 60, async |drill, proxy| {
        let agent = start(drill, proxy).await?;
        drill.await_frozen(1).await?;
        let fault = proxy.fail(|_, _| Some(500));
        // The thaw comes through to nobody.
        fault.await_hits(6).await;
        drop(fault);
        let attempts = drill.ensure_completed().await?;
        ensure!(attempts.len() == 1, "it took {attempts:#?}");
        agent.get("/healthz").await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn an_api_server_that_fails_every_request_until_the_lease_is_lost_leaves_the_thaw_to_the_next_agent()
-> Result<()> {
    with_proxy(&[("cutDelay", "6s")], 60, async |drill, proxy| {
        let agent = drill.agent("first").kubeconfig(proxy.kubeconfig());
        let mut first = LocalAgent::start(&agent).await?;
        drill.await_frozen(1).await?;
        let fault = proxy.fail(|_, _| Some(500));
        let status = first.wait_exit().await?;
        ensure!(status.code() == Some(3), "it ended with {status}");
        ensure!(drill.is_frozen().await?, "it was thawed by something else");
        drop(fault);
        let _second = LocalAgent::start(&drill.steady_agent("second")).await?;
        let attempts = drill.ensure_completed().await?;
        ensure!(attempts.len() == 2, "it took {attempts:#?}");
        Ok(())
    })
    .await
}
