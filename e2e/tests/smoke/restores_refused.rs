//! What a restore must not meet is looked for before anything is touched: it is named, and waited for where it passes by
//! itself.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Pod, ResourceQuota};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use sts_backup_api::names::{ALLOW_CONTESTED_ANNOTATION, ALLOW_RESTORE_FROM_ANNOTATION};
use sts_backup_api::restore::{StatefulSetRestoreSpec, StatefulSetRestoreStatus};
use sts_backup_api::snapshot::VolumeSnapshot;
use sts_backup_e2e::condition::{await_condition, await_deleted, snapshot_cut};
use sts_backup_e2e::kit::class::create_snapshot_class;
use sts_backup_e2e::kit::manifest::{refusal, restore_manifest};
use sts_backup_e2e::kit::pod::run_pod;
use sts_backup_e2e::kit::policy::change_set;
use sts_backup_e2e::kit::restore_drill::{POINT, ensure_untouched, footprint};
use sts_backup_e2e::kit::snapshot::{await_snapshot, take_snapshot};
use sts_backup_e2e::kit::{
    App, Cluster, Namespace, Restore, RestoreDrill, with_temp_namespace, with_temp_namespaces,
};

use crate::with_restore_drill;

const TIMEOUT: Duration = Duration::from_mins(1);

/// Keeps a claim that is deleted.
const FINALIZER: &str = "e2e.sts-backup.io/hold";

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn what_is_no_sound_restore_is_refused_with_the_remedy_and_a_sound_one_cannot_be_changed() -> Result<()>
{
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "restores", async |ns| {
        let one_source = "name one source: backupName, or useLatestBackup: true, or snapshotNames";
        let at_most_one = "write at most one of recoveryPoint, pointInTime and snapshotNames";
        let set_backup = "choose among the points of a backup: set backupName as well";
        let latest = |change: &Value| {
            let mut spec = json!({ "statefulSetRef": { "name": "app" }, "useLatestBackup": true });
            for (field, value) in change.as_object().into_iter().flatten() {
                spec[field] = value.clone();
            }
            spec
        };
        for (change, words) in [
            (json!({ "useLatestBackup": false }), one_source),
            (json!({ "backupName": "nightly" }), one_source),
            (json!({ "snapshotNames": ["a"] }), one_source),
            (
                json!({ "useLatestBackup": false, "backupName": "nightly", "recoveryPoint": "r",
                    "snapshotNames": ["a"] }),
                at_most_one,
            ),
            (
                json!({ "useLatestBackup": false, "backupName": "nightly", "recoveryPoint": "r",
                    "pointInTime": "2026-01-02T03:04:05Z" }),
                at_most_one,
            ),
            (json!({ "recoveryPoint": "r" }), set_backup),
            (json!({ "pointInTime": "2026-01-02T03:04:05Z" }), set_backup),
            (json!({ "statefulSetRef": { "name": "" } }), "spec.statefulSetRef.name"),
            (json!({ "replicas": [-1] }), "spec.replicas[0]"),
            (json!({ "replicas": [1, 1] }), "spec.replicas[1]: Duplicate value"),
            (json!({ "readyTimeoutSeconds": 0 }), "spec.readyTimeoutSeconds"),
            (json!({ "pvcDeletionTimeoutSeconds": 0 }), "spec.pvcDeletionTimeoutSeconds"),
            (json!({ "provisionTimeoutSeconds": 0 }), "spec.provisionTimeoutSeconds"),
            (json!({ "rollbackWindow": "soon" }), "spec.rollbackWindow"),
            (json!({ "onFailure": "Ignore" }), "\"Hold\", \"Rollback\""),
        ] {
            let said = refusal(ns, &restore_manifest("back", &latest(&change))).await?;
            let said = said.with_context(|| format!("admitted: {change}"))?;
            ensure!(said.contains(words), "{change}: {said}");
        }
        let unknown = latest(&json!({ "scaleUp": true }));
        let said = refusal(ns, &restore_manifest("back", &unknown)).await?.context("it was admitted")?;
        ensure!(said.contains("unknown field \"spec.scaleUp\""), "{said}");
        let long = restore_manifest(&"x".repeat(64), &latest(&json!({})));
        let said = refusal(ns, &long).await?.context("a name of 64 characters was admitted")?;
        ensure!(said.contains("the name is used as a label value: use at most 63"), "{said}");

        let restore = Restore::write(ns, "back", &latest(&json!({ "dryRun": true }))).await?;
        for change in [json!({ "dryRun": false }), json!({ "statefulSetRef": { "name": "other" } })] {
            let patch = Patch::Merge(json!({ "spec": change }));
            let changed = restore.api().patch("back", &PatchParams::default(), &patch).await;
            let said = changed.err().with_context(|| format!("admitted: {change}"))?.to_string();
            ensure!(said.contains("a restore cannot be changed: delete it and create another one"), "{said}");
        }
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn data_that_is_not_there_is_refused_by_name_and_nothing_is_touched() -> Result<()> {
    with_restore_drill(
        |app| app,
        async |ns, drill| {
            drill
                .ensure_refuses("no-backup", &["elsewhere"], |spec| {
                    spec.backup_name = Some("elsewhere".to_owned());
                })
                .await?;
            drill
                .ensure_refuses("no-point", &["20200101-000000-00000000"], |spec| {
                    spec.recovery_point = Some("20200101-000000-00000000".to_owned());
                })
                .await?;
            drill
                .ensure_refuses("no-snapshot", &["never-taken"], |spec| {
                    spec.backup_name = None;
                    spec.snapshot_names = vec!["never-taken".to_owned()];
                })
                .await?;
            drill.ensure_refuses("no-ordinal", &["7"], |spec| spec.replicas = vec![7]).await?;
            drill.ensure_refuses("running", &["app-0", "scaleDown"], |spec| spec.scale_down = false).await?;

            // One more replica than the point has: its volume has no data to come back.
            drill.app().scale(2).await?;
            drill.app().await_ready(2).await?;
            drill.ensure_refuses("beyond", &["ordinal 1"], |_| ()).await?;

            // A part of the point is gone: its newest complete one is none.
            for snapshot in drill.backup().snapshots().await? {
                let snapshots: Api<VolumeSnapshot> = ns.api();
                snapshots.delete(&snapshot.name_any(), &DeleteParams::default()).await?;
                await_deleted(&snapshots, &snapshot, TIMEOUT).await?;
            }
            drill.ensure_refuses("incomplete", &["nightly"], |_| ()).await
        },
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn claims_that_could_not_go_are_refused_by_what_holds_them() -> Result<()> {
    with_restore_drill(
        |app| app,
        async |ns, drill| {
            let job = pod_with_claim(ns, "done", "data-app-0")?;
            run_pod(ns, &job, TIMEOUT).await?;
            drill.ensure_refuses("pod", &["done", "data-app-0"], |_| ()).await?;
            let pods: Api<Pod> = ns.api();
            let pod = pods.get("done").await?;
            pods.delete("done", &DeleteParams::default()).await?;
            await_deleted(&pods, &pod, TIMEOUT).await?;

            let claims: Api<PersistentVolumeClaim> = ns.api();
            let finalizers = |all: &[&str]| Patch::Merge(json!({ "metadata": { "finalizers": all } }));
            let protection = "kubernetes.io/pvc-protection";
            let how = PatchParams::default();
            claims.patch("data-app-0", &how, &finalizers(&[protection, FINALIZER])).await?;
            drill.ensure_refuses("finalizer", &[FINALIZER, "data-app-0"], |_| ()).await?;
            claims.patch("data-app-0", &how, &finalizers(&[protection])).await?;

            let quota: ResourceQuota = serde_json::from_value(json!({
                "metadata": { "name": "tight" }, "spec": { "hard": { "requests.storage": "24Mi" } },
            }))?;
            let quotas: Api<ResourceQuota> = ns.api();
            quotas.create(&PostParams::default(), &quota).await?;
            let is_counted = |quota: &ResourceQuota| {
                let used = quota.status.as_ref().and_then(|status| status.used.as_ref());
                used.and_then(|used| used.get("requests.storage")).is_some_and(|used| used.0 == "16Mi")
            };
            await_condition(&quotas, "tight", "counted", TIMEOUT, is_counted).await?;
            drill.ensure_refuses("quota", &["tight"], |_| ()).await?;
            quotas.delete("tight", &DeleteParams::default()).await?;

            drill.restore("at-last", |_| ()).await?.await_completed().await?;
            drill.ensure_serves(POINT).await
        },
    )
    .await
}

/// A pod that ends at once, and names a claim for ever.
fn pod_with_claim(ns: &Namespace, name: &str, claim: &str) -> Result<Pod> {
    Ok(serde_json::from_value(json!({
        "metadata": { "name": name },
        "spec": {
            "restartPolicy": "Never",
            "containers": [{
                "name": "main",
                "image": ns.cluster().images().shell,
                "imagePullPolicy": "Never",
                "command": ["true"],
                "volumeMounts": [{ "name": "data", "mountPath": "/data" }],
            }],
            "volumes": [{ "name": "data", "persistentVolumeClaim": { "claimName": claim } }],
        },
    }))?)
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_snapshot_of_a_claim_that_is_never_ready_holds_a_restore_up_before_it_begins() -> Result<()> {
    with_restore_drill(
        |app| app,
        async |ns, drill| {
            let class = create_snapshot_class(ns, &[("readyDelay", "never")]).await?;
            take_snapshot(ns, "stuck", "data-app-0", &class).await?;
            let stuck = await_snapshot(ns, "stuck", "cut", snapshot_cut).await?;
            let before = footprint(ns).await?;
            let restore = drill.restore("back", |_| ()).await?;
            let says = |status: &StatefulSetRestoreStatus| {
                status.conditions.iter().any(|condition| condition.message.contains("VolumeSnapshot stuck"))
            };
            let status = restore.await_status("held up by the snapshot", says).await?;
            ensure!(status.swap.is_none(), "{status:?}");
            ensure_untouched(ns, &before).await?;

            let snapshots: Api<VolumeSnapshot> = ns.api();
            snapshots.delete("stuck", &DeleteParams::default()).await?;
            await_deleted(&snapshots, &stuck, TIMEOUT).await?;
            drill.restore("at-last", |_| ()).await?.await_completed().await?;
            drill.ensure_serves(POINT).await
        },
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn whoever_would_scale_up_in_the_middle_is_named_unless_that_is_allowed() -> Result<()> {
    with_restore_drill(
        |app| app.replicas(2),
        async |ns, drill| {
            let part = |spec: &mut StatefulSetRestoreSpec| spec.replicas = vec![1];
            let create = PostParams::default();
            let operator: ConfigMap =
                serde_json::from_value(json!({ "metadata": { "name": "operator-cr" } }))?;
            let operator = ns.api::<ConfigMap>().create(&create, &operator).await?;
            let owner = json!([{
                "apiVersion": "v1", "kind": "ConfigMap", "name": "operator-cr", "uid": operator.uid(),
                "controller": true,
            }]);
            change_set(ns, "app", &json!({ "ownerReferences": owner })).await?;
            drill.ensure_refuses("owned", &["operator-cr", ALLOW_CONTESTED_ANNOTATION], part).await?;
            change_set(ns, "app", &json!({ "ownerReferences": null })).await?;

            let elastic: HorizontalPodAutoscaler = serde_json::from_value(json!({
                "metadata": { "name": "elastic" },
                "spec": {
                    "scaleTargetRef": { "apiVersion": "apps/v1", "kind": "StatefulSet", "name": "app" },
                    "minReplicas": 2,
                    "maxReplicas": 3,
                },
            }))?;
            ns.api().create(&create, &elastic).await?;
            drill.ensure_refuses("scaled", &["elastic", ALLOW_CONTESTED_ANNOTATION], part).await?;
            ns.api::<HorizontalPodAutoscaler>().delete("elastic", &DeleteParams::default()).await?;

            let tracking = json!({ "argocd.argoproj.io/tracking-id": "shop:apps/StatefulSet:shop/app" });
            change_set(ns, "app", &json!({ "annotations": tracking })).await?;
            drill.ensure_refuses("synced", &["Argo", ALLOW_CONTESTED_ANNOTATION], part).await?;
            change_set(ns, "app", &json!({ "annotations": { ALLOW_CONTESTED_ANNOTATION: "true" } })).await?;
            drill.restore("allowed", part).await?.await_completed().await?;
            drill.app().ensure_text(1, POINT).await
        },
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_rollout_that_somebody_holds_is_refused_and_one_under_way_is_waited_for() -> Result<()> {
    with_restore_drill(
        |app| app.replicas(2),
        async |ns, drill| {
            // The lower pod keeps the former template: scaling to zero would complete what somebody holds.
            let template = |version: &str| json!({ "metadata": { "annotations": { "e2e": version } } });
            let partition = |at: i32| json!({ "rollingUpdate": { "partition": at } });
            change_spec(ns, &json!({ "updateStrategy": partition(1), "template": template("second") }))
                .await?;
            let is_half_way = |set: &StatefulSet| {
                set.status.as_ref().is_some_and(|status| {
                    status.observed_generation == set.metadata.generation
                        && status.current_revision != status.update_revision
                        && status.updated_replicas == Some(1)
                        && status.ready_replicas == Some(2)
                })
            };
            await_condition(&ns.api(), "app", "half way", TIMEOUT, is_half_way).await?;
            drill.ensure_refuses("held", &["StatefulSet app", "app-0"], |_| ()).await?;

            // The higher pod must be ready for a while before the lower one follows.
            let slowly = json!({
                "updateStrategy": partition(0), "template": template("third"), "minReadySeconds": 8,
            });
            change_spec(ns, &slowly).await?;
            let restore = drill.restore("back", |_| ()).await?;
            let is_waiting = |status: &StatefulSetRestoreStatus| {
                status.conditions.iter().any(|condition| condition.reason == "RolloutInProgress")
            };
            let waiting = restore.await_status("waiting for the rollout", is_waiting).await?;
            ensure!(waiting.swap.is_none(), "{waiting:?}");
            restore.await_completed().await?;
            drill.ensure_serves(POINT).await
        },
    )
    .await
}

async fn change_spec(ns: &Namespace, spec: &Value) -> Result<()> {
    let patch = Patch::Merge(json!({ "spec": spec }));
    ns.api::<StatefulSet>().patch("app", &PatchParams::default(), &patch).await?;
    Ok(())
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_set_in_another_namespace_is_restored_once_that_namespace_says_so() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespaces(&[&cluster, &cluster], "restores", async |namespaces| {
        let [ns, home] = namespaces else { anyhow::bail!("two namespaces") };
        let drill = RestoreDrill::deploy(home, App::new(home, "app")).await?;
        let before = footprint(home).await?;
        let restore = Restore::create(ns, "back", "app", |spec| {
            spec.stateful_set_ref.namespace = Some(home.name().to_owned());
            spec.use_latest_backup = Some(true);
        })
        .await?;
        let remedy = format!("{ALLOW_RESTORE_FROM_ANNOTATION}={}", ns.name());
        restore.await_waiting(&[&remedy]).await?;
        ensure_untouched(home, &before).await?;

        home.annotate(ALLOW_RESTORE_FROM_ANNOTATION, Some(ns.name())).await?;
        restore.await_completed().await?;
        drill.ensure_serves(POINT).await
    })
    .await
}
