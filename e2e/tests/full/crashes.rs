//! An agent that dies, at every boundary between two steps.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sts_backup_api::run::RunStep;
use sts_backup_api::snapshot::VolumeSnapshot;
use sts_backup_e2e::condition::{await_deleted, await_none};
use sts_backup_e2e::kit::drill::Drill;
use sts_backup_e2e::kit::local_agent::LocalAgent;

use crate::{UNCUT_FOR_A_WHILE, alone_in_namespace};

const TIMEOUT: Duration = Duration::from_mins(1);

/// Its calls fail, so they can be deleted.
const NEVER_CUT: [(&str, &str); 1] = [("failOnCall", "1-999999")];

/// The crash points of a run that is well, and how many attempts it takes when its agent dies there.
const CRASH_POINTS: [(&str, usize); 10] = [
    ("after-begin", 1),
    ("after-finalizer", 1),
    ("after-duty", 2),
    ("after-freeze", 2),
    ("after-create", 2),
    ("before-thaw", 2),
    ("after-thaw", 2),
    ("after-outcome", 1),
    ("before-finish", 1),
    ("after-finish", 1),
];

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_run_survives_the_death_of_its_agent_at_every_boundary() -> Result<()> {
    alone_in_namespace("crash", async |ns| {
        let mut drill = Drill::deploy(ns, &[], |_| ()).await?;
        let mut sound = LocalAgent::start(&drill.steady_agent("sound")).await?;
        drill.ensure_completed().await?;
        for (crash_point, attempts) in CRASH_POINTS {
            let survived = drill.ensure_survives(&mut sound, crash_point, attempts).await;
            survived.with_context(|| format!("the agent died at {crash_point}"))?;
        }
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_run_whose_agents_die_one_after_the_other_is_tried_three_times_in_all() -> Result<()> {
    alone_in_namespace("crash", async |ns| {
        let mut drill = Drill::deploy(ns, &[], |_| ()).await?;
        for crash_point in
            ["after-freeze", "after-record", "after-clean-up", "before-thaw", "after-record", "after-create"]
        {
            let failing = drill.agent(crash_point).failpoints(&format!("{crash_point}=return"));
            let mut failing = LocalAgent::start(&failing).await?;
            ensure!(failing.wait_exit().await?.code().is_none(), "the agent did not die at {crash_point}");
        }
        let _sound = LocalAgent::start(&drill.steady_agent("sound")).await?;
        let attempts = drill.settled().await?;
        ensure!(attempts.len() == 3, "it was tried {} times: {attempts:#?}", attempts.len());
        ensure!(attempts.iter().all(|run| run.reason == "Interrupted"), "{attempts:#?}");
        drill.ensure_sound().await?;
        drill.request().await?;
        drill.ensure_completed().await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn an_agent_that_is_asked_to_end_thaws_first_and_the_next_one_begins_the_run_anew() -> Result<()> {
    alone_in_namespace("crash", async |ns| {
        let mut drill = Drill::deploy(ns, &UNCUT_FOR_A_WHILE, |_| ()).await?;
        let mut first = LocalAgent::start(&drill.agent("first")).await?;
        drill.await_frozen(1).await?;
        first.terminate()?;
        let status = first.wait_exit().await?;
        ensure!(status.code() == Some(0), "after SIGTERM it ended with {status}");
        ensure!(!drill.is_frozen().await?, "it ended and left a server frozen");
        ensure!(first.log()?.contains("the lease is released"), "it did not release the lease");

        let _second = LocalAgent::start(&drill.steady_agent("second")).await?;
        let attempts = drill.ensure_completed().await?;
        ensure!(attempts.len() == 2, "it took {attempts:#?}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_backup_that_is_deleted_while_its_agent_is_dead_is_thawed_and_let_go() -> Result<()> {
    alone_in_namespace("crash", async |ns| {
        let mut drill = Drill::deploy(ns, &NEVER_CUT, |_| ()).await?;
        let first = LocalAgent::start(&drill.agent("first")).await?;
        drill.await_frozen(1).await?;
        first.kill().await?;
        let backup = drill.backup().api().get(drill.backup().name()).await?;
        drill.backup().delete().await?;
        ensure!(drill.is_frozen().await?, "it was thawed without an agent");

        let _second = LocalAgent::start(&drill.steady_agent("second")).await?;
        await_deleted(&drill.backup().api(), &backup, TIMEOUT).await?;
        ensure_nothing_is_left(&mut drill).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_backup_that_is_deleted_in_mid_freeze_is_thawed_and_let_go() -> Result<()> {
    alone_in_namespace("crash", async |ns| {
        let mut drill = Drill::deploy(ns, &NEVER_CUT, |_| ()).await?;
        let _agent = LocalAgent::start(&drill.steady_agent("agent")).await?;
        let run = drill.await_frozen(1).await?;
        ensure!(run.step == RunStep::Frozen, "{run:?}");
        let backup = drill.backup().api().get(drill.backup().name()).await?;
        drill.backup().delete().await?;
        await_deleted(&drill.backup().api(), &backup, TIMEOUT).await?;
        ensure_nothing_is_left(&mut drill).await
    })
    .await
}

/// Its object is gone, and no run completed.
async fn ensure_nothing_is_left(drill: &mut Drill) -> Result<()> {
    drill.ensure_writable().await?;
    for trace in drill.traces().await? {
        trace.ensure_thawed()?;
    }
    let snapshots = drill.backup().snapshots().await?;
    ensure!(snapshots.is_empty(), "snapshots are left: {snapshots:?}");
    await_none::<VolumeSnapshot>(&drill.namespace().api(), "snapshots", TIMEOUT, |_| true).await
}
