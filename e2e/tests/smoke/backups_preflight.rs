//! What a run needs is looked for before anything is touched: what is missing is named, and waited for where it may
//! come by itself.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use sts_backup_api::conditions::{
    self, LAST_BACKUP_SUCCEEDED, NAMESPACE_NOT_GRANTED, PROGRESSING, READY, STATEFUL_SET_NOT_FOUND, THAWED,
};
use sts_backup_api::names::{CLAIM_ANNOTATION, VOLUMES_ANNOTATION};
use sts_backup_api::run::{RunRecord, RunResult};
use sts_backup_api::snapshot::VolumeSnapshot;
use sts_backup_e2e::condition::{await_condition, await_deleted};
use sts_backup_e2e::kit::class::create_foreign_snapshot_class;
use sts_backup_e2e::kit::{App, Backup, Cluster, Namespace, with_temp_namespace, with_temp_namespaces};

const TIMEOUT: Duration = Duration::from_mins(1);

/// Keeps a pod that is deleted.
const POD_FINALIZER: &str = "e2e.sts-backup.io/hold";

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn what_a_healthy_set_lacks_is_refused_by_name_and_nothing_is_touched() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "preflight", async |ns| {
        let foreign = create_foreign_snapshot_class(ns).await?;
        let app = App::new(ns, "app");
        app.deploy().await?;
        let nowhere = json!({ "command": ["true"], "containerName": "nowhere" });
        let cases: [(&str, Value, &str, &str); 5] = [
            (
                "template",
                json!({ "volumeClaimTemplates": ["data", "logs"] }),
                "UnknownTemplate",
                "StatefulSet app has no volumeClaimTemplate logs: set volumeClaimTemplates to some of data",
            ),
            (
                "class",
                json!({ "volumeSnapshotClassName": "no-such-class" }),
                "NoSnapshotClass",
                "VolumeSnapshotClass no-such-class does not exist",
            ),
            (
                "driver",
                json!({ "volumeSnapshotClassName": foreign }),
                "SnapshotClassOfAnotherDriver",
                "PersistentVolumeClaim data-app-0 of csi.e2e.sts-backup.io",
            ),
            (
                "partial",
                json!({ "volumeSnapshotClassName": foreign, "allowPartial": true }),
                "SnapshotClassOfAnotherDriver",
                "PersistentVolumeClaim data-app-0 of csi.e2e.sts-backup.io",
            ),
            (
                "container",
                json!({ "postBackupHook": nowhere }),
                "ContainerNotFound",
                "app-0 has no container nowhere: set containerName to one of main",
            ),
        ];
        let mut backups = Vec::new();
        for (name, change, ..) in &cases {
            backups.push(Backup::write(ns, name, &hooked(change)).await?);
        }
        for ((name, _, reason, words), backup) in cases.iter().zip(&backups) {
            let record = backup.await_runs(1).await.context(*name)?;
            check_refusal(&record, reason, words)?;
            backup.await_condition(READY, "False", reason).await?;
            backup.await_condition(LAST_BACKUP_SUCCEEDED, "False", reason).await?;
            backup.await_event("BackupFailed").await?;
            let status = backup.status().await?;
            ensure!(conditions::find(&status.conditions, THAWED).is_none(), "{name}: {status:?}");
        }
        check_untouched(ns, &[&app]).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_claim_that_is_missing_or_goes_refuses_the_run_unless_a_part_is_wanted() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "preflight", async |ns| {
        let app = App::new(ns, "app").replicas(3);
        app.deploy().await?;
        lose_claim(ns, "data-app-1").await?;
        let whole = Backup::write(ns, "whole", &hooked(&json!({}))).await?;
        let record = whole.await_runs(1).await?;
        check_refusal(&record, "ClaimMissing", "PersistentVolumeClaim data-app-1 does not exist")?;
        whole.await_no_snapshots().await?;

        let part = Backup::write(ns, "part", &hooked(&json!({ "allowPartial": true }))).await?;
        let record = part.await_runs(1).await?;
        check_part(&record, "2/3 volumes", &["PersistentVolumeClaim data-app-1 does not exist"])?;
        part.await_condition(LAST_BACKUP_SUCCEEDED, "False", "ClaimsLeftOut").await?;
        part.await_condition(READY, "True", "Usable").await?;
        part.await_event("BackupPartiallyFailed").await?;
        let status = part.status().await?;
        ensure!(status.last_backup_time.is_some() && status.last_successful_time.is_none(), "{status:?}");
        let [point] = &status.recovery_points[..] else { anyhow::bail!("{status:?}") };
        ensure!(!point.complete && status.recovery_point_count == 0, "{status:?}");
        ensure!((point.ready_volumes, point.expected_volumes) == (2, 3), "{point:?}");
        for snapshot in part.snapshots().await? {
            ensure!(snapshot.annotations().get(VOLUMES_ANNOTATION).is_some_and(|volumes| volumes == "3"));
        }

        // Its pod uses it: it stays as long as that.
        let claims: Api<PersistentVolumeClaim> = ns.api();
        claims.delete("data-app-2", &DeleteParams::default()).await?;
        whole.request("another goes").await?;
        let record = whole.await_runs(2).await?;
        ensure!(record.result == RunResult::Failed, "{record:?}");
        ensure!(record.message.contains("PersistentVolumeClaim data-app-2 is being deleted"), "{record:?}");
        part.request("another goes").await?;
        let record = part.await_runs(2).await?;
        check_part(&record, "1/3 volumes", &["data-app-1 does not exist", "data-app-2 is being deleted"])?;
        let snapshots = part.snapshots_of(&record.id).await?;
        let claims: Vec<_> =
            snapshots.iter().map(|snapshot| snapshot.annotations().get(CLAIM_ANNOTATION)).collect();
        ensure!(claims == [Some(&"data-app-0".to_owned())], "{claims:?}");
        Ok(())
    })
    .await
}

fn check_part(record: &RunRecord, count: &str, left_out: &[&str]) -> Result<()> {
    ensure!(record.result == RunResult::PartiallyFailed && record.reason == "ClaimsLeftOut", "{record:?}");
    ensure!(record.message.starts_with(count), "{record:?}");
    ensure!(left_out.iter().all(|words| record.message.contains(words)), "{record:?}");
    Ok(())
}

/// Deletes a claim that a pod uses, as a person with too much power does.
async fn lose_claim(ns: &Namespace, name: &str) -> Result<()> {
    let claims: Api<PersistentVolumeClaim> = ns.api();
    let claim = claims.get(name).await?;
    claims.delete(name, &DeleteParams::default()).await?;
    let unprotected = Patch::Merge(json!({ "metadata": { "finalizers": null } }));
    claims.patch(name, &PatchParams::default(), &unprotected).await?;
    await_deleted(&claims, &claim, TIMEOUT).await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_backup_that_is_created_before_its_set_runs_once_the_set_is_there() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "preflight", async |ns| {
        let backup = Backup::write(ns, "nightly", &hooked(&json!({}))).await?;
        let ready = backup.await_condition(READY, "False", STATEFUL_SET_NOT_FOUND).await?;
        let words = format!("StatefulSet {}/app does not exist", ns.name());
        ensure!(ready.message.contains(&words), "{ready:?}");

        App::new(ns, "app").replicas(2).create().await?;
        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Completed, "{record:?}");
        ensure!(backup.status().await?.history.len() == 1, "the absence of the set counted as a run");
        backup.await_condition(READY, "True", "Usable").await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_run_waits_for_pods_that_are_not_ready_or_terminating_and_names_them() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "preflight", async |ns| {
        let app = App::new(ns, "app").replicas(2).ready_when_told();
        app.create().await?;
        let pods: Api<Pod> = ns.api();
        for ordinal in 0..2 {
            await_condition(&pods, &app.pod_name(ordinal), "running", TIMEOUT, is_running).await?;
        }
        app.tell_ready(0).await?;
        let backup = Backup::write(ns, "nightly", &hooked(&json!({}))).await?;
        await_waiting(&backup, "Pod app-1 is not Ready").await?;
        backup.await_event("WaitingForStatefulSet").await?;
        app.tell_ready(1).await?;
        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Completed, "{record:?}");

        let held = Patch::Merge(json!({ "metadata": { "finalizers": [POD_FINALIZER] } }));
        let pod = pods.patch("app-1", &PatchParams::default(), &held).await?;
        pods.delete("app-1", &DeleteParams::default()).await?;
        let sets: Api<StatefulSet> = ns.api();
        let is_known =
            |set: &StatefulSet| set.status.as_ref().is_some_and(|status| status.ready_replicas == Some(1));
        await_condition(&sets, "app", "aware of its pod", TIMEOUT, is_known).await?;
        backup.request("terminating").await?;
        await_waiting(&backup, "Pod app-1 is terminating").await?;
        let let_go = Patch::Merge(json!({ "metadata": { "finalizers": null } }));
        pods.patch("app-1", &PatchParams::default(), &let_go).await?;
        let is_new = |new: &Pod| new.uid() != pod.uid() && is_running(new);
        await_condition(&pods, "app-1", "replaced", TIMEOUT, is_new).await?;
        app.tell_ready(1).await?;
        let record = backup.await_runs(2).await?;
        ensure!(record.result == RunResult::Completed, "{record:?}");
        Ok(())
    })
    .await
}

/// Waits until the run waits for what these words say.
async fn await_waiting(backup: &Backup, words: &str) -> Result<()> {
    backup
        .await_status(&format!("waiting: {words}"), |status| {
            conditions::find(&status.conditions, PROGRESSING).is_some_and(|progressing| {
                progressing.reason == "WaitingForStatefulSet" && progressing.message.contains(words)
            })
        })
        .await?;
    Ok(())
}

fn is_running(pod: &Pod) -> bool {
    let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_deref());
    let is_running = |status: &k8s_openapi::api::core::v1::ContainerStatus| {
        status.state.as_ref().is_some_and(|state| state.running.is_some())
    };
    statuses.is_some_and(|statuses| statuses.iter().all(is_running))
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_set_in_another_namespace_is_out_of_reach() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespaces(&[&cluster, &cluster], "preflight", async |namespaces| {
        let [ns, other] = namespaces else { anyhow::bail!("two namespaces") };
        // One of the same name nearby is none of its business.
        let (near, far) = (App::new(ns, "app"), App::new(other, "app"));
        tokio::try_join!(near.deploy(), far.deploy())?;
        let spec = hooked(&json!({ "statefulSetRef": { "name": "app", "namespace": other.name() } }));
        let backup = Backup::write(ns, "nightly", &spec).await?;
        let ready = backup.await_condition(READY, "False", NAMESPACE_NOT_GRANTED).await?;
        ensure!(ready.message.contains(&format!("StatefulSet {}/app", other.name())), "{ready:?}");
        backup.await_event(NAMESPACE_NOT_GRANTED).await?;

        // A later object's run shows that the agent has seen the request.
        backup.request("please").await?;
        let own = Backup::write(ns, "own", &json!({ "statefulSetRef": { "name": "app" } })).await?;
        own.await_runs(1).await?;
        let status = backup.status().await?;
        ensure!(status.current_run.is_none() && status.history.is_empty(), "{status:?}");
        own.remove().await?;
        for snapshot in own.snapshots().await? {
            ns.api::<VolumeSnapshot>().delete(&snapshot.name_any(), &DeleteParams::default()).await?;
        }
        own.await_no_snapshots().await?;
        check_untouched(ns, &[&near, &far]).await?;
        check_untouched(other, &[]).await?;
        backup.remove().await
    })
    .await
}

/// A hook leaves its mark in the pod: what was not touched has none.
fn hooked(change: &Value) -> Value {
    let mark = json!({ "command": ["touch", "/dev/shm/touched"] });
    let mut spec = json!({
        "statefulSetRef": { "name": "app" }, "preBackupHook": mark, "postBackupHook": mark,
    });
    for (field, value) in change.as_object().into_iter().flatten() {
        spec[field] = value.clone();
    }
    spec
}

fn check_refusal(record: &RunRecord, reason: &str, words: &str) -> Result<()> {
    ensure!(record.result == RunResult::Failed && record.reason == reason, "{record:?}");
    ensure!(record.message.starts_with("nothing was frozen or snapshotted: "), "{record:?}");
    ensure!(record.message.contains(words), "{record:?}");
    Ok(())
}

async fn check_untouched(ns: &Namespace, apps: &[&App]) -> Result<()> {
    let snapshots = ns.api::<VolumeSnapshot>().list(&ListParams::default()).await?;
    ensure!(snapshots.items.is_empty(), "{:?}", snapshots.items);
    for app in apps {
        app.sh(0, "[ ! -e /dev/shm/touched ]").await.context("a hook ran")?;
    }
    Ok(())
}
