//! An agent that dies leaves no database frozen and no half of a backup, wherever it was. Every boundary, and what
//! else can end an agent, is in the full tier.

use anyhow::{Context, Result, ensure};
use sts_backup_e2e::kit::agent::alone;
use sts_backup_e2e::kit::drill::Drill;
use sts_backup_e2e::kit::local_agent::LocalAgent;
use sts_backup_e2e::kit::{Cluster, with_temp_namespace};

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
