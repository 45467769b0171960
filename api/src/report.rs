//! What agents tell the hub of the objects of their clusters: as much as a fleet's view needs.
//!
//! These are the bodies of the link's `Object`; fields are only ever added, and each has a default, so that agents and hubs
//! of different versions understand each other.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt;
use serde::{Deserialize, Serialize};

use crate::backup::StatefulSetBackup;
use crate::names::FROM_POLICY_LABEL;
use crate::policy::StatefulSetBackupPolicy;
use crate::restore::StatefulSetRestore;
use crate::run::RunRecord;

/// Kind of backups.
pub const BACKUP: &str = "StatefulSetBackup";
/// Kind of restores.
pub const RESTORE: &str = "StatefulSetRestore";
/// Kind of policies.
pub const POLICY: &str = "StatefulSetBackupPolicy";
/// What stands for the cluster as a whole: no object of it, without a namespace, and named as this.
pub const COVERAGE: &str = "Coverage";

/// A condition's newest word.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Verdict {
    /// True, False or Unknown.
    pub status: String,
    /// A word for programs.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
}

impl Verdict {
    fn of(conditions: &[Condition], type_: &str) -> Option<Self> {
        let found = conditions.iter().find(|condition| condition.type_ == type_)?;
        Some(Self {
            status: found.status.clone(),
            reason: found.reason.clone(),
            message: found.message.clone(),
        })
    }
}

/// A backup. Whoever reads many of them may take their runs for what it likes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BackupReport<Run = RunReport> {
    /// Its uid.
    pub uid: String,
    /// When it was created.
    pub created: Option<Timestamp>,
    /// What it backs up, as namespace/name.
    pub stateful_set: String,
    /// The policy that made it.
    pub policy: Option<String>,
    /// When it runs.
    pub schedule: Option<String>,
    /// It does not run by itself.
    pub suspended: bool,
    /// The oldest acceptable newest recovery point, seconds, as its policy has it.
    pub rpo_seconds: Option<i64>,
    /// Whether it is ready.
    pub ready: Option<Verdict>,
    /// When the newest complete recovery point was taken.
    pub last_success: Option<Timestamp>,
    /// When it runs next.
    pub next: Option<Timestamp>,
    /// How many runs were missed.
    pub missed: i64,
    /// How many recovery points there are.
    pub points: i64,
    /// A run is under way.
    pub running: bool,
    /// What has ended, as long as the object remembers it.
    pub runs: Vec<Run>,
}

/// A run that has ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RunReport {
    /// Its id.
    pub id: String,
    /// When it began.
    pub started: Timestamp,
    /// How long it took.
    pub duration_ms: i64,
    /// How long the application was frozen.
    pub freeze_ms: Option<i64>,
    /// `Completed`, `PartiallyFailed` or `Failed`.
    pub result: String,
    /// A word for programs.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
}

impl BackupReport {
    /// What is told of a backup whose policy has this RPO.
    #[must_use]
    pub fn of(backup: &StatefulSetBackup, rpo_seconds: Option<i64>) -> Self {
        let status = backup.status.clone().unwrap_or_default();
        let namespace = backup.namespace().unwrap_or_default();
        let set = &backup.spec.stateful_set_ref;
        Self {
            uid: backup.uid().unwrap_or_default(),
            created: backup.metadata.creation_timestamp.as_ref().map(|created| created.0),
            stateful_set: format!("{}/{}", set.namespace.as_ref().unwrap_or(&namespace), set.name),
            policy: backup.labels().get(FROM_POLICY_LABEL).cloned(),
            schedule: backup.spec.schedule.clone(),
            suspended: backup.spec.suspend,
            rpo_seconds,
            ready: Verdict::of(&status.conditions, "Ready"),
            last_success: status.last_successful_time.map(|time| time.0),
            next: status.next_schedule_time.map(|time| time.0),
            missed: status.missed_runs,
            points: status.recovery_point_count,
            running: status.current_run.is_some(),
            runs: status.history.iter().map(RunReport::of).collect(),
        }
    }

    /// Whether the newest complete recovery point is older than what is acceptable.
    #[must_use]
    pub fn is_overdue(&self, now: Timestamp) -> bool {
        let (Some(rpo), Some(since)) = (self.rpo_seconds, self.last_success.or(self.created)) else {
            return false;
        };
        now.duration_since(since) > SignedDuration::from_secs(rpo)
    }

    /// Whether the newest run that has ended failed.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        let newest = self.runs.iter().max_by_key(|run| run.started);
        newest.is_some_and(|run| run.result == "Failed")
    }
}

impl RunReport {
    fn of(run: &RunRecord) -> Self {
        Self {
            id: run.id.to_string(),
            started: run.started.0,
            duration_ms: run.duration_ms,
            freeze_ms: run.freeze_ms,
            result: format!("{:?}", run.result),
            reason: run.reason.clone(),
            message: run.message.clone(),
        }
    }
}

/// A restore.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RestoreReport {
    /// Its uid.
    pub uid: String,
    /// What it restores, as namespace/name.
    pub stateful_set: String,
    /// The recovery point.
    pub point: Option<String>,
    /// How far it is.
    pub phase: String,
    /// When it began.
    pub started: Option<Timestamp>,
    /// When it ended.
    pub completed: Option<Timestamp>,
    /// How long pods were down.
    pub downtime_seconds: Option<i64>,
    /// Until when it can be taken back.
    pub rollback_until: Option<Timestamp>,
    /// How it is, for people.
    pub message: String,
}

impl RestoreReport {
    /// What is told of a restore.
    #[must_use]
    pub fn of(restore: &StatefulSetRestore) -> Self {
        let status = restore.status.clone().unwrap_or_default();
        let namespace = restore.namespace().unwrap_or_default();
        let set = &restore.spec.stateful_set_ref;
        let newest = status.conditions.iter().max_by_key(|condition| condition.last_transition_time.0);
        Self {
            uid: restore.uid().unwrap_or_default(),
            stateful_set: format!("{}/{}", set.namespace.as_ref().unwrap_or(&namespace), set.name),
            point: status.plan.map(|plan| plan.point),
            phase: status.phase.map(|phase| format!("{phase:?}")).unwrap_or_default(),
            started: status.start_time.map(|time| time.0),
            completed: status.completion_time.map(|time| time.0),
            downtime_seconds: status.downtime_seconds,
            rollback_until: status.rollback_until.map(|time| time.0),
            message: newest.map(|condition| condition.message.clone()).unwrap_or_default(),
        }
    }
}

/// A policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyReport {
    /// Its uid.
    pub uid: String,
    /// The hub placed it.
    pub from_hub: bool,
    /// Whether it is ready.
    pub ready: Option<Verdict>,
    /// How many `StatefulSets` it selects.
    pub matched: i64,
    /// How many of them have a recovery point or a schedule.
    pub protected: i64,
    /// How many are overdue.
    pub overdue: i64,
    /// Some that nothing protects.
    pub first_unprotected: Vec<String>,
    /// Some that are overdue.
    pub first_overdue: Vec<String>,
}

impl PolicyReport {
    /// What is told of a policy.
    #[must_use]
    pub fn of(policy: &StatefulSetBackupPolicy, from_hub: bool) -> Self {
        let status = policy.status.clone().unwrap_or_default();
        Self {
            uid: policy.uid().unwrap_or_default(),
            from_hub,
            ready: Verdict::of(&status.conditions, "Ready"),
            matched: status.matched,
            protected: status.protected,
            overdue: status.overdue,
            first_unprotected: status.first_unprotected,
            first_overdue: status.first_overdue,
        }
    }
}

/// What of a cluster is protected, by policies or otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CoverageReport {
    /// How many `StatefulSets` with claims there are, but for those that are excluded.
    pub stateful_sets: usize,
    /// How many of them no backup names, or only ones that are suspended or have no schedule.
    pub unprotected: usize,
    /// Some of these, as namespace/name.
    pub first_unprotected: Vec<String>,
}
