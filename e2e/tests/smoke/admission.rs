//! Who may not exec in pods, or delete snapshots, does not get there by a backup's hooks or status: the chart's admission
//! policies, as the API server of the first cluster carries them out.

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

/// What a run still owes to pods is run from the status, and the snapshots that it names are deleted.
#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn the_status_of_runs_is_admitted_only_of_who_may_do_what_the_agent_does_by_it() -> Result<()> {
    with_writer(async |writer, own, _| {
        create(own, &backup(None, &json!({}))).await?;
        writer.grant(own, GROUP, "statefulsetbackups/status", &["patch"]).await?;
        let backups: Api<StatefulSetBackup> = Api::namespaced(writer.client(), own.name());
        let run = |more: Value| {
            let mut run = json!({
                "id": "20260102-030405-0badcafe",
                "slot": { "due": "Request", "value": "now", "attempt": 1 },
                "started": "2026-01-02T03:04:05.000000Z",
            });
            for (key, value) in more.as_object().into_iter().flatten() {
                run[key] = value.clone();
            }
            run
        };
        let cleaning = json!({ "currentRun": run(json!({ "step": "CleaningUp" })) });
        let failed = json!({ "durationMs": 1, "result": "Failed", "reason": "Failed", "message": "" });
        let history = json!({ "history": [run(failed)] });
        let owed = json!({ "step": "Thawing", "pods": [], "thawHook": { "command": ["id"] } });
        let owed = json!({ "currentRun": run(owed) });
        // Refused as a whole; and nothing is stored of what is admitted.
        let dry_run = PatchParams { dry_run: true, ..PatchParams::default() };
        let refusal = async |status: &Value| -> Result<Option<String>> {
            let patch = Patch::Merge(json!({ "status": status }));
            match backups.patch_status("nightly", &dry_run, &patch).await {
                Ok(_) => Ok(None),
                Err(kube::Error::Api(said)) if said.code == 403 => Ok(Some(said.message)),
                Err(other) => Err(other).with_context(|| status.to_string()),
            }
        };

        let said = refusal(&json!({ "missedRuns": 1 })).await?;
        ensure!(said.is_none(), "no run, no question: {said:?}");
        for status in [&cleaning, &history, &owed] {
            let said = refusal(status).await?.with_context(|| format!("{status} was admitted"))?;
            let reason = format!(
                "in namespace {}, where {} may not delete volumesnapshots.snapshot.storage.k8s.io",
                own.name(),
                writer.name()
            );
            ensure!(said.contains(&reason), "{said}");
        }

        writer.grant(own, "snapshot.storage.k8s.io", "volumesnapshots", &["delete"]).await?;
        for status in [&cleaning, &history] {
            let said = refusal(status).await?;
            ensure!(said.is_none(), "{said:?}");
        }
        ensure_names(refusal(&owed).await?, writer, own)?;

        writer.grant(own, "", "pods/exec", &["create"]).await?;
        let said = refusal(&owed).await?;
        ensure!(said.is_none(), "{said:?}");
        Ok(())
    })
    .await
}
