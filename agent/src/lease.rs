//! Which replica acts: leader election on a `coordination.k8s.io/v1` Lease.
//!
//! `next_lease_step` decides, [`Elector`] asks the API server, [`Leadership`] tells the rest of the agent. Spans are
//! measured on our own monotonic clock only: another machine's timestamps are written for people and never compared.
//! A lease does not fence: what must not happen twice carries a resource version as well.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::PostParams;
use kube::{Api, Client};
use sts_backup_service::clock;
use sts_backup_service::http::Health;
use sts_backup_service::telemetry::chain;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

pub use self::leadership::Leadership;
use self::leadership::Tenure;
use crate::config::LeaseConfig;

#[cfg(test)]
pub(crate) mod fake;
mod leadership;
#[cfg(test)]
mod tests;

/// A request for the lease failed; the next one may not.
#[derive(Debug, thiserror::Error)]
enum LeaseError {
    #[error("{verb} the lease")]
    Request {
        verb: &'static str,
        #[source]
        source: kube::Error,
    },
    #[error("{verb} the lease: no answer within {limit:?}")]
    Timeout { verb: &'static str, limit: Duration },
}

impl LeaseError {
    /// Whether our copy of the lease is older than the API server's.
    fn is_stale_copy(&self) -> bool {
        match self {
            Self::Request { verb, source: kube::Error::Api(status) } => {
                // A create is told so of a namespace that does not exist.
                let is_gone = status.is_not_found() && *verb != "create";
                status.is_conflict() || is_gone || status.is_already_exists()
            }
            Self::Request { .. } | Self::Timeout { .. } => false,
        }
    }
}

/// The lease as we last saw it.
#[derive(Clone, Debug, PartialEq)]
struct Record {
    /// Empty: nobody holds it.
    holder: String,
    duration: Duration,
    transitions: i32,
    /// Since when its spec has been this one, on our clock: at the latest now its holder wrote it.
    unchanged_since: Instant,
}

/// What to do about the lease next.
#[derive(Clone, Debug, PartialEq)]
enum LeaseStep {
    /// There is none: make it, with us as its holder.
    Create,
    /// Its holder is gone: become it.
    Take { transitions: i32 },
    /// It is ours: say that we are still here.
    Renew,
    /// Another one holds it, at least until then.
    Wait { until: Instant },
    /// We held it, and now we do not.
    Yield,
}

/// Decides from the lease as it is (`None`: there is none), from who `we` are and whether we believe to hold it.
fn next_lease_step(record: Option<&Record>, we: &str, held: bool, now: Instant) -> LeaseStep {
    let Some(record) = record else { return LeaseStep::Create };
    // Also when we do not believe to hold it: the answer to our taking it may have been lost.
    if record.holder == we {
        return LeaseStep::Renew;
    }
    // An emptied lease may have had another holder since our last renewal.
    if held {
        return LeaseStep::Yield;
    }
    let until = record.unchanged_since + record.duration;
    if record.holder.is_empty() || until <= now {
        return LeaseStep::Take { transitions: record.transitions.saturating_add(1) };
    }
    LeaseStep::Wait { until }
}

/// What one try came to.
enum Round {
    Held { renewed: Instant },
    Other { holder: String },
    Stolen { holder: String },
}

/// Gets the lease, renews it, and gives it back. The client must not repeat requests by itself.
#[derive(Debug)]
pub struct Elector {
    api: Api<Lease>,
    config: LeaseConfig,
    we: String,
    tenure: watch::Sender<Tenure>,
    seen: Option<(Lease, Instant)>,
    /// Whether the lease is, as far as we know, as we last saw it.
    fresh: bool,
}

impl Elector {
    /// A candidate called `we`, which no other process may be called, and what the rest of the agent knows of it.
    #[must_use]
    pub fn new(client: Client, namespace: &str, config: LeaseConfig, we: String) -> (Self, Leadership) {
        let (tenure, receiver) = watch::channel(Tenure::Candidate);
        let leadership = Leadership::new(receiver, config.duration, config.renew_deadline);
        let api = Api::namespaced(client, namespace);
        (Self { api, config, we, tenure, seen: None, fresh: false }, leadership)
    }

    /// Tries until it holds the lease, and renews it until leadership is lost, or until `release` is cancelled: then
    /// it gives the lease back.
    pub async fn run(mut self, release: CancellationToken, health: Health) {
        let mut failing = false;
        let mut other = String::new();
        loop {
            let started = clock::monotonic();
            let round = match self.deadline() {
                Some(deadline) if deadline <= clock::monotonic() => None,
                Some(deadline) => timeout_at(deadline, self.attempt()).await.ok(),
                None => Some(self.attempt().await),
            };
            health.beat();
            // Too late is lost, even if the API server said yes: the rest of the agent has stopped already.
            if self.deadline().is_some_and(|deadline| deadline <= clock::monotonic()) {
                let deadline = self.config.renew_deadline;
                warn!(?deadline, "the lease was not renewed in time: leadership is lost");
                return self.lose(false);
            }
            match round {
                Some(Ok(round)) => {
                    health.reached();
                    if std::mem::take(&mut failing) {
                        info!("requests for the lease succeed again");
                    }
                    match round {
                        Round::Held { renewed } => self.hold(renewed),
                        Round::Other { holder } if holder == other => {}
                        Round::Other { holder } => {
                            info!(%holder, "another replica leads: this one follows");
                            other = holder;
                        }
                        Round::Stolen { holder } => {
                            warn!(%holder, "another one holds the lease: leadership is lost");
                            return self.lose(true);
                        }
                    }
                }
                Some(Err(error)) if error.is_stale_copy() => {
                    debug!(error = %chain(&error), "lost a race for the lease");
                }
                Some(Err(error)) if failing => {
                    debug!(error = %chain(&error), "a request for the lease failed again");
                }
                Some(Err(error)) => {
                    warn!(error = %chain(&error), "a request for the lease failed: it is tried again");
                    failing = true;
                }
                None => debug!("a request for the lease was cut off by the deadline"),
            }
            tokio::select! {
                () = release.cancelled() => return self.release().await,
                () = sleep_until(started + self.pause()) => {}
            }
        }
    }

    /// When leadership ends unless the lease is renewed.
    fn deadline(&self) -> Option<Instant> {
        self.tenure.borrow().renewed().map(|renewed| renewed + self.config.renew_deadline)
    }

    /// From the start of one try to the start of the next, so that one which hangs does not delay the others.
    /// Candidates spread their tries; a leader keeps to its interval.
    fn pause(&self) -> Duration {
        let spread = if self.deadline().is_some() { 0.0 } else { rand::random_range(0.0..0.2) };
        self.config.retry.mul_f64(1.0 + spread)
    }

    fn hold(&self, renewed: Instant) {
        let before = self.tenure.send_replace(Tenure::Held { renewed });
        if before == Tenure::Candidate {
            info!(holder = %self.we, "this replica leads");
        }
    }

    fn lose(&self, taken: bool) {
        let renewed = self.tenure.borrow().renewed().filter(|_| !taken);
        self.tenure.send_replace(Tenure::Lost { renewed });
    }

    /// One try. A leader writes at once, on the copy that its last renewal gave it; if that is stale, or for a
    /// candidate, it reads first.
    async fn attempt(&mut self) -> Result<Round, LeaseError> {
        if self.fresh {
            match self.step().await {
                Err(error) if error.is_stale_copy() => {}
                done => return done,
            }
        }
        self.read().await?;
        self.step().await
    }

    async fn step(&mut self) -> Result<Round, LeaseError> {
        let record = self.record();
        let held = self.deadline().is_some();
        match next_lease_step(record.as_ref(), &self.we, held, clock::monotonic()) {
            LeaseStep::Create => self.write(Some(0)).await,
            LeaseStep::Take { transitions } => self.write(Some(transitions)).await,
            LeaseStep::Renew => self.write(None).await,
            LeaseStep::Wait { .. } => Ok(Round::Other { holder: holder_of(record) }),
            LeaseStep::Yield => Ok(Round::Stolen { holder: holder_of(record) }),
        }
    }

    async fn read(&mut self) -> Result<(), LeaseError> {
        let lease = self.request("read", self.api.get_opt(&self.config.name)).await?;
        self.observe(lease);
        Ok(())
    }

    /// Writes the lease with us as its holder; `transitions` says that we become it now.
    async fn write(&mut self, transitions: Option<i32>) -> Result<Round, LeaseError> {
        let at = MicroTime(clock::now());
        let seen = self.seen.as_ref().map(|(lease, _)| lease.clone());
        let exists = seen.is_some();
        let mut lease = seen.unwrap_or_else(|| Lease {
            metadata: ObjectMeta { name: Some(self.config.name.clone()), ..ObjectMeta::default() },
            spec: None,
        });
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        spec.holder_identity = Some(self.we.clone());
        spec.lease_duration_seconds = i32::try_from(self.config.duration.as_secs()).ok();
        spec.renew_time = Some(at.clone());
        if let Some(transitions) = transitions {
            spec.lease_transitions = Some(transitions);
            spec.acquire_time = Some(at);
        }
        // Counted from before the request: others may have seen our write as early as that.
        let renewed = clock::monotonic();
        self.fresh = false;
        let params = PostParams::default();
        let written = if exists {
            self.request("renew", self.api.replace(&self.config.name, &params, &lease)).await?
        } else {
            self.request("create", self.api.create(&params, &lease)).await?
        };
        self.observe(Some(written));
        self.fresh = true;
        Ok(Round::Held { renewed })
    }

    /// Gives the lease back, if it is ours: its next holder need not wait.
    async fn release(mut self) {
        let held = self.deadline().is_some();
        // First of all nobody here acts as a leader any more.
        self.tenure.send_replace(Tenure::Released);
        if !held {
            return;
        }
        for _ in 0..3 {
            match self.empty().await {
                Ok(()) => return info!("the lease is released"),
                Err(error) => debug!(error = %chain(&error), "the lease could not be released"),
            }
        }
        warn!("the lease could not be released: the next leader waits until it expires");
    }

    async fn empty(&mut self) -> Result<(), LeaseError> {
        if !self.fresh {
            self.read().await?;
        }
        let Some((mut lease, _)) = self.seen.clone() else { return Ok(()) };
        let Some(spec) = lease.spec.as_mut() else { return Ok(()) };
        if spec.holder_identity.as_deref() != Some(self.we.as_str()) {
            return Ok(());
        }
        spec.holder_identity = Some(String::new());
        spec.renew_time = Some(MicroTime(clock::now()));
        self.fresh = false;
        let params = PostParams::default();
        let replace = self.api.replace(&self.config.name, &params, &lease);
        let released = self.request("release", replace).await?;
        self.observe(Some(released));
        Ok(())
    }

    /// One request, with a limit short enough that a hanging connection leaves time for another one.
    async fn request<T>(
        &self,
        verb: &'static str,
        request: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, LeaseError> {
        let limit = self.config.retry.min(Duration::from_secs(5));
        match timeout(limit, request).await {
            Ok(answer) => answer.map_err(|source| LeaseError::Request { verb, source }),
            Err(_) => Err(LeaseError::Timeout { verb, limit }),
        }
    }

    /// Notes the lease. Its age counts from the last change of its spec: labels are nobody's sign of life.
    fn observe(&mut self, lease: Option<Lease>) {
        let now = clock::monotonic();
        self.seen = lease.map(|lease| match &self.seen {
            Some((before, since)) if before.spec == lease.spec => (lease, *since),
            Some(_) | None => (lease, now),
        });
    }

    fn record(&self) -> Option<Record> {
        let (lease, since) = self.seen.as_ref()?;
        let spec = lease.spec.clone().unwrap_or_default();
        let duration = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
        let duration = duration.filter(|seconds| *seconds > 0);
        Some(Record {
            holder: spec.holder_identity.unwrap_or_default(),
            duration: duration.map_or(self.config.duration, Duration::from_secs),
            transitions: spec.lease_transitions.unwrap_or(0),
            unchanged_since: *since,
        })
    }
}

fn holder_of(record: Option<Record>) -> String {
    record.map(|record| record.holder).unwrap_or_default()
}
