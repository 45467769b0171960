//! What the restore controller counts and measures, by `StatefulSet`.
//!
//! Counters and histograms count since the start of the process. The series of a `StatefulSet` are gone with its last
//! restore. `docs/metrics.md` lists all of them.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use dashmap::DashSet;
use futures::FutureExt;
use kube::runtime::reflector::Store;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use sts_backup_api::restore::{StatefulSetRestore, StatefulSetRestoreStatus};
use sts_backup_service::http::Metrics;

use super::context::set_name;
use super::decide::Outcome;

/// One `StatefulSet`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
struct Labels {
    namespace: String,
    statefulset: String,
}

impl Labels {
    fn of(restore: &StatefulSetRestore) -> Self {
        let (namespace, statefulset) = set_name(restore);
        Self { namespace, statefulset }
    }
}

type Histograms = Family<Labels, Histogram, fn() -> Histogram>;

/// Counters and histograms. A handle: clones count together.
#[derive(Clone, Debug)]
pub(super) struct RestoreMetrics {
    /// The `StatefulSets` that have series.
    counted: Arc<DashSet<Labels>>,
    attempts: Family<Labels, Counter>,
    successes: Family<Labels, Counter>,
    failures: Family<Labels, Counter>,
    rollbacks: Family<Labels, Counter>,
    durations: Histograms,
    downtimes: Histograms,
}

/// 1 s to 2.3 h.
fn spans() -> Histogram {
    Histogram::new(exponential_buckets(1.0, 2.0, 14))
}

impl RestoreMetrics {
    /// Metrics that are shown from now on, for the restores in the store.
    pub(super) fn register(metrics: &Metrics, store: Store<StatefulSetRestore>) -> Self {
        let counted = Self {
            counted: Arc::default(),
            attempts: Family::default(),
            successes: Family::default(),
            failures: Family::default(),
            rollbacks: Family::default(),
            durations: Family::new_with_constructor(spans),
            downtimes: Family::new_with_constructor(spans),
        };
        let scrape = Scrape { counted: counted.clone(), store };
        metrics.register(|registry| registry.register_collector(Box::new(scrape)));
        counted
    }

    /// A restore was begun.
    pub(super) fn started(&self, restore: &StatefulSetRestore) {
        let labels = Labels::of(restore);
        self.begin(&labels);
        self.attempts.get_or_create(&labels).inc();
    }

    /// A restore has ended; its status as it was just written.
    pub(super) fn finished(
        &self,
        restore: &StatefulSetRestore,
        outcome: Outcome,
        status: &StatefulSetRestoreStatus,
    ) {
        let labels = Labels::of(restore);
        self.begin(&labels);
        let family = match outcome {
            Outcome::Completed => &self.successes,
            Outcome::RolledBack => &self.rollbacks,
            Outcome::Failed | Outcome::LetGo => &self.failures,
        };
        family.get_or_create(&labels).inc();
        if let (Some(start), Some(end)) = (&status.start_time, &status.completion_time) {
            self.durations.get_or_create(&labels).observe(end.0.duration_since(start.0).as_secs_f64());
        }
        if let (Outcome::Completed, Some(downtime)) = (outcome, status.downtime_seconds) {
            self.downtimes.get_or_create(&labels).observe(i32::try_from(downtime).unwrap_or(i32::MAX).into());
        }
    }

    /// A restore was refused.
    pub(super) fn refused(&self, restore: &StatefulSetRestore) {
        let labels = Labels::of(restore);
        self.begin(&labels);
        self.failures.get_or_create(&labels).inc();
    }

    /// Begins to count for what is new: what first appears as 1 is no increase.
    fn begin(&self, labels: &Labels) {
        if self.counted.insert(labels.clone()) {
            for family in [&self.attempts, &self.successes, &self.failures, &self.rollbacks] {
                drop(family.get_or_create(labels));
            }
        }
    }

    /// Drops the series of what is gone.
    fn keep(&self, known: &BTreeSet<Labels>) {
        let Self { counted, attempts, successes, failures, rollbacks, durations, downtimes } = self;
        counted.retain(|labels| {
            let is_known = known.contains(labels);
            if !is_known {
                for family in [attempts, successes, failures, rollbacks] {
                    family.remove(labels);
                }
                durations.remove(labels);
                downtimes.remove(labels);
            }
            is_known
        });
    }
}

struct Scrape {
    counted: RestoreMetrics,
    store: Store<StatefulSetRestore>,
}

impl fmt::Debug for Scrape {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Scrape").finish_non_exhaustive()
    }
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let known: BTreeSet<_> = self.store.state().iter().map(|restore| Labels::of(restore)).collect();
        for labels in &known {
            self.counted.begin(labels);
        }
        // Before the first list is complete nothing is known to be gone.
        if self.store.wait_until_ready().now_or_never().is_some() {
            self.counted.keep(&known);
        }
        let RestoreMetrics { counted: _, attempts, successes, failures, rollbacks, durations, downtimes } =
            &self.counted;
        for (name, help, family) in [
            ("sts_restore_attempt", "Restores that were begun", attempts),
            ("sts_restore_success", "Restores that completed", successes),
            (
                "sts_restore_failure",
                "Restores that were refused or given up, with nothing exchanged",
                failures,
            ),
            ("sts_restore_rollback", "Restores whose old volumes were brought back", rollbacks),
        ] {
            family.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)?;
        }
        for (name, help, family) in [
            ("sts_restore_duration_seconds", "From a restore's begin to its end", durations),
            (
                "sts_restore_downtime_seconds",
                "From the order to scale down until all pods were ready again, of restores that completed",
                downtimes,
            ),
        ] {
            family.encode(encoder.encode_descriptor(name, help, None, MetricType::Histogram)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use kube::runtime::reflector::store::Writer;
    use kube::runtime::watcher::Event;
    use serde_json::json;

    use super::*;

    fn restore(name: &str) -> StatefulSetRestore {
        serde_json::from_value(json!({
            "apiVersion": "backup.sts-backup.io/v1alpha1",
            "kind": "StatefulSetRestore",
            "metadata": { "name": name, "namespace": "shop", "uid": name },
            "spec": { "statefulSetRef": { "name": "db" }, "useLatestBackup": true },
        }))
        .unwrap()
    }

    #[test]
    fn restores_count_by_stateful_set_and_go_with_the_last_one() {
        let mut store = Writer::default();
        for event in [Event::Init, Event::InitApply(restore("r")), Event::InitDone] {
            store.apply_watcher_event(&event);
        }
        let metrics = Metrics::new();
        let counted = RestoreMetrics::register(&metrics, store.as_reader());
        let labels = r#"{namespace="shop",statefulset="db"}"#;
        let text = metrics.encode().unwrap();
        assert!(text.contains(&format!("sts_restore_success_total{labels} 0")), "{text}");

        let status: StatefulSetRestoreStatus = serde_json::from_value(json!({
            "startTime": "2026-01-01T00:00:00.000000Z",
            "completionTime": "2026-01-01T00:01:00.000000Z",
            "downtimeSeconds": 5,
        }))
        .unwrap();
        counted.started(&restore("r"));
        counted.finished(&restore("r"), Outcome::Completed, &status);
        counted.refused(&restore("r"));
        let text = metrics.encode().unwrap();
        for line in [
            format!("sts_restore_attempt_total{labels} 1"),
            format!("sts_restore_success_total{labels} 1"),
            format!("sts_restore_failure_total{labels} 1"),
            format!("sts_restore_rollback_total{labels} 0"),
            format!("sts_restore_duration_seconds_sum{labels} 60.0"),
            format!("sts_restore_downtime_seconds_sum{labels} 5.0"),
        ] {
            assert!(text.contains(&line), "{line} is missing in {text}");
        }

        store.apply_watcher_event(&Event::Delete(restore("r")));
        let text = metrics.encode().unwrap();
        assert!(!text.contains(labels), "{text}");
    }
}
