//! An agent that dies leaves no database frozen, no half of a backup and no application scaled down, wherever it was. Every boundary, and what
//! else can end an agent, is in the full tier.

use anyhow::{Context, Result, ensure};
use sts_backup_e2e::kit::agent::alone;
use sts_backup_e2e::kit::crds::apply_crds;
use sts_backup_e2e::kit::drill::Drill;
use sts_backup_e2e::kit::local_agent::{LocalAgent, LocalAgentConfig};
use sts_backup_e2e::kit::restore_drill::{LATER, POINT};
use sts_backup_e2e::kit::{App, Cluster, RestoreDrill, with_temp_namespace};

/// One crash point of each kind, and how many attempts a run takes whose agent dies there. The frozen section is
/// never entered twice: a run that was in it is begun anew.
const CRASH_POINTS: [(&str, usize); 5] =
    [("after-begin", 1), ("after-freeze", 2), ("after-create", 2), ("after-thaw", 2), ("after-outcome", 1)];

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_run_whose_agent_dies_is_thawed_and_completed_by_the_next_one() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-2").await?;
    let _alone = alone(&cluster).await?;
    with_temp_namespace(&cluster, "crash", async |ns| {
        let mut drill = Drill::deploy(ns, &[], |_| ()).await?;
        let mut sound = LocalAgent::start(&drill.steady_agent("sound")).await?;
        let attempts = drill.ensure_completed().await?;
        ensure!(attempts.len() == 1, "an undisturbed run took {attempts:#?}");
        for (crash_point, attempts) in CRASH_POINTS {
            let survived = drill.ensure_survives(&mut sound, crash_point, attempts).await;
            survived.with_context(|| format!("the agent died at {crash_point}"))?;
        }
        Ok(())
    })
    .await
}

/// A crash in the middle of each kind of write of a restore: of the status, and of the cluster.
const RESTORE_CRASH_POINTS: [&str; 2] =
    ["after-restore-record=5*off->return", "after-restore-write=4*off->return"];

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_restore_whose_agent_dies_is_completed_by_the_next_one_and_can_be_taken_back() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-2").await?;
    let _alone = alone(&cluster).await?;
    with_temp_namespace(&cluster, "crash", async |ns| {
        apply_crds(&cluster).await?;
        let agent = LocalAgentConfig::new(ns, "sound").steady_lease();
        let mut sound = LocalAgent::start(&agent).await?;
        let drill = RestoreDrill::deploy(ns, App::new(ns, "app")).await?;
        for (name, crash_point) in ["record", "write"].into_iter().zip(RESTORE_CRASH_POINTS) {
            sound.terminate()?;
            sound.wait_exit().await?;
            let dying = LocalAgentConfig::new(ns, name).short_lease().failpoints(crash_point);
            let mut dying = LocalAgent::start(&dying).await?;
            let restore = drill.restore(name, |_| ()).await?;
            let status = dying.wait_exit().await?;
            ensure!(status.code().is_none(), "the agent did not die at {crash_point}: {status}");
            sound = LocalAgent::start(&agent).await?;
            restore.await_completed().await.with_context(|| format!("the agent died at {crash_point}"))?;
            drill.ensure_serves(POINT).await?;
            restore.request_rollback().await?;
            restore.await_rolled_back().await?;
            drill.ensure_serves(LATER).await?;
        }
        Ok(())
    })
    .await
}
