//! What becomes of snapshots: errors on their way, and their loss.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;
use sts_backup_api::run::RunResult;
use sts_backup_api::snapshot::{VolumeSnapshot, VolumeSnapshotContent};
use sts_backup_e2e::condition::{await_deleted, await_none};
use sts_backup_e2e::kit::snapshot::content_of;
use sts_backup_e2e::kit::{App, Backup, Cluster, Namespace, with_temp_namespace};

use crate::with_app;

/// For what takes seconds.
const SOON: Duration = Duration::from_mins(1);

/// Lets csi-snapshotter delete a content, and what it stands for in the storage, though its snapshot stays.
const DELETES_CONTENT: &str = "snapshot.storage.kubernetes.io/volumesnapshot-being-deleted";

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn an_error_of_the_storage_is_told_while_it_lasts_and_costs_no_backup() -> Result<()> {
    with_app("lifecycle", &[("failOnCall", "1-3")], async |ns, _app, class| {
        let spec = json!({ "statefulSetRef": { "name": "app" }, "volumeSnapshotClassName": class });
        let backup = Backup::write(ns, "nightly", &spec).await?;
        let said = backup.await_event("SnapshotError").await?;
        ensure!(said.contains("fails on demand") && said.contains("tries again"), "{said}");
        // The storage recovers with its fourth call, seconds later.
        let status = backup.status().await?;
        let run = status.current_run.as_ref().context("it was told after the run only")?;
        ensure!(said.contains(&run.volumes[0].snapshot), "{said} of {run:?}");
        let record = backup.await_runs(1).await?;
        ensure!(record.id == run.id && record.result == RunResult::Completed, "{record:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_point_that_loses_a_snapshot_or_its_content_is_no_longer_complete_and_says_so() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "lifecycle", async |ns| {
        App::new(ns, "app").replicas(2).deploy().await?;
        let backup = Backup::write(ns, "nightly", &json!({ "statefulSetRef": { "name": "app" } })).await?;
        let first = backup.await_runs(1).await?.id;
        backup.request("another").await?;
        let second = backup.await_runs(2).await?.id;
        backup.await_points(&[second.clone(), first.clone()]).await?;

        // As long as its claim is there, snapshot-controller orders a lost content anew.
        delete_app(ns).await?;
        let lost = backup.snapshots_of(&first).await?.remove(0);
        delete_content(ns, &lost).await?;
        let status =
            backup.await_status("short of a point", |status| status.recovery_point_count == 1).await?;
        let points: Vec<_> = status
            .recovery_points
            .iter()
            .map(|point| (&point.id, point.complete, point.ready_volumes, point.expected_volumes))
            .collect();
        ensure!(points == [(&second, true, 2, 2), (&first, false, 1, 2)], "{points:?}");
        let said = backup.await_event("RecoveryPointIncomplete").await?;
        ensure!(said.contains(first.as_str()) && said.contains("1/2 volumes"), "{said}");

        let lost = backup.snapshots_of(&second).await?.remove(0).name_any();
        ns.api::<VolumeSnapshot>().delete(&lost, &DeleteParams::default()).await?;
        let status = backup.await_status("without points", |status| status.recovery_point_count == 0).await?;
        ensure!(status.recovery_points.iter().all(|point| point.ready_volumes == 1), "{status:?}");
        Ok(())
    })
    .await
}

async fn delete_app(ns: &Namespace) -> Result<()> {
    let sets: Api<StatefulSet> = ns.api();
    sets.delete("app", &DeleteParams::foreground()).await?;
    let claims: Api<PersistentVolumeClaim> = ns.api();
    claims.delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
    await_none::<PersistentVolumeClaim>(&claims, "claims", SOON, |_| true).await
}

/// Deletes the content of a snapshot, and what it stands for in the storage.
async fn delete_content(ns: &Namespace, snapshot: &VolumeSnapshot) -> Result<()> {
    let contents: Api<VolumeSnapshotContent> = Api::all(ns.cluster().client());
    let content = content_of(ns, snapshot).await?;
    let patch = Patch::Merge(json!({ "metadata": { "annotations": { DELETES_CONTENT: "yes" } } }));
    contents.patch(&content.name_any(), &PatchParams::default(), &patch).await?;
    contents.delete(&content.name_any(), &DeleteParams::default()).await?;
    await_deleted(&contents, &content, SOON).await
}
