//! What the policy controller shows: coverage of the cluster and of each policy, computed at the scrape from what is
//! watched, so a restart changes nothing.

use std::collections::BTreeMap;
use std::fmt;

use futures::FutureExt;
use kube::ResourceExt;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use sts_backup_api::conditions::{self, APPLIED, READY};
use sts_backup_api::coverage::coverage;
use sts_backup_api::policy::StatefulSetBackupPolicyStatus;
use sts_backup_service::clock;
use sts_backup_service::http::Metrics;

use super::observe::{Stores, World};

#[derive(Clone, Debug, EncodeLabelSet)]
struct InNamespace {
    namespace: String,
}

#[derive(Clone, Debug, EncodeLabelSet)]
struct OfPolicy {
    policy: String,
}

/// Shows the metrics from now on.
pub(super) fn register(metrics: &Metrics, stores: Stores) {
    metrics.register(|registry| registry.register_collector(Box::new(Scrape { stores })));
}

struct Scrape {
    stores: Stores,
}

impl fmt::Debug for Scrape {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Scrape").finish_non_exhaustive()
    }
}

type Gauge = (&'static str, &'static str, fn(&StatefulSetBackupPolicyStatus) -> Option<i64>);

const GAUGES: [Gauge; 5] = [
    ("sts_backup_policy_ready", "1: the spec can be used; 0: it cannot", |status| is_true(status, READY)),
    (
        "sts_backup_policy_applied",
        "1: every StatefulSet that the policy is to back up has its backup as the template says; 0: some have not",
        |status| is_true(status, APPLIED),
    ),
    ("sts_backup_policy_matched", "StatefulSets that the policy selects", |status| Some(status.matched)),
    ("sts_backup_policy_protected", "StatefulSets of these that are protected", |status| {
        Some(status.protected)
    }),
    ("sts_backup_policy_overdue", "StatefulSets of these that are overdue", |status| Some(status.overdue)),
];

fn is_true(status: &StatefulSetBackupPolicyStatus, condition: &str) -> Option<i64> {
    Some(i64::from(conditions::find(&status.conditions, condition)?.status == "True"))
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        // Before the first lists are complete all would be unprotected.
        let is_complete = matches!(self.stores.ready().now_or_never(), Some(Ok(())));
        let unprotected = if is_complete { unprotected(&self.stores.observe()) } else { BTreeMap::new() };
        let mut family = encoder.encode_descriptor(
            "sts_backup_unprotected_statefulsets",
            "StatefulSets with claims that no backup names, or only ones that are suspended or have no schedule",
            None,
            MetricType::Gauge,
        )?;
        for (namespace, count) in unprotected {
            ConstGauge::new(count).encode(family.encode_family(&InNamespace { namespace })?)?;
        }
        for (name, help, value) in GAUGES {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for policy in self.stores.policies.state() {
                if let Some(value) = policy.status.as_ref().and_then(value) {
                    let labels = OfPolicy { policy: policy.name_any() };
                    ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
                }
            }
        }
        Ok(())
    }
}

/// How many are unprotected in each namespace that has something to protect.
fn unprotected(world: &World) -> BTreeMap<String, i64> {
    let mut counts: BTreeMap<String, i64> =
        world.protectees().filter(|set| !set.excluded).map(|set| (set.set.namespace.to_owned(), 0)).collect();
    // Without an RPO nothing depends on the time.
    let found = coverage(world.protectees(), world.protections(), None, clock::now());
    for set in found.unprotected {
        *counts.entry(set.namespace.to_owned()).or_default() += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use sts_backup_api::report::CoverageReport;

    use super::*;
    use crate::policy::status::cluster_coverage;
    use crate::policy::tests::world;

    #[test]
    fn a_condition_is_one_or_zero_and_nothing_until_it_is_known() {
        let mut status =
            StatefulSetBackupPolicyStatus { matched: 3, protected: 2, overdue: 1, ..Default::default() };
        let values = |status: &StatefulSetBackupPolicyStatus| GAUGES.map(|(_, _, value)| value(status));
        assert_eq!(values(&status), [None, None, Some(3), Some(2), Some(1)]);
        for (condition, is_so) in [(READY, true), (APPLIED, false)] {
            conditions::set(
                &mut status.conditions,
                condition,
                (is_so, "Reason", ""),
                None,
                Timestamp::UNIX_EPOCH,
            );
        }
        assert_eq!(values(&status), [Some(1), Some(0), Some(3), Some(2), Some(1)]);
    }

    #[test]
    fn what_nothing_protects_is_counted_by_namespace() {
        let world = world()
            .namespace("shop", &[])
            .namespace("bank", &[])
            .namespace("dev", &[])
            .excluded_namespace("dev")
            .set("shop/db", &[])
            .set("shop/cache", &[])
            .set("bank/db", &[])
            .set("dev/db", &[])
            .set("shop/opted-out", &[])
            .excluded("shop/opted-out")
            .set("shop/now-and-then", &[])
            .by_hand("shop/asked-for", "now-and-then", None)
            .by_hand("shop/mine", "db", None)
            .scheduled("shop/mine")
            .by_hand("bank/mine", "db", None)
            .scheduled("bank/mine");
        let expected = [("bank".to_owned(), 0), ("shop".to_owned(), 2)];
        assert_eq!(unprotected(&world.facts()), expected.into());
        let of_cluster = CoverageReport {
            stateful_sets: 4,
            unprotected: 2,
            first_unprotected: vec!["shop/cache".to_owned(), "shop/now-and-then".to_owned()],
        };
        assert_eq!(cluster_coverage(&world.facts(), Timestamp::UNIX_EPOCH), of_cluster);
    }
}
