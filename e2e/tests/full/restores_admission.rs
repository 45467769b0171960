//! What limits, admission policies and quotas make of the claims that a restore creates: before the pods stop a refusal
//! costs no downtime, and afterwards it is said and waited for.

use std::time::Duration;

use anyhow::{Result, ensure};
use k8s_openapi::api::admissionregistration::v1::{
    ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding,
};
use k8s_openapi::api::core::v1::{LimitRange, PersistentVolume, PersistentVolumeClaim, ResourceQuota};
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use sts_backup_api::names::EXPIRES_AT_ANNOTATION;
use sts_backup_api::restore::RestorePhase;
use sts_backup_e2e::condition::await_condition;
use sts_backup_e2e::kit::claim::restored_claim;
use sts_backup_e2e::kit::poll::until;
use sts_backup_e2e::kit::proxy::is_deletion_of_claim;
use sts_backup_e2e::kit::restore_drill::{LATER, POINT, await_untouched, footprint};
use sts_backup_e2e::kit::{Namespace, RestoreDrill};

use crate::alone_with_restore_drill;

const TIMEOUT: Duration = Duration::from_mins(1);

/// Waits until the API server refuses a claim as a restore stages it; it makes none.
async fn await_claims_refused(ns: &Namespace) -> Result<()> {
    let claims: Api<PersistentVolumeClaim> = ns.api();
    let dry_run = PostParams { dry_run: true, ..PostParams::default() };
    let claim = restored_claim("tried", "none", "stsb-e2e", "16Mi");
    until("claims are refused", async || match claims.create(&dry_run, &claim).await {
        Ok(_) => Ok(false),
        Err(kube::Error::Api(status)) if [403, 422].contains(&status.code) => Ok(true),
        Err(err) => Err(err.into()),
    })
    .await
}

/// Has a restore fail while it stages, with these words, and the application not notice.
async fn ensure_costs_no_downtime(ns: &Namespace, drill: &RestoreDrill, word: &str) -> Result<()> {
    let before = footprint(ns).await?;
    let restore = drill.restore("back", |_| ()).await?;
    let status = restore.await_failed(&[word]).await?;
    ensure!(status.downtime_seconds.is_none(), "{status:?}");
    await_untouched(ns, &before).await?;
    drill.volumes().await_only_those_of_claims().await?;
    drill.ensure_serves(LATER).await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_limit_that_refuses_the_new_claims_costs_no_downtime() -> Result<()> {
    alone_with_restore_drill(
        |app| app.replicas(2),
        async |ns, drill, _| {
            let limits = json!([{ "type": "PersistentVolumeClaim", "max": { "storage": "8Mi" } }]);
            let range = json!({ "metadata": { "name": "small" }, "spec": { "limits": limits } });
            let ranges: Api<LimitRange> = ns.api();
            ranges.create(&PostParams::default(), &serde_json::from_value(range)?).await?;
            await_claims_refused(ns).await?;
            ensure_costs_no_downtime(ns, drill, "maximum storage usage").await
        },
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn an_admission_policy_that_refuses_the_new_claims_costs_no_downtime() -> Result<()> {
    alone_with_restore_drill(
        |app| app,
        async |ns, drill, _| {
            let client = ns.cluster().client();
            let policies: Api<ValidatingAdmissionPolicy> = Api::all(client.clone());
            let bindings: Api<ValidatingAdmissionPolicyBinding> = Api::all(client);
            let name = format!("stsb-e2e-{}", ns.name());
            let rule = json!({
                "apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["persistentvolumeclaims"],
            });
            let says = "no claims from snapshots here";
            let policy = json!({ "metadata": { "name": name }, "spec": {
                "failurePolicy": "Fail",
                "matchConstraints": { "resourceRules": [rule] },
                "validations": [{ "expression": "!has(object.spec.dataSource)", "message": says }],
            } });
            let here = json!({ "matchLabels": { "kubernetes.io/metadata.name": ns.name() } });
            let binding = json!({ "metadata": { "name": name }, "spec": {
                "policyName": name, "validationActions": ["Deny"], "matchResources": { "namespaceSelector": here },
            } });
            policies.create(&PostParams::default(), &serde_json::from_value(policy)?).await?;
            bindings.create(&PostParams::default(), &serde_json::from_value(binding)?).await?;
            await_claims_refused(ns).await?;
            ensure_costs_no_downtime(ns, drill, says).await?;
            bindings.delete(&name, &DeleteParams::default()).await?;
            policies.delete(&name, &DeleteParams::default()).await?;
            Ok(())
        },
    )
    .await
}

/// Sets how many claims a namespace may have, and waits until that counts.
async fn allow_claims(ns: &Namespace, count: i32) -> Result<()> {
    let quotas: Api<ResourceQuota> = ns.api();
    let hard = json!({ "persistentvolumeclaims": count.to_string() });
    let quota = json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": { "name": "claims" }, "spec": { "hard": hard },
    });
    quotas.patch("claims", &PatchParams::apply("e2e").force(), &Patch::Apply(quota)).await?;
    let counts = |quota: &ResourceQuota| {
        let hard = quota.status.as_ref().and_then(|status| status.hard.as_ref());
        hard.and_then(|hard| hard.get("persistentvolumeclaims"))
            .is_some_and(|hard| hard.0 == count.to_string())
    };
    await_condition(&quotas, "claims", "counted", TIMEOUT, counts).await?;
    Ok(())
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_quota_that_is_taken_away_while_claims_are_exchanged_is_named_and_waited_for() -> Result<()> {
    alone_with_restore_drill(
        |app| app.replicas(2),
        async |ns, drill, proxy| {
            allow_claims(ns, 4).await?;
            let held = proxy.hold(is_deletion_of_claim);
            let restore = drill.restore("back", |_| ()).await?;
            held.await_hits(1).await;
            allow_claims(ns, 1).await?;
            drop(held);
            let status = restore.await_saying(&["exceeded quota", "claims are refused"]).await?;
            ensure!(status.phase == Some(RestorePhase::Restoring), "{status:?}");
            restore.await_event("ClaimRefused").await?;

            allow_claims(ns, 4).await?;
            restore.await_completed().await?;
            drill.ensure_serves(POINT).await
        },
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn an_old_volume_that_waits_for_a_claim_is_let_go_of_before_it_expires() -> Result<()> {
    alone_with_restore_drill(
        |app| app,
        async |ns, drill, _| {
            let volumes: Api<PersistentVolume> = Api::all(ns.cluster().client());
            let old = drill.volumes().by_claim().await?["data-app-0"].clone();
            drill.restore("back", |_| ()).await?.await_completed().await?;
            let patch =
                async |patch: Value| volumes.patch(&old, &PatchParams::default(), &Patch::Merge(patch)).await;
            // As whoever brings it back by hand does.
            patch(json!({ "spec": { "claimRef": { "uid": null, "resourceVersion": null } } })).await?;
            let is_available = |volume: &PersistentVolume| {
                volume.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Available")
            };
            await_condition(&volumes, &old, "available", TIMEOUT, is_available).await?;
            let past = json!({ EXPIRES_AT_ANNOTATION: "2026-01-01T00:00:00Z" });
            patch(json!({ "metadata": { "annotations": past } })).await?;
            drill.volumes().await_only_those_of_claims().await?;
            drill.ensure_serves(POINT).await
        },
    )
    .await
}
