//! Restores that go well: which data comes back, to which claims, and that it can be taken back.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use sts_backup_api::names::{BACKUP_LABEL, ROLLBACK_REQUESTED_AT_ANNOTATION, STATEFUL_SET_LABEL};
use sts_backup_api::restore::{OnFailure, StatefulSetRestoreSpec, StatefulSetRestoreStatus, VolumeAction};
use sts_backup_api::run::RunResult;
use sts_backup_api::snapshot::VolumeSnapshot;
use sts_backup_e2e::condition::{await_deleted, snapshot_ready};
use sts_backup_e2e::kit::agent::Agent;
use sts_backup_e2e::kit::class::create_host_volume;
use sts_backup_e2e::kit::restore::SUCCEEDED;
use sts_backup_e2e::kit::restore_drill::{
    BACKUP, LATER, POINT, ensure_released, ensure_untouched, footprint,
};
use sts_backup_e2e::kit::snapshot::{await_snapshot, take_snapshot};
use sts_backup_e2e::kit::{App, Backup, Cluster, Namespace, Postgres, Restore, Volumes, with_temp_namespace};

use crate::with_restore_drill;

const TIMEOUT: Duration = Duration::from_mins(1);

/// Short enough to wait for, and long enough to ask for a rollback within it.
const WINDOW: Duration = Duration::from_secs(15);

/// Nobody rolls back here.
const SHORT_WINDOW: Duration = Duration::from_secs(3);

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn postgres_has_the_rows_of_the_point_and_after_a_rollback_the_later_ones_again() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "restores", async |ns| {
        let database = Postgres::new(ns, "db");
        database.deploy().await?;
        let volumes = Volumes::watch(ns).await?;
        let rows = async || database.psql(0, "SELECT count(*), max(n) FROM rows").await;
        database.psql(0, "CREATE TABLE rows AS SELECT n FROM generate_series(1, 10000) AS n").await?;
        let backup = Backup::write(ns, BACKUP, &json!({ "statefulSetRef": { "name": "db" } })).await?;
        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Completed, "{record:?}");
        database.psql(0, "INSERT INTO rows SELECT n FROM generate_series(10001, 15000) AS n").await?;

        let restore =
            Restore::create(ns, "back", "db", |spec| spec.backup_name = Some(BACKUP.to_owned())).await?;
        let status = restore.await_completed().await?;
        let found = rows().await?;
        ensure!(found == "10000|10000", "after the restore: {found}");
        check_completed(&status, 1)?;
        for reason in ["RestoreStarted", "RestoreCompleted"] {
            restore.await_event(reason).await?;
        }
        let plan = status.plan.as_ref().context("it has a plan")?;
        ensure!(plan.point == record.id.as_str() && plan.backup.as_deref() == Some(BACKUP), "{plan:?}");
        check_columns(&restore, &plan.point).await?;

        database.psql(0, "INSERT INTO rows VALUES (20000)").await?;
        restore.request_rollback().await?;
        restore.await_rolled_back().await?;
        let found = rows().await?;
        ensure!(found == "15000|15000", "after the rollback: {found}");
        check_metrics(ns).await?;
        volumes.ensure_none_was_empty(&["data-db-0".to_owned()])
    })
    .await
}

/// What the status says of a restore of so many claims that went well.
fn check_completed(status: &StatefulSetRestoreStatus, claims: usize) -> Result<()> {
    let restored = &status.restored_snapshots;
    ensure!(restored.len() == claims && restored.iter().all(|restored| restored.success), "{restored:?}");
    ensure!(restored.iter().all(|restored| restored.restore_time.is_some()), "{restored:?}");
    ensure!(status.downtime_seconds.is_some() && status.rollback_until.is_some(), "{status:?}");
    ensure!(status.start_time.is_some() && status.completion_time.is_some(), "{status:?}");
    ensure!(status.original_replicas.is_some(), "{status:?}");
    Ok(())
}

/// What `kubectl get` prints of a restore of one claim that has completed.
async fn check_columns(restore: &Restore, point: &str) -> Result<()> {
    let columns = restore.columns().await?;
    for (column, expected) in [
        ("StatefulSet", "db"),
        ("Backup", BACKUP),
        ("Point", point),
        ("Phase", "Completed"),
        ("Progress", "1/1 volumes"),
    ] {
        ensure!(columns[column] == expected, "{column}: {columns:?}");
    }
    ensure!(columns["Downtime"].is_i64() && columns["Age"].is_string(), "{columns:?}");
    Ok(())
}

/// What the agent counts of a restore that completed and was rolled back.
async fn check_metrics(ns: &Namespace) -> Result<()> {
    let labels = format!(r#"{{namespace="{}",statefulset="db"}}"#, ns.name());
    let expected = [
        format!("sts_restore_attempt_total{labels} 1"),
        format!("sts_restore_success_total{labels} 1"),
        format!("sts_restore_failure_total{labels} 0"),
        format!("sts_restore_rollback_total{labels} 1"),
        format!("sts_restore_downtime_seconds_count{labels} 1"),
    ];
    let is_told = |metrics: &str| expected.iter().all(|line| metrics.lines().any(|told| told == line));
    Agent::shared(ns.cluster()).await_metrics(&format!("{expected:#?}"), is_told).await?;
    Ok(())
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_dry_run_stops_at_its_plan_and_only_the_plan_that_was_approved_runs() -> Result<()> {
    with_restore_drill(
        |app| app,
        async |ns, drill| {
            let before = footprint(ns).await?;
            let restore = drill.restore("look", |spec| spec.dry_run = true).await?;
            let plan = restore.await_planned().await?;
            ensure!(!plan.hash.is_empty() && (plan.replicas, plan.replicas_meanwhile) == (1, 0), "{plan:?}");
            let [volume] = &plan.volumes[..] else { anyhow::bail!("{plan:?}") };
            ensure!(volume.claim == "data-app-0" && volume.action == VolumeAction::Replace, "{volume:?}");
            ensure!(volume.snapshot.is_some() && volume.old_volume.is_some(), "{volume:?}");
            ensure_untouched(ns, &before).await?;

            // A newer point: what was looked at is not what would be done now.
            drill.backup().request("newer").await?;
            let newer = drill.backup().await_runs(2).await?;
            restore.approve(&plan.hash).await?;
            let is_newer = |status: &StatefulSetRestoreStatus| {
                status.plan.as_ref().is_some_and(|plan| plan.point == newer.id.as_str())
            };
            let status = restore.await_status("planned anew", is_newer).await?;
            ensure!(status.swap.is_none(), "a plan that nobody approved runs: {status:?}");
            ensure_untouched(ns, &before).await?;

            let plan = restore.await_planned().await?;
            restore.approve(&plan.hash).await?;
            restore.await_completed().await?;
            // The newer point was taken of the later data.
            drill.ensure_serves(LATER).await
        },
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_time_means_the_newest_point_that_is_not_later() -> Result<()> {
    with_restore_drill(
        |app| app,
        async |_, drill| {
            // A time in a spec has whole seconds.
            tokio::time::sleep(Duration::from_secs(1)).await;
            drill.backup().request("later").await?;
            let later = drill.backup().await_runs(2).await?;
            let point_at = |name: &'static str, time: Timestamp| {
                drill.restore(name, move |spec| {
                    spec.point_in_time = Some(Time(time));
                    spec.dry_run = true;
                })
            };
            let time = later.started.0 - Duration::from_millis(1);
            let plan = point_at("until-later", time + WINDOW).await?.await_planned().await?;
            ensure!(plan.point == later.id.as_str(), "{plan:?}");
            let long_ago = point_at("long-ago", time - Duration::from_hours(1)).await?;
            long_ago.await_refused(&["no complete recovery point"]).await?;

            let restore = drill.restore("back", |spec| spec.point_in_time = Some(Time(time))).await?;
            restore.await_completed().await?;
            drill.ensure_serves(POINT).await
        },
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_point_outlives_its_backup_and_the_claims_that_it_is_of() -> Result<()> {
    with_restore_drill(
        |app| app.replicas(2),
        async |ns, drill| {
            drill.backup().remove().await?;
            let app = drill.app();
            app.scale(0).await?;
            app.await_ready(0).await?;
            let claims: Api<PersistentVolumeClaim> = ns.api();
            for name in app.claims() {
                let claim = claims.get(&name).await?;
                claims.delete(&name, &DeleteParams::default()).await?;
                await_deleted(&claims, &claim, TIMEOUT).await?;
            }
            // Nothing is left to be scaled down: this is no reason to refuse.
            let restore = drill.restore("back", |spec| spec.scale_down = false).await?;
            let status = restore.await_completed().await?;
            let plan = status.plan.context("it has a plan")?;
            ensure!(plan.volumes.iter().all(|volume| volume.action == VolumeAction::Create), "{plan:?}");
            ensure!(status.original_replicas == Some(0), "{:?}", status.original_replicas);
            app.await_ready(0).await?;

            app.scale(2).await?;
            drill.ensure_serves(POINT).await
        },
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_set_that_was_made_again_gets_claims_of_its_new_size_that_keep_what_users_wrote() -> Result<()> {
    with_restore_drill(
        |app| app.template("logs", "stsb-e2e-wffc"),
        async |ns, drill| {
            let claims: Api<PersistentVolumeClaim> = ns.api();
            let users = json!({ "labels": { "team": "shop" }, "annotations": { "note": "mine" } });
            let users = Patch::Merge(json!({ "metadata": users }));
            for name in drill.app().claims() {
                claims.patch(&name, &PatchParams::default(), &users).await?;
            }
            drill.app().orphan().await?;
            let bigger = App::new(ns, "app").template("logs", "stsb-e2e-wffc").size("32Mi");
            bigger.deploy().await?;
            let before = drill.volumes().by_claim().await?;

            drill.restore("back", |_| ()).await?.await_completed().await?;
            drill.ensure_serves(POINT).await?;
            for (claim, (template, class)) in
                [("data-app-0", ("data", "stsb-e2e")), ("logs-app-0", ("logs", "stsb-e2e-wffc"))]
            {
                let found = claims.get(claim).await?;
                ensure!(
                    found.labels().get("team").is_some_and(|team| team == "shop"),
                    "{:?}",
                    found.metadata
                );
                ensure!(
                    found.annotations().get("note").is_some_and(|note| note == "mine"),
                    "{:?}",
                    found.metadata
                );
                let spec = found.spec.context("a claim has a spec")?;
                ensure!(spec.storage_class_name.as_deref() == Some(class), "{template}: {spec:?}");
                ensure!(spec.access_modes.as_deref() == Some(&["ReadWriteOnce".to_owned()]), "{spec:?}");
                ensure!(spec.volume_name.as_ref() != before.get(claim), "{claim} has its old volume");
                let asked = spec.resources.and_then(|resources| resources.requests);
                let asked =
                    asked.and_then(|requests| requests.get("storage").cloned()).context("a request")?;
                ensure!(bytes(&asked.0)? == 32 << 20, "{claim} asks for {asked:?}");
            }
            Ok(())
        },
    )
    .await
}

/// A size in mebibytes or bytes, as bytes.
fn bytes(size: &str) -> Result<u64> {
    match size.strip_suffix("Mi") {
        Some(mebibytes) => Ok(mebibytes.parse::<u64>()? << 20),
        None => Ok(size.parse()?),
    }
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn one_ordinal_is_restored_and_the_pods_below_it_do_not_notice() -> Result<()> {
    with_restore_drill(
        |app| app.replicas(3),
        async |ns, drill| {
            let pods: Api<Pod> = ns.api();
            let uids = async || anyhow::Ok([pods.get("app-0").await?.uid(), pods.get("app-1").await?.uid()]);
            let before = uids().await?;
            let restore = drill.restore("back", |spec| spec.replicas = vec![2]).await?;
            let status = restore.await_completed().await?;
            check_completed(&status, 1)?;
            let plan = status.plan.context("it has a plan")?;
            ensure!((plan.replicas, plan.replicas_meanwhile) == (3, 2), "{plan:?}");
            ensure!(uids().await? == before, "a pod of a lower ordinal was replaced");
            let app = drill.app();
            for (ordinal, text) in [(0, LATER), (1, LATER), (2, POINT)] {
                app.ensure_text(ordinal, text).await?;
            }

            // A lower one takes those above it down, and gives them their own volumes back.
            let restore = drill.restore("lower", |spec| spec.replicas = vec![1]).await?;
            let status = restore.await_completed().await?;
            let plan = status.plan.context("it has a plan")?;
            let kept = plan.volumes.iter().filter(|volume| volume.action == VolumeAction::Keep);
            let kept: Vec<_> = kept.map(|volume| volume.claim.as_str()).collect();
            ensure!(plan.replicas_meanwhile == 1 && kept == ["data-app-2"], "{plan:?}");
            for (ordinal, text) in [(0, LATER), (1, POINT), (2, POINT)] {
                app.ensure_text(ordinal, text).await?;
            }
            drill.ensure_none_was_empty()
        },
    )
    .await
}

/// Snapshots as the original made them, and its users' manifests: `/spec` of each is theirs but for the namespace.
#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn points_of_the_original_are_restored_by_the_manifests_of_its_users() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "restores", async |ns| {
        let app = App::new(ns, "postgresql");
        app.deploy().await?;
        app.write(0, POINT).await?;
        let time = ns.api::<StatefulSet>().get("postgresql").await?.creation_timestamp();
        let time = time.context("the API server sets the creation time")?.0.as_second();
        let snapshot = format!("postgres-scheduled-backup-data-{time}-0");
        let snapshot = snapshot.as_str();
        take_snapshot(ns, snapshot, "data-postgresql-0", "stsb-e2e").await?;
        let labels = json!({
            BACKUP_LABEL: "postgres-scheduled-backup", STATEFUL_SET_LABEL: "postgresql",
        });
        let labels = Patch::Merge(json!({ "metadata": { "labels": labels } }));
        ns.api::<VolumeSnapshot>().patch(snapshot, &PatchParams::default(), &labels).await?;
        await_snapshot(ns, snapshot, "ready", snapshot_ready).await?;

        for (name, spec) in originals(ns.name(), snapshot) {
            app.write(0, LATER).await?;
            let restore = Restore::write(ns, name, &spec).await?;
            let status = restore.await_completed().await.context(name)?;
            let taken: Vec<_> =
                status.restored_snapshots.iter().map(|restored| restored.snapshot_name.as_str()).collect();
            ensure!(taken == [snapshot], "{name}: {taken:?}");
            app.ensure_text(0, POINT).await.context(name)?;
        }
        Ok(())
    })
    .await
}

/// The restores of the original, with the namespace of their set.
fn originals(home: &str, snapshot: &str) -> [(&'static str, Value); 3] {
    let set = json!({ "name": "postgresql", "namespace": home });
    [
        (
            "restore-postgres",
            json!({
                "statefulSetRef": set,
                "backupName": "postgres-scheduled-backup",
                "scaleDown": true,
                "pvcDeletionTimeoutSeconds": 120,
            }),
        ),
        ("restore-latest", json!({ "statefulSetRef": set, "useLatestBackup": true, "scaleDown": true })),
        (
            "restore-one",
            json!({
                "statefulSetRef": set,
                "backupName": "postgres-scheduled-backup",
                "snapshotNames": [snapshot],
            }),
        ),
    ]
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn pods_that_stay_unready_are_held_with_the_remedy_or_rolled_back_by_themselves() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "restores", async |ns| {
        let app = App::new(ns, "app").ready_when("! grep -q broken /volumes/data/text");
        app.deploy().await?;
        let volumes = Volumes::watch(ns).await?;
        app.write(0, "broken").await?;
        take_snapshot(ns, "bad", "data-app-0", "stsb-e2e").await?;
        await_snapshot(ns, "bad", "ready", snapshot_ready).await?;
        app.write(0, "fine").await?;
        app.await_ready(1).await?;

        let bad = |on_failure: OnFailure| {
            move |spec: &mut StatefulSetRestoreSpec| {
                spec.snapshot_names = vec!["bad".to_owned()];
                spec.ready_timeout_seconds = 3;
                spec.on_failure = on_failure;
            }
        };
        let held = Restore::create(ns, "held", "app", bad(OnFailure::Hold)).await?;
        held.await_saying(&["app-0", ROLLBACK_REQUESTED_AT_ANNOTATION]).await?;
        app.ensure_text(0, "broken").await?;
        held.request_rollback().await?;
        held.await_rolled_back().await?;
        app.await_ready(1).await?;
        app.ensure_text(0, "fine").await?;

        let by_itself = Restore::create(ns, "by-itself", "app", bad(OnFailure::Rollback)).await?;
        by_itself.await_rolled_back().await?;
        by_itself.await_condition(SUCCEEDED, "False").await?;
        app.await_ready(1).await?;
        app.ensure_text(0, "fine").await?;
        volumes.ensure_none_was_empty(&app.claims())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn old_volumes_go_with_their_window_unless_they_were_to_be_retained() -> Result<()> {
    with_restore_drill(
        |app| app.replicas(2),
        async |ns, drill| {
            let volumes: Api<PersistentVolume> = Api::all(ns.cluster().client());
            let old = drill.volumes().by_claim().await?;
            let policy =
                |policy: &str| Patch::Merge(json!({ "spec": { "persistentVolumeReclaimPolicy": policy } }));
            let retained = old["data-app-1"].clone();
            volumes.patch(&retained, &PatchParams::default(), &policy("Retain")).await?;

            let restore = drill.restore("back", |spec| spec.rollback_window = SHORT_WINDOW.into()).await?;
            restore.await_completed().await?;
            drill.ensure_serves(POINT).await?;
            let mut stay: BTreeSet<String> = drill.volumes().by_claim().await?.into_values().collect();
            stay.insert(retained.clone());
            drill.volumes().await_left(&stay).await?;
            let volume = volumes.get(&retained).await?;
            let found = volume.spec.and_then(|spec| spec.persistent_volume_reclaim_policy);
            ensure!(found.as_deref() == Some("Retain"), "{found:?}");
            // What the new volumes are to become with their claims is what the old ones were.
            let new = drill.volumes().by_claim().await?;
            for (claim, wanted) in [("data-app-0", "Delete"), ("data-app-1", "Retain")] {
                let found = volumes.get(&new[claim]).await?.spec;
                let found = found.and_then(|spec| spec.persistent_volume_reclaim_policy);
                ensure!(found.as_deref() == Some(wanted), "{claim}: {found:?}");
            }
            // They go with the test.
            for name in [&retained, &new["data-app-1"]] {
                volumes.patch(name, &PatchParams::default(), &policy("Delete")).await?;
            }
            Ok(())
        },
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn after_a_rollback_the_old_volumes_go_with_their_claims_again() -> Result<()> {
    with_restore_drill(
        |app| app,
        async |ns, drill| {
            let old = drill.volumes().by_claim().await?;
            let restore = drill.restore("back", |spec| spec.rollback_window = WINDOW.into()).await?;
            restore.await_completed().await?;
            restore.request_rollback().await?;
            restore.await_rolled_back().await?;
            drill.ensure_serves(LATER).await?;
            ensure!(drill.volumes().by_claim().await? == old, "the claims have other volumes than before");
            drill.volumes().await_only_those_of_claims().await?;
            ensure_released(ns, drill.volumes()).await?;
            restore.remove().await
        },
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_volume_without_a_csi_driver_that_is_not_restored_keeps_its_claim() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "restores", async |ns| {
        let class = create_host_volume(ns).await?;
        let app = App::new(ns, "app").template("disk", &class);
        app.deploy().await?;
        let spec = json!({ "statefulSetRef": { "name": "app" }, "volumeClaimTemplates": ["data"] });
        let backup = Backup::write(ns, BACKUP, &spec).await?;
        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Completed, "{record:?}");
        let claims: Api<PersistentVolumeClaim> = ns.api();
        let disk =
            async || anyhow::Ok(claims.get("disk-app-0").await?.spec.and_then(|spec| spec.volume_name));
        let before = disk().await?;

        let restore =
            Restore::create(ns, "back", "app", |spec| spec.backup_name = Some(BACKUP.to_owned())).await?;
        let status = restore.await_completed().await?;
        let plan = status.plan.context("it has a plan")?;
        let disks = plan.volumes.iter().filter(|volume| volume.claim == "disk-app-0");
        let actions: Vec<_> = disks.map(|volume| volume.action).collect();
        ensure!(actions == [VolumeAction::Keep], "{plan:?}");
        ensure!(disk().await? == before, "the claim has another volume");
        app.await_ready(1).await
    })
    .await
}
