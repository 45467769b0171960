//! Restores that end early or have to wait: the application has its old data, and nothing is left of them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::json;
use sts_backup_api::restore::RestorePhase;
use sts_backup_api::run::RunResult;
use sts_backup_api::snapshot::VolumeSnapshot;
use sts_backup_e2e::condition::await_any;
use sts_backup_e2e::kit::class::{Binding, create_storage_class};
use sts_backup_e2e::kit::restore_drill::{LATER, POINT, await_untouched, footprint};
use sts_backup_e2e::kit::{App, Cluster, Namespace, RestoreDrill, with_temp_namespace};

use crate::with_restore_drill;

const TIMEOUT: Duration = Duration::from_mins(1);

/// Long enough to meet a restore that prepares its volumes.
const SLOW: (&str, &str) = ("provisionDelay", "6s");

/// The application's own volume is the first; there is never another one.
const ONLY_ONCE: (&str, &str) = ("failOnCall", "2-999999");

/// A drill of one pod whose volumes are of a class of the test driver with a fault.
async fn with_class(
    fault: (&str, &str),
    test: impl AsyncFnOnce(&Namespace, &RestoreDrill) -> Result<()>,
) -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "restores", async |ns| {
        let class = create_storage_class(ns, Binding::Immediate, &[fault]).await?;
        let drill = RestoreDrill::deploy(ns, App::new(ns, "app").storage_class(&class)).await?;
        test(ns, &drill).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn another_restore_and_a_backup_wait_until_a_restore_is_over() -> Result<()> {
    with_class(SLOW, async |_, drill| {
        let first = drill.restore("first", |_| ()).await?;
        first.await_phase(RestorePhase::Preparing).await?;
        let second = drill.restore("second", |_| ()).await?;
        drill.backup().request("in the middle").await?;
        second.await_waiting(&["first"]).await?;
        let waiting = drill
            .backup()
            .await_status("waiting for the restore", |status| {
                let mut said = status.conditions.iter().map(|condition| condition.message.as_str());
                said.any(|said| said.contains("first"))
            })
            .await?;
        ensure!(waiting.current_run.is_none(), "{waiting:?}");

        let over = first.await_completed().await?.completion_time.context("it is over")?;
        second.await_completed().await?;
        let record = drill.backup().await_runs(2).await?;
        ensure!(record.result == RunResult::Completed, "{record:?}");
        ensure!(record.started.0 >= over.0, "{record:?} began before {over:?}");
        drill.ensure_serves(POINT).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_restore_that_is_deleted_while_it_prepares_leaves_the_application_as_it_was() -> Result<()> {
    with_class(SLOW, async |ns, drill| {
        let before = footprint(ns).await?;
        let restore = drill.restore("back", |_| ()).await?;
        restore.await_phase(RestorePhase::Preparing).await?;
        restore.remove().await?;
        await_untouched(ns, &before).await?;
        drill.volumes().await_only_those_of_claims().await?;
        drill.ensure_serves(LATER).await
    })
    .await
}

/// What holds a claim, as a user would see it.
const FINALIZER: &str = "e2e.sts-backup.io/hold";

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_rollback_that_could_not_delete_a_claim_waits_while_the_application_runs() -> Result<()> {
    with_restore_drill(
        |app| app,
        async |ns, drill| {
            let restore = drill.restore("back", |_| ()).await?;
            restore.await_completed().await?;
            let claims: Api<PersistentVolumeClaim> = ns.api();
            let finalizers = claims.get("data-app-0").await?.metadata.finalizers.unwrap_or_default();
            let hold = async |finalizers: &[String]| {
                let patch = Patch::Merge(json!({ "metadata": { "finalizers": finalizers } }));
                claims.patch("data-app-0", &PatchParams::default(), &patch).await
            };
            hold(&[&finalizers[..], &[FINALIZER.to_owned()]].concat()).await?;
            let before = footprint(ns).await?;

            restore.request_rollback().await?;
            restore.await_saying(&["data-app-0", FINALIZER]).await?;
            restore.await_event("ClaimHeld").await?;
            let now = footprint(ns).await?;
            for kind in ["statefulsets", "pods", "claims"] {
                ensure!(before[kind] == now[kind], "{kind} were {:#}, and are {:#}", before[kind], now[kind]);
            }
            hold(&finalizers).await?;
            restore.await_rolled_back().await?;
            drill.ensure_serves(LATER).await
        },
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn volumes_that_cannot_be_made_cost_no_downtime_and_leave_nothing() -> Result<()> {
    with_class(ONLY_ONCE, async |ns, drill| {
        let before = footprint(ns).await?;
        let restore = drill.restore("back", |spec| spec.provision_timeout_seconds = 4).await?;
        let status = restore.await_failed(&["data-app-0"]).await?;
        ensure!(status.downtime_seconds.is_none(), "{status:?}");
        await_untouched(ns, &before).await?;
        drill.volumes().await_only_those_of_claims().await?;
        drill.ensure_serves(LATER).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_snapshot_that_goes_while_volumes_are_made_of_it_costs_no_downtime() -> Result<()> {
    with_class(ONLY_ONCE, async |ns, drill| {
        let before = footprint(ns).await?;
        let restore = drill.restore("back", |_| ()).await?;
        let status = restore.await_phase(RestorePhase::Preparing).await?;
        let plan = status.plan.context("it has a plan")?;
        let snapshot = plan.volumes[0].snapshot.clone().context("it is restored from a snapshot")?;
        let is_staged = |claim: &PersistentVolumeClaim| {
            claim.spec.as_ref().is_some_and(|spec| spec.data_source.is_some())
        };
        await_any(&ns.api(), "a claim of a snapshot", TIMEOUT, is_staged).await?;
        ns.api::<VolumeSnapshot>().delete(&snapshot, &DeleteParams::default()).await?;
        restore.await_failed(&[&snapshot]).await?;
        await_untouched(ns, &before).await?;
        drill.volumes().await_only_those_of_claims().await?;
        drill.ensure_serves(LATER).await
    })
    .await
}
