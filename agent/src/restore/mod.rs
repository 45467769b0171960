//! The restore controller: the loop that gives `StatefulSets` the data of their recovery points back.
//!
//! Four rooms: [`observe`] and [`survey`] read facts, [`decide`] names the next step ([`plan`] says what a restore would
//! do, [`prepare`] and [`exchange`] are the steps of the swap), [`perform`] does it, [`status`] says it. This module only
//! drives them; [`triggers`] says when to look, and [`expire`] lets old volumes go when their time has come.

mod candidates;
mod checks;
mod choose;
mod claims;
mod context;
mod decide;
mod exchange;
mod expire;
mod facts;
mod metrics;
#[cfg(test)]
mod model;
mod observe;
mod perform;
mod plan;
mod prepare;
#[cfg(test)]
mod scene;
mod status;
mod survey;
#[cfg(test)]
mod tests;
mod triggers;
mod view;
mod volumes;

use std::future::ready;
use std::sync::Arc;
use std::time::Duration;

use dashmap::DashMap;
use futures::StreamExt;
use jiff::Timestamp;
use kube::runtime::controller::{Action, Config as ControllerConfig};
use kube::runtime::events::Reporter;
use kube::{Api, ResourceExt};
use sts_backup_api::names::FIELD_MANAGER;
use sts_backup_api::restore::{StatefulSetRestore, StatefulSetRestoreStatus};
use sts_backup_service::clock;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use self::context::{Context, set_name};
use self::decide::{RestoreStep, Work, Write, after_refusal, next_restore_step};
use self::facts::{RestoreFacts, under_way};
use self::metrics::RestoreMetrics;
use self::observe::observe;
use self::perform::{Performed, Target};
use self::status::{next_status, notes};
use self::triggers::{freed_sets, stateful_set_changes, volume_changes, watch};
use crate::app;
use crate::error::{Error, Result};
use crate::occupancy::Holder;
use crate::reconciler::{Failures, RESYNC, gone_object, jittered, list_all, watched};

/// How long one look at a restore may take before it is given up and tried again.
const RECONCILE_TIMEOUT: Duration = Duration::from_mins(1);

/// The longest wait before a failed look at a restore under way is repeated: pods may be down.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Restores until `stop` is cancelled; who leads next goes on.
pub(crate) async fn run(app: app::Context, stop: CancellationToken) {
    let app::Context { client, exec_client, leadership, config, metrics, occupancy, coverage: _ } = app;
    let (wake, woken) = mpsc::unbounded_channel();
    let restores: Api<StatefulSetRestore> = Api::all(client.clone());
    let (controller, store) = watched(restores.clone(), keep);
    let known = store.clone();
    let freed = occupancy.join::<StatefulSetRestore>(move |holder| holder.is_in(&known));
    let cx = Arc::new(Context {
        reporter: Reporter { controller: FIELD_MANAGER.to_owned(), instance: Some(config.identity.clone()) },
        metrics: RestoreMetrics::register(&metrics, store.clone()),
        client: client.clone(),
        once: exec_client,
        leadership,
        stop: stop.clone(),
        tasks: TaskTracker::new(),
        occupancy,
        wake,
        watches: DashMap::new(),
        failures: Failures::default(),
    });
    info!("restore controller started");
    if stop.run_until_cancelled(resume(&cx, &restores)).await.is_some() {
        let control = controller
            .with_config(ControllerConfig::default().concurrency(config.concurrent_reconciles))
            .reconcile_on(stateful_set_changes(client.clone(), store.clone()))
            .reconcile_on(volume_changes(client, store.clone()))
            .reconcile_on(freed_sets(freed, store))
            .reconcile_on(UnboundedReceiverStream::new(woken))
            .graceful_shutdown_on(stop.clone().cancelled_owned())
            .run(reconcile, error_policy, Arc::clone(&cx))
            .for_each(|reconciled| {
                if let Some(gone) = gone_object(reconciled) {
                    cx.forget(&gone);
                }
                ready(())
            });
        tokio::join!(control, stop.run_until_cancelled(expire::run(&cx)));
    }
    cx.tasks.close();
    cx.tasks.wait().await;
    info!("restore controller stopped");
}

/// Drops what nobody reads in the store, and what is most of it: each look reads its restore anew.
fn keep(restore: &mut StatefulSetRestore) {
    restore.metadata.managed_fields = None;
    if let Some(status) = &mut restore.status {
        status.plan = None;
        if let Some(swap) = &mut status.swap {
            swap.volumes.clear();
        }
    }
}

/// Takes in hand what an earlier leader had, before anybody begins anything.
async fn resume(cx: &Arc<Context>, restores: &Api<StatefulSetRestore>) {
    let found = list_all(restores, "list the StatefulSetRestores").await;
    let is_under_way = |restore: &&StatefulSetRestore| {
        restore.status.as_ref().is_some_and(|status| under_way(status).is_some())
    };
    for restore in found.iter().filter(is_under_way) {
        cx.occupancy.resume(set_name(restore), Holder::of(restore));
    }
    cx.occupancy.all_resumed().await;
}

/// One look at a restore: everything that can be done about it now.
async fn reconcile(restore: Arc<StatefulSetRestore>, cx: Arc<Context>) -> Result<Action> {
    // What was written down by then is found by the next look.
    let steps = tokio::time::timeout(RECONCILE_TIMEOUT, Box::pin(next_steps(&restore, &cx))).await;
    let answer = steps.unwrap_or(Err(Error::NoAnswer { operation: "reconcile the StatefulSetRestore" }));
    cx.failures.note(&*restore, answer)
}

/// Goes on with a restore until it has to wait.
async fn next_steps(cached: &StatefulSetRestore, cx: &Arc<Context>) -> Result<Action> {
    // The cache may lag behind our own writes, and a decision on old facts is a wrong one.
    let Some(mut restore) = perform::refreshed(&cx.client, cached).await? else {
        cx.vacate(cached);
        return Ok(Action::await_change());
    };
    let mut in_hand = false;
    loop {
        if cx.stop.is_cancelled() || !cx.leadership.is_held() {
            return Ok(Action::await_change());
        }
        if let Some(swap) = restore.status.as_ref().and_then(under_way) {
            in_hand = true;
            watch(cx, &restore, swap);
        }
        let busy_with = cx.busy_with(&restore).map(|holder| holder.to_string());
        let facts = observe(&cx.client, &restore, busy_with).await?;
        let now = clock::now();
        let step = next_restore_step(&facts, now);
        debug!(?step, "decided");
        match &step {
            RestoreStep::AddFinalizer => {
                restore = perform::set_finalizer(&cx.client, &restore, true).await?;
                crash_point!("after-restore-finalizer");
            }
            RestoreStep::RemoveFinalizer => {
                restore = perform::set_finalizer(&cx.client, &restore, false).await?;
                if facts.is_deleting() {
                    cx.vacate(&restore);
                    return Ok(Action::await_change());
                }
            }
            RestoreStep::Do { work, writes } => {
                if let Some(step) = perform(cx, &facts, *work, writes).await? {
                    let until = until(&step);
                    restore = write(cx, &restore, &facts, &step, clock::now()).await?;
                    if let Some(until) = until {
                        return Ok(wake_at(until, clock::now()));
                    }
                }
            }
            RestoreStep::Begin { .. } | RestoreStep::RollBack(_) if !in_hand => {
                // Before the last look at what there is: what others do afterwards would not be seen. Where somebody was
                // faster, the next look says so.
                in_hand = cx.occupy(&restore).is_ok();
            }
            RestoreStep::Plan(_)
            | RestoreStep::Refuse(_)
            | RestoreStep::Begin { .. }
            | RestoreStep::Record(_)
            | RestoreStep::RollBack(_)
            | RestoreStep::RefuseRollback(_)
            | RestoreStep::Finish { .. } => {
                restore = write(cx, &restore, &facts, &step, now).await?;
                crash_point!("after-restore-record");
            }
            RestoreStep::Wait { until, .. } => {
                let written = write(cx, &restore, &facts, &step, now).await?;
                if facts.under_way().is_none() {
                    cx.vacate(&written);
                }
                return Ok(
                    until.map_or_else(|| Action::requeue(jittered(RESYNC)), |until| wake_at(until, now))
                );
            }
            RestoreStep::Idle => {
                cx.vacate(&restore);
                return Ok(Action::requeue(jittered(RESYNC)));
            }
        }
    }
}

/// Does some writes; what follows where one of them is refused for good.
async fn perform(
    cx: &Context,
    facts: &RestoreFacts,
    work: Work,
    writes: &[Write],
) -> Result<Option<RestoreStep>> {
    let set = &facts.restore.spec.stateful_set_ref.name;
    let target = Target { namespace: facts.target_namespace(), set };
    let done = perform::perform(&cx.client, target, work, writes).await?;
    debug!(?work, writes = writes.len(), "done");
    Ok(match done {
        Performed::Done => None,
        Performed::Refused(words) => {
            warn!(?work, reason = words, restore = facts.restore.name_any(), "write refused");
            Some(after_refusal(facts, work, &words, clock::now()))
        }
    })
}

/// When a step that waits is to be looked at again.
fn until(step: &RestoreStep) -> Option<Timestamp> {
    if let RestoreStep::Wait { until, .. } = step { *until } else { None }
}

fn wake_at(until: Timestamp, now: Timestamp) -> Action {
    // Rounded up, or the timer fires just before the moment it was set for.
    let pause = until.duration_since(now).as_millis().max(0).saturating_add(1);
    let pause = Duration::from_millis(u64::try_from(pause).unwrap_or(u64::MAX));
    Action::requeue(pause.min(jittered(RESYNC)))
}

/// Writes the status of a step, if that changes anything, and says so.
async fn write(
    cx: &Context,
    restore: &StatefulSetRestore,
    facts: &RestoreFacts,
    step: &RestoreStep,
    now: Timestamp,
) -> Result<StatefulSetRestore> {
    let status = next_status(facts, step, now);
    if restore.status.as_ref() == Some(&status) {
        return Ok(restore.clone());
    }
    let written = perform::write_status(&cx.client, restore, &status).await?;
    said(cx, &written, facts, step, &status);
    Ok(written)
}

/// Tells the Events, the log and the metrics what was written down.
fn said(
    cx: &Context,
    restore: &StatefulSetRestore,
    facts: &RestoreFacts,
    step: &RestoreStep,
    status: &StatefulSetRestoreStatus,
) {
    for note in notes(facts, step) {
        cx.publish(restore, note);
    }
    let (namespace, name) = (restore.namespace().unwrap_or_default(), restore.name_any());
    match step {
        RestoreStep::Begin { plan, .. } => {
            cx.metrics.started(restore);
            info!(namespace, restore = name, point = plan.point, "restore started");
        }
        RestoreStep::Refuse(failure) => {
            cx.vacate(restore);
            cx.metrics.refused(restore);
            info!(namespace, restore = name, reason = failure.reason, "restore refused");
        }
        RestoreStep::Finish { outcome, swap } => {
            cx.vacate(restore);
            cx.metrics.finished(restore, *outcome, status);
            let reason = swap.failure.as_ref().map(|failure| failure.reason.as_str());
            info!(namespace, restore = name, ?outcome, reason, "restore finished");
        }
        RestoreStep::Record(swap) | RestoreStep::RollBack(swap) => {
            info!(namespace, restore = name, step = ?swap.step, toward = ?swap.toward, "restore goes on");
        }
        RestoreStep::AddFinalizer
        | RestoreStep::RemoveFinalizer
        | RestoreStep::Plan(_)
        | RestoreStep::RefuseRollback(_)
        | RestoreStep::Do { .. }
        | RestoreStep::Wait { .. }
        | RestoreStep::Idle => {}
    }
}

#[expect(clippy::needless_pass_by_value, reason = "kube's controller calls it so")]
fn error_policy(restore: Arc<StatefulSetRestore>, err: &Error, cx: Arc<Context>) -> Action {
    let is_under_way = restore.status.as_ref().is_some_and(|status| under_way(status).is_some());
    cx.failures.action(&*restore, err, if is_under_way { LONGEST_PAUSE } else { Duration::MAX })
}
