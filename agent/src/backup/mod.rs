//! The backup controller: the loop that turns each `StatefulSetBackup` into recovery points.
//!
//! Four rooms: [`observe`] reads facts, [`decide`] names the next step, [`perform`] does it, [`status`] says it.
//! This module only drives them, and owns what outlives one reconciliation: the tasks that run hooks. A hook can
//! hang for as long as its timeout, so no reconciliation waits for one.

mod decide;
mod error;
mod metrics;
mod observe;
mod perform;
mod preflight;
mod section;
mod status;
#[cfg(test)]
mod tests;

use std::future::ready;
use std::sync::Arc;
use std::time::Duration;

use dashmap::DashMap;
use futures::{Stream, StreamExt, stream};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::core::PartialObjectMeta;
use kube::runtime::controller::{Action, Config as ControllerConfig, Controller};
use kube::runtime::events::{Event as KubeEvent, Recorder, Reporter};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher::{Config as WatcherConfig, Event};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use rand::Rng;
use sts_backup_api::backup::{StatefulSetBackup, StatefulSetBackupStatus};
use sts_backup_api::conditions::{self, READY};
use sts_backup_api::names::{BACKUP_LABEL, BACKUP_NAMESPACE_LABEL, FIELD_MANAGER, RUN_LABEL};
use sts_backup_api::run::{CurrentRun, RunStep};
use sts_backup_api::snapshot::VolumeSnapshot;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, debug, error, info, info_span, warn};

use self::decide::{BackupStep, next_backup_step};
use self::error::{Error, Result};
use self::metrics::BackupMetrics;
use self::observe::{BackupFacts, observe};
use self::section::Section;
use self::status::{Note, next_status, note};
use crate::lease::Leadership;
use crate::{app, clock, telemetry};

/// The longest note that the API server admits in an Event, bytes.
const MAX_NOTE: usize = 1024;

/// How long an attempt to write down what came of a section may take.
const OUTCOME_TIMEOUT: Duration = Duration::from_secs(10);

/// What the controller works with.
pub(crate) struct Context {
    client: Client,
    /// For what must not be repeated behind our back.
    exec: Client,
    leadership: Leadership,
    recorder: Recorder,
    metrics: BackupMetrics,
    /// Cancelled when this replica is to stop: no new work, thaw what is frozen.
    stop: CancellationToken,
    /// The runs whose hooks this process is running, by the uid of their object.
    sections: DashMap<String, CancellationToken>,
    tasks: TaskTracker,
    /// Asks for a reconciliation when a section has ended.
    wake: mpsc::UnboundedSender<ObjectRef<StatefulSetBackup>>,
    /// Failed reconciliations in a row, by uid.
    failures: DashMap<String, u32>,
}

/// Backs up until `stop` is cancelled, then thaws what is frozen, and returns.
pub(crate) async fn run(app: app::Context, stop: CancellationToken) {
    let app::Context { client, exec_client, leadership, config, metrics } = app;
    let (wake, woken) = mpsc::unbounded_channel();
    let backups: Api<StatefulSetBackup> = Api::all(client.clone());
    let controller = Controller::new(backups, WatcherConfig::default());
    let store = controller.store();
    let reporter = Reporter { controller: FIELD_MANAGER.to_owned(), instance: Some(config.identity.clone()) };
    let cx = Arc::new(Context {
        recorder: Recorder::new(client.clone(), reporter),
        metrics: BackupMetrics::register(&metrics, store.clone()),
        client: client.clone(),
        exec: exec_client,
        leadership,
        stop: stop.clone(),
        sections: DashMap::new(),
        tasks: TaskTracker::new(),
        wake,
        failures: DashMap::new(),
    });
    info!("backup controller started");
    controller
        .with_config(ControllerConfig::default().concurrency(config.concurrent_reconciles))
        .watches(
            Api::<VolumeSnapshot>::all(client.clone()),
            WatcherConfig::default().labels(RUN_LABEL),
            |snapshot| backup_of(&snapshot),
        )
        .reconcile_on(stateful_set_changes(client, store))
        .reconcile_on(UnboundedReceiverStream::new(woken))
        .graceful_shutdown_on(stop.cancelled_owned())
        .run(reconcile, error_policy, Arc::clone(&cx))
        .for_each(|_| ready(()))
        .await;
    cx.tasks.close();
    cx.tasks.wait().await;
    info!("backup controller stopped");
}

/// The backup whose run took a snapshot.
fn backup_of<K: ResourceExt>(snapshot: &K) -> Option<ObjectRef<StatefulSetBackup>> {
    let label = |name| snapshot.labels().get(name);
    Some(ObjectRef::new(label(BACKUP_LABEL)?).within(label(BACKUP_NAMESPACE_LABEL)?))
}

/// The backups that a change of some `StatefulSet` concerns.
fn stateful_set_changes(
    client: Client,
    store: Store<StatefulSetBackup>,
) -> impl Stream<Item = ObjectRef<StatefulSetBackup>> + Send + 'static {
    let sets: Api<PartialObjectMeta<StatefulSet>> = Api::all(client);
    watcher(sets, WatcherConfig::default()).default_backoff().filter_map(|event| ready(event.ok())).flat_map(
        move |event| {
            let (set, is_gone) = match event {
                Event::Apply(set) | Event::InitApply(set) => (Some(set), false),
                Event::Delete(set) => (Some(set), true),
                Event::Init | Event::InitDone => (None, false),
            };
            stream::iter(set.map(|set| concerned(&store, &set, is_gone)).unwrap_or_default())
        },
    )
}

fn concerned(
    store: &Store<StatefulSetBackup>,
    set: &PartialObjectMeta<StatefulSet>,
    is_gone: bool,
) -> Vec<ObjectRef<StatefulSetBackup>> {
    let (name, namespace) = (set.name_any(), set.namespace().unwrap_or_default());
    let is_concerned = |backup: &Arc<StatefulSetBackup>| {
        let own = backup.namespace().unwrap_or_default();
        let target = &backup.spec.stateful_set_ref;
        target.name == name && target.namespace_or(&own) == namespace && (is_gone || waits_for_set(backup))
    };
    store
        .state()
        .iter()
        .filter(|backup| is_concerned(backup))
        .map(|backup| ObjectRef::from_obj(&**backup))
        .collect()
}

/// A `StatefulSet` changes often; few changes matter to its backup.
fn waits_for_set(backup: &StatefulSetBackup) -> bool {
    let Some(status) = &backup.status else { return true };
    let in_preflight = status.current_run.as_ref().is_some_and(|run| run.step == RunStep::Preflight);
    in_preflight || conditions::find(&status.conditions, READY).is_none_or(|ready| ready.status != "True")
}

/// One look at a backup: everything that can be done about it now.
async fn reconcile(backup: Arc<StatefulSetBackup>, cx: Arc<Context>) -> Result<Action> {
    let uid = backup.uid().unwrap_or_default();
    let action = next_steps(&backup, &cx).await?;
    cx.failures.remove(&uid);
    Ok(action)
}

/// Goes on with a backup until it has to wait.
async fn next_steps(cached: &StatefulSetBackup, cx: &Arc<Context>) -> Result<Action> {
    let is_in_section = || cx.sections.contains_key(&cached.uid().unwrap_or_default());
    if is_in_section() && cached.metadata.deletion_timestamp.is_none() {
        // Its end wakes us; until then the API server is left to those who cut.
        return Ok(Action::await_change());
    }
    // The cache may lag behind our own writes, and a decision on old facts is a wrong one.
    let Some(mut backup) = perform::refreshed(&cx.client, cached).await? else {
        return Ok(Action::await_change());
    };
    loop {
        if cx.stop.is_cancelled() || !cx.leadership.is_held() {
            return Ok(Action::await_change());
        }
        let facts = observe(&cx.client, &backup, is_in_section()).await?;
        let now = clock::now();
        let step = next_backup_step(&facts, now);
        debug!(?step, "decided");
        match &step {
            BackupStep::AddFinalizer => {
                backup = perform::set_finalizer(&cx.client, &backup, true).await?;
                crash_point!("after-finalizer");
            }
            BackupStep::RemoveFinalizer => {
                backup = perform::set_finalizer(&cx.client, &backup, false).await?;
                if facts.deleting {
                    return Ok(Action::await_change());
                }
            }
            BackupStep::Begin(_) => {
                backup = write(cx, &backup, &facts, &step, now).await?;
                crash_point!("after-begin");
            }
            BackupStep::Record(_) => {
                backup = write(cx, &backup, &facts, &step, now).await?;
                crash_point!("after-record");
            }
            BackupStep::Finish(_) => {
                crash_point!("before-finish");
                backup = write(cx, &backup, &facts, &step, now).await?;
                crash_point!("after-finish");
            }
            BackupStep::CleanUp { doomed, .. } => {
                perform::delete_snapshots(&cx.client, &facts.namespace, doomed).await?;
                crash_point!("after-clean-up");
                backup = write(cx, &backup, &facts, &step, now).await?;
            }
            BackupStep::Freeze(run) => {
                let claims = section::claim_manifests(cx, &facts.namespace, run).await?;
                backup = write(cx, &backup, &facts, &step, now).await?;
                crash_point!("after-duty");
                let (namespace, run) = (facts.namespace.clone(), run.clone());
                spawn_section(cx, backup, move |cx, backup, cancel| async move {
                    Section { cx, backup, namespace, claims, cancel }.run(run).await
                });
                return Ok(Action::await_change());
            }
            BackupStep::Thaw(pods) => {
                let Some(run) = facts.status.current_run.clone() else { return Ok(Action::await_change()) };
                let (namespace, pods) = (facts.namespace.clone(), pods.clone());
                spawn_section(cx, backup, move |cx, backup, _cancel| async move {
                    let newer = backup.spec.post_backup_hook.as_ref();
                    perform::thaw(&cx.exec, &namespace, &run, &pods, newer).await
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
                write(cx, &backup, &facts, &step, now).await?;
                return Ok(
                    until.map_or_else(Action::await_change, |until| Action::requeue(from_to(now, until)))
                );
            }
            BackupStep::Idle(_) => {
                write(cx, &backup, &facts, &step, now).await?;
                return Ok(Action::await_change());
            }
        }
    }
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
    if let Some(note) = note(facts, step) {
        cx.publish(backup, note);
    }
    match step {
        BackupStep::Begin(run) => {
            cx.metrics.started(backup);
            info!(run = %run.id, "run started");
        }
        BackupStep::CleanUp { record, .. } | BackupStep::Finish(record) => {
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
        | BackupStep::Wait { .. }
        | BackupStep::Idle(_) => {}
    }
}

/// Runs hooks in a task of their own, and writes down the run that comes of it.
fn spawn_section<Run>(
    cx: &Arc<Context>,
    backup: StatefulSetBackup,
    section: impl FnOnce(Arc<Context>, Arc<StatefulSetBackup>, CancellationToken) -> Run,
) where
    Run: Future<Output = CurrentRun> + Send + 'static,
{
    let (cx, backup) = (Arc::clone(cx), Arc::new(backup));
    let cancel = cx.stop.child_token();
    let registered = Registered::new(&cx, &backup, cancel.clone());
    let span = info_span!("section", namespace = backup.namespace(), backup = backup.name_any());
    let section = section(Arc::clone(&cx), Arc::clone(&backup), cancel);
    let tasks = cx.tasks.clone();
    let task = async move {
        let run = section.await;
        write_outcome(&cx, &backup, run).await;
        drop(registered);
    };
    tasks.spawn(task.instrument(span));
}

/// Marks an object as having a section in this process; ends with the section, however that ends.
struct Registered {
    cx: Arc<Context>,
    uid: String,
    object: ObjectRef<StatefulSetBackup>,
}

impl Registered {
    fn new(cx: &Arc<Context>, backup: &StatefulSetBackup, cancel: CancellationToken) -> Self {
        let uid = backup.uid().unwrap_or_default();
        cx.sections.insert(uid.clone(), cancel);
        Self { cx: Arc::clone(cx), uid, object: ObjectRef::from_obj(backup) }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.cx.sections.remove(&self.uid);
        // Without a receiver the controller has ended, and nobody is to be woken.
        let _ = self.cx.wake.send(self.object.clone());
    }
}

/// Writes down what came of a section; tries until it is written, or somebody else has gone on with the run.
async fn write_outcome(cx: &Context, backup: &StatefulSetBackup, run: CurrentRun) {
    let was_at = backup.status.as_ref().and_then(|status| status.current_run.as_ref()).map(|run| run.step);
    let mut failures = 0;
    loop {
        let attempt = async {
            let Some(latest) = perform::refreshed(&cx.client, backup).await? else { return Ok(()) };
            let current = latest.status.as_ref().and_then(|status| status.current_run.as_ref());
            if current.is_none_or(|current| current.id != run.id || Some(current.step) != was_at) {
                warn!(run = %run.id, "another replica has gone on with the run");
                return Ok(());
            }
            let facts = observe(&cx.client, &latest, true).await?;
            let step = BackupStep::Record(run.clone());
            write(cx, &latest, &facts, &step, clock::now()).await?;
            crash_point!("after-outcome");
            Ok::<_, Error>(())
        };
        // A request that hangs is a failed one: pods may be waiting.
        let attempt = tokio::time::timeout(OUTCOME_TIMEOUT, attempt).await;
        let Err(err) = attempt.unwrap_or(Err(Error::NoAnswer { operation: "write what came of the hooks" }))
        else {
            return;
        };
        if !err.is_conflict() {
            warn!(error = %telemetry::chain(&err), run = %run.id, "outcome of the section not written yet");
        }
        tokio::time::sleep(err.backoff(failures).min(Duration::from_secs(2))).await;
        failures += 1;
    }
}

#[expect(clippy::needless_pass_by_value, reason = "kube's controller calls it so")]
fn error_policy(backup: Arc<StatefulSetBackup>, err: &Error, cx: Arc<Context>) -> Action {
    let mut failures = cx.failures.entry(backup.uid().unwrap_or_default()).or_insert(0);
    let pause = err.backoff(*failures);
    *failures = failures.saturating_add(1);
    if !err.is_conflict() {
        let (namespace, name) = (backup.namespace().unwrap_or_default(), backup.name_any());
        if err.is_transient() {
            warn!(error = %telemetry::chain(err), namespace, backup = name, "backup not reconciled yet");
        } else {
            error!(error = %telemetry::chain(err), namespace, backup = name, "backup cannot be reconciled");
        }
    }
    // Objects that failed together must not come back together.
    Action::requeue(pause.mul_f64(rand::rng().random_range(0.75..1.25)))
}

impl Context {
    /// Publishes an Event about a backup, beside what is going on.
    fn publish(&self, backup: &StatefulSetBackup, note: Note) {
        let Note { kind, reason, action, mut message } = note;
        message.truncate(message.floor_char_boundary(MAX_NOTE));
        let event = KubeEvent {
            type_: kind,
            reason: reason.to_owned(),
            note: Some(message),
            action: action.to_owned(),
            secondary: None,
        };
        let (recorder, reference) = (self.recorder.clone(), backup.object_ref(&()));
        self.tasks.spawn(async move {
            // In a namespace that is being deleted no Event can be created.
            if let Err(err) = recorder.publish(&event, &reference).await {
                debug!(error = %telemetry::chain(&err), "event not published");
            }
        });
    }
}
