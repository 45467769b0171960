//! Who may not exec in pods, or delete snapshots, does not get there by a backup's hooks or status, and who may not scale or
//! delete claims not by a restore: the chart's admission policies, as the API server of the first cluster carries them out.

use anyhow::{Context, Result, ensure};
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use sts_backup_api::backup::{GROUP, StatefulSetBackup, StatefulSetRef};
use sts_backup_api::names::{
    ALLOW_CONTESTED_ANNOTATION, APPROVED_PLAN_ANNOTATION, ROLLBACK_REQUESTED_AT_ANNOTATION,
};
use sts_backup_api::restore::{StatefulSetRestore, StatefulSetRestoreSpec};
use sts_backup_e2e::kit::manifest::{create, manifest, refusal_of};
use sts_backup_e2e::kit::{Cluster, Namespace, User, policy, with_temp_namespaces};

const BACKUPS: &str = "statefulsetbackups";
const RESTORES: &str = "statefulsetrestores";

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

/// Nothing is stored of what is admitted.
fn patch_params() -> PatchParams {
    PatchParams { dry_run: true, ..PatchParams::default() }
}

/// What the API server has to say against somebody's write.
fn refused<T>(outcome: kube::Result<T>, what: &str) -> Result<Option<String>> {
    match outcome {
        Ok(_) => Ok(None),
        Err(kube::Error::Api(said)) if said.code == 403 => Ok(Some(said.message)),
        Err(other) => Err(other).with_context(|| what.to_owned()),
    }
}

/// A restore of a `StatefulSet` that does not exist: nothing is touched.
fn restore(target: Option<&Namespace>) -> StatefulSetRestore {
    let spec = StatefulSetRestoreSpec {
        stateful_set_ref: StatefulSetRef {
            name: "absent".to_owned(),
            namespace: target.map(|namespace| namespace.name().to_owned()),
        },
        use_latest_backup: Some(true),
        dry_run: true,
        ..StatefulSetRestoreSpec::new("absent")
    };
    StatefulSetRestore::new("back", spec)
}

fn ensure_asked_to_scale(said: Option<String>, user: &User, namespace: &Namespace) -> Result<()> {
    let said = said.context("a restore was admitted of who may not scale")?;
    let reason = format!(
        "scales StatefulSet absent of namespace {}, where {} may not patch statefulsets/scale.apps",
        namespace.name(),
        user.name()
    );
    ensure!(said.contains(&reason), "{said}");
    Ok(())
}

fn ensure_asked_to_delete_claims(said: Option<String>, user: &User, namespace: &Namespace) -> Result<()> {
    let said = said.context("a restore was admitted of who may not delete claims")?;
    let reason = format!(
        "deletes claims of namespace {} and makes them again, where {} may not delete persistentvolumeclaims",
        namespace.name(),
        user.name()
    );
    ensure!(said.contains(&reason), "{said}");
    Ok(())
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn restores_are_admitted_only_of_who_may_scale_and_delete_claims_there() -> Result<()> {
    with_writer(async |writer, own, other| {
        writer.grant(own, GROUP, RESTORES, &["create"]).await?;
        let restores: Api<StatefulSetRestore> = Api::namespaced(writer.client(), own.name());
        let dry_run = PostParams { dry_run: true, ..PostParams::default() };
        let refusal = async |target: Option<&Namespace>| {
            refused(restores.create(&dry_run, &restore(target)).await, "create a restore")
        };

        ensure_asked_to_scale(refusal(None).await?, writer, own)?;
        writer.grant(own, "apps", "statefulsets/scale", &["patch"]).await?;
        ensure_asked_to_delete_claims(refusal(None).await?, writer, own)?;
        writer.grant(own, "", "persistentvolumeclaims", &["delete"]).await?;
        for target in [None, Some(own)] {
            let said = refusal(target).await?;
            ensure!(said.is_none(), "{said:?}");
        }

        ensure_asked_to_scale(refusal(Some(other)).await?, writer, other)?;
        writer.grant(other, "apps", "statefulsets/scale", &["patch"]).await?;
        ensure_asked_to_delete_claims(refusal(Some(other)).await?, writer, other)?;
        writer.grant(other, "", "persistentvolumeclaims", &["delete"]).await?;
        let said = refusal(Some(other)).await?;
        ensure!(said.is_none(), "{said:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn who_may_not_scale_neither_approves_a_restore_nor_rolls_it_back() -> Result<()> {
    with_writer(async |writer, own, _| {
        own.api().create(&PostParams::default(), &restore(None)).await?;
        writer.grant(own, GROUP, RESTORES, &["get", "patch"]).await?;
        let restores: Api<StatefulSetRestore> = Api::namespaced(writer.client(), own.name());
        let refusal = async |metadata: Value| {
            let patch = Patch::Merge(json!({ "metadata": metadata }));
            let outcome = restores.patch("back", &patch_params(), &patch).await;
            refused(outcome, &metadata.to_string())
        };
        let orders = [APPROVED_PLAN_ANNOTATION, ALLOW_CONTESTED_ANNOTATION, ROLLBACK_REQUESTED_AT_ANNOTATION]
            .map(|annotation| json!({ "annotations": { annotation: "true" } }));

        for harmless in
            [json!({ "annotations": { "team": "shop" } }), json!({ "labels": { "team": "shop" } })]
        {
            let said = refusal(harmless).await?;
            ensure!(said.is_none(), "{said:?}");
        }
        for order in &orders {
            ensure_asked_to_scale(refusal(order.clone()).await?, writer, own)?;
        }
        writer.grant(own, "apps", "statefulsets/scale", &["patch"]).await?;
        for order in &orders {
            ensure_asked_to_delete_claims(refusal(order.clone()).await?, writer, own)?;
        }
        writer.grant(own, "", "persistentvolumeclaims", &["delete"]).await?;
        for order in orders {
            let said = refusal(order).await?;
            ensure!(said.is_none(), "{said:?}");
        }
        Ok(())
    })
    .await
}

/// Claims are given the volumes that the status names.
#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn the_status_of_a_restore_is_admitted_only_of_who_may_patch_volumes() -> Result<()> {
    with_writer(async |writer, own, _| {
        own.api().create(&PostParams::default(), &restore(None)).await?;
        writer.grant(own, GROUP, "statefulsetrestores/status", &["patch"]).await?;
        // All that the writer of a restore is asked for is not enough.
        writer.grant(own, "apps", "statefulsets/scale", &["patch"]).await?;
        writer.grant(own, "", "persistentvolumeclaims", &["delete"]).await?;
        let restores: Api<StatefulSetRestore> = Api::namespaced(writer.client(), own.name());
        let swap = json!({ "swap": {
            "step": "Swapping", "stepSince": "2026-01-02T03:04:05.000000Z", "toward": "Restored",
            "statefulSetUid": "any", "replicas": 1, "replicasMeanwhile": 0, "volumes": [],
        } });
        let refusal = async |status: &Value| {
            let patch = Patch::Merge(json!({ "status": status }));
            refused(restores.patch_status("back", &patch_params(), &patch).await, &status.to_string())
        };

        let statuses = [swap, json!({ "rollbackUntil": "2126-01-02T03:04:05Z" })];
        for status in &statuses {
            let said = refusal(status).await?.with_context(|| format!("{status} was admitted"))?;
            ensure!(said.contains(&format!("{} may not patch persistentvolumes", writer.name())), "{said}");
        }
        writer.grant_everywhere(own, "", "persistentvolumes", &["patch"]).await?;
        for status in &statuses {
            let said = refusal(status).await?;
            ensure!(said.is_none(), "{said:?}");
        }
        Ok(())
    })
    .await
}
