//! Lets volumes go that restores have left over, when their time has come. Driven by the volumes alone: restores and
//! namespaces may be gone by then.

use std::pin::pin;
use std::time::Duration;

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::api::{Patch, PatchParams};
use kube::runtime::reflector;
use kube::runtime::watcher::Config as WatcherConfig;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use sts_backup_api::names::{FIELD_MANAGER, RESTORE_LABEL};
use sts_backup_service::{clock, telemetry};
use tracing::{info, warn};

use super::context::Context;
use super::decide::VolumeChange;
use super::facts::VolumeFacts;
use super::perform::volume_patch;
use crate::error::{Error, Result};
use crate::events::Note;

/// How soon a volume is looked at again that could not be changed.
const RETRY: Duration = Duration::from_secs(30);

/// The longest pause between two looks.
const LONGEST_PAUSE: Duration = Duration::from_hours(1);

/// How long one look at a volume may take.
const LOOK_TIMEOUT: Duration = Duration::from_secs(30);

/// Lets volumes go, until it is dropped.
pub(super) async fn run(cx: &Context) {
    let volumes: Api<PersistentVolume> = Api::all(cx.client.clone());
    let (store, writer) = reflector::store();
    let labelled = WatcherConfig::default().labels(RESTORE_LABEL);
    let changes = watcher(volumes.clone(), labelled)
        .default_backoff()
        .modify(|volume| volume.metadata.managed_fields = None);
    let mut changes = pin!(changes.reflect(writer));
    let mut pause = LONGEST_PAUSE;
    loop {
        tokio::select! {
            // An error is told and waited for by the watch itself.
            _ = changes.next() => {}
            () = tokio::time::sleep(pause) => {}
        }
        pause = LONGEST_PAUSE;
        let now = clock::now();
        for volume in store.state() {
            pause = pause.min(match expiry(&VolumeFacts::of(&volume), now) {
                Expiry::Never | Expiry::Later(None) => LONGEST_PAUSE,
                Expiry::Later(Some(time)) => Duration::try_from(time.duration_since(now)).unwrap_or_default(),
                Expiry::Write { .. } => {
                    let done = tokio::time::timeout(LOOK_TIMEOUT, change(cx, &volumes, &volume)).await;
                    let done =
                        done.unwrap_or(Err(Error::NoAnswer { operation: "change the PersistentVolume" }));
                    if let Err(err) = &done
                        && !err.is_conflict()
                    {
                        let error = telemetry::chain(err);
                        warn!(volume = volume.name_any(), %error, "volume of a restore cannot be changed");
                    }
                    RETRY
                }
            });
        }
        // Rounded up, or the timer fires just before the moment it was set for.
        pause += Duration::from_millis(1);
    }
}

/// Does what is due to a volume, as it is now.
async fn change(cx: &Context, volumes: &Api<PersistentVolume>, cached: &PersistentVolume) -> Result<()> {
    if !cx.leadership.is_held() {
        return Ok(());
    }
    let name = cached.name_any();
    let found = volumes.get_opt(&name).await.map_err(Error::request("get the PersistentVolume"))?;
    let Some(volume) = found.filter(|found| found.uid() == cached.uid()) else { return Ok(()) };
    let facts = VolumeFacts::of(&volume);
    let Expiry::Write { why, patch } = expiry(&facts, clock::now()) else { return Ok(()) };
    if let Some(claim) = &facts.claim {
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(cx.client.clone(), &claim.namespace);
        let found = claims.get_metadata_opt(&claim.name).await;
        let found = found.map_err(Error::request("get the PersistentVolumeClaim"))?;
        let found = found.filter(|found| claim.uid.is_some() && found.metadata.uid == claim.uid);
        let is_going = found.as_ref().is_some_and(|found| found.metadata.deletion_timestamp.is_some());
        if found.is_some() != (why == Due::InUse) || is_going {
            // The controller of volumes is behind.
            return Ok(());
        }
    }
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    let patched = volumes.patch(&name, &params, &Patch::Merge(patch)).await;
    patched.map_err(Error::request("patch the PersistentVolume"))?;
    crash_point!("after-restore-expiry");
    let claim = facts.for_claim.as_deref().unwrap_or("a claim");
    info!(volume = name, claim, ?why, "volume of a restore has expired");
    match why {
        Due::Disarmed => {}
        Due::Deleted => {
            let message = format!("it was kept after a restore of {claim}, and is deleted now");
            cx.publish(&volume, Note::normal("VolumeExpired", "Expire", message));
        }
        Due::InUse => {
            let message =
                format!("it came from a restore of {claim}, is in use, and has its reclaim policy again");
            cx.publish(&volume, Note::normal("VolumeGivenBack", "Expire", message));
        }
        Due::GivenBack => {
            let message = format!(
                "it was kept after a restore of {claim}, and stays, as its reclaim policy was Retain or it was made by hand"
            );
            cx.publish(&volume, Note::normal("VolumeGivenBack", "Expire", message));
        }
    }
    Ok(())
}

/// What is due to a volume that a restore has left over.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Expiry {
    /// Nothing before that time, or before it changes.
    Later(Option<Timestamp>),
    /// It has no end.
    Never,
    /// This change of it.
    Write { why: Due, patch: Value },
}

/// Why a volume is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// It waits for a claim, and what waits is never deleted.
    Disarmed,
    /// It is deleted, and what the storage holds of it.
    Deleted,
    /// It is its user's: nothing of us is left on it.
    GivenBack,
    /// As before, and it gets its own policy back, as a claim has it.
    InUse,
}

/// What is due to a volume now.
pub(super) fn expiry(volume: &VolumeFacts, now: Timestamp) -> Expiry {
    let (Some(_), Some(expires)) = (&volume.restore, &volume.expires_at) else { return Expiry::Never };
    // Who writes something else there means it to stay.
    let Ok(expires) = expires.parse::<Timestamp>() else { return Expiry::Never };
    if now < expires {
        return Expiry::Later(Some(expires));
    }
    let patch = |change| volume_patch(&volume.uid, volume.resource_version.as_deref(), &change);
    let is_ours_to_delete = volume.final_policy.as_deref() == Some("Delete")
        && volume.driver.is_some()
        && volume.provisioned_by == volume.driver;
    match volume.phase.as_str() {
        "Available" => Expiry::Write { why: Due::Disarmed, patch: patch(VolumeChange::Disarm) },
        "Released" if volume.policy == "Delete" => Expiry::Later(None),
        "Released" if is_ours_to_delete => {
            let mut patch = patch(VolumeChange::Disarm);
            patch["spec"] = json!({ "persistentVolumeReclaimPolicy": "Delete" });
            Expiry::Write { why: Due::Deleted, patch }
        }
        "Released" => {
            let policy = volume.policy.clone();
            Expiry::Write { why: Due::GivenBack, patch: patch(VolumeChange::Release { policy }) }
        }
        // Where the claim had none before the restore, and pods ran on a volume that was to be made anew.
        "Bound" => {
            let policy = volume.final_policy.clone().unwrap_or_else(|| volume.policy.clone());
            Expiry::Write { why: Due::InUse, patch: patch(VolumeChange::Release { policy }) }
        }
        _ => Expiry::Later(None),
    }
}

#[cfg(test)]
mod tests {
    use sts_backup_api::names::{EXPIRES_AT_ANNOTATION, FOR_CLAIM_ANNOTATION, RECLAIM_POLICY_ANNOTATION};

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// A volume that expires at 100, in this phase.
    fn volume(phase: &str, change: impl FnOnce(&mut Value)) -> VolumeFacts {
        let mut object = json!({
            "metadata": {
                "name": "pv", "uid": "uid", "resourceVersion": "7",
                "labels": { RESTORE_LABEL: "restore" },
                "annotations": {
                    EXPIRES_AT_ANNOTATION: at(100).to_string(),
                    RECLAIM_POLICY_ANNOTATION: "Delete",
                    FOR_CLAIM_ANNOTATION: "shop/data-db-0",
                    "pv.kubernetes.io/provisioned-by": "csi",
                },
            },
            "spec": {
                "persistentVolumeReclaimPolicy": "Retain",
                "csi": { "driver": "csi", "volumeHandle": "1" },
                "claimRef": { "namespace": "shop", "name": "data-db-0", "uid": "gone" },
            },
            "status": { "phase": phase },
        });
        change(&mut object);
        VolumeFacts::of(&serde_json::from_value(object).unwrap())
    }

    fn remove(object: &mut Value, key: &str) {
        object.as_object_mut().unwrap().remove(key);
    }

    fn due(volume: &VolumeFacts, now: i64) -> Option<(Due, Value)> {
        match expiry(volume, at(now)) {
            Expiry::Write { why, patch } => Some((why, patch)),
            Expiry::Later(_) | Expiry::Never => None,
        }
    }

    #[test]
    fn a_released_volume_is_deleted_when_its_time_has_come_and_not_before() {
        let released = volume("Released", |_| ());
        assert_eq!(expiry(&released, at(99)), Expiry::Later(Some(at(100))));
        let (why, patch) = due(&released, 100).unwrap();
        assert_eq!(why, Due::Deleted);
        let expected = json!({
            "metadata": { "uid": "uid", "resourceVersion": "7" },
            "spec": { "persistentVolumeReclaimPolicy": "Delete" },
        });
        assert_eq!(patch, expected);
        // The controller of volumes has not seen that yet.
        let policy = |object: &mut Value| object["spec"]["persistentVolumeReclaimPolicy"] = json!("Delete");
        assert_eq!(expiry(&volume("Released", policy), at(100)), Expiry::Later(None));
    }

    #[test]
    fn a_volume_that_a_claim_has_is_given_back_with_its_policy() {
        let bound = volume("Bound", |_| ());
        assert_eq!(expiry(&bound, at(99)), Expiry::Later(Some(at(100))));
        let (why, patch) = due(&bound, 100).unwrap();
        assert_eq!(why, Due::InUse);
        assert_eq!(patch["spec"], json!({ "persistentVolumeReclaimPolicy": "Delete" }));
        assert_eq!(patch["metadata"]["labels"], json!({ RESTORE_LABEL: null }));
    }

    #[test]
    fn a_volume_that_waits_for_a_claim_is_let_go_of_first() {
        let (why, patch) = due(&volume("Available", |_| ()), 100).unwrap();
        assert_eq!(why, Due::Disarmed);
        assert!(patch["spec"]["claimRef"]["uid"].is_string(), "{patch}");
        assert_eq!(patch["spec"]["persistentVolumeReclaimPolicy"], Value::Null);
    }

    #[test]
    fn what_is_not_ours_to_delete_is_given_back() {
        let was_retain = |object: &mut Value| {
            object["metadata"]["annotations"][RECLAIM_POLICY_ANNOTATION] = json!("Retain");
        };
        let is_static = |object: &mut Value| {
            remove(&mut object["metadata"]["annotations"], "pv.kubernetes.io/provisioned-by");
        };
        let by_another = |object: &mut Value| {
            object["metadata"]["annotations"]["pv.kubernetes.io/provisioned-by"] = json!("another");
        };
        let no_csi = |object: &mut Value| remove(&mut object["spec"], "csi");
        for change in [was_retain as fn(&mut Value), is_static, by_another, no_csi] {
            let (why, patch) = due(&volume("Released", change), 100).unwrap();
            assert_eq!(why, Due::GivenBack);
            assert_eq!(patch["spec"], json!({ "persistentVolumeReclaimPolicy": "Retain" }));
            assert_eq!(patch["metadata"]["labels"], json!({ RESTORE_LABEL: null }));
        }
    }

    #[test]
    fn a_volume_without_a_label_or_a_time_stays_for_ever() {
        let unlabelled = |object: &mut Value| object["metadata"]["labels"] = json!({});
        let unmarked =
            |object: &mut Value| remove(&mut object["metadata"]["annotations"], EXPIRES_AT_ANNOTATION);
        let garbled =
            |object: &mut Value| object["metadata"]["annotations"][EXPIRES_AT_ANNOTATION] = json!("never");
        for change in [unlabelled as fn(&mut Value), unmarked, garbled] {
            assert_eq!(expiry(&volume("Released", change), at(100)), Expiry::Never);
        }
    }
}
