//! Who may not exec in pods does not get there by a backup's hooks: the chart's admission policies, as the API server
//! of the first cluster carries them out.

use anyhow::{Context, Result, ensure};
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use sts_backup_api::backup::{GROUP, StatefulSetBackup};
use sts_backup_e2e::kit::manifest::{create, manifest, refusal_of};
use sts_backup_e2e::kit::{Cluster, Namespace, User, policy, with_temp_namespaces};

const BACKUPS: &str = "statefulsetbackups";

/// A backup of a `StatefulSet` that does not exist: nothing runs.
fn backup(namespace: Option<&Namespace>, more: &Value) -> Value {
    let mut spec = json!({ "statefulSetRef": { "name": "absent" } });
    if let Some(namespace) = namespace {
        spec["statefulSetRef"]["namespace"] = json!(namespace.name());
    }
    for (key, value) in more.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    manifest("nightly", &spec)
}

fn hook(name: &str) -> Value {
    json!({ name: { "command": ["true"] } })
}

/// Two namespaces, and a user who may write backups in the first.
async fn with_writer(test: impl AsyncFnOnce(&User, &Namespace, &Namespace) -> Result<()>) -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespaces(&[&cluster, &cluster], "admission", async |namespaces| {
        let [own, other] = namespaces else { anyhow::bail!("two were asked for") };
        let writer = User::new(&cluster, &format!("writer-{}", own.name())).await?;
        writer.grant(own, GROUP, BACKUPS, &["get", "create", "patch"]).await?;
        test(&writer, own, other).await
    })
    .await
}

fn ensure_names(said: Option<String>, user: &User, namespace: &Namespace) -> Result<()> {
    let said = said.context("hooks were admitted of who may not exec")?;
    let reason = format!(
        "in the pods of namespace {}, where {} may not create pods/exec",
        namespace.name(),
        user.name()
    );
    ensure!(said.contains(&reason), "{said}");
    Ok(())
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn hooks_are_admitted_only_of_who_may_exec_in_the_pods_they_run_in() -> Result<()> {
    with_writer(async |writer, own, other| {
        ensure!(refusal_of(writer, own, &backup(None, &json!({}))).await?.is_none(), "no hooks, no question");
        for name in ["preBackupHook", "postBackupHook"] {
            let said = refusal_of(writer, own, &backup(None, &hook(name))).await?;
            ensure_names(said, writer, own)?;
        }

        writer.grant(own, "", "pods/exec", &["create"]).await?;
        let hooked = hook("preBackupHook");
        for target in [None, Some(own)] {
            let said = refusal_of(writer, own, &backup(target, &hooked)).await?;
            ensure!(said.is_none(), "{said:?}");
        }
        let said = refusal_of(writer, own, &backup(Some(other), &hooked)).await?;
        ensure_names(said, writer, other)?;

        writer.grant(other, "", "pods/exec", &["create"]).await?;
        let said = refusal_of(writer, own, &backup(Some(other), &hooked)).await?;
        ensure!(said.is_none(), "{said:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn who_may_not_exec_changes_no_hooks_but_all_else_of_a_backup() -> Result<()> {
    with_writer(async |writer, own, _| {
        let hooked = hook("preBackupHook");
        create(own, &backup(None, &hooked)).await?;
        let backups: Api<StatefulSetBackup> = Api::namespaced(writer.client(), own.name());
        let patch = async |patch: Value| {
            backups.patch("nightly", &PatchParams::default(), &Patch::Merge(patch)).await
        };

        for change in [
            json!({ "metadata": { "annotations": { "backup.sts-backup.io/requested-at": "now" } } }),
            json!({ "metadata": { "labels": { "team": "shop" } } }),
            json!({ "spec": { "suspend": true } }),
            json!({ "spec": hooked }),
        ] {
            patch(change.clone()).await.with_context(|| format!("{change} was refused"))?;
        }
        for change in [
            json!({ "spec": { "preBackupHook": { "command": ["id"] } } }),
            json!({ "spec": { "preBackupHook": { "containerName": "other" } } }),
            json!({ "spec": hook("postBackupHook") }),
        ] {
            match patch(change.clone()).await {
                Err(kube::Error::Api(status)) if status.code == 403 => {
                    ensure_names(Some(status.message), writer, own)?;
                }
                other => anyhow::bail!("{change} was answered by {other:?}"),
            }
        }
        let without = json!({ "spec": { "preBackupHook": null } });
        patch(without).await.context("hooks were not to be taken away")?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn hooks_of_a_policy_are_admitted_only_of_who_may_exec_everywhere() -> Result<()> {
    with_writer(async |writer, own, _| {
        writer.grant_everywhere(own, GROUP, "statefulsetbackuppolicies", &["create"]).await?;
        let of = |template: &Value| policy::manifest(own, own.name(), &json!({ "template": template }));
        let hooked = of(&json!({ "spec": hook("preBackupHook") }));
        for without in [json!({ "spec": {} }), json!({ "spec": {}, "hookProfile": "postgres" })] {
            let said = refusal_of(writer, own, &of(&without)).await?;
            ensure!(said.is_none(), "{said:?}");
        }
        writer.grant(own, "", "pods/exec", &["create"]).await?;
        let said = refusal_of(writer, own, &hooked).await?.context("one namespace is not all")?;
        ensure!(
            said.contains(&format!("{} may not create pods/exec in all namespaces", writer.name())),
            "{said}"
        );

        writer.grant_everywhere(own, "", "pods/exec", &["create"]).await?;
        let said = refusal_of(writer, own, &hooked).await?;
        ensure!(said.is_none(), "{said:?}");
        Ok(())
    })
    .await
}

/// What a run still owes to pods is run from the status.
#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn who_may_not_exec_cannot_write_into_the_status_what_is_run_in_pods() -> Result<()> {
    with_writer(async |writer, own, _| {
        create(own, &backup(None, &json!({}))).await?;
        writer.grant(own, GROUP, "statefulsetbackups/status", &["patch"]).await?;
        let backups: Api<StatefulSetBackup> = Api::namespaced(writer.client(), own.name());
        let owed = json!({ "status": { "currentRun": {
            "id": "20260102-030405-0badcafe",
            "slot": { "due": "Request", "value": "now", "attempt": 1 },
            "started": "2026-01-02T03:04:05.000000Z",
            "step": "Thawing",
            "pods": [],
            "thawHook": { "command": ["id"] },
        } } });
        // Refused as a whole, and nothing of it is stored.
        let dry_run = PatchParams { dry_run: true, ..PatchParams::default() };
        let answer = backups.patch_status("nightly", &dry_run, &Patch::Merge(&owed)).await;
        match answer {
            Err(kube::Error::Api(status)) if status.code == 403 => {
                ensure_names(Some(status.message), writer, own)
            }
            other => anyhow::bail!("it was answered by {other:?}"),
        }
    })
    .await
}
