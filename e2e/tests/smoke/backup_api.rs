//! What the API server admits, as kubectl sends it, and what it says of the rest.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use sts_backup_api::run::RunResult;
use sts_backup_e2e::kit::class::create_snapshot_class;
use sts_backup_e2e::kit::manifest::{manifest, refusal};
use sts_backup_e2e::kit::{App, Backup, Cluster, Namespace, with_temp_namespace};

/// Fields of the original operator that no controller honours yet: a manifest with one is refused, not taken for less
/// than it says.
const WAITING: [&str; 2] = ["spec.retentionPolicy", "spec.schedule"];

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
async fn manifests_of_the_original_are_admitted_but_for_the_fields_that_wait() -> Result<()> {
    with_namespace(async |ns| {
        let class = "csi-hostpath-snapclass";
        for (original, waiting) in [
            (
                json!({
                    "statefulSetRef": { "name": "postgresql", "namespace": "default" },
                    "retentionPolicy": { "keepLast": 3 },
                    "volumeSnapshotClass": class,
                }),
                &WAITING[..1],
            ),
            (
                json!({
                    "statefulSetRef": { "name": "postgresql", "namespace": "production" },
                    "schedule": "0 2 * * *",
                    "retentionPolicy": { "keepLast": 7 },
                    "preBackupHook": { "command": ["psql", "-U", "postgres", "-c", "CHECKPOINT"] },
                    "postBackupHook": { "command": ["echo", "Backup completed"] },
                    "volumeSnapshotClass": class,
                }),
                &WAITING,
            ),
            (
                json!({
                    "statefulSetRef": { "name": "mongodb", "namespace": "databases" },
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
                &WAITING,
            ),
            (
                json!({
                    "statefulSetRef": { "name": "redis", "namespace": "cache" },
                    "schedule": "*/30 * * * *",
                    "retentionPolicy": { "keepLast": 12 },
                    "preBackupHook": { "command": ["redis-cli", "BGSAVE"] },
                }),
                &WAITING,
            ),
        ] {
            let said = refusal(ns, &manifest("original", &original)).await?.unwrap_or_default();
            ensure!(unknown_fields(&said) == waiting.iter().copied().collect(), "{original}: {said}");
            let mut without = original;
            for field in ["schedule", "retentionPolicy"] {
                without.as_object_mut().context("a spec is an object")?.remove(field);
            }
            let said = refusal(ns, &manifest("original", &without)).await?;
            ensure!(said.is_none(), "{without}: {said:?}");
        }
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn manifests_of_the_original_do_what_they_say() -> Result<()> {
    with_namespace(async |ns| {
        let class = create_snapshot_class(ns, &[]).await?;
        App::new(ns, "app").deploy().await?;
        let target = json!({ "name": "app", "namespace": ns.name() });
        let older = json!({ "statefulSetRef": target, "volumeSnapshotClass": class });
        let newer = json!({
            "statefulSetRef": target,
            "volumeSnapshotClassName": class,
            "preBackupHook": {
                "command": ["sh", "-c", "sleep 1"], "containerName": "main", "timeoutSeconds": 30,
            },
            "postBackupHook": { "command": ["echo", "Backup completed"] },
        });
        let mut backups = Vec::new();
        for (name, spec) in [("v0.0.2", &older), ("v0.0.7", &newer)] {
            backups.push(Backup::write(ns, name, spec).await?);
        }
        for backup in backups {
            let record = backup.await_runs(1).await?;
            ensure!(record.result == RunResult::Completed, "{record:?}");
            let snapshots = backup.snapshots().await?;
            let classes: Vec<_> =
                snapshots.iter().map(|snapshot| snapshot.spec.volume_snapshot_class_name.as_ref()).collect();
            ensure!(classes == [Some(&class)], "{classes:?}");
        }
        Ok(())
    })
    .await
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
