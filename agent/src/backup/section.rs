//! The frozen section of a run: freeze, cut, thaw, as one task with one deadline.
//!
//! It begins after the thaw duties are written down, and on every path it thaws before it ends. It writes the
//! status once, at its end; if it does not get there, the next process finds the duties.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::{join_all, try_join_all};
use futures::stream::FuturesUnordered;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ListParams, PostParams};
use kube::runtime::utils::Backoff;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, ResourceExt};
use sts_backup_api::backup::{HookPods, MAX_CLAIMS, OnError, StatefulSetBackup};
use sts_backup_api::conditions::{DELETED, INTERRUPTED};
use sts_backup_api::names::{FIELD_MANAGER, RUN_LABEL};
use sts_backup_api::points::is_cut;
use sts_backup_api::run::{
    Consistency, CurrentRun, Failure, RunId, RunPod, RunStep, SnapshotState, ThawState,
};
use sts_backup_api::snapshot::{VolumeSnapshot, VolumeSnapshotContent};
use sts_backup_service::{clock, telemetry};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, warn};

use super::context::Context;
use super::decide::{START_WITHIN, failing, later, milliseconds, trouble_of};
use super::perform::{self, LOOK_TIMEOUT};
use super::snapshot::snapshot_of;
use super::status::snapshot_error;
use crate::error::Error;
use crate::events::Note;
use crate::hooks::{self, Command, Outcome};

/// After one preBackupHook failed, the others get this long to end: a hook whose end was not seen costs a second
/// thaw.
const REMAINING_HOOKS: Duration = Duration::from_secs(2);

/// Between two tries of a request while pods are frozen.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// A watch that broke is begun again at a steady pace: its default backoff would be added to the freeze.
struct Steadily;

impl Iterator for Steadily {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(RETRY_PAUSE)
    }
}

impl Backoff for Steadily {
    fn reset(&mut self) {}
}

/// One frozen section.
pub(super) struct Section {
    pub(super) cx: Arc<Context>,
    /// The object, with the duties in its status.
    pub(super) backup: Arc<StatefulSetBackup>,
    pub(super) namespace: String,
    /// The claims, for the snapshots' annotations, as JSON by name.
    pub(super) claims: BTreeMap<String, String>,
    pub(super) cancel: CancellationToken,
}

impl Section {
    /// Freezes, cuts and thaws; returns the run as it is to be written down.
    pub(super) async fn run(&self, mut run: CurrentRun) -> CurrentRun {
        let begun = clock::monotonic();
        let mut creating = JoinSet::new();
        let mut verdict = self.freeze_and_cut(&mut run, begun, &mut creating).await;
        if run.pods.iter().any(|pod| pod.freeze_container.is_some()) {
            let frozen = clock::monotonic().duration_since(begun);
            run.freeze_ms = Some(i64::try_from(frozen.as_millis()).unwrap_or(i64::MAX));
        }
        crash_point!("before-thaw");
        run = self.thaw(run).await;
        crash_point!("after-thaw");
        // A request that was sent may still be carried out, and the clean-up must come after it.
        let _ = timeout(LOOK_TIMEOUT, async { while creating.join_next().await.is_some() {} }).await;
        if verdict.is_ok() {
            verdict = self.freeze_held(&run).await;
        }
        match verdict {
            Ok(()) => {
                run.cut_skew_ms = timeout(LOOK_TIMEOUT, self.cut_skew(&run)).await.ok().flatten();
                let mut duties = run.pods.iter().filter_map(|pod| pod.thaw.as_ref());
                let owed = duties.any(|thaw| thaw.state == ThawState::Owed);
                run.step = if owed { RunStep::Thawing } else { RunStep::Readying };
                run
            }
            Err(Failure { reason, message }) => failing(&run, &reason, &message),
        }
    }

    async fn freeze_and_cut(
        &self,
        run: &mut CurrentRun,
        begun: Instant,
        creating: &mut JoinSet<Result<(), Failure>>,
    ) -> Result<(), Failure> {
        let freezes = run.pods.iter().any(|pod| pod.freeze_container.is_some());
        let spec = &self.backup.spec;
        let budget = if freezes { spec.max_freeze() } else { spec.snapshot_timeout() };
        // The budget began when the duties were written down, perhaps by another process.
        let since = run.frozen_since.as_ref().unwrap_or(&run.started).0;
        let spent = u64::try_from(milliseconds(since, clock::now())).unwrap_or_default();
        let deadline = begun + budget.saturating_sub(Duration::from_millis(spent));

        // While the hooks run: what is done later adds to the freeze.
        let (_watching, changes) = self.watch(&run.id);
        let consistency = self.freeze(run, deadline).await?;
        debug!(run = %run.id, "frozen");
        crash_point!("after-freeze");
        self.cut(run, consistency, deadline, creating, changes).await?;
        debug!(run = %run.id, "cut");
        run.cut_at = Some(MicroTime(clock::now()));
        Ok(())
    }

    /// Whether the pods that were frozen are those of before, in containers that did not start anew: a database that was
    /// restarted in between has forgotten its freeze.
    async fn freeze_held(&self, run: &CurrentRun) -> Result<(), Failure> {
        let frozen = run.pods.iter().filter_map(|pod| Some((pod, pod.freeze_container.as_deref()?)));
        let since = run.frozen_since.as_ref().unwrap_or(&run.started).0;
        let look = async |(pod, container): (&RunPod, &str)| {
            let Some(found) = perform::find_pod(&self.cx.exec, &self.namespace, &pod.name).await else {
                let message = format!("nobody said whether pod {} ran through the freeze", pod.name);
                return Err(fail(INTERRUPTED, message));
            };
            let runs_on = found.is_some_and(|found| {
                let started = container_start(&found, container);
                // In whole seconds: a start in the very second of the freeze is taken for an earlier one.
                found.uid().as_deref() == Some(&pod.uid) && started.is_some_and(|started| started <= since)
            });
            if runs_on {
                return Ok(());
            }
            let message = format!("pod {}, container {container}, was restarted during the freeze", pod.name);
            Err(fail("FreezeLost", message))
        };
        try_join_all(frozen.map(look)).await?;
        Ok(())
    }

    /// Runs the preBackupHook in all its pods at once, and notes which of them may still be running.
    async fn freeze(&self, run: &mut CurrentRun, deadline: Instant) -> Result<Consistency, Failure> {
        let freezes = run.pods.iter().any(|pod| pod.freeze_container.is_some());
        let Some(hook) = self.backup.spec.pre_backup_hook.as_ref().filter(|_| freezes) else {
            return Ok(Consistency::CrashPerVolume);
        };
        let since = run.frozen_since.as_ref().unwrap_or(&run.started).0;
        let is_late = clock::now() > later(since, START_WITHIN);
        if is_late || !self.cx.leadership.is_held() || self.cancel.is_cancelled() {
            for pod in &mut run.pods {
                (pod.freeze_container, pod.hooks_may_run_until) = (None, None);
            }
            return Err(self.interrupted());
        }
        let commands: Vec<_> = run
            .pods
            .iter()
            .enumerate()
            .filter_map(|(at, pod)| Some((at, pod.name.clone(), pod.freeze_container.clone()?)))
            .collect();
        let mut running: FuturesUnordered<_> = commands
            .iter()
            .map(async |(at, pod, container)| {
                let command = Command {
                    namespace: &self.namespace,
                    pod,
                    container,
                    argv: &hook.command,
                    timeout: hook.timeout().min(deadline.duration_since(clock::monotonic())),
                };
                (*at, hooks::run(&self.cx.exec, &command).await)
            })
            .collect();
        let mut give_up = pin!(sleep_until(deadline));
        let mut failure = None;
        let mut held = 0;
        loop {
            let (at, outcome) = tokio::select! {
                biased;
                () = self.cancel.cancelled(), if failure.is_none() => {
                    failure = Some(self.interrupted());
                    give_up.as_mut().reset(clock::monotonic());
                    continue;
                }
                ended = running.next() => match ended {
                    Some(ended) => ended,
                    None => break,
                },
                () = &mut give_up => {
                    failure.get_or_insert_with(|| self.frozen_too_long("a preBackupHook did not end"));
                    break;
                }
            };
            let Some(pod) = run.pods.get_mut(at) else { continue };
            let reason = match outcome {
                Outcome::Succeeded => {
                    pod.hooks_may_run_until = None;
                    held += 1;
                    continue;
                }
                Outcome::Failed { reason } => {
                    pod.hooks_may_run_until = None;
                    reason
                }
                Outcome::NotStarted { reason } => {
                    pod.hooks_may_run_until = None;
                    pod.freeze_container = None;
                    reason
                }
                Outcome::Unknown { reason } => {
                    pod.hooks_may_run_until = Some(MicroTime(later(clock::now(), hook.timeout())));
                    reason
                }
            };
            let message = format!("preBackupHook in pod {}: {reason}", pod.name);
            self.note(Note::warning("PreBackupHookFailed", "Freeze", message.clone()));
            if hook.on_error == OnError::Fail && failure.is_none() {
                failure = Some(fail("PreBackupHookFailed", message));
                give_up.as_mut().reset(deadline.min(clock::monotonic() + REMAINING_HOOKS));
            }
        }
        let until = MicroTime(later(clock::now(), hook.timeout()));
        for pod in run.pods.iter_mut().filter(|pod| pod.hooks_may_run_until.is_some()) {
            pod.hooks_may_run_until = Some(until.clone());
        }
        if let Some(failure) = failure {
            return Err(failure);
        }
        let wanted = if hook.pods == HookPods::First { run.replicas.min(1) } else { run.replicas };
        Ok(if wanted > 0 && held == wanted { Consistency::Application } else { Consistency::CrashPerVolume })
    }

    /// Watches the run's snapshots, in a task of its own.
    fn watch(&self, run: &RunId) -> (AbortOnDropHandle<()>, mpsc::Receiver<VolumeSnapshot>) {
        let snapshots: Api<VolumeSnapshot> = Api::namespaced(self.cx.client.clone(), &self.namespace);
        let config = watcher::Config::default().labels(&format!("{RUN_LABEL}={run}"));
        let (tell, told) = mpsc::channel(MAX_CLAIMS);
        let watching = tokio::spawn(async move {
            let mut changes = pin!(watcher(snapshots, config).backoff(Steadily).applied_objects());
            while let Some(change) = changes.next().await {
                if let Ok(snapshot) = change
                    && tell.send(snapshot).await.is_err()
                {
                    return;
                }
            }
        });
        (AbortOnDropHandle::new(watching), told)
    }

    /// Creates all snapshots at once and returns when every one of them is cut.
    async fn cut(
        &self,
        run: &mut CurrentRun,
        consistency: Consistency,
        deadline: Instant,
        creating: &mut JoinSet<Result<(), Failure>>,
        mut changes: mpsc::Receiver<VolumeSnapshot>,
    ) -> Result<(), Failure> {
        for volume in &run.volumes {
            let manifest = self.claims.get(&volume.claim);
            let snapshot = snapshot_of(&self.backup, run, volume, manifest, consistency, clock::now());
            creating.spawn(create(Arc::clone(&self.cx), self.namespace.clone(), snapshot));
        }
        let mut told = BTreeSet::new();
        let mut give_up = pin!(sleep_until(deadline));
        while run.volumes.iter().any(|volume| volume.state == SnapshotState::Pending) {
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Err(self.interrupted()),
                Some(created) = creating.join_next() => {
                    created.unwrap_or_else(|_panic| Err(self.interrupted()))?;
                    if creating.is_empty() {
                        crash_point!("after-create");
                    }
                }
                Some(snapshot) = changes.recv() => {
                    note_cut(run, &snapshot);
                    let trouble = trouble_of(&snapshot).filter(|trouble| told.insert(trouble.clone()));
                    if let Some(trouble) = trouble {
                        self.note(snapshot_error("Cut", &trouble));
                    }
                },
                () = &mut give_up => {
                    // The watch may lag: one look decides. Nothing is thawed yet, so what is cut is cut in time.
                    let uncut = timeout(LOOK_TIMEOUT, self.look_for_cuts(run)).await;
                    let uncut = uncut.unwrap_or_else(|_elapsed| "the API server does not answer".to_owned());
                    if run.volumes.iter().any(|volume| volume.state == SnapshotState::Pending) {
                        return Err(self.frozen_too_long(&format!("snapshots were not cut: {uncut}")));
                    }
                }
            }
        }
        Ok(())
    }

    /// Notes what is cut by now; says what is not, and why.
    async fn look_for_cuts(&self, run: &mut CurrentRun) -> String {
        let snapshots: Api<VolumeSnapshot> = Api::namespaced(self.cx.exec.clone(), &self.namespace);
        let listed = snapshots.list(&ListParams::default().labels(&format!("{RUN_LABEL}={}", run.id))).await;
        let listed = listed.map(|listed| listed.items).unwrap_or_default();
        for snapshot in &listed {
            note_cut(run, snapshot);
        }
        let uncut = run.volumes.iter().filter(|volume| volume.state == SnapshotState::Pending);
        let told = uncut.map(|volume| {
            let found = listed.iter().find(|found| found.name_any() == volume.snapshot);
            found.and_then(trouble_of).unwrap_or_else(|| {
                format!("{}: no error reported; is the snapshot-controller running?", volume.snapshot)
            })
        });
        told.collect::<Vec<_>>().join("; ")
    }

    async fn thaw(&self, run: CurrentRun) -> CurrentRun {
        let due: Vec<_> = (0..run.pods.len()).filter(|at| run.pods[*at].thaw.is_some()).collect();
        perform::thaw(&self.cx, &self.namespace, &run, &due, None).await
    }

    /// From the first to the last cut by the storage's clocks, milliseconds; none where it does not say.
    async fn cut_skew(&self, run: &CurrentRun) -> Option<i64> {
        let snapshots: Api<VolumeSnapshot> = Api::namespaced(self.cx.client.clone(), &self.namespace);
        let contents: Api<VolumeSnapshotContent> = Api::all(self.cx.client.clone());
        let selector = format!("{RUN_LABEL}={}", run.id);
        let listed = snapshots.list(&ListParams::default().labels(&selector)).await.ok()?;
        let cut = listed
            .iter()
            .filter_map(|snapshot| snapshot.status.as_ref()?.bound_volume_snapshot_content_name.clone());
        let cuts =
            join_all(cut.map(async |name| contents.get(&name).await.ok()?.status?.creation_time)).await;
        let cuts: Option<Vec<i64>> = cuts.into_iter().collect();
        let cuts = cuts.filter(|cuts| cuts.len() == run.volumes.len())?;
        Some((cuts.iter().max()? - cuts.iter().min()?) / 1_000_000)
    }

    fn interrupted(&self) -> Failure {
        if self.cancel.is_cancelled() && !self.cx.stop.is_cancelled() {
            fail(DELETED, "the StatefulSetBackup was deleted during the freeze".to_owned())
        } else {
            fail(INTERRUPTED, "the agent was stopped during the freeze".to_owned())
        }
    }

    fn frozen_too_long(&self, what: &str) -> Failure {
        let spec = &self.backup.spec;
        if spec.pre_backup_hook.is_some() {
            let message =
                format!("{what} within maxFreezeSeconds ({}); the pods are thawed", spec.max_freeze_seconds);
            fail("FrozenTooLong", message)
        } else {
            let message = format!("{what} within snapshotTimeoutSeconds ({})", spec.snapshot_timeout_seconds);
            fail("SnapshotNotCut", message)
        }
    }

    fn note(&self, note: Note) {
        self.cx.publish(&self.backup, note);
    }
}

fn fail(reason: &str, message: String) -> Failure {
    Failure { reason: reason.to_owned(), message }
}

fn note_cut(run: &mut CurrentRun, snapshot: &VolumeSnapshot) {
    if !is_cut(snapshot) {
        return;
    }
    let name = snapshot.name_any();
    for volume in run.volumes.iter_mut().filter(|volume| volume.snapshot == name) {
        if volume.state == SnapshotState::Pending {
            volume.state = SnapshotState::Cut;
        }
    }
}

/// Creates a snapshot. That it exists already is success: the name is the run's and the claim's.
async fn create(cx: Arc<Context>, namespace: String, snapshot: VolumeSnapshot) -> Result<(), Failure> {
    // Not by the other client: reading the claims has just opened as many connections of this one.
    let snapshots: Api<VolumeSnapshot> = Api::namespaced(cx.client.clone(), &namespace);
    let name = snapshot.name_any();
    let params = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
    loop {
        if !cx.leadership.is_held() {
            return Err(fail(INTERRUPTED, "the agent lost its lease during the freeze".to_owned()));
        }
        let created = timeout(LOOK_TIMEOUT, snapshots.create(&params, &snapshot)).await;
        let created = match created {
            Ok(created) => created.map_err(Error::request("create the VolumeSnapshot")),
            Err(_elapsed) => Err(Error::NoAnswer { operation: "create the VolumeSnapshot" }),
        };
        match created {
            Ok(_) => return Ok(()),
            Err(err) if err.is_conflict() => {
                let found = timeout(LOOK_TIMEOUT, snapshots.get_opt(&name)).await;
                let is_ours = |found: &VolumeSnapshot| {
                    found.labels().get(RUN_LABEL) == snapshot.labels().get(RUN_LABEL)
                };
                match found {
                    Ok(Ok(Some(found))) if is_ours(&found) => return Ok(()),
                    Ok(Ok(Some(_))) => {
                        let message =
                            format!("VolumeSnapshot {name} exists and is not of this run: delete it");
                        return Err(fail("SnapshotNameTaken", message));
                    }
                    Ok(Ok(None) | Err(_)) | Err(_) => sleep(RETRY_PAUSE).await,
                }
            }
            Err(err) if err.is_transient() => {
                warn!(error = %telemetry::chain(&err), snapshot = %name, "snapshot not created yet");
                sleep(RETRY_PAUSE).await;
            }
            Err(err) => {
                let message = format!("VolumeSnapshot {name}: {}", telemetry::chain(&err));
                return Err(fail("SnapshotNotCreated", message));
            }
        }
    }
}

/// When a container of a pod started, if it runs.
fn container_start(pod: &Pod, container: &str) -> Option<Timestamp> {
    let statuses = pod.status.as_ref()?.container_statuses.as_deref()?;
    let status = statuses.iter().find(|status| status.name == container)?;
    Some(status.state.as_ref()?.running.as_ref()?.started_at.as_ref()?.0)
}
