//! Which runs there are, what they take, and what is left of them: backups of an application without a care.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;
use sts_backup_api::conditions::{self, LAST_BACKUP_SUCCEEDED, READY, THAWED};
use sts_backup_api::names::{CLAIM_ANNOTATION, ORDINAL_ANNOTATION, REPLICAS_ANNOTATION, VOLUMES_ANNOTATION};
use sts_backup_api::points::is_ready;
use sts_backup_api::run::{Consistency, Due, RunResult};
use sts_backup_api::snapshot::VolumeSnapshot;
use sts_backup_e2e::condition::{await_condition, statefulset_ready};
use sts_backup_e2e::kit::agent::Agent;
use sts_backup_e2e::kit::class::create_host_volume;
use sts_backup_e2e::kit::{App, Backup, Cluster, with_temp_namespace};

const TIMEOUT: Duration = Duration::from_mins(1);

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn each_new_request_is_one_run_with_one_snapshot_a_claim_and_they_outlive_the_backup() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "backups", async |ns| {
        App::new(ns, "app").replicas(3).deploy().await?;
        let backup = Backup::write(ns, "nightly", &json!({ "statefulSetRef": { "name": "app" } })).await?;
        let first = backup.await_runs(1).await?;
        ensure!(first.result == RunResult::Completed && first.slot.due == Due::Creation, "{first:?}");
        ensure!(first.freeze_ms.is_none() && first.cut_skew_ms.is_some(), "{first:?}");

        backup.request("one").await?;
        let second = backup.await_runs(2).await?;
        ensure!(second.result == RunResult::Completed && second.slot.value == "one", "{second:?}");
        // The same value again, in a write of its own: the agent sees the object, and does nothing.
        let note = json!({ "metadata": { "annotations": { "note": "again" } } });
        backup.api().patch("nightly", &PatchParams::default(), &Patch::Merge(note)).await?;
        backup.request("one").await?;
        backup.request("two").await?;
        backup.await_runs(3).await?;

        let status = backup.status().await?;
        let slots: Vec<_> = status.history.iter().map(|run| run.slot.value.as_str()).collect();
        ensure!(slots[..2] == ["two", "one"] && slots.len() == 3, "{slots:?}");
        ensure!(status.last_request.as_deref() == Some("two"), "{status:?}");
        ensure!(status.recovery_point_count == 3 && status.recovery_points.len() == 3, "{status:?}");
        let newest_first = status.recovery_points.is_sorted_by(|newer, older| newer.time > older.time);
        ensure!(newest_first, "{:?}", status.recovery_points);
        // Nothing was frozen, so nothing is said of a thaw.
        ensure!(conditions::find(&status.conditions, THAWED).is_none(), "{:?}", status.conditions);
        for point in &status.recovery_points {
            ensure!(point.complete && point.consistency == Consistency::CrashPerVolume, "{point:?}");
        }
        for run in &status.history {
            let claims = claims(&backup.snapshots_of(&run.id).await?);
            ensure!(claims == ["data-app-0", "data-app-1", "data-app-2"], "{claims:?}");
        }

        backup.remove().await?;
        let left = backup.snapshots().await?;
        ensure!(left.len() == 9 && left.iter().all(is_ready), "{left:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn ordinals_may_start_anywhere_and_of_none_the_claims_that_are_left_are_backed_up() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "backups", async |ns| {
        let app = App::new(ns, "app").replicas(2).start(5);
        app.deploy().await?;
        let spec = json!({
            "statefulSetRef": { "name": "app" },
            "preBackupHook": { "command": ["sh", "-c", "touch /dev/shm/frozen"], "pods": "First" },
            "postBackupHook": { "command": ["rm", "-f", "/dev/shm/frozen"] },
        });
        let backup = Backup::write(ns, "nightly", &spec).await?;
        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Completed && record.freeze_ms.is_some(), "{record:?}");
        let snapshots = backup.snapshots_of(&record.id).await?;
        ensure!(claims(&snapshots) == ["data-app-5", "data-app-6"], "{snapshots:?}");
        ensure!(annotations(&snapshots, ORDINAL_ANNOTATION) == ["5", "6"], "{snapshots:?}");
        // `First` is the lowest ordinal, not 0; the hook held where it was to run.
        let status = backup.status().await?;
        ensure!(status.recovery_points[0].consistency == Consistency::Application, "{status:?}");

        let sets: Api<StatefulSet> = ns.api();
        let to_zero = Patch::Merge(json!({ "spec": { "replicas": 0 } }));
        sets.patch("app", &PatchParams::default(), &to_zero).await?;
        await_condition(&sets, "app", "scaled to zero", TIMEOUT, statefulset_ready(0)).await?;
        backup.request("none runs").await?;
        let record = backup.await_runs(2).await?;
        ensure!(record.result == RunResult::Completed && record.freeze_ms.is_none(), "{record:?}");
        let snapshots = backup.snapshots_of(&record.id).await?;
        ensure!(claims(&snapshots) == ["data-app-5", "data-app-6"], "{snapshots:?}");
        ensure!(annotations(&snapshots, REPLICAS_ANNOTATION) == ["0", "0"], "{snapshots:?}");
        ensure!(annotations(&snapshots, VOLUMES_ANNOTATION) == ["2", "2"], "{snapshots:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_volume_without_a_csi_driver_is_refused_until_its_template_is_left_out() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "backups", async |ns| {
        let class = create_host_volume(ns).await?;
        App::new(ns, "app").template("disk", &class).deploy().await?;
        let all = json!({ "statefulSetRef": { "name": "app" } });
        let backup = Backup::write(ns, "all", &all).await?;
        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Failed && record.reason == "NotACsiVolume", "{record:?}");
        ensure!(record.message.contains("PersistentVolumeClaim disk-app-0 "), "{record:?}");
        ensure!(record.message.contains("volumeClaimTemplates"), "{record:?}");
        backup.await_condition(READY, "False", "NotACsiVolume").await?;
        backup.await_no_snapshots().await?;

        // As the message says.
        let only = Patch::Merge(json!({ "spec": { "volumeClaimTemplates": ["data"] } }));
        backup.api().patch("all", &PatchParams::default(), &only).await?;
        backup.request("only data").await?;
        let record = backup.await_runs(2).await?;
        ensure!(record.result == RunResult::Completed, "{record:?}");
        backup.await_condition(READY, "True", "Usable").await?;
        backup.await_condition(LAST_BACKUP_SUCCEEDED, "True", "Completed").await?;
        let taken = claims(&backup.snapshots().await?);
        ensure!(taken == ["data-app-0"], "{taken:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn metrics_tell_of_the_runs_of_a_backup_as_long_as_it_exists() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "backups", async |ns| {
        App::new(ns, "app").deploy().await?;
        let spec = json!({
            "statefulSetRef": { "name": "app" },
            "preBackupHook": { "command": ["true"] },
        });
        let backup = Backup::write(ns, "nightly", &spec).await?;
        backup.await_runs(1).await?;
        let fails = json!({ "spec": { "preBackupHook": { "command": ["false"] } } });
        backup.api().patch("nightly", &PatchParams::default(), &Patch::Merge(fails)).await?;
        backup.request("fails").await?;
        backup.await_runs(2).await?;

        let labels = format!(r#"{{namespace="{}",backup="nightly",statefulset="app"}}"#, ns.name());
        let success = backup.status().await?.last_successful_time.context("one run went well")?;
        let expected = [
            format!("sts_backup_attempt_total{labels} 2"),
            format!("sts_backup_success_total{labels} 1"),
            format!("sts_backup_failure_total{labels} 1"),
            format!("sts_backup_duration_seconds_count{labels} 2"),
            format!("sts_backup_freeze_seconds_count{labels} 2"),
            format!("sts_backup_last_status{labels} 0.0"),
            format!("sts_backup_recovery_points{labels} 1.0"),
        ];
        let agent = Agent::shared(&cluster);
        let is_told = |metrics: &str| expected.iter().all(|line| metrics.lines().any(|told| told == line));
        let metrics = agent.await_metrics(&format!("{expected:#?}"), is_told).await?;
        let timestamp = format!("sts_backup_last_successful_timestamp_seconds{labels} ");
        let told = metrics.lines().find_map(|line| line.strip_prefix(&timestamp));
        let told: f64 = told.context("no time of the last success")?.parse()?;
        let milliseconds = format!("{:.0}", told * 1000.0);
        ensure!(milliseconds == success.0.as_millisecond().to_string(), "{told} is not {success:?}");

        backup.remove().await?;
        // That nothing protects the StatefulSet any more is told without the backup's name.
        let own = format!(r#"namespace="{}",backup="#, ns.name());
        agent.await_metrics("its series are gone", |metrics| !metrics.contains(&own)).await?;
        Ok(())
    })
    .await
}

/// The claims of snapshots, in order: one that has two snapshots is there twice.
fn claims(snapshots: &[VolumeSnapshot]) -> Vec<String> {
    annotations(snapshots, CLAIM_ANNOTATION)
}

fn annotations(snapshots: &[VolumeSnapshot], key: &str) -> Vec<String> {
    let values = snapshots.iter().filter_map(|snapshot| snapshot.annotations().get(key).cloned());
    let mut values: Vec<_> = values.collect();
    values.sort();
    values
}
