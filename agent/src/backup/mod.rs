//! The backup controller: the loop that turns each `StatefulSetBackup` into recovery points.
//!
//! Four rooms: [`observe`] reads facts, [`decide`] names the next step, [`perform`] does it, [`status`] says it.
//! This module only drives them; [`tasks`] runs what can take long, hooks, beside it.

mod context;
mod decide;
mod due;
mod metrics;
pub(crate) mod observe;
mod perform;
pub(crate) mod preflight;
mod queue;
pub(crate) mod retention;
mod section;
mod snapshot;
mod status;
mod tasks;
#[cfg(test)]
mod tests;
mod triggers;

use std::future::ready;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dashmap::DashMap;
use futures::StreamExt;
use futures::future::join_all;
use jiff::Timestamp;
use kube::runtime::controller::{Action, Config as ControllerConfig};
use kube::runtime::events::Reporter;
use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt};
use sts_backup_api::backup::{StatefulSetBackup, StatefulSetBackupStatus};
use sts_backup_api::names::FIELD_MANAGER;
use sts_backup_api::run::{CurrentRun, RunStep};
use sts_backup_service::{clock, telemetry};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use self::context::{Context, set_name};
use self::decide::{BackupStep, Idle, Pruned, Wait, next_backup_step};
use self::due::{has_just_begun, is_to_begin};
use self::metrics::BackupMetrics;
use self::observe::{BackupFacts, observe};
use self::queue::Queue;
use self::section::Section;
use self::status::{damaged, next_status, notes};
use self::tasks::spawn_section;
use self::triggers::{freed_sets, grant_changes, snapshot_changes, stateful_set_changes};
use crate::app;
use crate::error::{Error, Result};
use crate::occupancy::Holder;
use crate::reconciler::{Failures, RESYNC, gone_object, jittered, list_all, watched};

/// How long one look at a backup may take before it is given up and tried again.
const RECONCILE_TIMEOUT: Duration = Duration::from_mins(1);

/// How soon a run that has begun looks whether others that are due have, too.
const OTHERS_BEGIN: Duration = Duration::from_millis(500);

/// Backs up until `stop` is cancelled, then thaws what is frozen, and returns.
pub(crate) async fn run(app: app::Context, stop: CancellationToken) {
    let app::Context { client, exec_client, leadership, config, metrics, occupancy, coverage: _ } = app;
    let (wake, woken) = mpsc::unbounded_channel();
    let backups: Api<StatefulSetBackup> = Api::all(client.clone());
    let (controller, store) = watched(backups.clone(), keep);
    let (known, sections) = (store.clone(), Arc::new(DashMap::new()));
    let under_way = Arc::clone(&sections);
    let freed = occupancy.join::<StatefulSetBackup>(move |holder| {
        // Its pods may be frozen, though it is gone.
        holder.is_in(&known) || under_way.contains_key(&holder.uid)
    });
    let cx = Arc::new(Context {
        reporter: Reporter { controller: FIELD_MANAGER.to_owned(), instance: Some(config.identity.clone()) },
        metrics: BackupMetrics::register(&metrics, store.clone()),
        client: client.clone(),
        exec: exec_client,
        leadership,
        stop: stop.clone(),
        sections,
        tasks: TaskTracker::new(),
        occupancy: Arc::clone(&occupancy),
        queue: Mutex::new(Queue::new(config.limits)),
        backups: store.clone(),
        wake,
        failures: Failures::default(),
    });
    info!("backup controller started");
    if stop.run_until_cancelled(resume(&cx, &backups)).await.is_some() {
        controller
            .with_config(ControllerConfig::default().concurrency(config.concurrent_reconciles))
            .reconcile_on(snapshot_changes(client.clone(), store.clone()))
            .reconcile_on(stateful_set_changes(client.clone(), store.clone()))
            .reconcile_on(grant_changes(client, store.clone()))
            .reconcile_on(freed_sets(freed, store))
            .reconcile_on(UnboundedReceiverStream::new(woken))
            .graceful_shutdown_on(stop.cancelled_owned())
            .run(reconcile, error_policy, Arc::clone(&cx))
            .for_each(|reconciled| {
                if let Some(gone) = gone_object(reconciled) {
                    cx.forget(&gone);
                }
                ready(())
            })
            .await;
    }
    cx.tasks.close();
    cx.tasks.wait().await;
    info!("backup controller stopped");
}

/// Drops what nobody reads in the store, and what is most of it: each look reads its backup anew.
fn keep(backup: &mut StatefulSetBackup) {
    backup.metadata.managed_fields = None;
    if let Some(status) = &mut backup.status {
        status.recovery_points.clear();
        // The metrics tell of the last one.
        status.history.truncate(1);
    }
}

/// Goes on with the runs of an earlier leader: what may be frozen comes before all else.
async fn resume(cx: &Arc<Context>, backups: &Api<StatefulSetBackup>) {
    let found = list_all(backups, "list the StatefulSetBackups").await;
    let run = |backup: &StatefulSetBackup| backup.status.as_ref()?.current_run.clone();
    let step = |backup: &StatefulSetBackup| run(backup).map(|run| run.step);
    let under_way = found.iter().filter(|backup| step(backup).is_some());
    for backup in under_way.clone() {
        let own = ObjectRef::from_obj(backup);
        cx.occupancy.resume(set_name(backup), Holder::of(backup));
        if let Some(run) = run(backup).filter(|run| run.step > RunStep::Preflight) {
            cx.queue().resume(own, &run);
        }
    }
    let may_be_frozen =
        under_way.filter(|backup| matches!(step(backup), Some(RunStep::Frozen | RunStep::Thawing)));
    join_all(may_be_frozen.map(async |backup| {
        // The controller tries again what fails here.
        if let Err(err) = Box::pin(next_steps(backup, cx)).await {
            warn!(error = %telemetry::chain(&err), backup = %ObjectRef::from_obj(backup), "run not resumed yet");
        }
    }))
    .await;
    cx.occupancy.all_resumed().await;
}

/// One look at a backup: everything that can be done about it now.
async fn reconcile(backup: Arc<StatefulSetBackup>, cx: Arc<Context>) -> Result<Action> {
    // What was written down by then is found by the next look.
    let steps = tokio::time::timeout(RECONCILE_TIMEOUT, Box::pin(next_steps(&backup, &cx))).await;
    let answer = steps.unwrap_or(Err(Error::NoAnswer { operation: "reconcile the StatefulSetBackup" }));
    cx.failures.note(&*backup, answer)
}

/// Goes on with a backup until it has to wait.
async fn next_steps(cached: &StatefulSetBackup, cx: &Arc<Context>) -> Result<Action> {
    let is_in_section = || cx.sections.contains_key(&cached.uid().unwrap_or_default());
    if is_in_section() && cached.metadata.deletion_timestamp.is_none() {
        // Its end wakes us; until then the API server is left to those who cut.
        return Ok(Action::await_change());
    }
    let mut backup = match its_turn(cached, cx).await? {
        ControlFlow::Continue(backup) => backup,
        ControlFlow::Break(action) => return Ok(action),
    };
    let mut known = None;
    loop {
        if cx.stop.is_cancelled() || !cx.leadership.is_held() {
            return Ok(Action::await_change());
        }
        let facts = match known.take() {
            Some(facts) => facts,
            None => look(cx, &backup, is_in_section()).await?,
        };
        let now = clock::now();
        let step = next_backup_step(&facts, now);
        debug!(?step, "decided");
        match &step {
            BackupStep::AddFinalizer => {
                backup = perform::set_finalizer(&cx.client, &backup, true).await?;
                crash_point!("after-finalizer");
                // Nobody has written the backup since.
                known = Some(Box::new(BackupFacts { has_finalizer: true, ..*facts }));
            }
            BackupStep::RemoveFinalizer => {
                backup = perform::set_finalizer(&cx.client, &backup, false).await?;
                if facts.deleting {
                    return Ok(Action::await_change());
                }
            }
            BackupStep::Begin { .. } => {
                if cx.occupy(&backup).is_err() {
                    // Somebody was faster: the next look says so.
                    continue;
                }
                write(cx, &backup, &facts, &step, now).await?;
                crash_point!("after-begin");
                // Others' turn; the next look finds the run.
                return Ok(Action::requeue(Duration::ZERO));
            }
            BackupStep::Record(_) | BackupStep::Skip { .. } | BackupStep::RefuseRequest => {
                backup = write(cx, &backup, &facts, &step, now).await?;
                crash_point!("after-record");
            }
            BackupStep::Finish(_) => {
                crash_point!("before-finish");
                backup = write(cx, &backup, &facts, &step, now).await?;
                crash_point!("after-finish");
            }
            BackupStep::CleanUp { doomed, .. } => {
                perform::delete_snapshots(&cx.client, facts.target_namespace(), doomed).await?;
                crash_point!("after-clean-up");
                backup = write(cx, &backup, &facts, &step, now).await?;
            }
            BackupStep::DeleteLate(late) => {
                perform::delete_snapshots(&cx.client, facts.target_namespace(), late).await?;
                warn!(snapshots = late.len(), "snapshots that came after their run had failed are deleted");
            }
            BackupStep::Prune(point) => {
                if !prune(cx, &backup, &facts, point).await {
                    let written =
                        write(cx, &backup, &facts, &BackupStep::Idle(Idle::NothingDue), now).await?;
                    return Ok(wake(&written, None, now));
                }
            }
            BackupStep::Freeze(run) => {
                if let Some(action) = freeze(cx, &backup, &facts, run).await? {
                    return Ok(action);
                }
            }
            BackupStep::Thaw(pods) => {
                let Some(run) = facts.status.current_run.clone() else { return Ok(Action::await_change()) };
                let (namespace, pods) = (facts.target_namespace().to_owned(), pods.clone());
                spawn_section(cx, backup, move |cx, backup, _cancel| async move {
                    let newer = backup.spec.post_backup_hook.as_ref();
                    perform::thaw(&cx, &namespace, &run, &pods, newer).await
                });
                return Ok(Action::await_change());
            }
            BackupStep::Cancel => {
                if let Some(section) = cx.sections.get(&facts.uid) {
                    section.cancel();
                }
                return Ok(Action::await_change());
            }
            BackupStep::Wait { until, .. } => {
                let written = write(cx, &backup, &facts, &step, now).await?;
                return Ok(wake(&written, *until, now));
            }
            BackupStep::Idle(_) => {
                let written = write(cx, &backup, &facts, &step, now).await?;
                return Ok(wake(&written, None, now));
            }
        }
    }
}

/// The backup as it is by now, unless it has to wait for others. The cache may lag behind our own writes, and a decision on
/// old facts is a wrong one.
async fn its_turn(
    cached: &StatefulSetBackup,
    cx: &Context,
) -> Result<ControlFlow<Action, StatefulSetBackup>> {
    let wait = || Ok(ControlFlow::Break(Action::requeue(jittered(OTHERS_BEGIN))));
    if lets_others_begin(cx, cached) {
        return wait();
    }
    let Some(backup) = perform::refreshed(&cx.client, cached).await? else {
        cx.vacate(cached);
        return Ok(ControlFlow::Break(Action::await_change()));
    };
    if lets_others_begin(cx, &backup) {
        return wait();
    }
    Ok(ControlFlow::Continue(backup))
}

/// Whether a run has begun while others are due.
fn lets_others_begin(cx: &Context, backup: &StatefulSetBackup) -> bool {
    let now = clock::now();
    let has_begun = backup.status.as_ref().is_some_and(|status| has_just_begun(status, now));
    let is_behind = |other: &Arc<StatefulSetBackup>| {
        // The cache may not know yet that this one has begun.
        other.uid() != backup.uid() && other.status.as_ref().is_some_and(|other| is_to_begin(other, now))
    };
    has_begun && backup.metadata.deletion_timestamp.is_none() && cx.backups.state().iter().any(is_behind)
}

/// What is known of a backup now.
async fn look(cx: &Context, backup: &StatefulSetBackup, in_section: bool) -> Result<Box<BackupFacts>> {
    let is_idle = backup.status.as_ref().is_none_or(|status| status.current_run.is_none());
    if is_idle {
        // Also where the end of its run was written down, and the answer lost.
        cx.vacate(backup);
    }
    let busy_with = if is_idle { cx.busy_with(backup) } else { None };
    Ok(Box::new(observe(&cx.client, backup, in_section, busy_with).await?))
}

/// Begins the frozen section of a run, if there is room for it; none: look again first.
async fn freeze(
    cx: &Arc<Context>,
    backup: &StatefulSetBackup,
    facts: &BackupFacts,
    run: &CurrentRun,
) -> Result<Option<Action>> {
    if let Err(limit) = cx.admit(backup, run) {
        let (step, now) = (BackupStep::Wait { why: Wait::NoRoom { limit }, until: None }, clock::now());
        let written = write(cx, backup, facts, &step, now).await?;
        return Ok(Some(wake(&written, None, now)));
    }
    let claims = snapshot::claim_manifests(&cx.client, facts.target_namespace(), run).await?;
    // Reading may have taken long, and the freeze counts from its record.
    let now = clock::now();
    let step = next_backup_step(facts, now);
    let BackupStep::Freeze(run) = &step else { return Ok(None) };
    let written = write(cx, backup, facts, &step, now).await?;
    crash_point!("after-duty");
    let (namespace, run) = (facts.target_namespace().to_owned(), run.clone());
    spawn_section(cx, written, move |cx, backup, cancel| async move {
        Section { cx, backup, namespace, claims, cancel }.run(run).await
    });
    Ok(Some(Action::await_change()))
}

/// Deletes a recovery point; whether that is done. Other work does not wait for what is refused.
async fn prune(cx: &Context, backup: &StatefulSetBackup, facts: &BackupFacts, point: &Pruned) -> bool {
    crash_point!("before-prune");
    match perform::prune(&cx.client, facts.target_namespace(), &point.snapshots).await {
        Ok(()) => {
            info!(point = %point.point, why = point.why, "recovery point pruned");
            cx.publish(backup, status::pruned(point));
            true
        }
        Err(err) => {
            let why = telemetry::chain(&err);
            warn!(point = %point.point, error = why, "recovery point not pruned");
            if !err.is_conflict() && !err.is_transient() {
                cx.publish(backup, status::not_pruned(point, &why));
            }
            false
        }
    }
}

/// Looks again when the next scheduled run begins, or at `until`, and at the latest when nothing has happened for long.
fn wake(backup: &StatefulSetBackup, until: Option<Timestamp>, now: Timestamp) -> Action {
    let next =
        backup.status.as_ref().and_then(|status| status.next_schedule_time.as_ref()).map(|next| next.0);
    let pauses = [next, until].into_iter().flatten().map(|until| from_to(now, until));
    Action::requeue(pauses.fold(jittered(RESYNC), Duration::min))
}

fn from_to(now: Timestamp, until: Timestamp) -> Duration {
    // Rounded up, or the timer fires just before the moment it was set for.
    Duration::from_millis(decide::milliseconds(now, until).unsigned_abs() + 1)
}

/// Writes the status of a step, if that changes anything, and says so.
async fn write(
    cx: &Context,
    backup: &StatefulSetBackup,
    facts: &BackupFacts,
    step: &BackupStep,
    now: Timestamp,
) -> Result<StatefulSetBackup> {
    let status = next_status(facts, step, now);
    if backup.status.as_ref() == Some(&status) {
        return Ok(backup.clone());
    }
    let written = perform::write_status(&cx.client, backup, &status).await?;
    said(cx, &written, facts, step, &status);
    Ok(written)
}

/// Tells the Events, the log and the metrics what was written down.
fn said(
    cx: &Context,
    backup: &StatefulSetBackup,
    facts: &BackupFacts,
    step: &BackupStep,
    status: &StatefulSetBackupStatus,
) {
    for note in notes(facts, step).chain(damaged(&facts.status, status)) {
        cx.publish(backup, note);
    }
    match step {
        BackupStep::Begin { run, missed: _ } => {
            cx.metrics.started(backup);
            info!(run = %run.id, "run started");
        }
        BackupStep::CleanUp { record, .. } | BackupStep::Finish(record) => {
            cx.vacate(backup);
            cx.metrics.finished(backup, record);
            info!(run = %record.id, result = ?record.result, reason = record.reason, "run finished");
        }
        BackupStep::Record(run) => {
            let step = status.current_run.as_ref().map(|run| run.step);
            debug!(run = %run.id, ?step, "run goes on");
        }
        BackupStep::AddFinalizer
        | BackupStep::RemoveFinalizer
        | BackupStep::Freeze(_)
        | BackupStep::Thaw(_)
        | BackupStep::Cancel
        | BackupStep::DeleteLate(_)
        | BackupStep::Skip { .. }
        | BackupStep::RefuseRequest
        | BackupStep::Prune(_)
        | BackupStep::Wait { .. }
        | BackupStep::Idle(_) => {}
    }
}

#[expect(clippy::needless_pass_by_value, reason = "kube's controller calls it so")]
fn error_policy(backup: Arc<StatefulSetBackup>, err: &Error, cx: Arc<Context>) -> Action {
    cx.failures.action(&*backup, err, Duration::MAX)
}
