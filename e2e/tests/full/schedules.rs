//! Schedules over days, as an agent sees them whose clock is set ahead.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use sts_backup_api::backup::{Phase, StatefulSetBackupStatus};
use sts_backup_api::conditions::PROGRESSING;
use sts_backup_api::run::{Due, RunResult};
use sts_backup_e2e::kit::{Backup, Namespace};

use crate::{Daily, alone_with_app, start_agent};

/// As late as can be.
const A_YEAR: i64 = 31_536_000;

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn an_agent_that_was_away_for_days_begins_the_last_run_if_it_may_and_counts_the_others() -> Result<()> {
    alone_with_app("schedules", 1, async |ns| {
        let daily = Daily::just_passed(ns).await?;
        let late = write(ns, "late", &daily.schedule(), 3600).await?;
        let too_late = write(ns, "too-late", &daily.schedule(), 60).await?;
        let agent = start_agent(ns, 0).await?;
        for backup in [&late, &too_late] {
            let status = backup.await_status("announced", is_announced).await?;
            ensure!(next(&status) == Some(daily.day(1)) && status.history.is_empty(), "{status:?}");
        }
        agent.end().await?;

        let agent = start_agent(ns, 3).await?;
        let run = late.await_runs(1).await?;
        ensure!(run.result == RunResult::Completed && run.slot.due == Due::Schedule, "{run:?}");
        ensure!(run.slot.scheduled() == Some(daily.day(3)), "{run:?}");
        let status = too_late.await_status("counted", |status| status.missed_runs > 0).await?;
        ensure!(status.missed_runs == 3 && status.history.is_empty(), "{status:?}");
        ensure!(status.current_run.is_none(), "{status:?}");
        let said = too_late.await_event("RunsMissed").await?;
        ensure!(said.contains("3 scheduled runs are not begun"), "{said}");
        let status = late.status().await?;
        ensure!(status.missed_runs == 2 && status.history.len() == 1, "{status:?}");
        let said = late.await_event("RunsMissed").await?;
        ensure!(said.contains("2 scheduled runs are not begun"), "{said}");
        for backup in [&late, &too_late] {
            let status = backup.status().await?;
            ensure!(next(&status) == Some(daily.day(4)), "{status:?}");
            ensure!(
                status.last_schedule_time.as_ref().map(|last| last.0) == Some(daily.day(3)),
                "{status:?}"
            );
        }
        agent.end().await?;

        // Another start on the same day finds nothing due.
        let _agent = start_agent(ns, 3).await?;
        ensure_next_is_requested(&late, &[Due::Request, Due::Schedule], 2).await?;
        ensure_next_is_requested(&too_late, &[Due::Request], 3).await?;
        late.remove().await?;
        too_late.remove().await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_schedule_that_is_written_or_goes_on_after_days_begins_nothing_for_them() -> Result<()> {
    alone_with_app("schedules", 1, async |ns| {
        let daily = Daily::just_passed(ns).await?;
        let edited = write(ns, "edited", "0 0 29 2 *", A_YEAR).await?;
        let paused = write(ns, "paused", &daily.schedule(), A_YEAR).await?;
        paused.change(&json!({ "suspend": true })).await?;
        let agent = start_agent(ns, 0).await?;
        edited.await_status("announced", is_announced).await?;
        paused.await_condition(PROGRESSING, "False", "Suspended").await?;
        agent.end().await?;

        let agent = start_agent(ns, 3).await?;
        agent.await_leads().await?;
        edited.change(&json!({ "schedule": daily.schedule() })).await?;
        paused.change(&json!({ "suspend": false })).await?;
        for backup in [&edited, &paused] {
            let status = backup
                .await_status("announced anew", |status| {
                    next(status) == Some(daily.day(4)) && status.phase != Some(Phase::Suspended)
                })
                .await?;
            ensure!(status.current_run.is_none() && status.history.is_empty(), "{status:?}");
            ensure_next_is_requested(backup, &[Due::Request], 0).await?;
        }
        agent.end().await?;

        // From now on it counts.
        let _agent = start_agent(ns, 4).await?;
        for backup in [&edited, &paused] {
            let run = backup.await_runs(2).await?;
            ensure!(run.slot.scheduled() == Some(daily.day(4)), "{run:?}");
            ensure!(backup.status().await?.missed_runs == 0, "{run:?}");
            backup.remove().await?;
        }
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn runs_of_every_minute_follow_each_other_and_none_is_missed() -> Result<()> {
    alone_with_app("schedules", 1, async |ns| {
        let _agent = start_agent(ns, 0).await?;
        let backup = write(ns, "nightly", "* * * * *", 100).await?;
        backup.await_runs(3).await?;
        let status = backup.status().await?;
        let slots: Vec<_> = status.history.iter().rev().filter_map(|run| run.slot.scheduled()).collect();
        ensure!(slots.len() == 3 && slots.iter().all(|slot| slot.as_second() % 60 == 0), "{slots:?}");
        let apart = slots.windows(2).map(|slots| slots[1].duration_since(slots[0]).as_secs());
        ensure!(apart.eq([60, 60]) && status.missed_runs == 0, "{status:?}");
        backup.remove().await
    })
    .await
}

async fn write(ns: &Namespace, name: &str, schedule: &str, deadline: i64) -> Result<Backup> {
    let spec: Value = json!({
        "statefulSetRef": { "name": "app" }, "schedule": schedule, "startingDeadlineSeconds": deadline,
    });
    Backup::write(ns, name, &spec).await
}

fn next(status: &StatefulSetBackupStatus) -> Option<jiff::Timestamp> {
    status.next_schedule_time.as_ref().map(|next| next.0)
}

fn is_announced(status: &StatefulSetBackupStatus) -> bool {
    status.next_schedule_time.is_some()
}

/// The next run is one that is asked for here, and with it there are these, the newest first, and so many missed ones.
async fn ensure_next_is_requested(backup: &Backup, due: &[Due], missed: i64) -> Result<()> {
    backup.request("what comes first").await?;
    backup.await_runs(due.len()).await?;
    let status = backup.status().await?;
    ensure!(status.history.iter().map(|run| &run.slot.due).eq(due), "{status:?}");
    ensure!(status.missed_runs == missed, "{status:?}");
    Ok(())
}
