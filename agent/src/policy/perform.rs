//! Does one step, so that doing it again does no harm. It decides nothing: what to do comes from `decide`.

use std::time::Duration;

use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Client, Resource, ResourceExt};
use serde_json::{Value, json};
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::names::{FIELD_MANAGER, TEMPLATE_HASH_ANNOTATION};
use sts_backup_api::policy::{StatefulSetBackupPolicy, StatefulSetBackupPolicyStatus};
use tokio::time::timeout;

use super::decide::{Step, Wanted};
use super::observe::PolicyFacts;
use crate::error::{Error, Result};

/// How long a write may take.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// What came of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The object is as wanted.
    Done,
    /// The write changed nothing: what was to be created is there already, or an update does not take.
    Unchanged,
    /// The object is not the one that was looked at.
    Outdated,
}

/// Does a step.
pub(super) async fn perform(client: &Client, policy: &PolicyFacts, step: &Step) -> Result<Outcome> {
    let done = async {
        let (namespace, name) = step.key();
        let backups: Api<StatefulSetBackup> = Api::namespaced(client.clone(), namespace);
        match step {
            Step::Create(wanted) => create(&backups, policy, wanted).await,
            Step::Update { wanted, uid, version } => {
                let applied = apply(&backups, &manifest(policy, wanted, Some(uid)), true).await;
                // An apply that changes nothing leaves the version as it is.
                let is_same = matches!(&applied, Ok(now) if now.is_some() && now == version);
                if is_same {
                    return Ok(Outcome::Unchanged);
                }
                outdated_if(applied.map(drop), Error::is_conflict)
            }
            Step::Delete { uid, version, .. } => {
                let this = Preconditions { uid: Some(uid.clone()), resource_version: version.clone() };
                let params = DeleteParams::background().preconditions(this);
                let deleted = backups.delete(name, &params).await.map(drop);
                let deleted = deleted.map_err(Error::request("delete the StatefulSetBackup"));
                outdated_if(deleted, |err| err.is_not_found() || err.is_conflict())
            }
        }
    };
    let late = Error::NoAnswer { operation: "write the StatefulSetBackup" };
    timeout(WRITE_TIMEOUT, done).await.unwrap_or(Err(late))
}

/// Creates a backup by applying it: as what it says is then owned as by later applies, these can take it away. Nobody
/// can apply only what does not exist, so it is looked at before.
async fn create(backups: &Api<StatefulSetBackup>, policy: &PolicyFacts, wanted: &Wanted) -> Result<Outcome> {
    let found = backups.get_metadata_opt(&wanted.key.1).await;
    let found = found.map_err(Error::request("get the StatefulSetBackup"))?;
    if let Some(found) = found {
        let is_ours = found.owner_references().iter().any(|owner| owner.uid == policy.uid);
        let is_there = is_ours && found.metadata.deletion_timestamp.is_none();
        return Ok(if is_there { Outcome::Unchanged } else { Outcome::Outdated });
    }
    // Not by force: what somebody made meanwhile is theirs.
    let applied = apply(backups, &manifest(policy, wanted, None), false).await;
    outdated_if(applied.map(drop), Error::is_conflict)
}

/// Applies a backup; says which version of it there is now.
async fn apply(backups: &Api<StatefulSetBackup>, manifest: &Value, force: bool) -> Result<Option<String>> {
    let params = PatchParams { force, ..PatchParams::apply(FIELD_MANAGER) };
    let name = manifest["metadata"]["name"].as_str().unwrap_or_default();
    let applied = backups.patch_metadata(name, &params, &Patch::Apply(manifest)).await;
    let applied = applied.map_err(Error::request("apply the StatefulSetBackup"))?;
    Ok(applied.resource_version())
}

fn outdated_if(done: Result<()>, is_outdated: impl Fn(&Error) -> bool) -> Result<Outcome> {
    match done {
        Ok(()) => Ok(Outcome::Done),
        Err(err) if is_outdated(&err) => Ok(Outcome::Outdated),
        Err(err) => Err(err),
    }
}

/// A backup as it is applied. With a uid: only to that object.
pub(super) fn manifest(policy: &PolicyFacts, wanted: &Wanted, uid: Option<&str>) -> Value {
    let Wanted { key: (namespace, name), labels, spec: _, hash } = wanted;
    let mut metadata = json!({
        "name": name,
        "namespace": namespace,
        "labels": labels,
        "annotations": { TEMPLATE_HASH_ANNOTATION: hash },
        "ownerReferences": [{
            "apiVersion": StatefulSetBackupPolicy::api_version(&()),
            "kind": StatefulSetBackupPolicy::kind(&()),
            "name": policy.name,
            "uid": policy.uid,
            "controller": true,
        }],
    });
    if let Some(uid) = uid {
        metadata["uid"] = json!(uid);
    }
    json!({
        "apiVersion": StatefulSetBackup::api_version(&()),
        "kind": StatefulSetBackup::kind(&()),
        "metadata": metadata,
        "spec": wanted.applied_spec(),
    })
}

/// Writes the status, if nobody has written the object since it was seen.
pub(super) async fn write_status(
    client: &Client,
    policy: &StatefulSetBackupPolicy,
    status: &StatefulSetBackupPolicyStatus,
) -> Result<Outcome> {
    // Not a merge: what is absent from the new status must go.
    let patch = json!([
        { "op": "replace", "path": "/metadata/resourceVersion", "value": policy.resource_version() },
        { "op": "add", "path": "/status", "value": status },
    ]);
    let patch = serde_json::from_value(patch).expect("it is a list of JSON patch operations");
    let patch = Patch::<StatefulSetBackupPolicy>::Json(patch);
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    let policies: Api<StatefulSetBackupPolicy> = Api::all(client.clone());
    let name = policy.name_any();
    let written = policies.patch_status(&name, &params, &patch);
    let operation = "write the status of the StatefulSetBackupPolicy";
    let written = timeout(WRITE_TIMEOUT, written).await.map_err(|_| Error::NoAnswer { operation })?;
    let written = written.map(drop).map_err(Error::request(operation));
    outdated_if(written, |err| err.is_conflict() || err.is_not_found())
}

#[cfg(test)]
#[path = "perform_tests.rs"]
mod tests;
