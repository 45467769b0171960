//! Backups where the storage, other people or another backup get in the way.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kube::api::DeleteParams;
use serde_json::{Value, json};
use sts_backup_api::conditions::{LAST_BACKUP_SUCCEEDED, THAWED};
use sts_backup_api::run::{RunResult, RunStep};
use sts_backup_api::snapshot::VolumeSnapshot;
use sts_backup_e2e::condition::await_condition;
use sts_backup_e2e::kit::Backup;

use crate::with_app;

/// For what takes seconds or goes on for ever.
const SOON: Duration = Duration::from_mins(1);

/// The thaw of one would end the freeze of the other before its cut.
#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn two_backups_of_one_set_never_freeze_it_at_the_same_time() -> Result<()> {
    with_app("faults", &[("cutDelay", "3s")], async |ns, app, class| {
        let spec = json!({
            "statefulSetRef": { "name": "app" },
            "volumeSnapshotClassName": class,
            "preBackupHook": hook("echo frozen >>/dev/shm/log"),
            "postBackupHook": hook("echo thawed >>/dev/shm/log"),
        });
        let (one, two) = tokio::try_join!(Backup::write(ns, "one", &spec), Backup::write(ns, "two", &spec))?;
        for backup in [one, two] {
            let record = backup.await_runs(1).await?;
            ensure!(record.result == RunResult::Completed, "{record:?}");
        }
        let log = app.sh(0, "cat /dev/shm/log").await?;
        let log: Vec<_> = log.lines().collect();
        ensure!(log == ["frozen", "thawed", "frozen", "thawed"], "{log:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_post_hook_that_thaws_nothing_and_does_not_end_in_time_does_not_hold_up_the_run() -> Result<()> {
    with_app("faults", &[], async |ns, _app, class| {
        let mut post = hook("sleep 600");
        post["timeoutSeconds"] = json!(1);
        let spec = json!({
            "statefulSetRef": { "name": "app" }, "volumeSnapshotClassName": class, "postBackupHook": post,
        });
        let backup = Backup::write(ns, "nightly", &spec).await?;
        let ended = await_condition(&backup.api(), "nightly", "at its end", SOON, |backup| {
            backup.status.as_ref().is_some_and(|status| !status.history.is_empty())
        })
        .await?;
        let record = &ended.status.context("it has a status")?.history[0];
        ensure!(record.result == RunResult::Completed, "{record:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_snapshot_that_somebody_deletes_before_it_is_ready_fails_the_run_by_name() -> Result<()> {
    with_app("faults", &[("readyDelay", "never")], async |ns, _app, class| {
        let spec = json!({ "statefulSetRef": { "name": "app" }, "volumeSnapshotClassName": class });
        let backup = Backup::write(ns, "nightly", &spec).await?;
        let status = backup
            .await_status("becoming ready", |status| {
                status.current_run.as_ref().is_some_and(|run| run.step == RunStep::Readying)
            })
            .await?;
        let run = status.current_run.context("a run is under way")?;
        let name = &run.volumes[0].snapshot;
        ns.api::<VolumeSnapshot>().delete(name, &DeleteParams::default()).await?;
        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Failed && record.reason == "SnapshotDeleted", "{record:?}");
        ensure!(record.message.contains(name), "{record:?}");
        backup.await_no_snapshots().await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn what_the_storage_refuses_for_good_is_told_in_its_words_and_leaves_nothing() -> Result<()> {
    with_app("faults", &[("failOnCall", "1-999999")], async |ns, _app, class| {
        let spec = json!({
            "statefulSetRef": { "name": "app" },
            "volumeSnapshotClassName": class,
            "snapshotTimeoutSeconds": 8,
        });
        let backup = Backup::write(ns, "nightly", &spec).await?;
        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Failed, "{record:?}");
        ensure!(record.message.contains("snapshotTimeoutSeconds (8)"), "{record:?}");
        ensure!(record.message.contains("fails on demand"), "{record:?}");
        backup.await_condition(LAST_BACKUP_SUCCEEDED, "False", &record.reason).await?;
        backup.await_no_snapshots().await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn what_the_storage_refuses_once_costs_no_backup() -> Result<()> {
    with_app("faults", &[("failOnCall", "1"), ("readyDelay", "2s")], async |ns, _app, class| {
        let spec = json!({
            "statefulSetRef": { "name": "app" },
            "volumeSnapshotClassName": class,
            "preBackupHook": hook("true"),
            "postBackupHook": hook("true"),
        });
        let backup = Backup::write(ns, "nightly", &spec).await?;
        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Completed, "{record:?}");
        Ok(())
    })
    .await
}

/// The finalizer must not hold the namespace for ever: its removal is the end of the test.
#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_namespace_where_a_thaw_fails_can_be_deleted() -> Result<()> {
    with_app("faults", &[], async |ns, _app, class| {
        let spec = json!({
            "statefulSetRef": { "name": "app" },
            "volumeSnapshotClassName": class,
            "preBackupHook": hook("true"),
            "postBackupHook": hook("false"),
        });
        let backup = Backup::write(ns, "nightly", &spec).await?;
        backup.await_condition(THAWED, "False", "ThawFailed").await?;
        Ok(())
    })
    .await
}

fn hook(script: &str) -> Value {
    json!({ "command": ["sh", "-c", script] })
}
