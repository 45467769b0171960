//! Does one step, so that doing it again does no harm. It decides nothing: what to do comes from `decide`.

use std::time::Duration;

use futures::future::join_all;
use futures::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use sts_backup_api::backup::{Hook, StatefulSetBackup, StatefulSetBackupStatus};
use sts_backup_api::names::{FIELD_MANAGER, RUN_FINALIZER};
use sts_backup_api::run::{CurrentRun, RunPod};
use sts_backup_api::snapshot::VolumeSnapshot;
use sts_backup_service::clock;
use tokio::time::timeout;
use tracing::warn;

use super::context::Context;
use super::decide::{Doomed, START_WITHIN, ThawAttempt, after_thaw, later};
use crate::error::{Error, Result};
use crate::hooks::{self, Command, Outcome};

/// How long a look at a single object may take while pods may be frozen.
pub(super) const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

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
///
/// `newer` is the hook as the user has it by now. It is tried where the one of the freeze has failed before, and it says
/// whether failures still matter: so a hook that can never succeed can be corrected.
///
/// Once another replica may lead, nothing is run: it thaws, and may have frozen the pods again by now.
pub(super) async fn thaw(
    cx: &Context,
    namespace: &str,
    run: &CurrentRun,
    pods: &[usize],
    newer: Option<&Hook>,
) -> CurrentRun {
    let mut run = run.clone();
    let Some(hook) = run.thaw_hook.clone() else { return run };
    if cx.leadership.remaining().is_zero() {
        warn!(run = %run.id, "the thaw is left to the next leader");
        return run;
    }
    let exec = &cx.exec;
    let attempts = pods.iter().filter_map(|at| Some((*at, run.pods.get(*at)?)));
    let since = run.frozen_since.as_ref().unwrap_or(&run.started).0;
    let attempts = attempts.map(async |(at, pod)| {
        let newer =
            newer.filter(|newer| **newer != hook && pod.thaw.as_ref().is_some_and(|thaw| thaw.failures > 0));
        let attempt = thaw_pod(exec, namespace, pod, &hook, newer, since).await;
        (at, after_thaw(pod, &attempt, newer.unwrap_or(&hook), clock::now()))
    });
    for (at, thawed) in join_all(attempts).await {
        run.pods[at] = thawed;
    }
    run
}

async fn thaw_pod(
    exec: &Client,
    namespace: &str,
    pod: &RunPod,
    hook: &Hook,
    newer: Option<&Hook>,
    since: Timestamp,
) -> ThawAttempt {
    let Some(thaw) = &pod.thaw else { return ThawAttempt::PodGone };
    let run = async |hook: &Hook, container: &str| {
        let timeout = hook.timeout();
        let command = Command { namespace, pod: &pod.name, container, argv: &hook.command, timeout };
        hooks::run(exec, &command).await
    };
    let mut outcome = run(hook, &thaw.container).await;
    if let (true, Some(newer)) = (outcome != Outcome::Succeeded, newer) {
        outcome = run(newer, newer.container_name.as_deref().unwrap_or(&thaw.container)).await;
    }
    if outcome != Outcome::Succeeded && is_gone(exec, namespace, pod, since).await {
        return ThawAttempt::PodGone;
    }
    ThawAttempt::Ran(outcome)
}

/// A pod as it is now, or nothing if there is no answer in time; `Some(None)`: it does not exist.
pub(super) async fn find_pod(client: &Client, namespace: &str, name: &str) -> Option<Option<Pod>> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    timeout(LOOK_TIMEOUT, pods.get_opt(name)).await.ok()?.ok()
}

/// Whether nothing that was frozen can be left of a pod. A question that finds no answer is answered with no.
async fn is_gone(client: &Client, namespace: &str, pod: &RunPod, since: Timestamp) -> bool {
    let Some(found) = find_pod(client, namespace, &pod.name).await else { return false };
    let Some(found) = found else { return true };
    let phase = found.status.as_ref().and_then(|status| status.phase.as_deref());
    // Commands go to a pod by its name: one that replaced ours before the hooks started may be the frozen one.
    let came_later = found.creation_timestamp().is_some_and(|created| created.0 > later(since, START_WITHIN));
    (found.uid().as_deref() != Some(&pod.uid) && came_later) || matches!(phase, Some("Succeeded" | "Failed"))
}

/// How many snapshots are deleted at once.
const PARALLEL_DELETIONS: usize = 16;

/// Deletes snapshots that are as they were when that was decided; those that are gone are done.
pub(super) async fn prune(client: &Client, namespace: &str, doomed: &[Doomed]) -> Result<()> {
    let snapshots: Api<VolumeSnapshot> = Api::namespaced(client.clone(), namespace);
    let delete = async |Doomed { name, uid, resource_version }: &Doomed| {
        let preconditions = Preconditions { uid: uid.clone(), resource_version: resource_version.clone() };
        let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::background() };
        done(snapshots.delete(name, &params).await)
    };
    // One first: where somebody holds or uses the point since, it stays whole.
    let Some((first, others)) = doomed.split_first() else { return Ok(()) };
    delete(first).await?;
    stream::iter(others).map(delete).buffer_unordered(PARALLEL_DELETIONS).try_collect().await
}

fn done<T>(deleted: kube::Result<T>) -> Result<()> {
    match deleted.map_err(Error::request("delete the VolumeSnapshot")) {
        Err(err) if !err.is_not_found() => Err(err),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Deletes snapshots; those that are gone are done.
pub(super) async fn delete_snapshots(client: &Client, namespace: &str, names: &[String]) -> Result<()> {
    let snapshots: Api<VolumeSnapshot> = Api::namespaced(client.clone(), namespace);
    let params = DeleteParams::background();
    let delete = async |name: &String| done(snapshots.delete(name, &params).await);
    stream::iter(names).map(delete).buffer_unordered(PARALLEL_DELETIONS).try_collect().await
}
