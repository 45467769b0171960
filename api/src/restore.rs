//! `StatefulSetRestore`: which data a `StatefulSet` gets back, and what has come of it.
//!
//! The schema and the CEL rules of the CRD are made from these types (`crdgen`). A field is here only when the
//! agent honours it. What a restore under way remembers is in [`swap`](crate::swap).

#![allow(clippy::doc_markdown, reason = "kubectl explain shows these texts, and backticks as they are")]
#![allow(unreachable_pub, reason = "KubeSchema repeats the struct inside a function")]

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, MicroTime, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backup::{SPAN, Span, StatefulSetRef};
use crate::run::Consistency;
use crate::swap::Swap;

/// Gives a `StatefulSet` the data of a recovery point back, beside which the old data stays for a while.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "backup.sts-backup.io",
    version = "v1alpha1",
    kind = "StatefulSetRestore",
    namespaced,
    status = "StatefulSetRestoreStatus",
    shortname = "stsr",
    category = "backup",
    doc = "Gives a StatefulSet the data of a recovery point back. The old volumes stay for the rollback window.",
    printcolumn(name = "StatefulSet", type_ = "string", json_path = ".spec.statefulSetRef.name"),
    printcolumn(name = "Backup", type_ = "string", json_path = ".status.plan.backup"),
    printcolumn(name = "Point", type_ = "string", json_path = ".status.plan.point"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Progress", type_ = "string", json_path = ".status.progress"),
    printcolumn(name = "Downtime", type_ = "integer", json_path = ".status.downtimeSeconds"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("self.metadata.name.size() <= 63")
        .message("the name is used as a label value: use at most 63 characters"),
)]
#[cfg_attr(test, kube(cel))]
#[x_kube(
    validation = Rule::new("self == oldSelf")
        .message("a restore cannot be changed: delete it and create another one"),
    validation = Rule::new(
        "(has(self.backupName) && self.backupName != '' ? 1 : 0) + (has(self.useLatestBackup) && self.useLatestBackup ? 1 : 0) + (has(self.snapshotNames) && self.snapshotNames.size() > 0 && !(has(self.backupName) && self.backupName != '') ? 1 : 0) == 1"
    )
    .message("name one source: backupName, or useLatestBackup: true, or snapshotNames"),
    validation = Rule::new(
        "(has(self.recoveryPoint) && self.recoveryPoint != '' ? 1 : 0) + (has(self.pointInTime) ? 1 : 0) + (has(self.snapshotNames) && self.snapshotNames.size() > 0 ? 1 : 0) <= 1"
    )
    .message("write at most one of recoveryPoint, pointInTime and snapshotNames: each alone says which data"),
    validation = Rule::new(
        "!((has(self.recoveryPoint) && self.recoveryPoint != '') || has(self.pointInTime)) || (has(self.backupName) && self.backupName != '')"
    )
    .message("recoveryPoint and pointInTime choose among the points of a backup: set backupName as well"),
)]
#[serde(rename_all = "camelCase")]
pub struct StatefulSetRestoreSpec {
    /// The StatefulSet that gets the data.
    pub stateful_set_ref: StatefulSetRef,

    /// The StatefulSetBackup that took the data, which need not exist any more: its newest complete recovery point,
    /// unless recoveryPoint, pointInTime or snapshotNames say which.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub backup_name: Option<String>,

    /// The recovery point of that backup, by its run's id; also one that is not complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub recovery_point: Option<String>,

    /// The newest complete recovery point of that backup that is not later than this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub point_in_time: Option<Time>,

    /// The newest complete recovery point of all backups of the StatefulSet; false is the same as absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub use_latest_backup: Option<bool>,

    /// VolumeSnapshots by name, at most one of each claim.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100), inner(length(min = 1, max = 253)), extend("x-kubernetes-list-type" = "set"))]
    pub snapshot_names: Vec<String>,

    /// The ordinals to restore, such as [2]; absent or empty: all of the recovery point. An ordinal that runs now and is not
    /// in the point makes a restore of all refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100), inner(range(min = 0)), extend("x-kubernetes-list-type" = "set"))]
    pub replicas: Vec<i32>,

    /// Scale the StatefulSet down as far as needed, and up again. False: refuse unless the pods are gone already.
    #[serde(default = "yes")]
    pub scale_down: bool,

    /// Only make the plan. The annotation backup.sts-backup.io/approved-plan with the plan's hash lets exactly it run.
    #[serde(default)]
    pub dry_run: bool,

    /// How long the old volumes stay, such as 24h: until then the annotation
    /// backup.sts-backup.io/rollback-requested-at brings them back.
    #[serde(default = "day")]
    #[schemars(extend("pattern" = SPAN, "maxLength" = 20))]
    pub rollback_window: Span,

    /// How long the pods may take to become ready again, seconds.
    #[serde(default = "default_ready_timeout_seconds")]
    #[schemars(range(min = 1, max = 604_800))]
    pub ready_timeout_seconds: i64,

    /// How long the pods and then the claims may take to go, seconds each.
    #[serde(default = "default_pvc_deletion_timeout_seconds")]
    #[schemars(range(min = 1, max = 86_400))]
    pub pvc_deletion_timeout_seconds: i64,

    /// How long the new volumes may take to be made, seconds. The application runs meanwhile.
    #[serde(default = "default_provision_timeout_seconds")]
    #[schemars(range(min = 1, max = 604_800))]
    pub provision_timeout_seconds: i64,

    /// What happens when the pods do not become ready in time. Hold: everything stays as it is. Rollback: the old volumes
    /// come back.
    #[serde(default)]
    pub on_failure: OnFailure,
}

fn yes() -> bool {
    true
}

fn day() -> Span {
    Duration::from_hours(24).into()
}

fn default_ready_timeout_seconds() -> i64 {
    600
}

fn default_pvc_deletion_timeout_seconds() -> i64 {
    60
}

fn default_provision_timeout_seconds() -> i64 {
    3600
}

/// Seconds as users write them; the schema keeps them positive.
fn seconds(seconds: i64) -> Duration {
    Duration::from_secs(seconds.max(1).unsigned_abs())
}

impl StatefulSetRestoreSpec {
    /// A restore of the `StatefulSet` of that name in the object's own namespace, with all defaults and no source.
    #[must_use]
    pub fn new(stateful_set: &str) -> Self {
        Self {
            stateful_set_ref: StatefulSetRef { name: stateful_set.to_owned(), namespace: None },
            backup_name: None,
            recovery_point: None,
            point_in_time: None,
            use_latest_backup: None,
            snapshot_names: Vec::new(),
            replicas: Vec::new(),
            scale_down: true,
            dry_run: false,
            rollback_window: day(),
            ready_timeout_seconds: default_ready_timeout_seconds(),
            pvc_deletion_timeout_seconds: default_pvc_deletion_timeout_seconds(),
            provision_timeout_seconds: default_provision_timeout_seconds(),
            on_failure: OnFailure::Hold,
        }
    }

    /// [`Self::ready_timeout_seconds`].
    #[must_use]
    pub fn ready_timeout(&self) -> Duration {
        seconds(self.ready_timeout_seconds)
    }

    /// [`Self::pvc_deletion_timeout_seconds`].
    #[must_use]
    pub fn pvc_deletion_timeout(&self) -> Duration {
        seconds(self.pvc_deletion_timeout_seconds)
    }

    /// [`Self::provision_timeout_seconds`].
    #[must_use]
    pub fn provision_timeout(&self) -> Duration {
        seconds(self.provision_timeout_seconds)
    }
}

/// What happens when the pods do not become ready after a restore.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnFailure {
    /// Everything stays as it is, and the status says how to roll back.
    #[default]
    Hold,
    /// The old volumes come back.
    Rollback,
}

/// What has come of a `StatefulSetRestore`, written by the agent alone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StatefulSetRestoreStatus {
    /// One word for people; programs read the conditions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<RestorePhase>,
    /// Progressing, Succeeded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// What is going to be done, or was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<RestorePlan>,
    /// How far it is, for people, such as 2/3 volumes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<String>,
    /// The replicas that the StatefulSet had, and has again afterwards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_replicas: Option<i32>,
    /// When the agent began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<MicroTime>,
    /// When it was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<MicroTime>,
    /// How long pods were down, from the order to scale down until all were ready again, seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_seconds: Option<i64>,
    /// Which claim got the data of which snapshot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub restored_snapshots: Vec<RestoredSnapshot>,
    /// Until when the old volumes stay, and can be brought back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback_until: Option<Time>,
    /// The value of the annotation `backup.sts-backup.io/rollback-requested-at` that was handled last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_rollback_request: Option<String>,
    /// All that is needed to go on with it, or to roll it back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap: Option<Swap>,
}

/// One word for the state of a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RestorePhase {
    /// Nothing is known yet, or it waits for its turn.
    New,
    /// The plan is made, and nothing has been touched.
    Planned,
    /// New volumes are made beside the running application.
    Preparing,
    /// The pods are going.
    ScalingDown,
    /// Claims are taken from the old volumes to the new ones.
    Restoring,
    /// The pods are coming back.
    ScalingUp,
    /// The application serves the restored data.
    Completed,
    /// It was given up, and the application has its old data.
    Failed,
    /// The old volumes are being brought back.
    RollingBack,
    /// The application serves its old data again.
    RolledBack,
}

/// What a restore is going to do, found without touching anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RestorePlan {
    /// Of all that makes this plan another one: which data, which claims and volumes, which replicas.
    pub hash: String,
    /// The backup that took the data; absent for snapshots of no backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<String>,
    /// The recovery point: its run, or what its snapshots' names have in common.
    pub point: String,
    /// When its cut was ordered.
    pub time: MicroTime,
    /// What the point guarantees; absent where nobody wrote it down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistency: Option<Consistency>,
    /// The replicas now, and again afterwards.
    pub replicas: i32,
    /// The replicas while claims are swapped.
    pub replicas_meanwhile: i32,
    /// What happens to each claim of the pods that go.
    pub volumes: Vec<PlannedVolume>,
    /// How long pods are expected to be down, seconds.
    pub expected_downtime_seconds: i64,
    /// What the user should know before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// What happens to one claim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PlannedVolume {
    /// The claim.
    pub claim: String,
    /// What happens to it.
    pub action: VolumeAction,
    /// The snapshot whose data it gets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// The size that its new volume is asked for, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<i64>,
    /// The volume that it has now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old_volume: Option<String>,
}

/// What a restore does to a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum VolumeAction {
    /// It is deleted and made again with a new volume; the old volume stays for the rollback window.
    Replace,
    /// It does not exist, and is made with a new volume.
    Create,
    /// Its pod goes and comes back, and it keeps its volume.
    Keep,
}

/// A claim that was given the data of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RestoredSnapshot {
    /// The snapshot.
    pub snapshot_name: String,
    /// The claim.
    pub pvc_name: String,
    /// When the claim was bound to its new volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore_time: Option<Time>,
    /// Whether the claim has the data.
    pub success: bool,
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A restore of StatefulSet db by a spec without its target.
    fn restore(spec: &Value) -> StatefulSetRestore {
        let mut spec = spec.clone();
        spec["statefulSetRef"] = json!({ "name": "db" });
        StatefulSetRestore::new("back", serde_json::from_value(spec).unwrap())
    }

    fn refusal(restore: &StatefulSetRestore) -> String {
        restore.validate_cel().map_or_else(|refused| refused.to_string(), |()| "admitted".to_owned())
    }

    #[test]
    fn a_spec_with_only_a_source_has_the_documented_defaults() {
        let spec = restore(&json!({ "backupName": "nightly" })).spec;
        let expected = StatefulSetRestoreSpec {
            backup_name: Some("nightly".to_owned()),
            ..StatefulSetRestoreSpec::new("db")
        };
        assert_eq!(spec, expected);
        assert!(spec.scale_down && !spec.dry_run);
        assert_eq!(spec.rollback_window, Span::from(Duration::from_hours(24)));
        assert_eq!(
            (spec.ready_timeout(), spec.pvc_deletion_timeout(), spec.provision_timeout()),
            (Duration::from_mins(10), Duration::from_mins(1), Duration::from_hours(1))
        );
        assert_eq!(spec.on_failure, OnFailure::Hold);
    }

    #[test]
    fn there_is_one_source() {
        let one = "name one source";
        for (spec, verdict) in [
            (json!({ "backupName": "nightly" }), "admitted"),
            (json!({ "backupName": "nightly", "useLatestBackup": false }), "admitted"),
            (json!({ "backupName": "nightly", "snapshotNames": ["a"] }), "admitted"),
            (json!({ "useLatestBackup": true }), "admitted"),
            (json!({ "useLatestBackup": true, "backupName": "" }), "admitted"),
            (json!({ "snapshotNames": ["a", "b"] }), "admitted"),
            (json!({ "snapshotNames": ["a"], "backupName": "", "useLatestBackup": false }), "admitted"),
            (json!({}), one),
            (json!({ "backupName": "" }), one),
            (json!({ "useLatestBackup": false }), one),
            (json!({ "snapshotNames": [] }), one),
            (json!({ "backupName": "nightly", "useLatestBackup": true }), one),
            (json!({ "useLatestBackup": true, "snapshotNames": ["a"] }), one),
        ] {
            let said = refusal(&restore(&spec));
            assert!(said.contains(verdict), "{spec}: {said}");
        }
    }

    #[test]
    fn a_backup_s_data_is_narrowed_in_one_way() {
        let (once, backup) = ("write at most one of", "set backupName as well");
        for (spec, verdict) in [
            (json!({ "backupName": "nightly", "recoveryPoint": "r" }), "admitted"),
            (json!({ "backupName": "nightly", "pointInTime": "2026-01-01T00:00:00Z" }), "admitted"),
            (json!({ "backupName": "nightly", "recoveryPoint": "", "snapshotNames": ["a"] }), "admitted"),
            (json!({ "useLatestBackup": true, "recoveryPoint": "" }), "admitted"),
            (
                json!({ "backupName": "nightly", "recoveryPoint": "r", "pointInTime": "2026-01-01T00:00:00Z" }),
                once,
            ),
            (json!({ "backupName": "nightly", "recoveryPoint": "r", "snapshotNames": ["a"] }), once),
            (
                json!({ "backupName": "nightly", "pointInTime": "2026-01-01T00:00:00Z", "snapshotNames": ["a"] }),
                once,
            ),
            (json!({ "useLatestBackup": true, "recoveryPoint": "r" }), backup),
            (json!({ "useLatestBackup": true, "pointInTime": "2026-01-01T00:00:00Z" }), backup),
        ] {
            let said = refusal(&restore(&spec));
            assert!(said.contains(verdict), "{spec}: {said}");
        }
    }

    #[test]
    fn a_restore_cannot_be_changed() {
        let one = restore(&json!({ "backupName": "nightly" }));
        assert!(one.validate_cel_update(&one).is_ok());
        for change in [
            json!({ "backupName": "weekly" }),
            json!({ "backupName": "nightly", "dryRun": true }),
            json!({ "backupName": "nightly", "rollbackWindow": "1h" }),
        ] {
            let refused = restore(&change).validate_cel_update(&one).unwrap_err().to_string();
            assert!(refused.contains("delete it and create another one"), "{refused}");
        }
    }

    #[test]
    fn a_name_that_is_no_label_value_is_refused() {
        let mut long = restore(&json!({ "backupName": "nightly" }));
        long.metadata.name = Some("x".repeat(64));
        assert!(refusal(&long).contains("use at most 63 characters"), "{}", refusal(&long));
    }

    #[test]
    fn the_original_s_restores_are_admitted() {
        for spec in [
            json!({ "backupName": "nightly", "scaleDown": true, "pvcDeletionTimeoutSeconds": 120 }),
            json!({ "useLatestBackup": true, "scaleDown": true }),
            json!({ "backupName": "nightly", "snapshotNames": ["nightly-data-1768300000-0"] }),
        ] {
            assert_eq!(refusal(&restore(&spec)), "admitted", "{spec}");
        }
    }
}
