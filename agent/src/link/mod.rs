//! The link to the hub: the only part that knows that there is one. It writes down the policies that the hub wants, and tells
//! the hub what becomes of the cluster's objects.
//!
//! Everything that counts is in the cluster: policies are objects, as everybody's are, so that nothing here has to work for
//! backups to run. [`guard`] judges what comes, [`apply`] writes it, [`report`] remembers what is to be told, [`session`]
//! speaks with the hub, [`identity`] is what this cluster shows it.

mod apply;
mod guard;
mod identity;
mod metrics;
mod report;
mod session;
mod state;

use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use sts_backup_api::link::reconnect_pause;
use sts_backup_service::clock;
use sts_backup_service::telemetry::chain;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::apply::Applier;
use self::metrics::LinkMetrics;
use self::report::Reports;
use self::session::{Ended, Session};
use crate::app;

/// A connection that held for so long was a good one.
const STABLE: Duration = Duration::from_mins(1);

/// Keeps the link until `stop`. Without one in the configuration there is nothing to do.
pub(crate) async fn run(cx: app::Context, stop: CancellationToken) {
    let Some(link) = cx.config.link.clone() else { return };
    let metrics = LinkMetrics::default();
    metrics.register(&cx.metrics);
    let reports = Arc::new(Reports::default());
    let applier = Arc::new(Applier::new(&cx, link.guardrails.clone()));
    let coverage = cx.coverage.subscribe();
    let observing = report::observe(cx.client.clone(), coverage, Arc::clone(&reports), Arc::clone(&applier));
    let session = Session::new(&cx, link, reports, applier, metrics);
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        () = observing => {}
        () = connect(session, &stop) => {}
    }
}

/// Connects, and connects again, until `stop`.
async fn connect(mut session: Session, stop: &CancellationToken) {
    let mut failures = 0_u32;
    loop {
        let began = clock::monotonic();
        let ended = session.run(stop).await;
        if clock::monotonic().duration_since(began) >= STABLE {
            failures = 0;
        }
        let pause = match ended {
            Ended::Stopped => return,
            Ended::ComeAgain { after, reason } => {
                info!(
                    reason,
                    ?after,
                    "the hub says when to come again: the cluster goes on by itself until then"
                );
                after.mul_f64(rand::rng().random_range(0.5..1.5))
            }
            Ended::Renewed => {
                info!("the link's certificate is another one: the agent connects with it");
                continue;
            }
            Ended::Lost { error, spread } => {
                let pause = reconnect_pause(failures, rand::random()) + spread.mul_f64(rand::random());
                failures = failures.saturating_add(1);
                warn!(error = chain(&*error), ?pause, "the hub is lost: the cluster goes on by itself");
                pause
            }
            Ended::Failed(error) => {
                let pause = reconnect_pause(failures, rand::random());
                failures = failures.saturating_add(1);
                warn!(error = chain(&*error), ?pause, "not linked to the hub: the cluster goes on by itself");
                pause
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(pause) => {}
        }
    }
}
