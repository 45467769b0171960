//! What the backup controller counts and measures. Names follow Velero's, which dashboards know.
//!
//! Gauges are computed from the objects at the scrape, so a restart changes none of them; counters and histograms
//! count since the start of the process. The series of a deleted object are gone with it.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use dashmap::DashSet;
use futures::FutureExt;
use kube::ResourceExt;
use kube::runtime::reflector::Store;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::run::{RunRecord, RunResult};

use crate::metrics::Metrics;

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
        self.attempts.get_or_create(&labels).inc();
        // At zero from the start: what first appears as 1 is no increase.
        for family in [&self.successes, &self.partial_failures, &self.failures] {
            drop(family.get_or_create(&labels));
        }
        self.counted.insert(labels);
    }

    /// A run has ended.
    pub(super) fn finished(&self, backup: &StatefulSetBackup, record: &RunRecord) {
        let labels = Labels::of(backup);
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
        self.counted.insert(labels);
    }

    /// Drops the series of backups that are gone.
    fn keep(&self, known: &BTreeSet<Labels>) {
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
        // Before the first list is complete nothing is known to be gone.
        if self.store.wait_until_ready().now_or_never().is_some() {
            self.counted.keep(&backups.iter().map(|backup| Labels::of(backup)).collect());
        }
        let BackupMetrics { counted: _, attempts, successes, partial_failures, failures, durations, freezes } =
            &self.counted;
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
        gauges(&mut encoder, &backups)
    }
}

type Gauge = (&'static str, &'static str, fn(&StatefulSetBackup) -> Option<f64>);

const GAUGES: [Gauge; 3] = [
    ("sts_backup_last_status", "1: the last run left a complete recovery point; 0: it did not", last_status),
    (
        "sts_backup_last_successful_timestamp_seconds",
        "The time of the newest complete recovery point that a run made",
        last_success,
    ),
    ("sts_backup_recovery_points", "Complete recovery points", points),
];

fn gauges(encoder: &mut DescriptorEncoder<'_>, backups: &[Arc<StatefulSetBackup>]) -> Result<(), fmt::Error> {
    for (name, help, value) in GAUGES {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for backup in backups {
            if let Some(value) = value(backup) {
                ConstGauge::new(value).encode(family.encode_family(&Labels::of(backup))?)?;
            }
        }
    }
    Ok(())
}

fn last_status(backup: &StatefulSetBackup) -> Option<f64> {
    let last = backup.status.as_ref()?.history.first()?;
    Some(if last.result == RunResult::Completed { 1.0 } else { 0.0 })
}

fn last_success(backup: &StatefulSetBackup) -> Option<f64> {
    let time = backup.status.as_ref()?.last_successful_time.as_ref()?;
    Some(seconds(time.0.as_millisecond()))
}

#[expect(clippy::cast_precision_loss, reason = "a count of objects is small")]
fn points(backup: &StatefulSetBackup) -> Option<f64> {
    Some(backup.status.as_ref()?.recovery_point_count as f64)
}
