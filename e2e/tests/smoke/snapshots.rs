//! A snapshot of a live PostgreSQL holds every row committed before it: what the product promises, done by
//! hand.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::Api;
use kube::api::PostParams;
use sts_backup_e2e::condition::snapshot_ready;
use sts_backup_e2e::kit::claim::capacity;
use sts_backup_e2e::kit::snapshot::{await_snapshot, take_snapshot};
use sts_backup_e2e::kit::{Cluster, Postgres, WriteLoad, with_temp_namespace};

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_second_postgres_recovers_every_row_committed_before_the_snapshot() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "snapshots", async |ns| {
        let source = Postgres::new(ns, "source");
        source.deploy().await?;
        let mut load = WriteLoad::start(&source, 0).await?;
        load.wait_until(200).await?;

        let committed_before = load.committed();
        take_snapshot(ns, "live", &source.claim_name(0), "stsb-e2e").await?;
        await_snapshot(ns, "live", "ready", snapshot_ready).await?;
        // One row may be committed that is not acknowledged yet; all later ones are too late for the snapshot.
        let last_possible = load.committed() + 1;
        load.wait_until(load.committed() + 50).await?;
        let committed_at_last = load.stop().await?;

        // The claim is bound only when its pod comes: the class waits for the first consumer.
        let restored = Postgres::new(ns, "restored").storage_class("stsb-e2e-wffc").size("512Mi");
        let claims: Api<PersistentVolumeClaim> = ns.api();
        let claim = restored.restored_claim(0, "live");
        claims.create(&PostParams::default(), &claim).await.context("create the restored claim")?;
        restored.deploy().await?;

        let claim = claims.get(&restored.claim_name(0)).await?;
        ensure!(capacity(&claim) == Some("512Mi"), "the restored volume has the size {:?}", capacity(&claim));
        let rows = restored.rows(0).await?;
        ensure!(rows.is_unbroken(), "the restored rows have gaps: {rows:?}");
        ensure!(
            (committed_before..=last_possible).contains(&rows.count),
            "the snapshot was taken between the rows {committed_before} and {last_possible}: {rows:?}"
        );
        let rows = source.rows(0).await?;
        ensure!(rows.is_unbroken() && rows.count == committed_at_last, "the source lost rows: {rows:?}");
        Ok(())
    })
    .await
}
