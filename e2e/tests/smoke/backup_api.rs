//! What the API server admits, as kubectl sends it, and what it says of the rest.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use sts_backup_api::backup::StatefulSetBackupStatus;
use sts_backup_api::conditions::{NAMESPACE_NOT_GRANTED, READY};
use sts_backup_api::names::ALLOW_BACKUP_FROM_ANNOTATION;
use sts_backup_api::run::RunResult;
use sts_backup_e2e::kit::class::create_snapshot_class;
use sts_backup_e2e::kit::manifest::{manifest, refusal};
use sts_backup_e2e::kit::{App, Backup, Cluster, Namespace, with_temp_namespace, with_temp_namespaces};

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn what_is_no_sound_backup_is_refused_with_the_reason() -> Result<()> {
    with_namespace(async |ns| {
        let hook = json!({ "command": ["true"] });
        let first = json!({ "command": ["true"], "pods": "First" });
        let many = |what: &str, count: usize| vec![what.to_owned(); count];
        let templates: Vec<_> = (0..101).map(|n| format!("t{n}")).collect();

        for (case, words) in [
            (
                json!({ "volumeSnapshotClass": "a", "volumeSnapshotClassName": "b" }),
                "volumeSnapshotClass is the older spelling of volumeSnapshotClassName: write one of them",
            ),
            (
                json!({ "preBackupHook": hook, "postBackupHook": first }),
                "postBackupHook must run wherever preBackupHook ran: set postBackupHook.pods to All",
            ),
            (json!({ "statefulSetRef": null }), "spec.statefulSetRef: Required value"),
            (json!({ "statefulSetRef": { "namespace": "x" } }), "spec.statefulSetRef.name: Required value"),
            (json!({ "statefulSetRef": { "name": "" } }), "spec.statefulSetRef.name"),
            (json!({ "statefulSetRef": { "name": "x".repeat(254) } }), "spec.statefulSetRef.name: Too long"),
            (json!({ "maxFreezeSeconds": 0 }), "spec.maxFreezeSeconds"),
            (json!({ "maxFreezeSeconds": 3601 }), "spec.maxFreezeSeconds"),
            (json!({ "snapshotTimeoutSeconds": 604_801 }), "spec.snapshotTimeoutSeconds"),
            (json!({ "historyLimit": 0 }), "spec.historyLimit"),
            (json!({ "historyLimit": 101 }), "spec.historyLimit"),
            (json!({ "volumeClaimTemplates": ["a", "a"] }), "spec.volumeClaimTemplates[1]: Duplicate value"),
            (json!({ "volumeClaimTemplates": templates }), "spec.volumeClaimTemplates: Too many"),
            (json!({ "preBackupHook": {} }), "spec.preBackupHook.command: Required value"),
            (json!({ "preBackupHook": { "command": [] } }), "spec.preBackupHook.command"),
            (json!({ "preBackupHook": { "command": "true" } }), "spec.preBackupHook.command"),
            (
                json!({ "preBackupHook": { "command": many("x", 65) } }),
                "spec.preBackupHook.command: Too many",
            ),
            (json!({ "preBackupHook": { "command": ["true"], "timeoutSeconds": 0 } }), "timeoutSeconds"),
            (
                json!({ "preBackupHook": { "command": ["true"], "onError": "Ignore" } }),
                "\"Fail\", \"Continue\"",
            ),
            (json!({ "preBackupHook": { "command": ["true"], "pods": "Last" } }), "\"All\", \"First\""),
        ] {
            let said = refusal(ns, &manifest("nightly", &spec(&case))).await?;
            let said = said.with_context(|| format!("admitted: {case}"))?;
            ensure!(said.contains(words), "{case}: {said}");
        }
        let said = refusal(ns, &manifest(&"x".repeat(64), &spec(&json!({})))).await?;
        let said = said.context("a name of 64 characters was admitted")?;
        ensure!(said.contains("the name is a label value of every snapshot: use at most 63"), "{said}");
        ensure!(refusal(ns, &manifest(&"x".repeat(63), &spec(&json!({})))).await?.is_none());
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn an_unknown_field_is_refused_by_its_name() -> Result<()> {
    with_namespace(async |ns| {
        let hook = json!({ "command": ["true"], "timeout": 5 });
        let manifest = manifest("nightly", &spec(&json!({ "preHook": {}, "preBackupHook": hook })));
        let said = refusal(ns, &manifest).await?.context("unknown fields were admitted")?;
        ensure!(unknown_fields(&said) == ["spec.preBackupHook.timeout", "spec.preHook"].into(), "{said}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn the_target_of_a_backup_cannot_be_changed() -> Result<()> {
    with_namespace(async |ns| {
        let backup = Backup::write(ns, "nightly", &spec(&json!({}))).await?;
        for change in [json!({ "name": "other" }), json!({ "namespace": "elsewhere" })] {
            let patch = Patch::Merge(json!({ "spec": { "statefulSetRef": change } }));
            let changed = backup.api().patch("nightly", &PatchParams::default(), &patch).await;
            let said = changed.err().with_context(|| format!("admitted: {change}"))?.to_string();
            ensure!(said.contains("create another StatefulSetBackup for another StatefulSet"), "{said}");
        }
        let other = Patch::Merge(json!({ "spec": { "maxFreezeSeconds": 5 } }));
        backup.api().patch("nightly", &PatchParams::default(), &other).await?;
        Ok(())
    })
    .await
}

/// What users of the original have in their repositories.
#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn manifests_of_the_original_are_admitted() -> Result<()> {
    with_namespace(async |ns| {
        for (name, spec) in originals("production", "databases", "csi-hostpath-snapclass") {
            let said = refusal(ns, &manifest(name, &spec)).await?;
            ensure!(said.is_none(), "{name}: {said:?}");
        }
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn manifests_of_the_original_do_what_they_say() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespaces(&[&cluster, &cluster], "api", async |namespaces| {
        let [ns, databases] = namespaces else { anyhow::bail!("two namespaces") };
        let class = create_snapshot_class(ns, &[]).await?;
        let postgresql = stand_in(ns, "postgresql");
        let mongodb = stand_in(databases, "mongodb").default_container("mongod");
        let redis = stand_in(ns, "redis");
        for (app, program) in [(&postgresql, "psql"), (&mongodb, "mongosh"), (&redis, "redis-cli")] {
            app.deploy().await?;
            app.sh(0, &format!("printf '{STAND_IN}' >{BIN}/{program} && chmod +x {BIN}/{program}")).await?;
        }

        let mut backups = BTreeMap::new();
        for (name, spec) in originals(ns.name(), databases.name(), &class) {
            backups.insert(name, Backup::write(ns, name, &spec).await?);
        }
        // Without a schedule, so it runs at its creation.
        let by_hand = &backups["my-database-backup"];
        ensure_completed(by_hand, 1, Some(&class)).await?;
        let of_databases = backups["mongodb-backup"].clone().of_namespace(databases);
        of_databases.await_condition(READY, "False", NAMESPACE_NOT_GRANTED).await?;
        databases.annotate(ALLOW_BACKUP_FROM_ANNOTATION, Some(ns.name())).await?;
        for (backup, class) in [
            (&backups["postgres-scheduled-backup"], Some(&class)),
            (&of_databases, Some(&class)),
            (&backups["redis-backup"], None),
        ] {
            let is_announced = |status: &StatefulSetBackupStatus| status.next_schedule_time.is_some();
            backup.await_status("announced", is_announced).await?;
            backup.request("not to wait for the night").await?;
            ensure_completed(backup, 1, class).await?;
        }
        for (app, calls) in [
            (&postgresql, "main: psql -U postgres -c CHECKPOINT\n"),
            (&mongodb, "mongod: mongosh --eval db.fsyncLock()\nmongod: mongosh --eval db.fsyncUnlock()\n"),
            (&redis, "main: redis-cli BGSAVE\n"),
        ] {
            let called = app.sh(0, &format!("cat {BIN}/calls")).await?;
            // The schedule of redis may have come meanwhile.
            ensure!(called.starts_with(calls) && called.replace(calls, "").is_empty(), "{called}");
        }

        for run in 2..=4 {
            by_hand.request(&format!("run {run}")).await?;
            ensure_completed(by_hand, run, Some(&class)).await?;
        }
        let last_three: Vec<_> =
            by_hand.status().await?.history.into_iter().map(|run| run.id).take(3).collect();
        by_hand.await_points(&last_three).await
    })
    .await
}

/// Where programs of an application under test are found first.
const BIN: &str = "/volumes/data";

/// A program that only writes down how it is called.
const STAND_IN: &str = "#!/bin/sh\\necho \"$CONTAINER: ${0##*/} $*\" >>/volumes/data/calls\\n";

/// An application that has none of the programs yet that its hooks call.
fn stand_in(ns: &Namespace, name: &str) -> App {
    App::new(ns, name).env("PATH", &format!("{BIN}:/usr/local/bin:/usr/bin:/bin"))
}

/// The newest of so many runs completed, with snapshots of that class, if it is known.
async fn ensure_completed(backup: &Backup, runs: usize, class: Option<&String>) -> Result<()> {
    let record = backup.await_runs(runs).await?;
    ensure!(record.result == RunResult::Completed, "{}: {record:?}", backup.name());
    let snapshots = backup.snapshots_of(&record.id).await?;
    ensure!(snapshots.len() == 1, "{}: {snapshots:?}", backup.name());
    let of_class = snapshots[0].spec.volume_snapshot_class_name.as_ref();
    ensure!(class.is_none_or(|class| of_class == Some(class)), "{}: {of_class:?}", backup.name());
    Ok(())
}

/// The backups of the original, with the namespaces of most sets and of one that is elsewhere, and a class.
fn originals(home: &str, elsewhere: &str, class: &str) -> [(&'static str, Value); 4] {
    [
        (
            "my-database-backup",
            json!({
                "statefulSetRef": { "name": "postgresql", "namespace": home },
                "retentionPolicy": { "keepLast": 3 },
                "volumeSnapshotClass": class,
            }),
        ),
        (
            "postgres-scheduled-backup",
            json!({
                "statefulSetRef": { "name": "postgresql", "namespace": home },
                "schedule": "0 2 * * *",
                "retentionPolicy": { "keepLast": 7 },
                "preBackupHook": { "command": ["psql", "-U", "postgres", "-c", "CHECKPOINT"] },
                "postBackupHook": { "command": ["echo", "Backup completed"] },
                "volumeSnapshotClass": class,
            }),
        ),
        (
            "mongodb-backup",
            json!({
                "statefulSetRef": { "name": "mongodb", "namespace": elsewhere },
                "schedule": "0 3 * * *",
                "retentionPolicy": { "keepDays": 7 },
                "preBackupHook": {
                    "command": ["mongosh", "--eval", "db.fsyncLock()"],
                    "containerName": "mongod", "timeoutSeconds": 30,
                },
                "postBackupHook": {
                    "command": ["mongosh", "--eval", "db.fsyncUnlock()"], "containerName": "mongod",
                },
                "volumeSnapshotClassName": class,
            }),
        ),
        (
            "redis-backup",
            json!({
                "statefulSetRef": { "name": "redis", "namespace": home },
                "schedule": "*/30 * * * *",
                "retentionPolicy": { "keepLast": 12 },
                "preBackupHook": { "command": ["redis-cli", "BGSAVE"] },
            }),
        ),
    ]
}

/// A sound spec with a change; null removes a field.
fn spec(change: &Value) -> Value {
    let mut spec = json!({ "statefulSetRef": { "name": "app" } });
    for (field, value) in change.as_object().into_iter().flatten() {
        spec[field] = value.clone();
    }
    if let Some(fields) = spec.as_object_mut() {
        fields.retain(|_, value| !value.is_null());
    }
    spec
}

/// The fields that a strict decoding error names.
fn unknown_fields(said: &str) -> BTreeSet<&str> {
    said.split("unknown field \"").skip(1).filter_map(|rest| rest.split('"').next()).collect()
}

async fn with_namespace(test: impl AsyncFnOnce(&Namespace) -> Result<()>) -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "api", test).await
}
