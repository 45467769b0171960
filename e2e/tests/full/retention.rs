//! Retention over days, as an agent sees them whose clock is set ahead, and across the death of an agent.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use jiff::civil::ISOWeekDate;
use jiff::tz::TimeZone;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;
use sts_backup_api::names::{HOLD_LABEL, RUN_LABEL};
use sts_backup_api::run::{RunId, RunRecord, RunResult};
use sts_backup_api::snapshot::VolumeSnapshot;
use sts_backup_e2e::kit::class::create_host_volume;
use sts_backup_e2e::kit::crds::apply_crds;
use sts_backup_e2e::kit::local_agent::{LocalAgent, LocalAgentConfig};
use sts_backup_e2e::kit::{App, Backup};

use crate::{Daily, alone_in_namespace, alone_with_app, start_agent};

/// More than a week, so that the newest point of the week before is older than the daily ones on most days.
const DAYS: usize = 12;

const KEEP_DAILY: usize = 3;

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn of_nightly_runs_over_weeks_those_points_stay_that_the_rules_count() -> Result<()> {
    alone_with_app("retention", 1, async |ns| {
        let daily = Daily::just_passed(ns).await?;
        let spec = json!({
            "statefulSetRef": { "name": "app" },
            "schedule": daily.schedule(),
            "startingDeadlineSeconds": 3600,
            "retentionPolicy": { "keepDaily": KEEP_DAILY, "keepWeekly": 2 },
        });
        let backup = Backup::write(ns, "nightly", &spec).await?;
        let mut runs: Vec<RunRecord> = Vec::new();
        for day in 1..=DAYS {
            let agent = start_agent(ns, i64::try_from(day)?).await?;
            let run = backup.await_runs(day).await?;
            ensure!(run.result == RunResult::Completed, "{run:?}");
            ensure!(run.slot.scheduled() == Some(daily.day(i64::try_from(day)?)), "{run:?}");
            if day == 1 {
                hold(&ns.api(), &backup, &run.id).await?;
            }
            runs.insert(0, run);
            backup.await_points(&expected(&runs)).await.with_context(|| format!("day {day}"))?;
            agent.end().await?;
        }
        let status = backup.status().await?;
        ensure!(status.missed_runs == 0 && status.history.len() == DAYS, "{status:?}");
        Ok(())
    })
    .await
}

/// The points that stay of runs, the newest first: the last of each of three days, the last of each of two weeks, and the
/// oldest one, which is on hold.
fn expected(runs: &[RunRecord]) -> Vec<RunId> {
    let week =
        |run: &RunRecord| -> ISOWeekDate { run.started.0.to_zoned(TimeZone::UTC).date().iso_week_date() };
    let mut weeks = BTreeSet::new();
    let stays = |(at, run): &(usize, &RunRecord)| {
        let week = week(run);
        let first_of_week = weeks.len() < 2 && weeks.insert((week.year(), week.week()));
        *at < KEEP_DAILY || first_of_week || at + 1 == runs.len()
    };
    runs.iter().enumerate().filter(stays).map(|(_, run)| run.id.clone()).collect()
}

async fn hold(snapshots: &Api<VolumeSnapshot>, backup: &Backup, run: &RunId) -> Result<()> {
    let patch = Patch::Merge(json!({ "metadata": { "labels": { HOLD_LABEL: "true" } } }));
    for snapshot in backup.snapshots_of(run).await? {
        snapshots.patch(&snapshot.name_any(), &PatchParams::default(), &patch).await?;
    }
    Ok(())
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn an_incomplete_point_goes_after_a_day_and_the_newest_of_each_kind_never() -> Result<()> {
    alone_in_namespace("retention", async |ns| {
        apply_crds(ns.cluster()).await?;
        let disk = create_host_volume(ns).await?;
        App::new(ns, "app").template("disk", &disk).deploy().await?;
        let spec = json!({
            "statefulSetRef": { "name": "app" },
            "volumeClaimTemplates": ["data"],
            "allowPartial": true,
            "retentionPolicy": { "keepDays": 1 },
        });
        let backup = Backup::write(ns, "nightly", &spec).await?;
        let agent = start_agent(ns, 0).await?;
        let complete = backup.await_runs(1).await?;
        ensure!(complete.result == RunResult::Completed, "{complete:?}");
        backup.change(&json!({ "volumeClaimTemplates": null })).await?;
        backup.request("with what has no driver").await?;
        let partial = backup.await_runs(2).await?;
        ensure!(partial.result == RunResult::PartiallyFailed, "{partial:?}");
        backup.request("once more").await?;
        let newest = backup.await_runs(3).await?;
        let status = backup.status().await?;
        let points: Vec<_> = status.recovery_points.iter().map(|point| (&point.id, point.complete)).collect();
        ensure!(points == [(&newest.id, false), (&partial.id, false), (&complete.id, true)], "{points:?}");
        agent.end().await?;

        let _agent = start_agent(ns, 2).await?;
        // The newest data there is does not go because it could be better.
        let left = [&newest.id, &complete.id];
        backup
            .await_status("left with the newest of each kind", |status| {
                status.recovery_points.iter().map(|point| &point.id).eq(left)
            })
            .await?;
        let said = backup.await_event("Pruned").await?;
        ensure!(said.contains(partial.id.as_str()) && said.contains("more than 24 h old"), "{said}");
        backup.remove().await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn what_an_agent_that_dies_has_not_pruned_the_next_one_does() -> Result<()> {
    alone_with_app("retention", 2, async |ns| {
        let backup = Backup::write(ns, "nightly", &json!({ "statefulSetRef": { "name": "app" } })).await?;
        let agent = start_agent(ns, 0).await?;
        let mut runs = vec![backup.await_runs(1).await?.id];
        for ended in 2..=4 {
            backup.request(&format!("run {ended}")).await?;
            runs.insert(0, backup.await_runs(ended).await?.id);
        }
        backup.await_points(&runs).await?;
        agent.end().await?;

        // It dies once before the first point is pruned, and once between the two.
        let keep_two = json!({ "retentionPolicy": { "keepLast": 2 } });
        backup.change(&keep_two).await?;
        for (failpoint, left) in [("before-prune=return", 4), ("before-prune=1*off->return", 3)] {
            let failing = LocalAgentConfig::new(ns, "failing").short_lease().failpoints(failpoint);
            let mut failing = LocalAgent::start(&failing).await?;
            ensure!(failing.wait_exit().await?.code().is_none(), "the agent did not die at {failpoint}");
            let points: BTreeSet<_> = backup.snapshots().await?.iter().map(run_of).collect();
            ensure!(points.len() == left, "{failpoint}: {points:?}");
        }
        let _agent = start_agent(ns, 0).await?;
        backup.await_points(&runs[..2]).await?;
        backup.await_event("Pruned").await?;
        backup.remove().await
    })
    .await
}

fn run_of(snapshot: &VolumeSnapshot) -> Option<String> {
    snapshot.labels().get(RUN_LABEL).cloned()
}
