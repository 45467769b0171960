//! Does one step, so that doing it again does no harm. It decides nothing: what to do comes from `decide`.

use futures::future::{join_all, try_join_all};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use sts_backup_api::backup::{Hook, OnError, StatefulSetBackup, StatefulSetBackupStatus};
use sts_backup_api::names::{FIELD_MANAGER, RUN_FINALIZER};
use sts_backup_api::run::{CurrentRun, RunPod};
use sts_backup_api::snapshot::VolumeSnapshot;

use super::decide::{ThawAttempt, after_thaw};
use super::error::{Error, Result};
use crate::clock;
use crate::hooks::{self, Command, Outcome};

fn api(client: &Client, backup: &StatefulSetBackup) -> Api<StatefulSetBackup> {
    Api::namespaced(client.clone(), &backup.namespace().expect("a StatefulSetBackup is namespaced"))
}

/// The object as it is now; none when it is gone, or another one has its name.
pub(super) async fn refreshed(
    client: &Client,
    backup: &StatefulSetBackup,
) -> Result<Option<StatefulSetBackup>> {
    let found = api(client, backup).get_opt(&backup.name_any()).await;
    let found = found.map_err(Error::request("get the StatefulSetBackup"))?;
    Ok(found.filter(|found| found.uid() == backup.uid()))
}

/// Adds or removes the finalizer that holds the object while it has a run.
pub(super) async fn set_finalizer(
    client: &Client,
    backup: &StatefulSetBackup,
    wanted: bool,
) -> Result<StatefulSetBackup> {
    let mut finalizers = backup.finalizers().to_vec();
    finalizers.retain(|finalizer| finalizer != RUN_FINALIZER);
    if wanted {
        finalizers.push(RUN_FINALIZER.to_owned());
    }
    // With the resource version: a finalizer of somebody else must not be lost.
    let metadata = json!({ "resourceVersion": backup.resource_version(), "finalizers": finalizers });
    let patch = Patch::Merge(json!({ "metadata": metadata }));
    let patched = api(client, backup).patch(&backup.name_any(), &PatchParams::default(), &patch).await;
    patched.map_err(Error::request("set the finalizer of the StatefulSetBackup"))
}

/// Writes the status, if nobody has written the object since it was read.
pub(super) async fn write_status(
    client: &Client,
    backup: &StatefulSetBackup,
    status: &StatefulSetBackupStatus,
) -> Result<StatefulSetBackup> {
    // Not a merge: what is absent from the new status must go.
    let patch = json!([
        { "op": "replace", "path": "/metadata/resourceVersion", "value": backup.resource_version() },
        { "op": "add", "path": "/status", "value": status },
    ]);
    let patch = serde_json::from_value(patch).expect("it is a list of JSON patch operations");
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    let patched = api(client, backup)
        .patch_status(&backup.name_any(), &params, &Patch::<StatefulSetBackup>::Json(patch))
        .await;
    patched.map_err(Error::request("write the status of the StatefulSetBackup"))
}

/// Runs the postBackupHook in some of the run's pods at once.
pub(super) async fn thaw(
    exec: &Client,
    namespace: &str,
    run: &CurrentRun,
    pods: &[usize],
    newer: Option<&Hook>,
) -> CurrentRun {
    let mut run = run.clone();
    let attempts = pods.iter().filter_map(|at| Some((*at, run.pods.get(*at)?)));
    let attempts = attempts
        .map(async |(at, pod)| (at, thaw_pod(exec, namespace, pod, run.thaw_hook.as_ref(), newer).await));
    let attempts = join_all(attempts).await;
    let on_error = run.thaw_hook.as_ref().map(|hook| hook.on_error).unwrap_or_default();
    let now = clock::now();
    for (at, attempt) in attempts {
        if let Some(pod) = run.pods.get_mut(at) {
            *pod = after_thaw(pod, &attempt, on_error, now);
        }
    }
    run
}

/// Runs the hook that goes with the freeze, and where that fails, the one that the user has written since.
async fn thaw_pod(
    exec: &Client,
    namespace: &str,
    pod: &RunPod,
    hook: Option<&Hook>,
    newer: Option<&Hook>,
) -> ThawAttempt {
    let Some((thaw, hook)) = pod.thaw.as_ref().zip(hook) else { return ThawAttempt::Ran(Outcome::Succeeded) };
    let run = async |hook: &Hook| {
        let Hook { command, .. } = hook;
        let command = Command {
            namespace,
            pod: &pod.name,
            container: &thaw.container,
            argv: command,
            timeout: hook.timeout(),
        };
        hooks::run(exec, &command).await
    };
    let mut outcome = run(hook).await;
    if let (true, Some(newer)) =
        (outcome != Outcome::Succeeded && thaw.failures > 0, newer.filter(|newer| *newer != hook))
    {
        outcome = run(newer).await;
    }
    if outcome != Outcome::Succeeded && hook.on_error == OnError::Fail && is_gone(exec, namespace, pod).await
    {
        return ThawAttempt::PodGone;
    }
    ThawAttempt::Ran(outcome)
}

/// Whether nothing that was frozen can be left of a pod. A question that finds no answer is answered with no.
async fn is_gone(client: &Client, namespace: &str, pod: &RunPod) -> bool {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    match pods.get_opt(&pod.name).await {
        Ok(None) => true,
        Ok(Some(found)) => {
            let phase = found.status.as_ref().and_then(|status| status.phase.as_deref());
            found.uid().as_deref() != Some(&pod.uid) || matches!(phase, Some("Succeeded" | "Failed"))
        }
        Err(_) => false,
    }
}

/// Deletes snapshots; those that are gone are done.
pub(super) async fn delete_snapshots(client: &Client, namespace: &str, names: &[String]) -> Result<()> {
    let snapshots: Api<VolumeSnapshot> = Api::namespaced(client.clone(), namespace);
    let params = DeleteParams::background();
    let delete = async |name: &String| match snapshots
        .delete(name, &params)
        .await
        .map_err(Error::request("delete the VolumeSnapshot"))
    {
        Err(err) if !err.is_not_found() => Err(err),
        Ok(_) | Err(_) => Ok(()),
    };
    try_join_all(names.iter().map(delete)).await?;
    Ok(())
}
