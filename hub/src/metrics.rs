//! What the hub shows at `/metrics`, computed at the scrape. Series by cluster are bounded by the configuration; the sums
//! are always there.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use sts_backup_service::http::encode_gauge;

use crate::app::Reloads;
use crate::fleet::{Fleet, HELD};

type PerCluster = Family<Vec<(&'static str, String)>, Gauge>;

/// The fleet's metrics.
#[derive(Debug)]
pub struct FleetMetrics {
    fleet: Arc<Fleet>,
    reloads: Arc<Reloads>,
    most: usize,
}

impl FleetMetrics {
    /// Of this fleet, with series for so many clusters.
    #[must_use]
    pub fn new(fleet: Arc<Fleet>, reloads: Arc<Reloads>, most: usize) -> Self {
        Self { fleet, reloads, most }
    }
}

impl Collector for FleetMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let connected = PerCluster::default();
        let behind = PerCluster::default();
        let rejected = PerCluster::default();
        let seen = PerCluster::default();
        let (mut count, mut up, mut held, mut flapping) = (0_i64, 0_i64, 0_i64, 0_i64);
        for (name, cluster) in self.fleet.clusters() {
            let state = cluster.state();
            if state.revoked.is_some() {
                // Nobody misses it.
                continue;
            }
            let is_up = i64::from(state.session.is_some());
            let outcome = state.applied.as_ref().map(|applied| &*applied.outcome);
            count += 1;
            up += is_up;
            held += i64::from(outcome == Some(HELD));
            flapping += i64::from(state.is_flapping());
            if usize::try_from(count).is_ok_and(|count| count > self.most) {
                continue;
            }
            let labels = vec![("cluster", name)];
            connected.get_or_create(&labels).set(is_up);
            let applied = state.applied.as_ref().map_or(0, |applied| applied.revision);
            let lag = state.revision.saturating_sub(applied);
            behind.get_or_create(&labels).set(i64::try_from(lag).unwrap_or(i64::MAX));
            let refused = state.applied.map_or(0, |applied| applied.rejected.len());
            rejected.get_or_create(&labels).set(i64::try_from(refused).unwrap_or(i64::MAX));
            if let Some(time) = state.seen {
                seen.get_or_create(&labels).set(time.as_second());
            }
        }
        let policies = self.fleet.policies().set.map_or(0, |set| set.len());
        let policies = i64::try_from(policies).unwrap_or(i64::MAX);
        let failed = |flag: &std::sync::atomic::AtomicBool| i64::from(flag.load(Ordering::Relaxed));
        for (name, help, value) in [
            ("sts_backup_hub_clusters", "Clusters that the hub lets in", count),
            ("sts_backup_hub_clusters_connected", "Clusters that are connected", up),
            ("sts_backup_hub_clusters_held", "Clusters that hold back what they were sent", held),
            ("sts_backup_hub_clusters_flapping", "Clusters that several agents connect as", flapping),
            ("sts_backup_hub_policies", "Fleet policies in use", policies),
            (
                "sts_backup_hub_policies_reload_failed",
                "Whether the newest policy files cannot be used",
                failed(&self.reloads.policies_failed),
            ),
            (
                "sts_backup_hub_certificates_reload_failed",
                "Whether the newest certificates of the link cannot be used",
                failed(&self.reloads.certificates_failed),
            ),
        ] {
            encode_gauge(&mut encoder, name, help, value)?;
        }
        for (name, help, family) in [
            ("sts_backup_hub_cluster_connected", "Whether the cluster is connected", &connected),
            (
                "sts_backup_hub_cluster_revisions_behind",
                "Revisions that the cluster has not applied",
                &behind,
            ),
            (
                "sts_backup_hub_cluster_policies_rejected",
                "Policies that the cluster does not take",
                &rejected,
            ),
            ("sts_backup_hub_cluster_seen_timestamp_seconds", "When the cluster was last heard of", &seen),
        ] {
            use prometheus_client::metrics::TypedMetric;
            family.encode(encoder.encode_descriptor(name, help, None, Gauge::<i64>::TYPE)?)?;
        }
        Ok(())
    }
}
