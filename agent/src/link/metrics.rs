//! What the link shows at `/metrics`.

use jiff::Timestamp;
use prometheus_client::metrics::gauge::Gauge;
use sts_backup_api::link::{Applied, applied::Outcome};
use sts_backup_service::clock;
use sts_backup_service::http::Metrics;

/// The link's metrics. A handle: clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct LinkMetrics {
    connected: Gauge,
    heard: Gauge,
    certificate: Gauge,
    revision: Gauge,
    held: Gauge,
    rejected: Gauge,
}

impl LinkMetrics {
    pub(super) fn register(&self, metrics: &Metrics) {
        metrics.register(|registry| {
            for (name, help, gauge) in [
                ("sts_backup_link_connected", "Whether the agent is linked to the hub", &self.connected),
                (
                    "sts_backup_link_certificate_expiry_timestamp_seconds",
                    "When the certificate that the hub is shown ends",
                    &self.certificate,
                ),
                (
                    "sts_backup_link_revision",
                    "Revision of the hub's policies that was answered last",
                    &self.revision,
                ),
                ("sts_backup_link_held", "Whether what the hub sends is held back", &self.held),
                (
                    "sts_backup_link_policies_rejected",
                    "Policies of the hub's last message that the cluster does not take",
                    &self.rejected,
                ),
            ] {
                registry.register(name, help, gauge.clone());
            }
            let help = "When the hub was last heard of";
            registry.register("sts_backup_link_heard_timestamp_seconds", help, self.heard.clone());
        });
    }

    pub(super) fn connected(&self) {
        self.connected.set(1);
        self.heard();
    }

    pub(super) fn disconnected(&self) {
        self.connected.set(0);
    }

    pub(super) fn heard(&self) {
        self.heard.set(clock::now().as_second());
    }

    pub(super) fn certificate(&self, until: Timestamp) {
        self.certificate.set(until.as_second());
    }

    pub(super) fn applied(&self, applied: &Applied) {
        self.revision.set(i64::try_from(applied.revision).unwrap_or(i64::MAX));
        self.held.set(i64::from(applied.outcome() == Outcome::Held));
        self.rejected.set(i64::try_from(applied.items.len()).unwrap_or(i64::MAX));
    }
}
