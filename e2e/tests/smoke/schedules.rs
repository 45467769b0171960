//! Runs by schedule, and none that nobody expects. What takes days is in the full tier.

use anyhow::{Context, Result, ensure};
use futures::future::select_ok;
use jiff::Timestamp;
use serde_json::{Value, json};
use sts_backup_api::backup::Phase;
use sts_backup_api::conditions::{INVALID_SCHEDULE, PROGRESSING, READY};
use sts_backup_api::run::{Due, RunRecord, RunResult};
use sts_backup_e2e::kit::{App, Backup};

use crate::with_app;

/// Comes in no test.
const RARELY: &str = "0 0 29 2 *";

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_schedule_begins_a_run_at_its_time_and_shows_the_next_one() -> Result<()> {
    with_app("schedules", &[], async |ns, _app, _class| {
        let backup = Backup::write(ns, "nightly", &every_minute("app")).await?;
        let one_ended =
            async || backup.await_status("one run ended", |status| status.history.len() == 1).await;
        let status = one_ended().await?;
        let run = &status.history[0];
        // None at creation.
        let slot = slot(run)?;
        ensure!(run.result == RunResult::Completed && run.started.0 >= slot, "{run:?}");
        ensure!(is_whole_minute(slot), "it was due at {slot}");
        ensure!(status.last_schedule_time.as_ref().map(|last| last.0) == Some(slot), "{status:?}");
        let next = status.next_schedule_time.as_ref().context("no next run is said")?.0;
        ensure!(is_whole_minute(next) && next > slot, "after {slot} comes {next}");
        ensure!(status.missed_runs == 0, "{status:?}");

        let columns = backup.columns().await?;
        ensure!(columns["Schedule"] == "* * * * *" && columns["Suspended"] == false, "{columns:?}");
        let shown: Timestamp = columns["Next Backup"].as_str().context("no column")?.parse()?;
        ensure!(is_whole_minute(shown) && shown >= next, "{columns:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_schedule_that_cannot_be_read_is_refused_with_the_remedy_and_a_correction_is_taken() -> Result<()> {
    with_app("schedules", &[], async |ns, _app, _class| {
        let good = json!({ "schedule": RARELY, "timeZone": null, "spread": null });
        for (name, bad, words) in [
            (
                "minute",
                json!({ "schedule": "61 * * * *" }),
                r#""61" is no minute; write * or values of 0-59, such as 1, 1,3, 1-3 or */2"#,
            ),
            (
                "fields",
                json!({ "schedule": "0 0 2 * * *" }),
                "it has 6 fields, not 5; write minute, hour, day of the month, month and day of the week: no seconds, \
                 no year",
            ),
            (
                "zone",
                json!({ "schedule": RARELY, "timeZone": "Europe/Atlantis" }),
                r#"timeZone "Europe/Atlantis": the IANA database has no such time zone; write one such as Europe/Paris"#,
            ),
            (
                "spread",
                json!({ "schedule": "*/5 * * * *", "spread": "5m" }),
                r#"it is not smaller than the smallest time between runs of schedule "*/5 * * * *""#,
            ),
        ] {
            let checked = async {
                let mut spec = json!({ "statefulSetRef": { "name": "app" } });
                for (field, value) in bad.as_object().into_iter().flatten() {
                    spec[field] = value.clone();
                }
                let backup = Backup::write(ns, name, &spec).await?;
                for _ in 0..2 {
                    let ready = backup.await_condition(READY, "False", INVALID_SCHEDULE).await?;
                    ensure!(ready.message.contains(words), "{ready:?}");
                    ensure!(backup.status().await?.next_schedule_time.is_none(), "it has a next run");
                    backup.change(&good).await?;
                    backup.await_condition(READY, "True", "Usable").await?;
                    let status = backup.status().await?;
                    ensure!(status.next_schedule_time.is_some() && status.history.is_empty(), "{status:?}");
                    backup.change(&bad).await?;
                }
                let said = backup.await_event(INVALID_SCHEDULE).await?;
                ensure!(said.contains(words), "{said}");
                anyhow::Ok(())
            };
            checked.await.context(name)?;
        }
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_time_that_comes_while_a_run_is_under_way_gets_none() -> Result<()> {
    with_app("schedules", &[("readyDelay", "never")], async |ns, _app, class| {
        let mut spec = every_minute("app");
        spec["volumeSnapshotClassName"] = json!(class);
        let backup = Backup::write(ns, "nightly", &spec).await?;
        backup.request("now").await?;
        let status = backup.await_status("with a skipped time", |status| status.missed_runs > 0).await?;
        let run = status.current_run.as_ref().context("the run is over")?;
        let skipped = status.last_schedule_time.as_ref().context("no time is dealt with")?.0;
        ensure!(is_whole_minute(skipped) && skipped > run.started.0, "{status:?}");
        ensure!(status.missed_runs == 1 && status.history.is_empty(), "{status:?}");
        let said = backup.await_event("RunSkipped").await?;
        ensure!(said.contains(&format!("run {} was still under way", run.id)), "{said}");
        ensure!(said.contains("1 scheduled runs are not begun"), "{said}");

        // What ends it is no run for the time that was skipped.
        backup.change(&json!({ "snapshotTimeoutSeconds": 1 })).await?;
        let ended = backup.await_runs(1).await?;
        ensure!(ended.id == run.id && ended.reason == "SnapshotNotReady", "{ended:?}");
        backup.change(&json!({ "suspend": true })).await?;
        let status = backup
            .await_status("suspended", |status| {
                status.phase == Some(Phase::Suspended) && status.current_run.is_none()
            })
            .await?;
        for later in status.history.iter().filter(|later| later.id != run.id) {
            ensure!(slot(later)? > skipped, "{later:?}");
        }
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_suspended_backup_begins_nothing_and_does_not_catch_up_when_it_goes_on() -> Result<()> {
    with_app("schedules", &[], async |ns, _app, _class| {
        App::new(ns, "other").deploy().await?;
        let mut spec = every_minute("app");
        spec["suspend"] = json!(true);
        let backup = Backup::write(ns, "nightly", &spec).await?;
        backup.await_condition(PROGRESSING, "False", "Suspended").await?;
        backup.request("please").await?;
        let said = backup.await_event("RequestRefused").await?;
        ensure!(said.contains("set it to false, and request again"), "{said}");

        // What another backup does at its time shows that the time has come.
        let awake = Backup::write(ns, "awake", &every_minute("other")).await?;
        let passed = slot(&awake.await_runs(1).await?)?;
        let status = backup.status().await?;
        ensure!(status.phase == Some(Phase::Suspended) && status.history.is_empty(), "{status:?}");
        ensure!(status.current_run.is_none() && status.next_schedule_time.is_none(), "{status:?}");
        ensure!(status.last_request.as_deref() == Some("please") && status.missed_runs == 0, "{status:?}");

        backup.change(&json!({ "suspend": false })).await?;
        backup
            .await_status("announced again", |status| {
                status.next_schedule_time.as_ref().is_some_and(|next| next.0 > passed)
            })
            .await?;
        let first = backup.await_runs(1).await?;
        ensure!(first.result == RunResult::Completed && slot(&first)? > passed, "{first:?}");
        let status = backup.status().await?;
        ensure!(status.missed_runs == 0 && status.history.iter().all(|run| slot(run).is_ok()), "{status:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn two_backups_of_one_set_that_are_due_at_one_time_run_one_after_the_other() -> Result<()> {
    with_app("schedules", &[("readyDelay", "5s")], async |ns, _app, class| {
        let mut spec = every_minute("app");
        spec["volumeSnapshotClassName"] = json!(class);
        let (one, two) = tokio::try_join!(Backup::write(ns, "one", &spec), Backup::write(ns, "two", &spec))?;
        let waits = |backup: &Backup| {
            let backup = backup.clone();
            Box::pin(async move { backup.await_condition(PROGRESSING, "False", "Queued").await })
        };
        let (queued, _) = select_ok([waits(&one), waits(&two)]).await?;
        ensure!(queued.message.contains("waits for StatefulSetBackup"), "{queued:?}");
        select_ok([&one, &two].map(|backup| Box::pin(backup.await_event("Queued")))).await?;

        let (first, second) = tokio::try_join!(one.await_runs(1), two.await_runs(1))?;
        let (first, second) =
            if first.started.0 < second.started.0 { (first, second) } else { (second, first) };
        for run in [&first, &second] {
            ensure!(run.result == RunResult::Completed && is_whole_minute(slot(run)?), "{run:?}");
        }
        let apart = second.started.0.duration_since(first.started.0).as_millis();
        ensure!(apart >= i128::from(first.duration_ms), "{second:?} began during {first:?}");
        Ok(())
    })
    .await
}

/// A backup of that `StatefulSet` at every minute.
fn every_minute(set: &str) -> Value {
    json!({ "statefulSetRef": { "name": set }, "schedule": "* * * * *" })
}

/// The scheduled time that a run was due at.
fn slot(run: &RunRecord) -> Result<Timestamp> {
    ensure!(run.slot.due == Due::Schedule && run.slot.attempt == 1, "{run:?}");
    run.slot.scheduled().context("a time")
}

fn is_whole_minute(time: Timestamp) -> bool {
    time.as_second() % 60 == 0 && time.subsec_nanosecond() == 0
}
