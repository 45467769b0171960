//! What the backup controller counts and measures. Names follow Velero's, which dashboards know.
//!
//! Gauges are computed from the objects at the scrape, so a restart changes none of them, and neither does it
//! `sts_backup_missed_runs_total`, which the objects count; other counters and histograms count since the start of the
//! process. The series of a deleted object are gone with it. `docs/metrics.md` lists all of them.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use dashmap::DashSet;
use futures::FutureExt;
use jiff::Timestamp;
use kube::ResourceExt;
use kube::runtime::reflector::Store;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::conditions::{self, READY, THAWED};
use sts_backup_api::coverage::newest_complete;
use sts_backup_api::run::{RunRecord, RunResult};
use sts_backup_api::schedule::Timetable;
use sts_backup_service::clock;
use sts_backup_service::http::Metrics;

use super::status::{THAW_FAILED, THAW_GIVEN_UP};

/// How long the run that begins at the last moment may take before its backup is overdue.
const SLACK: Duration = Duration::from_mins(15);

/// One backup.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
struct Labels {
    namespace: String,
    backup: String,
    statefulset: String,
}

impl Labels {
    fn of(backup: &StatefulSetBackup) -> Self {
        Self {
            namespace: backup.namespace().unwrap_or_default(),
            backup: backup.name_any(),
            statefulset: backup.spec.stateful_set_ref.name.clone(),
        }
    }
}

/// A backup with its labels, which are made once a scrape.
type Labelled<'a> = (Labels, &'a StatefulSetBackup);

type Histograms = Family<Labels, Histogram, fn() -> Histogram>;

/// Counters and histograms by backup. A handle: clones count together.
#[derive(Clone, Debug)]
pub(super) struct BackupMetrics {
    /// The backups that have series.
    counted: Arc<DashSet<Labels>>,
    attempts: Family<Labels, Counter>,
    successes: Family<Labels, Counter>,
    partial_failures: Family<Labels, Counter>,
    failures: Family<Labels, Counter>,
    durations: Histograms,
    freezes: Histograms,
}

/// 1 s to 2.3 h.
fn durations() -> Histogram {
    Histogram::new(exponential_buckets(1.0, 2.0, 14))
}

/// 50 ms to 102 s.
fn freezes() -> Histogram {
    Histogram::new(exponential_buckets(0.05, 2.0, 12))
}

impl BackupMetrics {
    /// Metrics that are shown from now on, for the backups in the store.
    pub(super) fn register(metrics: &Metrics, store: Store<StatefulSetBackup>) -> Self {
        let counted = Self {
            counted: Arc::default(),
            attempts: Family::default(),
            successes: Family::default(),
            partial_failures: Family::default(),
            failures: Family::default(),
            durations: Family::new_with_constructor(durations),
            freezes: Family::new_with_constructor(freezes),
        };
        let scrape = Scrape { counted: counted.clone(), store };
        metrics.register(|registry| registry.register_collector(Box::new(scrape)));
        counted
    }

    /// A run was begun.
    pub(super) fn started(&self, backup: &StatefulSetBackup) {
        let labels = Labels::of(backup);
        self.begin(&labels);
        self.attempts.get_or_create(&labels).inc();
    }

    /// A run has ended.
    pub(super) fn finished(&self, backup: &StatefulSetBackup, record: &RunRecord) {
        let labels = Labels::of(backup);
        self.begin(&labels);
        let family = match record.result {
            RunResult::Completed => &self.successes,
            RunResult::PartiallyFailed => &self.partial_failures,
            RunResult::Failed => &self.failures,
        };
        family.get_or_create(&labels).inc();
        self.durations.get_or_create(&labels).observe(seconds(record.duration_ms));
        if let Some(freeze) = record.freeze_ms {
            self.freezes.get_or_create(&labels).observe(seconds(freeze));
        }
    }

    /// Begins to count for what is new: what first appears as 1 is no increase.
    fn begin(&self, labels: &Labels) {
        if self.counted.insert(labels.clone()) {
            for family in [&self.attempts, &self.successes, &self.partial_failures, &self.failures] {
                drop(family.get_or_create(labels));
            }
        }
    }

    /// Drops the series of backups that are gone.
    fn keep(&self, known: &BTreeSet<&Labels>) {
        let Self { counted, attempts, successes, partial_failures, failures, durations, freezes } = self;
        counted.retain(|labels| {
            let is_known = known.contains(labels);
            if !is_known {
                for family in [attempts, successes, partial_failures, failures] {
                    family.remove(labels);
                }
                durations.remove(labels);
                freezes.remove(labels);
            }
            is_known
        });
    }
}

#[expect(clippy::cast_precision_loss, reason = "no run takes 285,000 years")]
fn seconds(milliseconds: i64) -> f64 {
    milliseconds as f64 / 1000.0
}

struct Scrape {
    counted: BackupMetrics,
    store: Store<StatefulSetBackup>,
}

impl fmt::Debug for Scrape {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Scrape").finish_non_exhaustive()
    }
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let backups = self.store.state();
        let backups: Vec<Labelled<'_>> =
            backups.iter().map(|backup| (Labels::of(backup), &**backup)).collect();
        for (labels, _) in &backups {
            self.counted.begin(labels);
        }
        // Before the first list is complete nothing is known to be gone.
        if self.store.wait_until_ready().now_or_never().is_some() {
            self.counted.keep(&backups.iter().map(|(labels, _)| labels).collect());
        }
        counters(&mut encoder, &self.counted)?;
        missed_runs(&mut encoder, &backups)?;
        for (name, help, value) in GAUGES {
            gauge(&mut encoder, &backups, name, help, value)?;
        }
        let now = clock::now();
        gauge(
            &mut encoder,
            &backups,
            "sts_backup_expected_interval_seconds",
            "From one scheduled run to the next, about now: the longer one of the passing and the next interval",
            |backup| expected_interval(backup, now),
        )?;
        gauge(
            &mut encoder,
            &backups,
            "sts_backup_next_success_deadline_timestamp_seconds",
            "When a scheduled backup is overdue: 15 minutes after the second run that is scheduled after the last success",
            |backup| deadline(backup, now),
        )
    }
}

fn counters(encoder: &mut DescriptorEncoder<'_>, counted: &BackupMetrics) -> Result<(), fmt::Error> {
    let BackupMetrics { counted: _, attempts, successes, partial_failures, failures, durations, freezes } =
        counted;
    for (name, help, family) in [
        ("sts_backup_attempt", "Runs that were begun", attempts),
        ("sts_backup_success", "Runs that ended with a complete recovery point", successes),
        ("sts_backup_partial_failure", "Runs that left claims out", partial_failures),
        ("sts_backup_failure", "Runs that failed", failures),
    ] {
        family.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)?;
    }
    for (name, help, family) in [
        ("sts_backup_duration_seconds", "From a run's begin to its end", durations),
        (
            "sts_backup_freeze_seconds",
            "From the first preBackupHook to the last cut, or to the failure before it",
            freezes,
        ),
    ] {
        family.encode(encoder.encode_descriptor(name, help, None, MetricType::Histogram)?)?;
    }
    Ok(())
}

/// A counter that the objects keep.
fn missed_runs(encoder: &mut DescriptorEncoder<'_>, backups: &[Labelled<'_>]) -> Result<(), fmt::Error> {
    let help = "Scheduled runs that were not begun";
    let mut family = encoder.encode_descriptor("sts_backup_missed_runs", help, None, MetricType::Counter)?;
    for (labels, backup) in backups {
        if let Some(status) = &backup.status {
            let missed = status.missed_runs.max(0).unsigned_abs();
            ConstCounter::new(missed).encode(family.encode_family(labels)?)?;
        }
    }
    Ok(())
}

type Gauge = (&'static str, &'static str, fn(&StatefulSetBackup) -> Option<f64>);

const GAUGES: [Gauge; 11] = [
    ("sts_backup_created_timestamp_seconds", "When the object was created", created),
    ("sts_backup_suspended", "1: no further runs are begun, as the spec says", suspended),
    ("sts_backup_ready", "1: the spec can be used; 0: it cannot, or the last preflight refused", usable),
    ("sts_backup_last_status", "1: the last run left a complete recovery point; 0: it did not", last_status),
    (
        "sts_backup_last_partial_failure",
        "1: the last run left claims out; 0: it did not",
        last_partial_failure,
    ),
    (
        "sts_backup_last_successful_timestamp_seconds",
        "The time of the newest complete recovery point that a run made, be it there or not",
        last_success,
    ),
    (
        "sts_backup_last_freeze_seconds",
        "The freeze of the last run, where its preBackupHook froze anything",
        last_freeze,
    ),
    ("sts_backup_max_freeze_seconds", "The longest freeze that the spec allows", max_freeze),
    (
        "sts_backup_thaw_failed",
        "1: a postBackupHook failed, and its pod may still be frozen; 0: nothing is owed, or not yet",
        thaw_failed,
    ),
    ("sts_backup_recovery_points", "Complete recovery points", points),
    (
        "sts_backup_newest_point_timestamp_seconds",
        "The time of the newest complete recovery point that there is",
        newest_point,
    ),
];

fn gauge(
    encoder: &mut DescriptorEncoder<'_>,
    backups: &[Labelled<'_>],
    name: &str,
    help: &str,
    value: impl Fn(&StatefulSetBackup) -> Option<f64>,
) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, backup) in backups {
        if let Some(value) = value(backup) {
            ConstGauge::new(value).encode(family.encode_family(labels)?)?;
        }
    }
    Ok(())
}

fn flag(is_so: bool) -> f64 {
    if is_so { 1.0 } else { 0.0 }
}

fn created(backup: &StatefulSetBackup) -> Option<f64> {
    let time = backup.metadata.creation_timestamp.as_ref()?;
    Some(seconds(time.0.as_millisecond()))
}

#[expect(clippy::unnecessary_wraps, reason = "others have no value for every backup")]
fn suspended(backup: &StatefulSetBackup) -> Option<f64> {
    Some(flag(backup.spec.suspend))
}

/// Office hours have long gaps too: an alert that knew only the next gap would fire in the long one before it. So it is
/// the longer one of that which began with the newest slot and of the next one.
fn expected_interval(backup: &StatefulSetBackup, now: Timestamp) -> Option<f64> {
    let table = Timetable::of(&backup.spec, &backup.uid()?).ok()??;
    let newest_slot = backup.status.as_ref().and_then(|status| status.last_schedule_time.as_ref());
    let before_it = newest_slot.and_then(|slot| slot.0.checked_sub(Duration::from_secs(1)).ok());
    let passing = before_it.and_then(|before| table.interval(before));
    Some(passing.max(Some(table.interval(now)?))?.as_secs_f64())
}

/// One run may fail, or be long under way: a backup is overdue when the second one after the last success has not
/// succeeded either. That takes the slots themselves: the gaps between them differ.
fn deadline(backup: &StatefulSetBackup, now: Timestamp) -> Option<f64> {
    let table = Timetable::of(&backup.spec, &backup.uid()?).ok()??;
    let success = backup.status.as_ref().and_then(|status| status.last_successful_time.as_ref());
    let since =
        success.map(|time| time.0).or(backup.metadata.creation_timestamp.as_ref().map(|time| time.0))?;
    // It is in the future when the clock was put back: then nothing is known of what came since.
    let second = table.after(table.after(since.min(now))?)?;
    Some(seconds(second.checked_add(SLACK).ok()?.as_millisecond()))
}

fn usable(backup: &StatefulSetBackup) -> Option<f64> {
    let ready = conditions::find(&backup.status.as_ref()?.conditions, READY)?;
    Some(flag(ready.status == "True"))
}

fn last_run(backup: &StatefulSetBackup) -> Option<&RunRecord> {
    backup.status.as_ref()?.history.first()
}

fn last_status(backup: &StatefulSetBackup) -> Option<f64> {
    Some(flag(last_run(backup)?.result == RunResult::Completed))
}

fn last_partial_failure(backup: &StatefulSetBackup) -> Option<f64> {
    Some(flag(last_run(backup)?.result == RunResult::PartiallyFailed))
}

fn last_success(backup: &StatefulSetBackup) -> Option<f64> {
    let time = backup.status.as_ref()?.last_successful_time.as_ref()?;
    Some(seconds(time.0.as_millisecond()))
}

fn last_freeze(backup: &StatefulSetBackup) -> Option<f64> {
    Some(seconds(last_run(backup)?.freeze_ms?))
}

#[expect(clippy::unnecessary_wraps, reason = "others have no value for every backup")]
fn max_freeze(backup: &StatefulSetBackup) -> Option<f64> {
    Some(backup.spec.max_freeze().as_secs_f64())
}

fn thaw_failed(backup: &StatefulSetBackup) -> Option<f64> {
    let thawed = conditions::find(&backup.status.as_ref()?.conditions, THAWED)?;
    let has_failed = [THAW_FAILED, THAW_GIVEN_UP].contains(&thawed.reason.as_str());
    Some(flag(thawed.status == "False" && has_failed))
}

#[expect(clippy::cast_precision_loss, reason = "a count of objects is small")]
fn points(backup: &StatefulSetBackup) -> Option<f64> {
    Some(backup.status.as_ref()?.recovery_point_count as f64)
}

fn newest_point(backup: &StatefulSetBackup) -> Option<f64> {
    Some(seconds(newest_complete(backup.status.as_ref()?)?.as_millisecond()))
}

#[cfg(test)]
mod tests {
    use kube::runtime::reflector::store::Writer;
    use kube::runtime::watcher::Event;
    use serde_json::{Value, json};

    use super::*;

    fn backup(name: &str, spec: &Value, status: Option<&Value>) -> StatefulSetBackup {
        let mut spec = spec.clone();
        spec["statefulSetRef"] = json!({ "name": "db" });
        serde_json::from_value(json!({
            "apiVersion": "backup.sts-backup.io/v1alpha1",
            "kind": "StatefulSetBackup",
            "metadata": {
                "name": name,
                "namespace": "shop",
                "uid": name,
                "creationTimestamp": "2026-01-01T00:00:00Z",
            },
            "spec": spec,
            "status": status,
        }))
        .unwrap()
    }

    /// A store with these, and their metrics.
    fn shown(backups: Vec<StatefulSetBackup>) -> (Writer<StatefulSetBackup>, Metrics, BackupMetrics) {
        let mut store = Writer::default();
        store.apply_watcher_event(&Event::Init);
        for backup in backups {
            store.apply_watcher_event(&Event::InitApply(backup));
        }
        store.apply_watcher_event(&Event::InitDone);
        let metrics = Metrics::new();
        let counted = BackupMetrics::register(&metrics, store.as_reader());
        (store, metrics, counted)
    }

    /// The series of a backup: their names and values.
    fn series(metrics: &Metrics, backup: &str) -> Vec<String> {
        let labels = format!(r#"{{namespace="shop",backup="{backup}",statefulset="db"}}"#);
        let text = metrics.encode().unwrap();
        text.lines().filter(|line| line.contains(&labels)).map(|line| line.replace(&labels, "")).collect()
    }

    fn record(result: &str, freeze: Option<i64>) -> Value {
        json!({
            "id": "20260102-030405-0badcafe",
            "slot": { "due": "Schedule", "value": "now", "attempt": 1 },
            "started": "2026-01-02T03:04:05.000000Z",
            "durationMs": 2500,
            "freezeMs": freeze,
            "result": result,
            "reason": result,
            "message": "",
        })
    }

    #[test]
    fn a_backup_that_has_not_run_counts_from_zero_and_has_no_outcome() {
        let (_store, metrics, _) = shown(vec![backup("new", &json!({}), None)]);
        assert_eq!(
            series(&metrics, "new"),
            [
                "sts_backup_attempt_total 0",
                "sts_backup_success_total 0",
                "sts_backup_partial_failure_total 0",
                "sts_backup_failure_total 0",
                "sts_backup_created_timestamp_seconds 1767225600.0",
                "sts_backup_suspended 0.0",
                "sts_backup_max_freeze_seconds 120.0",
            ]
        );
    }

    #[test]
    fn gauges_and_missed_runs_are_as_the_object_says() {
        let status = json!({
            "conditions": [
                condition("Ready", "False", "NoSnapshotClass"),
                condition("Thawed", "False", "ThawFailed"),
            ],
            "missedRuns": 3,
            "lastSuccessfulTime": "2026-01-02T03:04:05.500000Z",
            "recoveryPointCount": 7,
            "recoveryPoints": [
                point("2026-01-02T04:00:00.000000Z", false),
                point("2026-01-02T03:00:00.250000Z", true),
                point("2026-01-02T02:00:00.000000Z", true),
            ],
            "history": [record("PartiallyFailed", Some(1500)), record("Completed", None)],
        });
        let spec = json!({ "suspend": true, "maxFreezeSeconds": 60, "schedule": "@hourly" });
        let (_store, metrics, _) = shown(vec![backup("old", &spec, Some(&status))]);
        assert_eq!(
            series(&metrics, "old")[4..],
            [
                "sts_backup_missed_runs_total 3",
                "sts_backup_created_timestamp_seconds 1767225600.0",
                "sts_backup_suspended 1.0",
                "sts_backup_ready 0.0",
                "sts_backup_last_status 0.0",
                "sts_backup_last_partial_failure 1.0",
                "sts_backup_last_successful_timestamp_seconds 1767323045.5",
                "sts_backup_last_freeze_seconds 1.5",
                "sts_backup_max_freeze_seconds 60.0",
                "sts_backup_thaw_failed 1.0",
                "sts_backup_recovery_points 7.0",
                "sts_backup_newest_point_timestamp_seconds 1767322800.25",
                "sts_backup_expected_interval_seconds 3600.0",
                "sts_backup_next_success_deadline_timestamp_seconds 1767330900.0",
            ]
        );
    }

    fn point(time: &str, complete: bool) -> Value {
        json!({
            "id": time, "time": time, "complete": complete, "readyVolumes": 1, "expectedVolumes": 2,
            "replicas": 1, "consistency": "Application", "sizeBytes": 1, "hold": false,
        })
    }

    fn condition(type_: &str, status: &str, reason: &str) -> Value {
        let at = "2026-01-01T00:00:00Z";
        json!({ "type": type_, "status": status, "reason": reason, "message": "", "lastTransitionTime": at })
    }

    #[test]
    fn only_a_thaw_that_failed_is_told_as_failed() {
        for (status, reason, failed) in [
            ("False", "Frozen", 0.0),
            ("False", "ThawDue", 0.0),
            ("False", "ThawFailed", 1.0),
            ("False", "ThawGivenUp", 1.0),
            ("True", "Thawed", 0.0),
        ] {
            let status = json!({ "conditions": [condition("Thawed", status, reason)] });
            assert_eq!(thaw_failed(&backup("db", &json!({}), Some(&status))), Some(failed), "{reason}");
        }
    }

    #[test]
    fn the_interval_is_the_long_one_until_its_end_has_come() {
        let office_hours = json!({ "schedule": "0 9 * * 1-5" });
        let (day, weekend) = (Some(86_400.0), Some(3.0 * 86_400.0));
        // 2026-01-09 is a Friday.
        for (latest, now, interval) in [
            (None, "2026-01-07T12:00:00Z", day),
            (Some("2026-01-07T09:00:00Z"), "2026-01-07T12:00:00Z", day),
            (Some("2026-01-08T09:00:00Z"), "2026-01-08T12:00:00Z", weekend),
            (Some("2026-01-09T09:00:00Z"), "2026-01-11T12:00:00Z", weekend),
            (Some("2026-01-12T09:00:00Z"), "2026-01-12T12:00:00Z", day),
        ] {
            let backup = backup("db", &office_hours, Some(&json!({ "lastScheduleTime": latest })));
            assert_eq!(expected_interval(&backup, now.parse().unwrap()), interval, "{now}");
        }
        for schedule in [None, Some("not a schedule")] {
            let backup = backup("db", &json!({ "schedule": schedule }), None);
            assert_eq!(expected_interval(&backup, "2026-01-07T12:00:00Z".parse().unwrap()), None);
        }
    }

    #[test]
    fn a_backup_is_overdue_after_the_second_run_that_followed_the_last_success() {
        let (days, hours) = ("0 9 * * 1-5", "*/5 9-17 * * *");
        // 2026-01-09 is a Friday.
        for (schedule, success, latest, now, deadline) in [
            // Never a success: since the creation, which is a Thursday's midnight.
            (days, None, None, "2026-01-01T12:00:00Z", "2026-01-02T09:15:00Z"),
            // The newest slot is that of the run under way, or of one that failed: no matter.
            (
                days,
                Some("2026-01-09T09:00:05.000000Z"),
                Some("2026-01-12T09:00:00Z"),
                "2026-01-12T09:01:00Z",
                "2026-01-13T09:15:00Z",
            ),
            (
                days,
                Some("2026-01-08T09:00:05.000000Z"),
                Some("2026-01-09T09:00:00Z"),
                "2026-01-11T12:00:00Z",
                "2026-01-12T09:15:00Z",
            ),
            (
                hours,
                Some("2026-01-08T17:55:02.000000Z"),
                Some("2026-01-09T09:00:00Z"),
                "2026-01-09T09:00:01Z",
                "2026-01-09T09:20:00Z",
            ),
            (
                hours,
                Some("2026-01-09T09:00:02.000000Z"),
                Some("2026-01-09T11:00:00Z"),
                "2026-01-09T11:00:01Z",
                "2026-01-09T09:25:00Z",
            ),
            // The clock was put back.
            (days, Some("2027-01-01T09:00:05.000000Z"), None, "2026-01-07T12:00:00Z", "2026-01-09T09:15:00Z"),
        ] {
            let status = json!({ "lastSuccessfulTime": success, "lastScheduleTime": latest });
            let backup = backup("db", &json!({ "schedule": schedule }), Some(&status));
            let expected = seconds(deadline.parse::<Timestamp>().unwrap().as_millisecond());
            assert_eq!(super::deadline(&backup, now.parse().unwrap()), Some(expected), "{deadline}");
        }
        for schedule in [None, Some("not a schedule")] {
            let backup = backup("db", &json!({ "schedule": schedule }), None);
            assert_eq!(deadline(&backup, "2026-01-07T12:00:00Z".parse().unwrap()), None);
        }
    }

    #[test]
    fn runs_are_counted_by_their_results_until_the_backup_is_gone() {
        let object = backup("db", &json!({}), None);
        let (mut store, metrics, counted) = shown(vec![object.clone()]);
        for result in ["Completed", "Failed", "Failed", "PartiallyFailed"] {
            counted.started(&object);
            counted.finished(&object, &serde_json::from_value(record(result, Some(40))).unwrap());
        }
        let told = series(&metrics, "db");
        for line in [
            "sts_backup_attempt_total 4",
            "sts_backup_success_total 1",
            "sts_backup_partial_failure_total 1",
            "sts_backup_failure_total 2",
            "sts_backup_duration_seconds_count 4",
            "sts_backup_duration_seconds_sum 10.0",
            "sts_backup_freeze_seconds_count 4",
        ] {
            assert!(told.iter().any(|told| told == line), "no {line} in {told:#?}");
        }
        store.apply_watcher_event(&Event::Delete(object));
        assert_eq!(series(&metrics, "db"), Vec::<String>::new());
    }
}
