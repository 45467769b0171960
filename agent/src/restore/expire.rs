//! Lets volumes go that restores have left over, when their time has come. Driven by the volumes alone: restores and
//! namespaces may be gone by then.

use jiff::Timestamp;
use serde_json::{Value, json};
use sts_backup_api::names::{EXPIRES_AT_ANNOTATION, FOR_CLAIM_ANNOTATION, RECLAIM_POLICY_ANNOTATION, RESTORE_LABEL};

use super::decide::VolumeChange;
use super::facts::VolumeFacts;
use super::perform::volume_patch;

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
            let mut patch = patch(VolumeChange::Disarm);
            let annotations = json!({
                EXPIRES_AT_ANNOTATION: null, RECLAIM_POLICY_ANNOTATION: null, FOR_CLAIM_ANNOTATION: null,
            });
            patch["metadata"]["labels"] = json!({ RESTORE_LABEL: null });
            patch["metadata"]["annotations"] = annotations;
            patch["spec"] = json!({});
            Expiry::Write { why: Due::GivenBack, patch }
        }
        _ => Expiry::Later(None),
    }
}
