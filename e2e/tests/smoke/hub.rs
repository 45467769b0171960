//! The hub's program, as a pipeline runs it that checks fleet policies.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sts_backup_e2e::harness::paths::Paths;
use sts_backup_e2e::kit::manifest::refusal;
use sts_backup_e2e::kit::policy::manifest;
use sts_backup_e2e::kit::{Cluster, with_temp_namespace};
use tokio::process::Command;

/// What the hub says against a fleet policy that hands out this spec; nothing when it can be used.
async fn objection(spec: &Value) -> Result<Option<String>> {
    let directory = tempfile::tempdir()?;
    let policy = json!({
        "apiVersion": "hub.sts-backup.io/v1alpha1",
        "kind": "FleetPolicy",
        "metadata": { "name": "gold" },
        "spec": { "policy": spec },
    });
    // JSON is YAML.
    std::fs::write(directory.path().join("gold.yaml"), policy.to_string())?;
    let mut command = Command::new(Paths::find()?.program("sts-backup-hub"));
    let output = command.arg("check").arg("--policies").arg(directory.path()).output();
    let output = output.await.context("start the hub's program")?;
    let said = String::from_utf8(output.stderr)?;
    match output.status.code() {
        Some(0) => Ok(None),
        Some(2) => Ok(Some(said)),
        code => anyhow::bail!("it ended with {code:?}: {said}"),
    }
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn the_hub_and_a_cluster_say_the_same_of_a_policy() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "hub", async |ns| {
        let labels: BTreeMap<_, _> = (0..33).map(|at| (format!("l{at}"), "x")).collect();
        let hook = json!({ "command": ["true"] });
        let first = json!({ "command": ["true"], "pods": "First" });
        let of_template = |fields: Value| json!({ "template": { "spec": fields } });
        let with = |field: &str, value: Value| {
            let mut spec = of_template(json!({}));
            spec[field] = value;
            spec
        };
        let usable = [
            of_template(json!({})),
            of_template(json!({ "schedule": "0 2 * * *", "timeZone": "Europe/Paris", "spread": "5m" })),
            of_template(json!({ "preBackupHook": hook, "postBackupHook": hook })),
            of_template(json!({ "retentionPolicy": { "keepLast": 3, "keepDaily": 7 }, "historyLimit": 100 })),
            with("exclude", json!(["scratch", "shop/cache"])),
            with("rpo", json!("26h")),
            with("rpo", Value::Null),
            with("namespaceSelector", json!({ "matchExpressions": [{ "key": "a", "operator": "Exists" }] })),
            json!({ "template": { "hookProfile": "postgres", "labels": { "team": "dba" }, "spec": {} } }),
        ];
        let unusable = [
            json!({}),
            json!({ "template": {} }),
            json!({ "template": { "spec": {}, "labels": labels } }),
            json!({ "template": { "hookProfile": "postgres", "spec": { "preBackupHook": hook } } }),
            with("templates", json!({})),
            with("exclude", json!(["scratch", "scratch"])),
            with("exclude", json!(["a/b/c"])),
            with("rpo", json!("a day")),
            with("rpo", json!(26)),
            with("priority", json!(1_000_001)),
            with("priority", json!(0.5)),
            with("namespaceSelector", json!({ "matchLabel": {} })),
            with("namespaceSelector", json!({ "matchExpressions": [{ "key": "a" }] })),
            of_template(json!({ "statefulSetRef": { "name": "db" } })),
            of_template(json!({ "maxFreezeSeconds": 0 })),
            of_template(json!({ "historyLimit": 101 })),
            of_template(json!({ "volumeClaimTemplates": ["a", "a"] })),
            of_template(json!({ "volumeSnapshotClass": "a", "volumeSnapshotClassName": "b" })),
            of_template(json!({ "preBackupHook": { "command": [] } })),
            of_template(json!({ "preBackupHook": { "command": ["true"], "timeout": 5 } })),
            of_template(json!({ "preBackupHook": { "command": ["true"], "onError": "Ignore" } })),
            of_template(json!({ "preBackupHook": hook, "postBackupHook": first })),
            of_template(json!({ "retentionPolicy": { "keepLast": -1 } })),
            of_template(json!({ "suspend": "yes" })),
        ];
        for (spec, is_usable) in
            usable.iter().map(|spec| (spec, true)).chain(unusable.iter().map(|spec| (spec, false)))
        {
            let cluster = refusal(ns, &manifest(ns, "gold", spec)).await?;
            ensure!(cluster.is_none() == is_usable, "a cluster says of {spec}: {cluster:?}");
            let hub = objection(spec).await?;
            ensure!(hub.is_none() == is_usable, "the hub says of {spec}: {hub:?}");
        }
        Ok(())
    })
    .await
}
