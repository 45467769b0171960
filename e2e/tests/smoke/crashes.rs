//! An agent that dies leaves no database frozen and no half of a backup, wherever it was.

use anyhow::{Context, Result, ensure};
use std::os::unix::process::ExitStatusExt;
use sts_backup_e2e::kit::agent::alone;
use sts_backup_e2e::kit::drill::Drill;
use sts_backup_e2e::kit::local_agent::LocalAgent;
use sts_backup_e2e::kit::{Cluster, with_temp_namespace};

/// One boundary of each kind, and how many attempts a run takes whose agent dies there. The frozen section is never
/// entered twice: a run that was in it is begun anew.
const BOUNDARIES: [(&str, usize); 8] = [
    ("after-begin", 1),
    ("after-duty", 2),
    ("after-freeze", 2),
    ("after-create", 2),
    ("before-thaw", 2),
    ("after-thaw", 2),
    ("after-outcome", 1),
    ("before-finish", 1),
];

/// What abort sends.
const SIGABRT: i32 = 6;

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn wherever_the_agent_dies_the_next_one_thaws_and_completes_the_run() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-2").await?;
    let _alone = alone(&cluster).await?;
    with_temp_namespace(&cluster, "crash", async |ns| {
        let mut drill = Drill::deploy(ns, &[], |_| ()).await?;
        let mut sound = LocalAgent::start(&drill.agent("sound-0")).await?;
        let attempts = drill.ensure_completed().await?;
        ensure!(attempts.len() == 1, "an undisturbed run took {attempts:#?}");

        for (boundary, attempts) in BOUNDARIES {
            let crash = async {
                let failing = drill.agent(boundary).failpoints(&format!("{boundary}=return"));
                let mut failing = LocalAgent::start(&failing).await?;
                sound.terminate()?;
                let status = sound.wait_exit().await?;
                ensure!(status.success(), "an idle agent ended with {status}");
                failing.await_leads().await?;
                sound = LocalAgent::start(&drill.agent(&format!("sound-{boundary}"))).await?;

                drill.request().await?;
                let status = failing.wait_exit().await?;
                ensure!(status.signal() == Some(SIGABRT), "the agent ended with {status}");
                let took = drill.ensure_completed().await?;
                ensure!(took.len() == attempts, "it took {took:#?}");
                anyhow::Ok(())
            };
            crash.await.with_context(|| format!("the agent died at {boundary}"))?;
        }
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn an_agent_that_is_asked_to_end_thaws_first_and_the_next_one_begins_the_run_anew() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-2").await?;
    let _alone = alone(&cluster).await?;
    with_temp_namespace(&cluster, "crash", async |ns| {
        let mut drill = Drill::deploy(ns, &[("cutDelay", "4s")], |_| ()).await?;
        let mut first = LocalAgent::start(&drill.agent("first")).await?;
        drill.await_frozen(1).await?;
        first.terminate()?;
        let status = first.wait_exit().await?;
        ensure!(status.code() == Some(0), "after SIGTERM it ended with {status}");
        ensure!(!drill.is_frozen().await?, "it ended and left a server frozen");
        let says = first.log()?;
        ensure!(says.contains("the lease is released"), "it did not release the lease");

        let _second = LocalAgent::start(&drill.agent("second")).await?;
        let attempts = drill.ensure_completed().await?;
        ensure!(attempts.len() == 2, "it took {attempts:#?}");
        Ok(())
    })
    .await
}
