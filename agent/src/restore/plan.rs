//! What a restore is going to do. Pure.

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::ResourceExt;
use serde_json::{Value, json};
use sts_backup_api::names::{RESTORE_LABEL, staged_claim_name};
use sts_backup_api::restore::{RestorePlan, StatefulSetRestore};
use sts_backup_api::swap::{Swap, SwapPv, SwapVolume, Toward};

use super::survey::Survey;

/// What comes of planning.
pub(super) enum Verdict {
    /// It can be done so. The swap has step Protecting, toward Restored, `step_since` = now.
    Go(Box<Planned>),
    /// It is refused: nothing was touched, and trying again without a change is no use.
    Refuse(Vec<Problem>),
    /// Something that passes by itself is in the way.
    Wait(Problem),
}

/// A plan and the swap that does it.
pub(super) struct Planned {
    pub(super) plan: RestorePlan,
    pub(super) swap: Swap,
}

/// What is in the way.
pub(super) struct Problem {
    /// A condition reason.
    pub(super) reason: &'static str,
    /// What, of what object, and the remedy.
    pub(super) message: String,
}

/// The plan of a restore.
pub(super) fn plan(restore: &StatefulSetRestore, survey: &Survey, _now: jiff::Timestamp) -> Verdict {
    let Survey {} = survey;
    let message = format!("{} cannot be planned", restore.name_any());
    Verdict::Refuse(vec![Problem { reason: "NoPlan", message }])
}

fn manifest(volume: &SwapVolume) -> Value {
    serde_json::from_str(&volume.manifest).unwrap_or_else(|_| json!({ "spec": {} }))
}

/// The claim by which a new volume is made from a snapshot.
pub(super) fn staged_claim(restore_uid: &str, volume: &SwapVolume) -> PersistentVolumeClaim {
    let mut claim = manifest(volume);
    let name = staged_claim_name(&volume.claim, restore_uid, volume.stagings);
    claim["metadata"] = json!({ "name": name, "labels": { RESTORE_LABEL: restore_uid } });
    claim["spec"]["dataSource"] =
        json!({ "apiGroup": "snapshot.storage.k8s.io", "kind": "VolumeSnapshot", "name": volume.snapshot });
    claim["spec"]["resources"] = json!({ "requests": { "storage": volume.size_bytes.to_string() } });
    serde_json::from_value(claim).expect("it is a claim")
}

/// A claim of the `StatefulSet`, made again with its wanted volume.
pub(super) fn final_claim(volume: &SwapVolume, wanted: &SwapPv, _toward: Toward) -> PersistentVolumeClaim {
    let mut claim = manifest(volume);
    claim["metadata"]["name"] = json!(volume.claim);
    claim["spec"]["volumeName"] = json!(wanted.name);
    serde_json::from_value(claim).expect("it is a claim")
}
