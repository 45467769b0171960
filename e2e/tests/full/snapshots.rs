//! How many snapshots an agent lets be under way at once, and what it says of errors after their cut.

use anyhow::{Context, Result, ensure};
use futures::future::{select_ok, try_join_all};
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use sts_backup_api::conditions::{self, PROGRESSING};
use sts_backup_api::run::{RunResult, RunStep};
use sts_backup_api::snapshot::VolumeSnapshot;
use sts_backup_e2e::kit::class::create_snapshot_class;
use sts_backup_e2e::kit::local_agent::{LocalAgent, LocalAgentConfig};
use sts_backup_e2e::kit::snapshot::most_unready;
use sts_backup_e2e::kit::snapshot_controller::Outage;
use sts_backup_e2e::kit::{App, Backup};

use crate::{alone_with_app, start_agent};

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn no_more_snapshots_are_under_way_than_the_limit_and_who_waits_says_so() -> Result<()> {
    alone_with_app("limits", 1, async |ns| {
        let class = create_snapshot_class(ns, &[("readyDelay", "8s")]).await?;
        try_join_all(["second", "third"].map(async |name| App::new(ns, name).deploy().await)).await?;
        let write = async |set: &str| {
            let spec = json!({ "statefulSetRef": { "name": set }, "volumeSnapshotClassName": class });
            Backup::write(ns, set, &spec).await
        };
        let backups = try_join_all(["app", "second", "third"].map(write)).await?;
        let config = LocalAgentConfig::new(ns, "agent").steady_lease();
        let mut agent = None;
        let most = most_unready(ns, async {
            agent = Some(LocalAgent::start(&config.env("STSB_LIMITS__SNAPSHOTS_PER_DRIVER", "2")).await?);
            let waits = backups.iter().map(|backup| {
                Box::pin(async move {
                    let said = backup.await_condition(PROGRESSING, "False", "Queued").await?;
                    backup.await_event("Queued").await?;
                    anyhow::Ok(said)
                })
            });
            let (said, _) = select_ok(waits).await?;
            ensure!(said.message.contains("at most 2 snapshots of the driver"), "{said:?}");
            for run in try_join_all(backups.iter().map(|backup| backup.await_runs(1))).await? {
                ensure!(run.result == RunResult::Completed, "{run:?}");
            }
            Ok(())
        })
        .await?;
        ensure!(most == 2, "{most} snapshots were under way at once");
        try_join_all(backups.iter().map(Backup::remove)).await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn an_error_after_the_cut_is_told_while_it_lasts_and_costs_no_backup() -> Result<()> {
    alone_with_app("snapshots", 1, async |ns| {
        let class = create_snapshot_class(ns, &[("readyDelay", "30s")]).await?;
        let spec = json!({ "statefulSetRef": { "name": "app" }, "volumeSnapshotClassName": class });
        let backup = Backup::write(ns, "nightly", &spec).await?;
        let _agent = start_agent(ns, 0).await?;
        let status = backup
            .await_status("becoming ready", |status| {
                status.current_run.as_ref().is_some_and(|run| run.step == RunStep::Readying)
            })
            .await?;
        let run = status.current_run.context("a run is under way")?;

        // The test driver has no such error, so the test writes what snapshot-controller would, and would soon undo.
        let outage = Outage::begin(ns.cluster()).await?;
        let error = json!({ "message": "the array is offline", "time": run.started });
        let patch = Patch::Merge(json!({ "status": { "error": error } }));
        let snapshots: Api<VolumeSnapshot> = ns.api();
        snapshots.patch_status(&run.volumes[0].snapshot, &PatchParams::default(), &patch).await?;
        backup
            .await_status("told of the error", |status| {
                conditions::find(&status.conditions, PROGRESSING).is_some_and(|progressing| {
                    progressing.reason == "Readying" && progressing.message.contains("the array is offline")
                })
            })
            .await?;
        let said = backup.await_event("SnapshotError").await?;
        ensure!(said.contains("the array is offline"), "{said}");
        outage.end().await?;
        let record = backup.await_runs(1).await?;
        ensure!(record.id == run.id && record.result == RunResult::Completed, "{record:?}");
        backup.remove().await
    })
    .await
}
