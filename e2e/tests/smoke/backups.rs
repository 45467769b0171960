//! Backups of databases that are written to, with the documented hooks: they freeze, and they thaw, whatever comes of
//! the run.

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use sts_backup_api::backup::{Phase, StatefulSetBackup};
use sts_backup_api::conditions::{self, LAST_BACKUP_SUCCEEDED, PROGRESSING, READY, THAWED};
use sts_backup_api::names::{
    BACKUP_LABEL, BACKUP_NAMESPACE_LABEL, CLAIM_ANNOTATION, CLAIM_MANIFEST_ANNOTATION,
    CONSISTENCY_ANNOTATION, ORDINAL_ANNOTATION, REPLICAS_ANNOTATION, RUN_LABEL, SLOT_ANNOTATION,
    STATEFUL_SET_LABEL, TEMPLATE_ANNOTATION, TIME_ANNOTATION, VOLUMES_ANNOTATION,
};
use sts_backup_api::points::is_ready;
use sts_backup_api::run::{Consistency, RunId, RunRecord, RunResult, RunStep, SnapshotState};
use sts_backup_api::snapshot::VolumeSnapshot;
use sts_backup_e2e::condition::await_condition;
use sts_backup_e2e::kit::class::create_snapshot_class;
use sts_backup_e2e::kit::hooks::Hooks;
use sts_backup_e2e::kit::{Backup, Cluster, Namespace, Postgres, Redis, WriteLoad, with_temp_namespace};

/// Longer than a test: what ends such a freeze is the post hook.
const NEVER: u32 = 600;

/// Long enough to see a writer wait.
const SLOW_CUT: (&str, &str) = ("cutDelay", "5s");

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_backup_holds_up_every_writer_until_every_volume_is_cut() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "backups", async |ns| {
        let class = create_snapshot_class(ns, &[SLOW_CUT]).await?;
        let database = Postgres::new(ns, "db").replicas(3);
        database.deploy().await?;
        let mut loads = try_join_all((0..3).map(|ordinal| WriteLoad::start(&database, ordinal))).await?;
        for load in &mut loads {
            load.wait_until(20).await?;
        }

        let spec = spec(&Postgres::freeze_hooks(NEVER)?, "db", &class);
        let backup = Backup::write(ns, "nightly", &spec).await?;
        try_join_all((0..3).map(|ordinal| database.await_blocked_writer(ordinal))).await?;
        let committed: Vec<u64> = loads.iter().map(WriteLoad::committed).collect();
        let run = check_freeze(&backup).await?;
        for (load, committed) in loads.iter_mut().zip(committed) {
            load.wait_until(committed + 20).await?;
        }

        let record = backup.await_runs(1).await?;
        ensure!(record.id == run && record.result == RunResult::Completed, "{record:?}");
        ensure!(record.freeze_ms.is_some() && record.cut_skew_ms.is_some(), "{record:?}");
        check_result(&backup, &record).await?;
        check_snapshots(ns, &backup, &record).await?;
        check_columns(&backup).await?;
        for reason in ["BackupStarted", "Freezing", "BackupCompleted"] {
            backup.await_event(reason).await?;
        }
        for (ordinal, load) in (0..).zip(&mut loads) {
            let (committed, rows) = (load.stop().await?, database.rows(ordinal).await?);
            ensure!(rows.is_unbroken() && rows.count == committed, "{rows:?} of {committed}");
        }
        Ok(())
    })
    .await
}

/// What the status says in the middle of a freeze.
async fn check_freeze(backup: &Backup) -> Result<RunId> {
    let status = backup.status().await?;
    ensure!(status.phase == Some(Phase::InProgress), "{status:?}");
    let run = status.current_run.as_ref().context("a run is under way")?;
    ensure!(run.step == RunStep::Frozen && run.pods.len() == 3 && run.volumes.len() == 3, "{run:?}");
    for (type_, expected) in [(PROGRESSING, "True Frozen"), (THAWED, "False Frozen"), (READY, "True Usable")]
    {
        let said = conditions::find(&status.conditions, type_).context("it is there")?;
        ensure!(format!("{} {}", said.status, said.reason) == expected, "{said:?}");
    }
    Ok(run.id.clone())
}

/// What the status says of a run that went well.
async fn check_result(backup: &Backup, record: &RunRecord) -> Result<()> {
    let is_let_go = |object: &StatefulSetBackup| object.finalizers().is_empty();
    let timeout = std::time::Duration::from_secs(30);
    let object = await_condition(&backup.api(), backup.name(), "let go", timeout, is_let_go).await?;
    let status = object.status.context("it has a status")?;
    ensure!(status.phase == Some(Phase::Ready), "{status:?}");
    ensure!(status.observed_generation == object.metadata.generation, "{status:?}");
    for (type_, expected) in [
        (READY, "True Usable"),
        (PROGRESSING, "False Idle"),
        (LAST_BACKUP_SUCCEEDED, "True Completed"),
        (THAWED, "True Thawed"),
    ] {
        let said = conditions::find(&status.conditions, type_).with_context(|| format!("no {type_}"))?;
        ensure!(format!("{} {}", said.status, said.reason) == expected, "{said:?}");
        ensure!(said.observed_generation == object.metadata.generation, "{said:?}");
    }
    let [point] = &status.recovery_points[..] else { anyhow::bail!("{status:?}") };
    ensure!(point.id == record.id && point.complete && point.replicas == 3, "{point:?}");
    ensure!((point.ready_volumes, point.expected_volumes) == (3, 3), "{point:?}");
    ensure!(point.consistency == Consistency::Application && point.size_bytes > 0, "{point:?}");
    ensure!(status.recovery_point_count == 1, "{status:?}");
    let time = Some(&point.time);
    ensure!(status.last_backup_time.as_ref() == time, "{status:?}");
    ensure!(status.last_successful_time.as_ref() == time, "{status:?}");
    Ok(())
}

/// Each snapshot tells all that a restore must know, also when its claim is gone.
async fn check_snapshots(ns: &Namespace, backup: &Backup, record: &RunRecord) -> Result<()> {
    let snapshots = backup.snapshots().await?;
    ensure!(snapshots.len() == 3 && snapshots.iter().all(is_ready), "{snapshots:?}");
    let claims: Api<PersistentVolumeClaim> = ns.api();
    for ordinal in 0..3 {
        let name = format!("data-db-{ordinal}");
        let of_claim =
            |snapshot: &&VolumeSnapshot| snapshot.annotations().get(CLAIM_ANNOTATION) == Some(&name);
        let snapshot = snapshots.iter().find(of_claim).with_context(|| format!("no snapshot of {name}"))?;
        let source = snapshot.spec.source.persistent_volume_claim_name.as_ref();
        ensure!(source == Some(&name), "{source:?}");
        for (key, value) in [
            (BACKUP_LABEL, "nightly"),
            (BACKUP_NAMESPACE_LABEL, ns.name()),
            (STATEFUL_SET_LABEL, "db"),
            (RUN_LABEL, record.id.as_str()),
        ] {
            let label = snapshot.labels().get(key);
            ensure!(label.is_some_and(|label| label == value), "{key}: {label:?}");
        }
        let annotation = |key| snapshot.annotations().get(key).map(String::as_str);
        for (key, value) in [
            (TEMPLATE_ANNOTATION, "data"),
            (ORDINAL_ANNOTATION, &ordinal.to_string()),
            (CONSISTENCY_ANNOTATION, "Application"),
            (REPLICAS_ANNOTATION, "3"),
            (VOLUMES_ANNOTATION, "3"),
        ] {
            ensure!(annotation(key) == Some(value), "{key}: {:?}", annotation(key));
        }
        ensure!(annotation(SLOT_ANNOTATION).is_some_and(|slot| slot.starts_with("Creation ")));
        let time: jiff::Timestamp = annotation(TIME_ANNOTATION).context("no time")?.parse()?;
        ensure!(time >= record.started.0, "cut at {time}, before the run");

        let manifest: PersistentVolumeClaim =
            serde_json::from_str(annotation(CLAIM_MANIFEST_ANNOTATION).context("no manifest")?)?;
        let claim = claims.get(&name).await?;
        ensure!(manifest.metadata.managed_fields.is_none(), "{manifest:?}");
        ensure!(manifest.uid() == claim.uid() && manifest.labels() == claim.labels(), "{manifest:?}");
        ensure!(!manifest.labels().is_empty() && manifest.spec == claim.spec, "{manifest:?}");
    }
    Ok(())
}

/// What `kubectl get stsb` prints.
async fn check_columns(backup: &Backup) -> Result<()> {
    let columns = backup.columns().await?;
    let names: Vec<_> = columns.keys().map(String::as_str).collect();
    let expected = [
        "Age",
        "Last Backup",
        "Name",
        "Next Backup",
        "Phase",
        "Points",
        "Schedule",
        "StatefulSet",
        "Suspended",
    ];
    ensure!(names == expected, "{names:?}");
    ensure!(
        columns["StatefulSet"] == "db" && columns["Phase"] == "Ready" && columns["Points"] == 1,
        "{columns:?}"
    );
    let last_backup = columns["Last Backup"].as_str().unwrap_or_default();
    ensure!(!last_backup.is_empty() && !last_backup.contains('<'), "{columns:?}");
    Ok(())
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn writers_go_on_at_the_cut_and_snapshots_that_are_never_ready_are_removed() -> Result<()> {
    with_written_postgres(&[("readyDelay", "never")], async |ns, class, load| {
        let mut spec = spec(&Postgres::freeze_hooks(NEVER)?, "db", class);
        spec["snapshotTimeoutSeconds"] = json!(10);
        let backup = Backup::write(ns, "nightly", &spec).await?;
        let readying = backup
            .await_status("becoming ready", |status| {
                status.current_run.as_ref().is_some_and(|run| run.step == RunStep::Readying)
            })
            .await?;
        load.wait_until(load.committed() + 20).await?;
        let run = readying.current_run.context("a run is under way")?;
        ensure!(run.volumes.iter().all(|volume| volume.state == SnapshotState::Cut), "{run:?}");
        ensure!(run.freeze_ms.is_some() && run.cut_at.is_some(), "{run:?}");
        let thawed = conditions::find(&readying.conditions, THAWED).context("no Thawed")?;
        ensure!(thawed.status == "True", "{thawed:?}");

        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Failed && record.reason == "SnapshotNotReady", "{record:?}");
        ensure!(record.message.contains(&run.volumes[0].snapshot), "{record:?}");
        backup.await_no_snapshots().await?;
        let status = backup.status().await?;
        ensure!(status.phase == Some(Phase::Failed) && status.last_backup_time.is_none(), "{status:?}");
        ensure!(status.recovery_point_count == 0, "{status:?}");
        backup.await_condition(LAST_BACKUP_SUCCEEDED, "False", "SnapshotNotReady").await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_freeze_over_its_budget_is_thawed_and_leaves_nothing() -> Result<()> {
    with_written_postgres(&[("failOnCall", "1-999999")], async |ns, class, load| {
        let mut spec = spec(&Postgres::freeze_hooks(NEVER)?, "db", class);
        // The pre hook alone takes seconds on a busy machine.
        spec["maxFreezeSeconds"] = json!(25);
        let backup = Backup::write(ns, "nightly", &spec).await?;
        Postgres::new(ns, "db").await_blocked_writer(0).await?;
        load.wait_until(load.committed() + 20).await?;

        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Failed && record.reason == "FrozenTooLong", "{record:?}");
        ensure!(record.message.contains("maxFreezeSeconds (25)"), "{record:?}");
        backup.await_condition(THAWED, "True", "Thawed").await?;
        backup.await_condition(LAST_BACKUP_SUCCEEDED, "False", "FrozenTooLong").await?;
        backup.await_no_snapshots().await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_backup_that_is_deleted_in_the_freeze_thaws_first_and_leaves_nothing() -> Result<()> {
    // Never cut: csi-snapshotter comes back to a snapshot that is deleted during its cut only after minutes.
    with_written_postgres(&[("failOnCall", "1-999999")], async |ns, class, load| {
        let database = Postgres::new(ns, "db");
        let spec = spec(&Postgres::freeze_hooks(NEVER)?, "db", class);
        let backup = Backup::write(ns, "nightly", &spec).await?;
        database.await_blocked_writer(0).await?;
        let committed = load.committed();
        backup.remove().await?;
        ensure!(!database.is_frozen(0).await?, "the object went before the freeze");
        load.wait_until(committed + 20).await?;
        backup.await_no_snapshots().await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_backup_of_redis_holds_up_its_writers_until_the_cut() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "backups", async |ns| {
        let class = create_snapshot_class(ns, &[SLOW_CUT]).await?;
        let redis = Redis::new(ns, "cache").replicas(2);
        redis.deploy().await?;
        let backup =
            Backup::write(ns, "nightly", &spec(&Redis::freeze_hooks(NEVER)?, "cache", &class)).await?;
        backup.await_condition(THAWED, "False", "Frozen").await?;
        // Where the freeze is not in force yet the value is there at once, and the next one waits.
        let writer = async |ordinal| loop {
            redis.redis_cli(ordinal, &["INCR", "n"]).await?;
            if backup.status().await?.current_run.is_none_or(|run| run.step != RunStep::Frozen) {
                return anyhow::Ok(());
            }
        };
        let blocked = async || tokio::try_join!(redis.await_blocked_writer(0), redis.await_blocked_writer(1));
        tokio::try_join!(writer(0), writer(1), blocked())?;

        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Completed, "{record:?}");
        let status = backup.status().await?;
        let [point] = &status.recovery_points[..] else { anyhow::bail!("{status:?}") };
        ensure!(point.complete && point.ready_volumes == 2, "{point:?}");
        ensure!(point.consistency == Consistency::Application, "{point:?}");
        Ok(())
    })
    .await
}

/// The documented hooks for a `StatefulSet`, and a snapshot class.
fn spec(hooks: &Hooks, set: &str, class: &str) -> Value {
    let mut spec = hooks.spec().clone();
    spec["statefulSetRef"] = json!({ "name": set });
    spec["volumeSnapshotClassName"] = json!(class);
    spec
}

/// One PostgreSQL `db` that is written to, and a class of the test driver with faults.
async fn with_written_postgres(
    faults: &[(&str, &str)],
    test: impl AsyncFnOnce(&Namespace, &str, &mut WriteLoad) -> Result<()>,
) -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "backups", async |ns| {
        let class = create_snapshot_class(ns, faults).await?;
        let database = Postgres::new(ns, "db");
        database.deploy().await?;
        let mut load = WriteLoad::start(&database, 0).await?;
        load.wait_until(20).await?;
        test(ns, &class, &mut load).await?;
        let (committed, rows) = (load.stop().await?, database.rows(0).await?);
        ensure!(rows.is_unbroken() && rows.count == committed, "{rows:?} of {committed}");
        Ok(())
    })
    .await
}
