//! Which recovery points stay. What takes days is in the full tier.

use anyhow::{Result, ensure};
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;
use sts_backup_api::names::HOLD_LABEL;
use sts_backup_api::run::RunResult;
use sts_backup_api::snapshot::VolumeSnapshot;
use sts_backup_e2e::kit::class::create_host_volume;
use sts_backup_e2e::kit::{App, Backup, Cluster, with_temp_namespace};

use crate::with_app;

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn of_four_runs_the_last_two_leave_their_points_whole() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "retention", async |ns| {
        App::new(ns, "app").replicas(2).deploy().await?;
        let spec = json!({ "statefulSetRef": { "name": "app" }, "retentionPolicy": { "keepLast": 2 } });
        let backup = Backup::write(ns, "nightly", &spec).await?;
        let mut runs = vec![backup.await_runs(1).await?.id];
        for ended in 2..=4 {
            backup.request(&format!("run {ended}")).await?;
            runs.insert(0, backup.await_runs(ended).await?.id);
            backup.await_points(&runs[..ended.min(2)]).await?;
        }
        ensure!(backup.snapshots().await?.len() == 4, "two points of two volumes are left");
        let said = backup.await_event("Pruned").await?;
        ensure!(said.contains("no rule keeps it; 2 snapshots deleted"), "{said}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_point_on_hold_stays_until_it_is_released() -> Result<()> {
    with_app("retention", &[], async |ns, _app, _class| {
        let spec = json!({ "statefulSetRef": { "name": "app" }, "retentionPolicy": { "keepLast": 1 } });
        let backup = Backup::write(ns, "nightly", &spec).await?;
        let held = backup.await_runs(1).await?.id;
        let member = backup.snapshots_of(&held).await?.remove(0).name_any();
        let snapshots: Api<VolumeSnapshot> = ns.api();
        let set_label = async |value: Option<&str>| {
            let patch = Patch::Merge(json!({ "metadata": { "labels": { HOLD_LABEL: value } } }));
            snapshots.patch(&member, &PatchParams::default(), &patch).await
        };
        set_label(Some("true")).await?;
        backup.request("second").await?;
        let second = backup.await_runs(2).await?.id;
        backup.await_points(&[second, held.clone()]).await?;
        backup.request("third").await?;
        let third = backup.await_runs(3).await?.id;
        backup.await_points(&[third.clone(), held.clone()]).await?;
        let status = backup.status().await?;
        ensure!(status.recovery_points.iter().all(|point| point.hold == (point.id == held)), "{status:?}");
        set_label(None).await?;
        backup.await_points(&[third]).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn what_a_partial_run_left_goes_when_a_newer_point_is_complete() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "retention", async |ns| {
        let disk = create_host_volume(ns).await?;
        App::new(ns, "app").template("disk", &disk).deploy().await?;
        let spec = json!({
            "statefulSetRef": { "name": "app" }, "allowPartial": true, "retentionPolicy": { "keepLast": 5 },
        });
        let backup = Backup::write(ns, "nightly", &spec).await?;
        let partial = backup.await_runs(1).await?;
        ensure!(partial.result == RunResult::PartiallyFailed, "{partial:?}");
        backup.request("again").await?;
        let newer = backup.await_runs(2).await?.id;
        let status = backup.status().await?;
        let points: Vec<_> = status.recovery_points.iter().map(|point| (&point.id, point.complete)).collect();
        ensure!(points == [(&newer, false), (&partial.id, false)], "{points:?}");

        backup.change(&json!({ "volumeClaimTemplates": ["data"] })).await?;
        backup.request("what can be").await?;
        let complete = backup.await_runs(3).await?;
        ensure!(complete.result == RunResult::Completed, "{complete:?}");
        backup.await_points(&[complete.id]).await?;
        let said = backup.await_event("Pruned").await?;
        ensure!(said.contains("incomplete, and a newer one is complete; 1 snapshots deleted"), "{said}");
        Ok(())
    })
    .await
}
