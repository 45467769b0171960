//! Does one step, so that doing it again does no harm. It decides nothing: what to do comes from `decide`.

use futures::{StreamExt, stream};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use sts_backup_api::names::{
    EXPIRES_AT_ANNOTATION, FIELD_MANAGER, FOR_CLAIM_ANNOTATION, RECLAIM_POLICY_ANNOTATION, RESTORE_FINALIZER,
    RESTORE_LABEL,
};
use sts_backup_api::restore::{StatefulSetRestore, StatefulSetRestoreStatus};

use super::decide::{VolumeChange, Work, Write};
use super::view::NO_CLAIM;
use crate::error::{Error, Result};

/// How many writes are under way at once.
const PARALLEL_WRITES: usize = 32;

fn api(client: &Client, restore: &StatefulSetRestore) -> Api<StatefulSetRestore> {
    Api::namespaced(client.clone(), &restore.namespace().expect("a StatefulSetRestore is namespaced"))
}

/// The object as it is now; none when it is gone, or another one has its name.
pub(super) async fn refreshed(
    client: &Client,
    restore: &StatefulSetRestore,
) -> Result<Option<StatefulSetRestore>> {
    let found = api(client, restore).get_opt(&restore.name_any()).await;
    let found = found.map_err(Error::request("get the StatefulSetRestore"))?;
    Ok(found.filter(|found| found.uid() == restore.uid()))
}

/// Adds or removes the finalizer that holds the object while it has volumes in hand.
pub(super) async fn set_finalizer(
    client: &Client,
    restore: &StatefulSetRestore,
    wanted: bool,
) -> Result<StatefulSetRestore> {
    let mut finalizers = restore.finalizers().to_vec();
    finalizers.retain(|finalizer| finalizer != RESTORE_FINALIZER);
    if wanted {
        finalizers.push(RESTORE_FINALIZER.to_owned());
    }
    // With the resource version: a finalizer of somebody else must not be lost.
    let metadata = json!({ "resourceVersion": restore.resource_version(), "finalizers": finalizers });
    let patch = Patch::Merge(json!({ "metadata": metadata }));
    let patched = api(client, restore).patch(&restore.name_any(), &PatchParams::default(), &patch).await;
    patched.map_err(Error::request("set the finalizer of the StatefulSetRestore"))
}

/// Writes the status, if nobody has written the object since it was read.
pub(super) async fn write_status(
    client: &Client,
    restore: &StatefulSetRestore,
    status: &StatefulSetRestoreStatus,
) -> Result<StatefulSetRestore> {
    // Not a merge: what is absent from the new status must go.
    let patch = json!([
        { "op": "replace", "path": "/metadata/resourceVersion", "value": restore.resource_version() },
        { "op": "add", "path": "/status", "value": status },
    ]);
    let patch = serde_json::from_value(patch).expect("it is a list of JSON patch operations");
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    let patched = api(client, restore)
        .patch_status(&restore.name_any(), &params, &Patch::<StatefulSetRestore>::Json(patch))
        .await;
    patched.map_err(Error::request("write the status of the StatefulSetRestore"))
}

/// What came of some writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Performed {
    /// All are done.
    Done,
    /// One is refused, and would be again, in these words.
    Refused(String),
}

/// The `StatefulSet` that a restore is of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target<'a> {
    pub(super) namespace: &'a str,
    pub(super) set: &'a str,
}

/// Does some writes at once.
///
/// # Errors
/// The first one that failed; the others are done all the same.
pub(super) async fn perform(
    client: &Client,
    target: Target<'_>,
    work: Work,
    writes: &[Write],
) -> Result<Performed> {
    if work == Work::Stage {
        // All or nothing, as far as can be told: limits, quotas and admission refuse what they would refuse.
        let tried = each(client, target, writes, true).await?;
        if tried != Performed::Done {
            return Ok(tried);
        }
    }
    each(client, target, writes, false).await
}

async fn each(client: &Client, target: Target<'_>, writes: &[Write], dry_run: bool) -> Result<Performed> {
    let write = async |write: &Write| {
        let done = one(client, target, write, dry_run).await;
        crash_point!("after-restore-write");
        done
    };
    let done: Vec<_> = stream::iter(writes).map(write).buffer_unordered(PARALLEL_WRITES).collect().await;
    done.into_iter().try_fold(Performed::Done, |all, one| match (all, one?) {
        (Performed::Done, one) => Ok(one),
        (refused @ Performed::Refused(_), _) => Ok(refused),
    })
}

async fn one(client: &Client, target: Target<'_>, write: &Write, dry_run: bool) -> Result<Performed> {
    let Target { namespace, set } = target;
    match write {
        Write::Volume { name, uid, resource_version, change } => {
            let volumes: Api<PersistentVolume> = Api::all(client.clone());
            let patch = volume_patch(uid, resource_version.as_deref(), change);
            let params =
                PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
            let patched = volumes.patch(name, &params, &Patch::Merge(patch)).await;
            patched.map_err(Error::request("patch the PersistentVolume"))?;
        }
        Write::CreateClaim(claim) => return create(client, namespace, claim, dry_run).await,
        Write::DeleteClaim { name, uid } => {
            let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), namespace);
            done(claims.delete(name, &only(uid)).await, "delete the PersistentVolumeClaim")?;
        }
        Write::DeletePod { name, uid } => {
            let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
            done(pods.delete(name, &only(uid)).await, "delete the Pod")?;
        }
        Write::Scale { uid, resource_version, replicas } => {
            let sets: Api<StatefulSet> = Api::namespaced(client.clone(), namespace);
            let patch = scale_patch(uid, resource_version.as_deref(), *replicas);
            let params =
                PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
            let patched = sets.patch_scale(set, &params, &Patch::Merge(patch)).await;
            done(patched, "scale the StatefulSet")?;
        }
    }
    Ok(Performed::Done)
}

/// Creates a claim; one that exists is judged by the next look.
async fn create(
    client: &Client,
    namespace: &str,
    claim: &PersistentVolumeClaim,
    dry_run: bool,
) -> Result<Performed> {
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), namespace);
    let params = PostParams { dry_run, field_manager: Some(FIELD_MANAGER.to_owned()) };
    let Err(err) = claims.create(&params, claim).await else { return Ok(Performed::Done) };
    if let kube::Error::Api(status) = &err {
        match status.code {
            409 if status.reason == "AlreadyExists" => return Ok(Performed::Done),
            // A quota that is just being counted answers 409; 404 is a namespace that is gone.
            400 | 403 | 422 => return Ok(Performed::Refused(status.message.clone())),
            _ => {}
        }
    }
    Err(Error::request("create the PersistentVolumeClaim")(err))
}

fn only(uid: &str) -> DeleteParams {
    let preconditions = Preconditions { uid: Some(uid.to_owned()), resource_version: None };
    DeleteParams { preconditions: Some(preconditions), ..DeleteParams::background() }
}

/// What is gone is done.
fn done<T>(answer: kube::Result<T>, operation: &'static str) -> Result<()> {
    match answer.map_err(Error::request(operation)) {
        Err(err) if !err.is_not_found() => Err(err),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// The merge patch for a change of a volume.
pub(super) fn volume_patch(uid: &str, resource_version: Option<&str>, change: &VolumeChange) -> Value {
    let mut patch = match change {
        VolumeChange::Keep { restore, policy, claim, expires } => json!({
            "metadata": {
                "labels": { RESTORE_LABEL: restore },
                "annotations": {
                    RECLAIM_POLICY_ANNOTATION: policy,
                    FOR_CLAIM_ANNOTATION: claim,
                    EXPIRES_AT_ANNOTATION: expires.map(|time| time.to_string()),
                },
            },
            "spec": { "persistentVolumeReclaimPolicy": "Retain" },
        }),
        // With no claimRef at all, a claim of any namespace could take it.
        VolumeChange::Arm { namespace, claim } => json!({
            "spec": { "claimRef": {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "namespace": namespace,
                "name": claim,
                "uid": null,
                "resourceVersion": null,
            } },
        }),
        VolumeChange::Disarm => {
            json!({ "spec": { "claimRef": { "uid": NO_CLAIM, "resourceVersion": null } } })
        }
        VolumeChange::Release { policy } => json!({
            "metadata": {
                "labels": { RESTORE_LABEL: null },
                "annotations": {
                    RECLAIM_POLICY_ANNOTATION: null,
                    FOR_CLAIM_ANNOTATION: null,
                    EXPIRES_AT_ANNOTATION: null,
                },
            },
            "spec": { "persistentVolumeReclaimPolicy": policy },
        }),
        VolumeChange::Expire { at, policy } => {
            let mut annotations = json!({ EXPIRES_AT_ANNOTATION: at.to_string() });
            if let Some(policy) = policy {
                annotations[RECLAIM_POLICY_ANNOTATION] = json!(policy);
            }
            json!({ "metadata": { "annotations": annotations } })
        }
    };
    patch["metadata"]["uid"] = json!(uid);
    if let Some(version) = resource_version {
        patch["metadata"]["resourceVersion"] = json!(version);
    }
    patch
}

/// The merge patch for the scale of a `StatefulSet`.
pub(super) fn scale_patch(uid: &str, resource_version: Option<&str>, replicas: i32) -> Value {
    let mut patch = json!({ "metadata": { "uid": uid }, "spec": { "replicas": replicas } });
    if let Some(version) = resource_version {
        patch["metadata"]["resourceVersion"] = json!(version);
    }
    patch
}

#[cfg(test)]
#[path = "perform_tests.rs"]
mod tests;
