//! `StatefulSetBackup`: what to back up and how, and what has come of it.
//!
//! The schema and the CEL rules of the CRD are made from these types (`crdgen`). A field is here only when the
//! agent honours it.

#![allow(clippy::doc_markdown, reason = "kubectl explain shows these texts, and backticks as they are")]
#![allow(unreachable_pub, reason = "KubeSchema repeats the struct inside a function")]

use std::fmt;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, MicroTime, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::run::{CurrentRun, RecoveryPoint, RunRecord};

/// The API group of everything that is ours.
pub const GROUP: &str = "backup.sts-backup.io";

/// More claims than this in one `StatefulSet` are refused: their state would not fit in the status.
pub const MAX_CLAIMS: usize = 100;

/// How many recovery points the status lists, the newest ones.
pub const MAX_LISTED_POINTS: usize = 50;

/// Backs up one `StatefulSet`: a snapshot of every claim of every replica, taken together.
///
/// With a schedule, runs are taken at its times; without one, a run is taken when the object is created. Either way one
/// is taken when the annotation `backup.sts-backup.io/requested-at` gets a new value.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "backup.sts-backup.io",
    version = "v1alpha1",
    kind = "StatefulSetBackup",
    namespaced,
    status = "StatefulSetBackupStatus",
    shortname = "stsb",
    category = "backup",
    doc = "Backs up one StatefulSet: a snapshot of every claim of every replica, taken together.",
    printcolumn(name = "StatefulSet", type_ = "string", json_path = ".spec.statefulSetRef.name"),
    printcolumn(name = "Schedule", type_ = "string", json_path = ".spec.schedule"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Last Backup", type_ = "date", json_path = ".status.lastBackupTime"),
    // A date column shows <invalid> for what is still to come.
    printcolumn(name = "Next Backup", type_ = "string", json_path = ".status.nextScheduleTime"),
    printcolumn(name = "Points", type_ = "integer", json_path = ".status.recoveryPointCount"),
    printcolumn(name = "Suspended", type_ = "boolean", json_path = ".spec.suspend", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("self.metadata.name.size() <= 63")
        .message("the name is a label value of every snapshot: use at most 63 characters"),
)]
#[cfg_attr(test, kube(cel))]
#[x_kube(
    validation = Rule::new(
        "!has(self.volumeSnapshotClass) || !has(self.volumeSnapshotClassName) || self.volumeSnapshotClass == '' || self.volumeSnapshotClassName == '' || self.volumeSnapshotClass == self.volumeSnapshotClassName"
    )
    .message("volumeSnapshotClass is the older spelling of volumeSnapshotClassName: write one of them, or the same in both"),
    validation = Rule::new(
        "!has(self.preBackupHook) || !has(self.postBackupHook) || self.preBackupHook.pods == 'First' || self.postBackupHook.pods == 'All'"
    )
    .message("postBackupHook must run wherever preBackupHook ran: set postBackupHook.pods to All, or preBackupHook.pods to First"),
)]
#[serde(rename_all = "camelCase")]
pub struct StatefulSetBackupSpec {
    /// The StatefulSet to back up. Immutable.
    #[x_kube(validation = Rule::new("self == oldSelf")
        .message("statefulSetRef cannot be changed: create another StatefulSetBackup for another StatefulSet"))]
    pub stateful_set_ref: StatefulSetRef,

    /// When runs are due: five fields (minute, hour, day of month, month, day of week), or @hourly, @daily, @midnight,
    /// @weekly, @monthly, @yearly, @annually. Absent or empty: one run at creation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    #[x_kube(validation = Rule::new("!self.contains('TZ=')")
        .message("a time zone in the schedule is not read: set timeZone"))]
    #[x_kube(validation = Rule::new("!self.startsWith('@every')")
        .message("@every has no fixed times: write five fields, such as */30 * * * *"))]
    pub schedule: Option<String>,

    /// The IANA time zone of the schedule and of the retention's days, weeks, months and years, such as Europe/Paris;
    /// absent or empty: UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub time_zone: Option<String>,

    /// Runs begin at an offset after their scheduled time that is the same for every run of this object and smaller than
    /// this, such as 10m: so that many objects with one schedule do not begin at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = SPAN, "maxLength" = 20))]
    pub spread: Option<Span>,

    /// How late a run may begin that was missed at its time, seconds; absent: half the time to the next one, and at
    /// least 100. What is older is counted as missed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub starting_deadline_seconds: Option<i64>,

    /// Begin no further runs, until this is false again; what was due meanwhile is not caught up with.
    #[serde(default)]
    pub suspend: bool,

    /// Which recovery points stay; absent: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention_policy: Option<RetentionPolicy>,

    /// The VolumeSnapshotClass of the snapshots; absent or empty: the default class of each volume's CSI driver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub volume_snapshot_class_name: Option<String>,

    /// The older spelling of volumeSnapshotClassName.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub volume_snapshot_class: Option<String>,

    /// Names of the claim templates to back up; absent or empty: all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100), inner(length(min = 1, max = 253)), extend("x-kubernetes-list-type" = "set"))]
    pub volume_claim_templates: Vec<String>,

    /// Back up what can be backed up when a claim is missing or unfit, instead of refusing the run. Such a run
    /// ends as PartiallyFailed.
    #[serde(default)]
    pub allow_partial: bool,

    /// Runs in the pods before the snapshots are cut, at most once a run; freezes the application.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pre_backup_hook: Option<Hook>,

    /// Runs in the pods as soon as the snapshots are cut, and whenever a run ends otherwise; thaws the
    /// application. It may run more than once a run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post_backup_hook: Option<Hook>,

    /// The longest time from the first preBackupHook to the last cut, seconds; over it the application is thawed
    /// and the run fails.
    #[serde(default = "default_max_freeze_seconds")]
    #[schemars(range(min = 1, max = 3600))]
    pub max_freeze_seconds: i64,

    /// How long the snapshots may take to become ready after the cut, seconds.
    #[serde(default = "default_snapshot_timeout_seconds")]
    #[schemars(range(min = 1, max = 604_800))]
    pub snapshot_timeout_seconds: i64,

    /// How many finished runs the status shows.
    #[serde(default = "default_history_limit")]
    #[schemars(range(min = 1, max = 100))]
    pub history_limit: i32,
}

/// A span of time in hours, minutes and seconds, such as `1h30m`.
pub use kube::core::Duration as Span;

/// What the schema admits as a [`Span`].
pub(crate) const SPAN: &str = "^([0-9]{1,10}(h|m|s))+$";

fn default_max_freeze_seconds() -> i64 {
    120
}

fn default_snapshot_timeout_seconds() -> i64 {
    3600
}

fn default_history_limit() -> i32 {
    20
}

fn default_hook_timeout_seconds() -> i64 {
    60
}

/// Seconds as users write them; the schema keeps them positive.
fn seconds(seconds: i64) -> Duration {
    Duration::from_secs(seconds.max(1).unsigned_abs())
}

impl StatefulSetBackupSpec {
    /// A backup of the `StatefulSet` of that name in the object's own namespace, with all defaults.
    #[must_use]
    pub fn new(stateful_set: &str) -> Self {
        Self {
            stateful_set_ref: StatefulSetRef { name: stateful_set.to_owned(), namespace: None },
            schedule: None,
            time_zone: None,
            spread: None,
            starting_deadline_seconds: None,
            suspend: false,
            retention_policy: None,
            volume_snapshot_class_name: None,
            volume_snapshot_class: None,
            volume_claim_templates: Vec::new(),
            allow_partial: false,
            pre_backup_hook: None,
            post_backup_hook: None,
            max_freeze_seconds: default_max_freeze_seconds(),
            snapshot_timeout_seconds: default_snapshot_timeout_seconds(),
            history_limit: default_history_limit(),
        }
    }

    /// The schedule as people read it, with all that its times depend on; none without one.
    #[must_use]
    pub fn timing(&self) -> Option<String> {
        let schedule = self.schedule.as_deref().filter(|schedule| !schedule.is_empty())?;
        let zone = self.time_zone.as_deref().filter(|zone| !zone.is_empty()).unwrap_or("UTC");
        let spread = self.spread.as_ref().map_or_else(String::new, |spread| format!(", spread {spread:?}"));
        Some(format!("{schedule} ({zone}{spread})"))
    }

    /// The snapshot class that the user names, in either spelling.
    #[must_use]
    pub fn snapshot_class(&self) -> Option<&str> {
        [&self.volume_snapshot_class_name, &self.volume_snapshot_class]
            .into_iter()
            .flatten()
            .map(String::as_str)
            .find(|name| !name.is_empty())
    }

    /// [`Self::max_freeze_seconds`].
    #[must_use]
    pub fn max_freeze(&self) -> Duration {
        seconds(self.max_freeze_seconds)
    }

    /// [`Self::snapshot_timeout_seconds`].
    #[must_use]
    pub fn snapshot_timeout(&self) -> Duration {
        seconds(self.snapshot_timeout_seconds)
    }
}

/// Names a `StatefulSet`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct StatefulSetRef {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Its namespace; absent: the object's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub namespace: Option<String>,
}

impl StatefulSetRef {
    /// The namespace meant by an object in `own`.
    #[must_use]
    pub fn namespace_or<'a>(&'a self, own: &'a str) -> &'a str {
        self.namespace.as_deref().filter(|namespace| !namespace.is_empty()).unwrap_or(own)
    }
}

/// Which complete recovery points stay: those that any of the rules keeps, and always the newest one.
///
/// Days, weeks, months and years are those of the calendar in the backup's timeZone, weeks begin on Monday. Of each period
/// with any point the newest one is kept; periods without a point do not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RetentionPolicy {
    /// The newest ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub keep_last: Option<i32>,
    /// All that are younger than so many days of 24 hours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub keep_days: Option<i32>,
    /// One an hour.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub keep_hourly: Option<i32>,
    /// One a day.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub keep_daily: Option<i32>,
    /// One a week.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub keep_weekly: Option<i32>,
    /// One a month.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub keep_monthly: Option<i32>,
    /// One a year.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub keep_yearly: Option<i32>,
}

/// A command that runs in pods of the StatefulSet.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Hook {
    /// The program and its arguments; no shell is involved unless it is named.
    #[schemars(length(min = 1, max = 32), inner(length(max = 8192)))]
    pub command: Vec<String>,
    /// The container; absent: the one that the annotation kubectl.kubernetes.io/default-container names, else
    /// the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub container_name: Option<String>,
    /// How long the command may take, seconds.
    #[serde(default = "default_hook_timeout_seconds")]
    #[schemars(range(min = 1, max = 3600))]
    pub timeout_seconds: i64,
    /// What a failure means. Fail: a failed preBackupHook ends the run before anything is snapshotted; a failed
    /// postBackupHook is repeated until it succeeds, in pods where a preBackupHook may have started. Continue: a
    /// failed preBackupHook lowers the consistency of the recovery point; a postBackupHook that ended with another
    /// exit code than 0 is not repeated.
    #[serde(default)]
    pub on_error: OnError,
    /// The pods to run in: all of them, or the one with the lowest ordinal.
    #[serde(default)]
    pub pods: HookPods,
}

/// Leaves the command out, which can hold secrets: what is written for developers ends up in logs.
impl fmt::Debug for Hook {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { command: _, container_name, timeout_seconds, on_error, pods } = self;
        formatter
            .debug_struct("Hook")
            .field("container_name", container_name)
            .field("timeout_seconds", timeout_seconds)
            .field("on_error", on_error)
            .field("pods", pods)
            .finish_non_exhaustive()
    }
}

impl Hook {
    /// [`Self::timeout_seconds`].
    #[must_use]
    pub fn timeout(&self) -> Duration {
        seconds(self.timeout_seconds)
    }
}

/// What the failure of a hook means for the run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnError {
    /// It counts.
    #[default]
    Fail,
    /// It is reported, and the run goes on.
    Continue,
}

/// Which pods a hook runs in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HookPods {
    /// Every pod of the `StatefulSet`.
    #[default]
    All,
    /// The pod with the lowest ordinal.
    First,
}

/// What has come of a `StatefulSetBackup`, written by the agent alone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StatefulSetBackupStatus {
    /// One word for people; programs read the conditions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// The generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready, Progressing, LastBackupSucceeded, Thawed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// The time of the newest recovery point that a run made, complete or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_backup_time: Option<MicroTime>,
    /// The time of the newest complete recovery point that a run made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_successful_time: Option<MicroTime>,
    /// The schedule that the times below are of, with its zone and spread.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<String>,
    /// How far scheduled times are dealt with: the newest one that a run was begun for or that was missed, or when the
    /// schedule was written or no longer suspended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_schedule_time: Option<Time>,
    /// When the next scheduled run begins; absent without a schedule, and while suspended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_schedule_time: Option<Time>,
    /// How many scheduled runs were not begun: the agent was away for too long, or another run was still under way.
    #[serde(default)]
    pub missed_runs: i64,
    /// The value of the annotation `backup.sts-backup.io/requested-at` that was handled last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_request: Option<String>,
    /// The run under way: all that is needed to go on with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current_run: Option<CurrentRun>,
    /// The newest recovery points, newest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recovery_points: Vec<RecoveryPoint>,
    /// How many complete recovery points there are.
    #[serde(default)]
    pub recovery_point_count: i64,
    /// The finished runs, newest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<RunRecord>,
}

/// One word for the state of a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// No run has begun yet.
    Pending,
    /// A run is under way.
    InProgress,
    /// The last run left a recovery point.
    Ready,
    /// The last run failed.
    Failed,
    /// No further run begins.
    Suspended,
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn backup(change: impl FnOnce(&mut StatefulSetBackupSpec)) -> StatefulSetBackup {
        let mut spec = StatefulSetBackupSpec::new("db");
        change(&mut spec);
        StatefulSetBackup::new("nightly", spec)
    }

    fn hook(pods: HookPods) -> Hook {
        let hook: Value = json!({ "command": ["true"], "pods": pods });
        serde_json::from_value(hook).unwrap()
    }

    fn refusal(backup: &StatefulSetBackup) -> String {
        backup.validate_cel().map_or_else(|refused| refused.to_string(), |()| "admitted".to_owned())
    }

    #[test]
    fn a_spec_with_only_a_name_has_the_documented_defaults() {
        let spec: StatefulSetBackupSpec =
            serde_json::from_value(json!({ "statefulSetRef": { "name": "db" } })).unwrap();
        assert_eq!(spec, StatefulSetBackupSpec::new("db"));
        assert_eq!(refusal(&backup(|_| ())), "admitted");

        let hook = hook(HookPods::All);
        assert_eq!((hook.timeout(), hook.on_error), (Duration::from_mins(1), OnError::Fail));
    }

    #[test]
    fn a_name_that_is_no_label_value_is_refused() {
        let mut long = backup(|_| ());
        long.metadata.name = Some("x".repeat(64));
        assert!(refusal(&long).contains("use at most 63 characters"), "{}", refusal(&long));
    }

    #[test]
    fn both_spellings_of_the_class_are_refused_only_when_they_differ() {
        let both = |new: &str, old: &str| {
            backup(|spec| {
                spec.volume_snapshot_class_name = Some(new.to_owned());
                spec.volume_snapshot_class = Some(old.to_owned());
            })
        };
        assert!(refusal(&both("a", "b")).contains("older spelling"));
        for (new, old, class) in
            [("a", "a", Some("a")), ("", "b", Some("b")), ("a", "", Some("a")), ("", "", None)]
        {
            assert_eq!(refusal(&both(new, old)), "admitted");
            assert_eq!(both(new, old).spec.snapshot_class(), class);
        }
    }

    #[test]
    fn a_post_hook_must_reach_every_pod_that_the_pre_hook_froze() {
        let hooks = |pre, post| {
            backup(|spec| {
                spec.pre_backup_hook = Some(hook(pre));
                spec.post_backup_hook = Some(hook(post));
            })
        };
        assert!(refusal(&hooks(HookPods::All, HookPods::First)).contains("wherever preBackupHook ran"));
        assert_eq!(refusal(&hooks(HookPods::All, HookPods::All)), "admitted");
        assert_eq!(refusal(&hooks(HookPods::First, HookPods::First)), "admitted");
        assert_eq!(refusal(&hooks(HookPods::First, HookPods::All)), "admitted");
    }

    #[test]
    fn the_target_cannot_be_changed() {
        let one = backup(|_| ());
        let other = backup(|spec| spec.stateful_set_ref.name = "other".to_owned());
        let refused = other.validate_cel_update(&one).unwrap_err().to_string();
        assert!(refused.contains("create another StatefulSetBackup"), "{refused}");
        assert!(one.validate_cel_update(&one).is_ok());
    }

    #[test]
    fn an_empty_namespace_means_the_object_s_own() {
        let mut target = StatefulSetRef { name: "db".to_owned(), namespace: None };
        assert_eq!(target.namespace_or("shop"), "shop");
        target.namespace = Some(String::new());
        assert_eq!(target.namespace_or("shop"), "shop");
        target.namespace = Some("databases".to_owned());
        assert_eq!(target.namespace_or("shop"), "databases");
    }
}
