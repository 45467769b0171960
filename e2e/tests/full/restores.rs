//! Restores of every kind of `StatefulSet`, and what goes wrong on the storage and at the API server meanwhile.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::{self, PersistentVolume, PersistentVolumeClaim, ResourceQuota};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use sts_backup_api::names::RESTORE_LABEL;
use sts_backup_api::restore::{RestorePhase, VolumeAction};
use sts_backup_api::run::RunResult;
use sts_backup_e2e::condition::{await_condition, await_deleted};
use sts_backup_e2e::kit::agent::alone;
use sts_backup_e2e::kit::crds::apply_crds;
use sts_backup_e2e::kit::local_agent::{LocalAgent, LocalAgentConfig};
use sts_backup_e2e::kit::proxy::is_deletion_of_claim;
use sts_backup_e2e::kit::restore_drill::{BACKUP, LATER, POINT, ensure_released};
use sts_backup_e2e::kit::{
    App, Backup, Cluster, Postgres, Restore, RestoreDrill, Volumes, WriteLoad, with_temp_namespaces,
};

use crate::{alone_in_namespace, alone_with_restore_drill, start_agent};

const TIMEOUT: Duration = Duration::from_mins(1);

/// Longer than the freeze of any backup here.
const NEVER: u32 = 600;

/// Keeps a claim that is deleted.
const FINALIZER: &str = "e2e.sts-backup.io/hold";

/// Says which driver made a volume; without it nobody deletes what the storage holds of it.
const PROVISIONED_BY: &str = "pv.kubernetes.io/provisioned-by";

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn three_postgres_under_load_get_the_rows_of_the_point_and_then_all_later_ones_back() -> Result<()> {
    alone_in_namespace("restores", async |ns| {
        apply_crds(ns.cluster()).await?;
        let _agent = start_agent(ns, 0).await?;
        let database = Postgres::new(ns, "db").replicas(3);
        database.deploy().await?;
        let volumes = Volumes::watch(ns).await?;
        let mut loads = try_join_all((0..3).map(|ordinal| WriteLoad::start(&database, ordinal))).await?;
        for load in &mut loads {
            load.wait_until(200).await?;
        }
        let before: Vec<u64> = loads.iter().map(WriteLoad::committed).collect();
        let mut spec = Postgres::freeze_hooks(NEVER)?.spec().clone();
        spec["statefulSetRef"] = json!({ "name": "db" });
        let backup = Backup::write(ns, BACKUP, &spec).await?;
        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Completed, "{record:?}");
        // One row may be committed that is not acknowledged yet; all later ones are too late for the point.
        let last_possible: Vec<u64> = loads.iter().map(|load| load.committed() + 1).collect();
        for (load, last) in loads.iter_mut().zip(&last_possible) {
            load.wait_until(last + 50).await?;
        }

        // The load goes on until its server goes.
        let restore =
            Restore::create(ns, "back", "db", |spec| spec.backup_name = Some(BACKUP.to_owned())).await?;
        let status = restore.await_completed().await?;
        eprintln!("the downtime of three PostgreSQL servers was {:?} s", status.downtime_seconds);
        let committed: Vec<u64> = loads.iter().map(WriteLoad::committed).collect();
        for (ordinal, (first, last)) in (0..).zip(before.iter().zip(&last_possible)) {
            let rows = database.rows(ordinal).await?;
            ensure!(rows.is_unbroken(), "server {ordinal}: {rows:?}");
            ensure!((*first..=*last).contains(&rows.count), "server {ordinal}, {first} to {last}: {rows:?}");
        }

        restore.request_rollback().await?;
        restore.await_rolled_back().await?;
        for (ordinal, committed) in (0..).zip(&committed) {
            let rows = database.rows(ordinal).await?;
            ensure!(rows.is_unbroken(), "server {ordinal}: {rows:?}");
            ensure!(
                (*committed..=committed + 1).contains(&rows.count),
                "server {ordinal} had {committed} rows when it was scaled down: {rows:?}"
            );
        }
        let claims: Vec<String> = (0..3).map(|ordinal| database.claim_name(ordinal)).collect();
        volumes.ensure_none_was_empty(&claims)
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn ordered_pods_none_of_which_is_ready_are_restored() -> Result<()> {
    let app = |app: App| app.replicas(3).ordered().ready_when("! grep -q broken /volumes/data/text");
    alone_with_restore_drill(app, async |ns, drill, _| {
        drill.app().write_all("broken").await?;
        let none_is_ready = |set: &k8s_openapi::api::apps::v1::StatefulSet| {
            set.status.as_ref().is_some_and(|status| status.ready_replicas.unwrap_or(0) == 0)
        };
        await_condition(&ns.api(), "app", "unready", TIMEOUT, none_is_ready).await?;
        drill.restore("back", |_| ()).await?.await_completed().await?;
        drill.ensure_serves(POINT).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn claims_that_go_with_their_pods_are_restored_whole_or_in_part_and_brought_back() -> Result<()> {
    alone_with_restore_drill(
        |app| app.replicas(3).claims_go(),
        async |ns, drill, _| {
            let old = drill.volumes().by_claim().await?;
            let whole = drill.restore("whole", |_| ()).await?;
            whole.await_completed().await?;
            drill.ensure_serves(POINT).await?;
            whole.request_rollback().await?;
            whole.await_rolled_back().await?;
            drill.ensure_serves(LATER).await?;
            ensure!(drill.volumes().by_claim().await? == old, "the claims have other volumes than before");

            let part = drill.restore("part", |spec| spec.replicas = vec![1]).await?;
            part.await_completed().await?;
            let app = drill.app();
            for (ordinal, text) in [(0, LATER), (1, POINT), (2, LATER)] {
                app.ensure_text(ordinal, text).await?;
            }
            // That of ordinal 2 went with its pod, too, and has its own volume again.
            let now = drill.volumes().by_claim().await?;
            ensure!(now["data-app-2"] == old["data-app-2"], "{now:?}, not {old:?}");
            part.request_rollback().await?;
            part.await_rolled_back().await?;
            drill.ensure_serves(LATER).await?;
            ensure!(drill.volumes().by_claim().await? == old, "the claims have other volumes than before");
            ensure_released(ns, drill.volumes()).await
        },
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn ordinals_that_start_anywhere_are_restored_whole_and_in_part() -> Result<()> {
    alone_with_restore_drill(
        |app| app.start(5).replicas(2),
        async |_, drill, _| {
            let part = drill.restore("part", |spec| spec.replicas = vec![6]).await?;
            let status = part.await_completed().await?;
            let plan = status.plan.context("it has a plan")?;
            ensure!((plan.replicas, plan.replicas_meanwhile) == (2, 1), "{plan:?}");
            drill.app().ensure_text(5, LATER).await?;
            drill.app().ensure_text(6, POINT).await?;
            drill.write_later().await?;
            drill.restore("whole", |_| ()).await?.await_completed().await?;
            drill.ensure_serves(POINT).await
        },
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn twenty_claims_of_ten_pods_are_restored() -> Result<()> {
    alone_with_restore_drill(
        |app| app.replicas(10).template("logs", "stsb-e2e-wffc"),
        async |ns, drill, _| {
            let window = Duration::from_secs(1);
            let restore = drill.restore("back", |spec| spec.rollback_window = window.into()).await?;
            let status = restore.await_completed().await?;
            let restored = status.restored_snapshots.iter().filter(|restored| restored.success).count();
            ensure!(restored == 20, "{status:?}");
            eprintln!("the downtime of twenty claims was {:?} s", status.downtime_seconds);
            drill.ensure_serves(POINT).await?;
            drill.volumes().await_only_those_of_claims().await?;
            ensure_released(ns, drill.volumes()).await
        },
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_quota_with_just_enough_room_for_the_new_volumes_is_enough() -> Result<()> {
    alone_with_restore_drill(
        |app| app.replicas(2),
        async |ns, drill, _| {
            let hard = json!({ "requests.storage": "64Mi", "persistentvolumeclaims": "4" });
            let quota = json!({ "metadata": { "name": "exact" }, "spec": { "hard": hard } });
            let quotas: Api<ResourceQuota> = ns.api();
            quotas.create(&PostParams::default(), &serde_json::from_value(quota)?).await?;
            let is_counted = |quota: &ResourceQuota| {
                let used = quota.status.as_ref().and_then(|status| status.used.as_ref());
                used.and_then(|used| used.get("requests.storage")).is_some_and(|used| used.0 == "32Mi")
            };
            await_condition(&quotas, "exact", "counted", TIMEOUT, is_counted).await?;
            drill.restore("back", |_| ()).await?.await_completed().await?;
            drill.ensure_serves(POINT).await
        },
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_claim_that_somebody_holds_after_the_scale_down_is_named_and_the_restore_goes_on_without_it()
-> Result<()> {
    alone_with_restore_drill(
        |app| app.replicas(2),
        async |ns, drill, proxy| {
            let held = proxy.hold(is_deletion_of_claim);
            let restore = drill.restore("back", |spec| spec.pvc_deletion_timeout_seconds = 5).await?;
            held.await_hits(1).await;
            let claims: Api<PersistentVolumeClaim> = ns.api();
            let finalizers = |all: &[&str]| Patch::Merge(json!({ "metadata": { "finalizers": all } }));
            let protection = "kubernetes.io/pvc-protection";
            let how = PatchParams::default();
            claims.patch("data-app-1", &how, &finalizers(&[protection, FINALIZER])).await?;
            drop(held);
            let status = restore.await_saying(&["data-app-1", FINALIZER]).await?;
            ensure!(status.phase == Some(RestorePhase::Restoring), "{status:?}");

            claims.patch("data-app-1", &how, &finalizers(&[])).await?;
            restore.await_completed().await?;
            drill.ensure_serves(POINT).await
        },
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn an_api_server_that_fails_for_a_while_at_any_kind_of_write_only_costs_time() -> Result<()> {
    alone_with_restore_drill(
        |app| app.replicas(2),
        async |_, drill, proxy| {
            let kinds = ["/persistentvolumes/", "/persistentvolumeclaims", "/scale", "/statefulsetrestores/"];
            for (kind, status) in kinds.into_iter().flat_map(|kind| [(kind, 500), (kind, 429)]) {
                drill.write_later().await?;
                let fault = proxy.fail(move |method, uri| {
                    let is_dry_run = uri.query().is_some_and(|query| query.contains("dryRun"));
                    (method != "GET" && !is_dry_run && uri.path().contains(kind)).then_some(status)
                });
                let name = format!("back-{}-{status}", kind.trim_matches('/'));
                let window = Duration::from_secs(1);
                let restore = drill.restore(&name, |spec| spec.rollback_window = window.into()).await?;
                fault.await_hits(2).await;
                drop(fault);
                restore.await_completed().await.with_context(|| name.clone())?;
                drill.ensure_serves(POINT).await.with_context(|| name.clone())?;
                drill.volumes().await_only_those_of_claims().await.context(name)?;
            }
            Ok(())
        },
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_set_that_is_deleted_in_the_middle_serves_the_restored_data_when_it_is_made_again() -> Result<()> {
    alone_with_restore_drill(
        |app| app.replicas(2),
        async |_, drill, proxy| {
            let held = proxy.hold(is_deletion_of_claim);
            let restore = drill.restore("back", |_| ()).await?;
            held.await_hits(1).await;
            drill.app().orphan().await?;
            drop(held);
            restore.await_completed().await?;
            drill.app().deploy().await?;
            drill.ensure_serves(POINT).await
        },
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_restore_that_is_deleted_while_claims_are_exchanged_is_finished_first() -> Result<()> {
    alone_with_restore_drill(
        |app| app.replicas(2),
        async |ns, drill, proxy| {
            let held = proxy.hold(is_deletion_of_claim);
            let restore = drill.restore("back", |_| ()).await?;
            held.await_hits(1).await;
            let object = restore.get().await?;
            restore.delete().await?;
            drop(held);
            await_deleted(&restore.api(), &object, TIMEOUT).await?;
            drill.ensure_serves_either().await?;
            ensure_released(ns, drill.volumes()).await
        },
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_namespace_that_is_deleted_in_the_middle_goes_and_its_volumes_stay() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-2").await?;
    let _alone = alone(&cluster).await?;
    // The agent's lease is in the other one.
    with_temp_namespaces(&[&cluster, &cluster], "restores", async |namespaces| {
        let [ns, home] = namespaces else { anyhow::bail!("two namespaces") };
        apply_crds(&cluster).await?;
        let proxy = sts_backup_e2e::kit::proxy::ApiProxy::start(&cluster).await?;
        let config = LocalAgentConfig::new(ns, "agent").steady_lease().kubeconfig(proxy.kubeconfig());
        let _agent = LocalAgent::start(&config).await?;
        let drill = RestoreDrill::deploy(home, App::new(home, "app")).await?;
        let old = drill.volumes().by_claim().await?;
        let held = proxy.hold(is_deletion_of_claim);
        let restore = drill.restore("back", |_| ()).await?;
        held.await_hits(1).await;
        let kept: BTreeSet<String> = restore.volumes().await?.iter().map(ResourceExt::name_any).collect();
        ensure!(kept.is_superset(&old.into_values().collect()) && kept.len() == 2, "{kept:?}");

        let all: Api<v1::Namespace> = Api::all(cluster.client());
        let object = all.get(home.name()).await?;
        all.delete(home.name(), &DeleteParams::default()).await?;
        drop(held);
        await_deleted(&all, &object, Duration::from_mins(2)).await?;
        let volumes: Api<PersistentVolume> = Api::all(cluster.client());
        for volume in try_join_all(kept.iter().map(|name| volumes.get(name))).await? {
            ensure!(volume.labels().contains_key(RESTORE_LABEL), "{volume:?}");
        }
        drill.volumes().await_left(&kept).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn an_old_volume_that_somebody_deleted_is_named_and_can_be_made_again_from_the_status() -> Result<()> {
    alone_with_restore_drill(
        |app| app,
        async |ns, drill, _| {
            let restore = drill.restore("back", |_| ()).await?;
            let status = restore.await_completed().await?;
            let swap = status.swap.context("it remembers its volumes")?;
            let previous = swap.volumes[0].previous.clone().context("it had a volume before")?;
            let volumes: Api<PersistentVolume> = Api::all(ns.cluster().client());
            let old = volumes.get(&previous.name).await?;
            volumes.delete(&previous.name, &DeleteParams::default()).await?;
            await_deleted(&volumes, &old, TIMEOUT).await?;

            restore.request_rollback().await?;
            restore.await_saying(&[&previous.name]).await?;
            ensure!(restore.status().await?.phase == Some(RestorePhase::Completed));
            drill.ensure_serves(POINT).await?;

            // What the storage holds has nobody now, until the object is made again.
            let mut object: Value = serde_json::from_str(&previous.manifest.context("it has its manifest")?)?;
            for field in ["uid", "resourceVersion", "creationTimestamp"] {
                object["metadata"].as_object_mut().context("it has metadata")?.remove(field);
            }
            object["spec"]["persistentVolumeReclaimPolicy"] = json!("Delete");
            volumes.create(&PostParams::default(), &serde_json::from_value(object)?).await?;
            drill.volumes().await_only_those_of_claims().await
        },
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn old_volumes_go_after_a_day_also_when_their_restore_is_gone_and_static_ones_stay() -> Result<()> {
    alone_in_namespace("restores", async |ns| {
        apply_crds(ns.cluster()).await?;
        let mut agent = start_agent(ns, 0).await?;
        let drill = RestoreDrill::deploy(ns, App::new(ns, "app").replicas(2)).await?;
        let volumes: Api<PersistentVolume> = Api::all(ns.cluster().client());
        let old = drill.volumes().by_claim().await?;
        let static_one = old["data-app-1"].clone();
        let provisioned =
            |by: Value| Patch::Merge(json!({ "metadata": { "annotations": { PROVISIONED_BY: by } } }));
        let by = volumes.get(&static_one).await?.annotations().get(PROVISIONED_BY).cloned();
        volumes.patch(&static_one, &PatchParams::default(), &provisioned(Value::Null)).await?;

        let restore = drill.restore("back", |_| ()).await?;
        let status = restore.await_completed().await?;
        let plan = status.plan.context("it has a plan")?;
        ensure!(plan.volumes.iter().all(|volume| volume.action == VolumeAction::Replace), "{plan:?}");
        let mut all: BTreeSet<String> = old.values().cloned().collect();
        all.extend(drill.volumes().by_claim().await?.into_values());
        drill.volumes().await_left(&all).await?;
        restore.remove().await?;
        agent.terminate()?;
        agent.wait_exit().await?;

        let _later = start_agent(ns, 2).await?;
        all.remove(&old["data-app-0"]);
        drill.volumes().await_left(&all).await?;
        let is_given_back = |volume: &PersistentVolume| !volume.labels().contains_key(RESTORE_LABEL);
        await_condition(&volumes, &static_one, "its user's again", TIMEOUT, is_given_back).await?;
        drill.ensure_serves(POINT).await?;

        // It goes with the test.
        volumes.patch(&static_one, &PatchParams::default(), &provisioned(json!(by))).await?;
        let goes = Patch::Merge(json!({ "spec": { "persistentVolumeReclaimPolicy": "Delete" } }));
        volumes.patch(&static_one, &PatchParams::default(), &goes).await?;
        Ok(())
    })
    .await
}
