//! One execution of a backup and its result: the ids, the state that a run is resumed from, and the records
//! that stay.

#![allow(clippy::doc_markdown, reason = "kubectl explain shows these texts, and backticks as they are")]

use std::fmt::{self, Display, Formatter};

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backup::Hook;
use crate::conditions::INTERRUPTED;
use crate::names::short_hash;

/// Names a run, and the recovery point that it makes: a label value, and the end of its snapshots' names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct RunId(String);

impl RunId {
    /// The id of the run that the object with that uid begins at `started` for a slot. It is written down before
    /// anything is done in its name, so that whoever repeats a step meets the same snapshots.
    ///
    /// It begins with the time, so that ids sort as people expect. The time is also what tells it from an earlier run
    /// that was asked for by the same value.
    #[must_use]
    pub fn new(uid: &str, slot: &Slot, started: Timestamp) -> Self {
        let Slot { due, value, attempt } = slot;
        let due = match due {
            Due::Creation => "creation",
            Due::Request => "request",
            Due::Schedule => "schedule",
        };
        let hash = short_hash(&[uid, due, value, &attempt.to_string(), &started.to_string()]);
        Self(format!("{}-{hash}", started.strftime("%Y%m%d-%H%M%S")))
    }

    /// The id as it is written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<String> for RunId {
    fn from(id: String) -> Self {
        Self(id)
    }
}

impl Display for RunId {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// What a run is due to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Slot {
    /// The occasion.
    pub due: Due,
    /// Tells it from others of its kind: the time of the creation or of the schedule, or the annotation that asked for the
    /// run.
    pub value: String,
    /// 1, or more after runs for the same occasion were interrupted.
    pub attempt: i32,
}

impl Slot {
    /// The first attempt at the run that a new object is due.
    #[must_use]
    pub fn creation(at: Timestamp) -> Self {
        Self { due: Due::Creation, value: at.to_string(), attempt: 1 }
    }

    /// The first attempt at a run that somebody asked for, by the value of their annotation.
    #[must_use]
    pub fn request(annotation: &str) -> Self {
        Self { due: Due::Request, value: request_key(annotation), attempt: 1 }
    }

    /// The first attempt at the run that a schedule has at that time.
    #[must_use]
    pub fn schedule(at: Timestamp) -> Self {
        Self { due: Due::Schedule, value: at.to_string(), attempt: 1 }
    }

    /// The scheduled time that the run is due to.
    #[must_use]
    pub fn scheduled(&self) -> Option<Timestamp> {
        self.value.parse().ok().filter(|_| self.due == Due::Schedule)
    }
}

/// The kinds of occasions for a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Due {
    /// The object was created.
    Creation,
    /// Somebody asked for it.
    Request,
    /// The schedule says so.
    Schedule,
}

/// An annotation that asks for a run, as the status keeps it: itself, or its hash when it is long.
#[must_use]
pub fn request_key(annotation: &str) -> String {
    const MAX_KEPT: usize = 128;
    if annotation.len() <= MAX_KEPT { annotation.to_owned() } else { short_hash(&[annotation]) }
}

/// The run under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CurrentRun {
    /// Its id.
    pub id: RunId,
    /// What it is due to.
    pub slot: Slot,
    /// When it was recorded.
    pub started: MicroTime,
    /// What is done next.
    pub step: RunStep,
    /// The replicas of the StatefulSet at the preflight.
    #[serde(default)]
    pub replicas: i32,
    /// The claims that are backed up.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<RunVolume>,
    /// What is left out, and why; only with allowPartial.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
    /// The pods that hooks run in. Written before the first hook starts: what is owed to them is known to
    /// whoever goes on with the run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pods: Vec<RunPod>,
    /// The postBackupHook as it was at the freeze.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thaw_hook: Option<Hook>,
    /// When the frozen section was about to begin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_since: Option<MicroTime>,
    /// When the last snapshot was seen to be cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut_at: Option<MicroTime>,
    /// From the first preBackupHook to the last cut, or to the failure before it, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze_ms: Option<i64>,
    /// From the first to the last cut by the storage's clocks, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut_skew_ms: Option<i64>,
    /// Why the run is going to fail, once that is certain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

/// The steps of a run, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum RunStep {
    /// Is everything there that the run needs? Nothing has been touched.
    Preflight,
    /// Freeze, cut, thaw: one stretch that is never entered twice.
    Frozen,
    /// Pods are still owed a thaw.
    Thawing,
    /// The snapshots are cut and become ready.
    Readying,
    /// The run has failed; snapshots that would never become ready are removed.
    CleaningUp,
}

/// One claim of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RunVolume {
    /// The claim.
    pub claim: String,
    /// Its template in the StatefulSet.
    pub template: String,
    /// The ordinal of its replica.
    pub ordinal: i32,
    /// The snapshot's name.
    pub snapshot: String,
    /// The class it is made with.
    pub snapshot_class: String,
    /// The CSI driver of its volume.
    #[serde(default)]
    pub driver: String,
    /// How far it is.
    pub state: SnapshotState,
}

/// How far a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SnapshotState {
    /// Not known to be cut.
    Pending,
    /// Cut: what is written to the volume from now on is not in it.
    Cut,
    /// A volume can be made from it.
    Ready,
}

/// One pod of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RunPod {
    /// Its name.
    pub name: String,
    /// Its uid: a pod that was replaced is not frozen.
    pub uid: String,
    /// The container that the preBackupHook runs in; absent: it does not run, or certainly did not start, in
    /// this pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze_container: Option<String>,
    /// Until when a hook may still be running whose end was not seen: a thaw before that time is followed by another
    /// one after it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hooks_may_run_until: Option<MicroTime>,
    /// What is owed to it; absent: no postBackupHook runs in this pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thaw: Option<ThawDuty>,
}

/// A postBackupHook that is to run in a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ThawDuty {
    /// The container.
    pub container: String,
    /// Whether it is still owed.
    pub state: ThawState,
    /// Not to be tried before: after a failure, or when a preBackupHook may still be running.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_before: Option<MicroTime>,
    /// Failed attempts.
    #[serde(default)]
    pub failures: i32,
    /// Why the last attempt failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// Whether a thaw is still owed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ThawState {
    /// The hook is to run, perhaps once more.
    Owed,
    /// The hook succeeded.
    Thawed,
    /// The pod is gone, and the freeze with it.
    Gone,
    /// The hook failed, and the spec says to go on.
    GivenUp,
}

/// Why a run failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// One CamelCase word for programs.
    pub reason: String,
    /// What happened, to what, and what to do.
    pub message: String,
}

/// A finished run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RunRecord {
    /// Its id; the recovery point has the same.
    pub id: RunId,
    /// What it was due to.
    pub slot: Slot,
    /// When it was recorded.
    pub started: MicroTime,
    /// From the record to the end, milliseconds.
    pub duration_ms: i64,
    /// From the first preBackupHook to the last cut, or to the failure before it, milliseconds; absent without a
    /// preBackupHook.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze_ms: Option<i64>,
    /// From the first to the last cut by the storage's clocks, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut_skew_ms: Option<i64>,
    /// How it ended.
    pub result: RunResult,
    /// Of a failed run: how many of its snapshots were ready and stay. Where it is 0, one that appears later is late,
    /// and removed: it was asked for in time, but cut after the thaw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_volumes: Option<i32>,
    /// One CamelCase word for programs.
    pub reason: String,
    /// For people.
    pub message: String,
}

impl RunRecord {
    /// The run that follows this one by itself: after an interruption the same occasion is tried again, three times
    /// in all.
    #[must_use]
    pub fn next_attempt(&self) -> Option<Slot> {
        const MAX_ATTEMPTS: i32 = 3;
        let attempt = self.slot.attempt + 1;
        (self.reason == INTERRUPTED && attempt <= MAX_ATTEMPTS).then(|| Slot { attempt, ..self.slot.clone() })
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum RunResult {
    /// Every expected claim has a ready snapshot.
    Completed,
    /// Claims were left out; those that were not have ready snapshots.
    PartiallyFailed,
    /// Some snapshot is missing.
    Failed,
}

/// What can be restored: the snapshots of one run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RecoveryPoint {
    /// The run that made it.
    pub id: RunId,
    /// When its first cut was ordered, by the agent's clock.
    pub time: MicroTime,
    /// Whether every expected claim has a ready snapshot.
    pub complete: bool,
    /// How many of its snapshots are ready.
    pub ready_volumes: i32,
    /// How many claims were to be snapshotted.
    pub expected_volumes: i32,
    /// The replicas of the StatefulSet.
    pub replicas: i32,
    /// What the data is like.
    pub consistency: Consistency,
    /// The sum of the volumes' restore sizes, bytes.
    pub size_bytes: i64,
    /// One of its snapshots has the label backup.sts-backup.io/hold=true: it is not pruned.
    #[serde(default)]
    pub hold: bool,
}

/// What the data of a recovery point is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Consistency {
    /// The preBackupHook held in every pod while all snapshots were cut.
    Application,
    /// Each volume is as after a power cut, at its own instant.
    CrashPerVolume,
}

impl Consistency {
    /// The word, as it is written.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Application => "Application",
            Self::CrashPerVolume => "CrashPerVolume",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_id_starts_with_its_time_and_is_a_label_value() {
        let started = "2026-01-02T03:04:05.678Z".parse().unwrap();
        for value in ["", "now", "böse Wörter!", &"x".repeat(100_000)] {
            let id = RunId::new("uid", &Slot::request(value), started);
            let legal = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
            assert!(id.as_str().len() <= 63 && id.as_str().bytes().all(legal), "{id}");
            assert!(id.as_str().starts_with("20260102-030405-"), "{id}");
        }
    }

    #[test]
    fn objects_occasions_attempts_and_times_have_run_ids_of_their_own() {
        let started = "2026-01-02T03:04:05Z".parse().unwrap();
        let creation = Slot::creation(started);
        let request = Slot::request("2026-01-02T03:04:05Z");
        let again = Slot { attempt: 2, ..creation.clone() };
        let ids = [
            RunId::new("uid-1", &creation, started),
            RunId::new("uid-2", &creation, started),
            RunId::new("uid-1", &request, started),
            RunId::new("uid-1", &again, started),
            RunId::new("uid-1", &request, "2026-01-02T03:04:05.1Z".parse().unwrap()),
        ];
        for (at, id) in ids.iter().enumerate() {
            assert!(!ids[..at].contains(id), "{ids:?}");
        }
    }
}
