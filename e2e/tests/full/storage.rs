//! A cluster whose snapshot-controller is away while a database is frozen.

use anyhow::{Result, ensure};
use sts_backup_e2e::kit::drill::Drill;
use sts_backup_e2e::kit::local_agent::LocalAgent;
use sts_backup_e2e::kit::snapshot_controller::Outage;

use crate::alone_in_namespace;

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn without_snapshot_controller_a_freeze_ends_with_its_budget_and_leaves_no_snapshot() -> Result<()> {
    alone_in_namespace("storage", async |ns| {
        let mut drill = Drill::deploy(ns, &[], |spec| spec.max_freeze_seconds = 6).await?;
        let outage = Outage::begin(ns.cluster()).await?;
        let _agent = LocalAgent::start(&drill.steady_agent("agent")).await?;
        drill.postgres().await_blocked_writer(0).await?;
        let run = drill.ensure_failed("FrozenTooLong").await?;
        ensure!(run.message.contains("is the snapshot-controller running?"), "{run:?}");
        outage.end().await?;
        drill.request().await?;
        drill.ensure_completed().await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_snapshot_controller_that_is_back_within_the_budget_completes_the_run() -> Result<()> {
    alone_in_namespace("storage", async |ns| {
        let mut drill = Drill::deploy(ns, &[], |_| ()).await?;
        let outage = Outage::begin(ns.cluster()).await?;
        let _agent = LocalAgent::start(&drill.steady_agent("agent")).await?;
        drill.await_frozen(1).await?;
        drill.postgres().await_blocked_writer(0).await?;
        outage.end().await?;
        let attempts = drill.ensure_completed().await?;
        ensure!(attempts.len() == 1, "it took {attempts:#?}");
        Ok(())
    })
    .await
}
