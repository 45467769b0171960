//! The policy controller: the loop that gives each `StatefulSet` that a policy selects its `StatefulSetBackup`.
//!
//! Four rooms: [`observe`] watches, [`decide`] compares what policies want with what there is, [`perform`] writes the
//! differences, [`status`] says it. As policies can select the same `StatefulSets`, they are decided together, in memory
//! and for all changes of half a second at once; a change costs no request but the writes that it calls for.

mod decide;
mod metrics;
pub(crate) mod observe;
mod perform;
mod status;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use jiff::Timestamp;
use kube::runtime::events::Reporter;
use kube::{Client, Resource};
use sts_backup_api::names::FIELD_MANAGER;
use sts_backup_api::report::CoverageReport;
use sts_backup_service::{clock, telemetry};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::decide::{PolicyPlan, Step, next_policy_steps};
use self::observe::{Key, Stores};
use self::perform::Outcome;
use self::status::{Results, change_notes, cluster_coverage, idle_note, next_status, write_notes};
use crate::app;
use crate::error::Result;
use crate::events::{self, Note};
use crate::lease::Leadership;

/// How long changes are collected before they are looked at: they come in bursts.
const DEBOUNCE: Duration = Duration::from_millis(500);

/// After which time a status is written again that could not be.
const STATUS_RETRY: Duration = Duration::from_secs(10);

/// After which time is looked again at what had changed when it was to be written: not every change makes itself known.
const OUTDATED_RETRY: Duration = Duration::from_secs(1);

/// The longest wait before an update that does not take is tried again.
const UNCHANGED_RETRY: Duration = Duration::from_mins(5);

/// Keeps backups as policies want them, until `stop` is cancelled.
pub(crate) async fn run(app: app::Context, stop: CancellationToken) {
    let app::Context { client, exec_client, leadership, config, metrics, occupancy: _, coverage } = app;
    let changed = Arc::new(Notify::new());
    // They end with this function.
    let mut watches = JoinSet::new();
    let stores = Stores::watch(&client, config.hook_profiles.clone(), &changed, &mut watches);
    metrics::register(&metrics, stores.clone());
    let mut controller = Controller {
        reporter: Reporter { controller: FIELD_MANAGER.to_owned(), instance: Some(config.identity.clone()) },
        client,
        once: exec_client,
        leadership,
        concurrency: usize::from(config.concurrent_reconciles),
        stores,
        coverage,
        failures: HashMap::new(),
    };
    info!("policy controller started");
    stop.run_until_cancelled(controller.keep(&changed)).await;
    info!("policy controller stopped");
}

struct Controller {
    client: Client,
    /// For Events: one that is sent twice is there twice.
    once: Client,
    leadership: Leadership,
    reporter: Reporter,
    concurrency: usize,
    stores: Stores,
    /// For whoever wants to know of the cluster as a whole.
    coverage: watch::Sender<Option<CoverageReport>>,
    failures: HashMap<Key, Failure>,
}

/// A write that failed, and is not tried again at once.
struct Failure {
    /// What was to be written; something else is tried at once.
    hash: Option<String>,
    message: String,
    times: u32,
    until: Instant,
}

impl Controller {
    async fn keep(&mut self, changed: &Notify) {
        if self.stores.ready().await.is_err() {
            // The watches end with the process only.
            return;
        }
        loop {
            let look_again = self.look().await;
            let in_time = async {
                match look_again {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = changed.notified() => {}
                () = in_time => {}
            }
            tokio::time::sleep(DEBOUNCE).await;
        }
    }

    /// One look at everything; says after which time the next one is due without a change.
    async fn look(&mut self) -> Option<Duration> {
        if !self.leadership.is_held() {
            return None;
        }
        let (world, now) = (self.stores.observe(), clock::now());
        self.coverage.send_if_modified(|known| {
            let seen = Some(cluster_coverage(&world, now));
            let is_new = *known != seen;
            *known = seen;
            is_new
        });
        let plans = next_policy_steps(&world, now);
        let results = self.write(&plans).await;
        let mut said = true;
        for (plan, results) in plans.iter().zip(&results) {
            said &= self.say(plan, results, now).await;
        }
        let again = (!said).then_some(STATUS_RETRY);
        let outdated = results.iter().any(|results| results.is_outdated).then_some(OUTDATED_RETRY);
        let next = plans.iter().filter_map(|plan| plan.look_again).min();
        let next = next.map(|next| until(clock::now(), next));
        let retry = self.failures.values().map(|failure| failure.until).min();
        let retry = retry.map(|retry| retry.saturating_duration_since(clock::monotonic()));
        next.into_iter().chain(retry).chain(again).chain(outdated).min()
    }

    /// Does the steps of all plans, some at a time, but for those that failed just now.
    async fn write(&mut self, plans: &[PolicyPlan<'_>]) -> Vec<Results> {
        let mut results = vec![Results::default(); plans.len()];
        let mut due: Vec<(usize, usize)> = Vec::new();
        let mut failures = HashMap::new();
        for (at, plan) in plans.iter().enumerate() {
            for (step_at, step) in plan.steps.iter().enumerate() {
                match self
                    .failures
                    .remove(step.key())
                    .filter(|failure| failure.hash.as_deref() == step.hash())
                {
                    Some(failure) if clock::monotonic() < failure.until => {
                        results[at].failed.insert(step_at, failure.message.clone());
                        failures.insert(step.key().clone(), failure);
                    }
                    earlier => {
                        due.push((at, step_at));
                        failures.extend(earlier.map(|failure| (step.key().clone(), failure)));
                    }
                }
            }
        }
        // What nobody wants to write any more has not failed.
        self.failures = failures;

        let (client, leadership) = (&self.client, &self.leadership);
        let mut writes = stream::iter(due)
            .map(async |(at, step_at)| {
                let (plan, step) = (&plans[at], &plans[at].steps[step_at]);
                crash_point!("before-policy-write");
                let done = if leadership.is_held() {
                    perform::perform(client, plan.policy, step).await
                } else {
                    Ok(Outcome::Outdated)
                };
                crash_point!("after-policy-write");
                (at, step_at, done)
            })
            .buffer_unordered(self.concurrency);
        // A policy whose backups are all refused for one reason says so once.
        let mut failed_now = vec![0_usize; plans.len()];
        while let Some((at, step_at, done)) = writes.next().await {
            let step = (step_at, &plans[at].steps[step_at]);
            let is_failure = !take_down(&mut results[at], &mut self.failures, step, done);
            failed_now[at] += usize::from(is_failure);
        }
        for (at, failures) in failed_now.into_iter().enumerate().filter(|(_, failures)| *failures > 0) {
            let error = results[at].failed.first_key_value().map(|(_, message)| message.as_str());
            warn!(policy = plans[at].policy.name, failures, error, "backups of the policy not written yet");
        }
        results
    }

    /// Writes the status, if that changes anything, and says what was done. No: the status could not be written.
    async fn say(&self, plan: &PolicyPlan<'_>, results: &Results, now: Timestamp) -> bool {
        let policy = plan.policy;
        if !results.done.is_empty() {
            info!(policy = policy.name, writes = results.done.len(), "backups of the policy written");
        }
        for note in write_notes(plan, results) {
            self.publish(plan, note).await;
        }
        let old = policy.object.status.clone().unwrap_or_default();
        let status = next_status(plan, results, now);
        if policy.object.status.as_ref() == Some(&status) || !self.leadership.is_held() {
            return true;
        }
        match perform::write_status(&self.client, &policy.object, &status).await {
            Ok(Outcome::Done) => {
                for note in change_notes(&old, &status).into_iter().chain(idle_note(plan, &old)) {
                    self.publish(plan, note).await;
                }
            }
            Ok(Outcome::Outdated | Outcome::Unchanged) => {
                debug!(policy = policy.name, "the policy changed meanwhile");
                return false;
            }
            Err(err) => {
                warn!(policy = policy.name, error = %telemetry::chain(&err), "status of the policy not written");
                return false;
            }
        }
        true
    }

    async fn publish(&self, plan: &PolicyPlan<'_>, note: Note) {
        let about = plan.policy.object.object_ref(&());
        events::publish(self.once.clone(), &self.reporter, about, note).await;
    }
}

/// Takes down what came of a step. No: it failed.
fn take_down(
    results: &mut Results,
    failures: &mut HashMap<Key, Failure>,
    (at, step): (usize, &Step),
    done: Result<Outcome>,
) -> bool {
    let times = failures.remove(step.key()).map_or(0, |failure| failure.times);
    let (message, pause) = match (done, step) {
        (Ok(Outcome::Done), _) => {
            results.done.insert(at);
            return true;
        }
        (Ok(Outcome::Outdated), _) => {
            results.is_outdated = true;
            return true;
        }
        (Ok(Outcome::Unchanged), Step::Create(_) | Step::Delete { .. }) => {
            results.done_before.insert(at);
            return true;
        }
        (Ok(Outcome::Unchanged), Step::Update { .. }) => {
            let message = "it was applied, and is what it was before: something in the cluster, such as a mutating \
                           webhook, undoes what the template says";
            (message.to_owned(), (STATUS_RETRY * 2_u32.saturating_pow(times.min(16))).min(UNCHANGED_RETRY))
        }
        (Err(err), _) => (telemetry::chain(&err), err.backoff(times)),
    };
    results.failed.insert(at, message.clone());
    let failure = Failure {
        hash: step.hash().map(str::to_owned),
        message,
        times: times.saturating_add(1),
        until: clock::monotonic() + pause,
    };
    failures.insert(step.key().clone(), failure);
    false
}

fn until(now: Timestamp, next: Timestamp) -> Duration {
    // Rounded up, or the timer fires just before the moment it was set for.
    let milliseconds = next.as_millisecond().saturating_sub(now.as_millisecond()).max(0);
    Duration::from_millis(milliseconds.unsigned_abs() + 1)
}
