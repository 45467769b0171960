//! The test driver does what the parameters of its classes say, so that tests of the product can rely on its
//! faults.
//!
//! Delays are read from what the API recorded. A time cut down to whole seconds at the start of a delay, or at
//! both ends, never makes 3 s look shorter.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, PersistentVolume, PersistentVolumeClaim};
use kube::api::{DeleteParams, PostParams};
use kube::{Api, ResourceExt};
use sts_backup_api::snapshot::{VolumeSnapshot, VolumeSnapshotContent, VolumeSnapshotStatus};
use sts_backup_e2e::condition::{
    await_any, await_condition, await_deleted, pvc_bound, snapshot_cut, snapshot_ready,
};
use sts_backup_e2e::kit::claim::empty_claim;
use sts_backup_e2e::kit::class::{Binding, create_snapshot_class, create_storage_class};
use sts_backup_e2e::kit::snapshot::{await_snapshot, content_of, cut_time, take_snapshot};
use sts_backup_e2e::kit::{Cluster, Namespace, with_temp_namespace};

const TIMEOUT: Duration = Duration::from_mins(1);

/// What the driver says to a call that `failOnCall` names.
const DRIVERS_WORDS: &str = "fails on demand";

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn cut_delay_postpones_the_moment_a_snapshot_is_cut() -> Result<()> {
    with_snapshot_class(&[("cutDelay", "3s")], async |ns, class| {
        let created = created(&take_snapshot(ns, "slow", "data", class).await?)?;

        let snapshot = await_snapshot(ns, "slow", "cut", snapshot_cut).await?;
        let cut = cut_time(ns, &snapshot).await?;
        ensure!(seconds_between(created, cut) >= 3.0, "created at {created}, cut at {cut}");
        await_snapshot(ns, "slow", "ready", snapshot_ready).await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn ready_delay_keeps_a_snapshot_cut_but_not_ready_for_a_while() -> Result<()> {
    with_snapshot_class(&[("readyDelay", "3s")], async |ns, class| {
        take_snapshot(ns, "slow", "data", class).await?;

        let cut = await_snapshot(ns, "slow", "cut", snapshot_cut).await?;
        let ready = await_snapshot(ns, "slow", "ready", snapshot_ready).await?;
        ensure!(status(&ready).creation_time == status(&cut).creation_time, "it was cut a second time");
        // The last change of its status made it ready.
        let changes = ready.managed_fields().iter().filter(|entry| entry.subresource.is_some());
        let ready_at = changes.filter_map(|entry| entry.time.as_ref()).map(|time| time.0).max();
        let cut_at = status(&ready).creation_time.map(|time| time.0);
        let (cut_at, ready_at) = cut_at.zip(ready_at).context("the API server records both times")?;
        ensure!(seconds_between(cut_at, ready_at) >= 3.0, "cut at {cut_at}, ready at {ready_at}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_snapshot_that_never_becomes_ready_is_cut_and_can_be_deleted() -> Result<()> {
    with_snapshot_class(&[("readyDelay", "never")], async |ns, class| {
        take_snapshot(ns, "stuck", "data", class).await?;

        let cut = await_snapshot(ns, "stuck", "cut and not ready", |snapshot| {
            snapshot_cut(snapshot) && status(snapshot).ready_to_use == Some(false)
        })
        .await?;
        let content = content_of(ns, &cut).await?;

        let snapshots: Api<VolumeSnapshot> = ns.api();
        snapshots.delete("stuck", &DeleteParams::default()).await?;
        await_deleted(&snapshots, &cut, TIMEOUT).await?;
        let contents: Api<VolumeSnapshotContent> = Api::all(ns.cluster().client());
        await_deleted(&contents, &content, TIMEOUT).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_failed_snapshot_call_shows_as_an_error_that_a_retry_clears() -> Result<()> {
    with_snapshot_class(&[("failOnCall", "1")], async |ns, class| {
        take_snapshot(ns, "flaky", "data", class).await?;

        await_snapshot(ns, "flaky", "failed by the driver", |snapshot| {
            let message = status(snapshot).error.and_then(|error| error.message);
            message.is_some_and(|message| message.contains(DRIVERS_WORDS))
        })
        .await?;
        await_snapshot(ns, "flaky", "ready and without error", |snapshot| {
            snapshot_ready(snapshot) && status(snapshot).error.is_none()
        })
        .await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn provision_delay_postpones_the_volume() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "faults", async |ns| {
        let class = create_storage_class(ns, Binding::Immediate, &[("provisionDelay", "3s")]).await?;
        let claim = bound_claim(ns, &class).await?;

        let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref());
        let volumes: Api<PersistentVolume> = Api::all(cluster.client());
        let volume = volumes.get(volume.context("a bound claim has a volume")?).await?;
        let (asked, made) = (created(&claim)?, created(&volume)?);
        ensure!(seconds_between(asked, made) >= 3.0, "asked for at {asked}, made at {made}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_failed_volume_call_shows_as_an_event_and_is_retried() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "faults", async |ns| {
        let class = create_storage_class(ns, Binding::Immediate, &[("failOnCall", "1")]).await?;
        bound_claim(ns, &class).await?;
        let events: Api<Event> = ns.api();
        // Another one tells of a class that the provisioner does not know yet.
        let is_said = |event: &Event| {
            event.reason.as_deref() == Some("ProvisioningFailed")
                && event.message.iter().any(|said| said.contains(DRIVERS_WORDS))
        };
        await_any(&events, "an Event with the driver's words", TIMEOUT, is_said).await?;
        Ok(())
    })
    .await
}

/// Runs a test in a namespace with a bound claim `data` of the sound class, and a snapshot class with a fault.
async fn with_snapshot_class(
    parameters: &[(&str, &str)],
    test: impl AsyncFnOnce(&Namespace, &str) -> Result<()>,
) -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "faults", async |ns| {
        let class = create_snapshot_class(ns, parameters).await?;
        bound_claim(ns, "stsb-e2e").await?;
        test(ns, &class).await
    })
    .await
}

async fn bound_claim(ns: &Namespace, storage_class: &str) -> Result<PersistentVolumeClaim> {
    let claims: Api<PersistentVolumeClaim> = ns.api();
    claims.create(&PostParams::default(), &empty_claim("data", storage_class, "16Mi")).await?;
    await_condition(&claims, "data", "bound", TIMEOUT, pvc_bound).await
}

fn status(snapshot: &VolumeSnapshot) -> VolumeSnapshotStatus {
    snapshot.status.clone().unwrap_or_default()
}

fn created(object: &impl ResourceExt) -> Result<Timestamp> {
    let created = object.creation_timestamp().context("the API server sets the creation time")?;
    Ok(created.0)
}

fn seconds_between(earlier: Timestamp, later: Timestamp) -> f64 {
    later.duration_since(earlier).as_secs_f64()
}
