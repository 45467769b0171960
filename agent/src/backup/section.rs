//! The frozen section of a run: freeze, cut, thaw, as one task with one deadline.
//!
//! It begins after the thaw duties are written down, and on every path it thaws before it ends. It writes the
//! status once, at its end; if it does not get there, the next process finds the duties.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{join_all, try_join_all};
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::{ListParams, PostParams};
use kube::runtime::utils::Backoff;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, ResourceExt};
use sts_backup_api::backup::{HookPods, OnError, StatefulSetBackup};
use sts_backup_api::conditions::{DELETED, INTERRUPTED};
use sts_backup_api::names::{
    BACKUP_LABEL, BACKUP_NAMESPACE_LABEL, CLAIM_ANNOTATION, CLAIM_MANIFEST_ANNOTATION,
    CONSISTENCY_ANNOTATION, FIELD_MANAGER, ORDINAL_ANNOTATION, REPLICAS_ANNOTATION, RUN_LABEL,
    SLOT_ANNOTATION, STATEFUL_SET_LABEL, TEMPLATE_ANNOTATION, TIME_ANNOTATION, VOLUMES_ANNOTATION,
};
use sts_backup_api::points::is_cut;
use sts_backup_api::run::{Consistency, CurrentRun, Failure, RunStep, RunVolume, SnapshotState, ThawState};
use sts_backup_api::snapshot::{
    VolumeSnapshot, VolumeSnapshotContent, VolumeSnapshotSource, VolumeSnapshotSpec,
};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::Context;
use super::decide::{START_WITHIN, failing, later, milliseconds};
use super::error::{Error, Result};
use super::perform;
use super::status::Note;
use crate::hooks::{self, Command, Outcome};
use crate::{clock, telemetry};

/// After one preBackupHook failed, the others get this long to end: a hook whose end was not seen costs a second
/// thaw.
const REMAINING_HOOKS: Duration = Duration::from_secs(2);

/// Between two tries of a request while pods are frozen.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// How long the API server may take to create a snapshot before it is asked again.
const CREATE_TIMEOUT: Duration = Duration::from_secs(5);

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

/// The manifests of a run's claims, as JSON by name, without managed fields.
pub(super) async fn claim_manifests(
    cx: &Context,
    namespace: &str,
    run: &CurrentRun,
) -> Result<BTreeMap<String, String>> {
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(cx.client.clone(), namespace);
    let manifest = async |volume: &RunVolume| {
        let claim =
            claims.get(&volume.claim).await.map_err(Error::request("get the PersistentVolumeClaim"))?;
        Ok::<_, Error>((volume.claim.clone(), manifest_of(claim)))
    };
    Ok(try_join_all(run.volumes.iter().map(manifest)).await?.into_iter().collect())
}

fn manifest_of(mut claim: PersistentVolumeClaim) -> String {
    claim.metadata.managed_fields = None;
    serde_json::to_string(&claim).expect("a claim that was read can be written")
}

impl Section {
    /// Freezes, cuts and thaws; returns the run as it is to be written down.
    pub(super) async fn run(&self, mut run: CurrentRun) -> CurrentRun {
        let begun = clock::monotonic();
        let verdict = self.freeze_and_cut(&mut run, begun).await;
        crash_point!("before-thaw");
        run = self.thaw(run).await;
        crash_point!("after-thaw");
        match verdict {
            Ok(()) => {
                run.cut_skew_ms = self.cut_skew(&run).await;
                let owed = run.pods.iter().filter_map(|pod| pod.thaw.as_ref());
                let owed = owed.into_iter().any(|thaw| thaw.state == ThawState::Owed);
                run.step = if owed { RunStep::Thawing } else { RunStep::Readying };
                run
            }
            Err(Failure { reason, message }) => failing(&run, &reason, &message),
        }
    }

    async fn freeze_and_cut(&self, run: &mut CurrentRun, begun: Instant) -> std::result::Result<(), Failure> {
        let freezes = run.pods.iter().any(|pod| pod.freeze_container.is_some());
        let spec = &self.backup.spec;
        let budget = if freezes { spec.max_freeze() } else { spec.snapshot_timeout() };
        // The budget began when the duties were written down, perhaps by another process.
        let since = run.frozen_since.as_ref().unwrap_or(&run.started).0;
        let spent = u64::try_from(milliseconds(since, clock::now())).unwrap_or_default();
        let deadline = begun + budget.saturating_sub(Duration::from_millis(spent));

        let consistency = self.freeze(run, deadline).await?;
        crash_point!("after-freeze");
        self.cut(run, consistency, deadline).await?;
        run.cut_at = Some(MicroTime(clock::now()));
        if freezes {
            let frozen = clock::monotonic().duration_since(begun);
            run.freeze_ms = Some(i64::try_from(frozen.as_millis()).unwrap_or(i64::MAX));
        }
        Ok(())
    }

    /// Runs the preBackupHook in all its pods at once, and notes which of them may still be running.
    async fn freeze(
        &self,
        run: &mut CurrentRun,
        deadline: Instant,
    ) -> std::result::Result<Consistency, Failure> {
        let Some(hook) = &self.backup.spec.pre_backup_hook else { return Ok(Consistency::CrashPerVolume) };
        let since = run.frozen_since.as_ref().unwrap_or(&run.started).0;
        let is_late = clock::now() > later(since, START_WITHIN);
        if is_late || !self.cx.leadership.is_held() || self.cancel.is_cancelled() {
            for pod in &mut run.pods {
                (pod.freeze_container, pod.freeze_may_run_until) = (None, None);
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
                    pod.freeze_may_run_until = None;
                    held += 1;
                    continue;
                }
                Outcome::Failed { reason } => {
                    pod.freeze_may_run_until = None;
                    reason
                }
                Outcome::NotStarted { reason } => {
                    pod.freeze_may_run_until = None;
                    pod.freeze_container = None;
                    reason
                }
                Outcome::Unknown { reason } => {
                    pod.freeze_may_run_until = Some(MicroTime(later(clock::now(), hook.timeout())));
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
        for pod in run.pods.iter_mut().filter(|pod| pod.freeze_may_run_until.is_some()) {
            pod.freeze_may_run_until = Some(until.clone());
        }
        if let Some(failure) = failure {
            return Err(failure);
        }
        let wanted = if hook.pods == HookPods::First { run.replicas.min(1) } else { run.replicas };
        Ok(if wanted > 0 && held == wanted { Consistency::Application } else { Consistency::CrashPerVolume })
    }

    /// Creates all snapshots at once and returns when every one of them is cut.
    async fn cut(
        &self,
        run: &mut CurrentRun,
        consistency: Consistency,
        deadline: Instant,
    ) -> std::result::Result<(), Failure> {
        let snapshots: Api<VolumeSnapshot> = Api::namespaced(self.cx.client.clone(), &self.namespace);
        let selector = format!("{RUN_LABEL}={}", run.id);
        let config = watcher::Config::default().labels(&selector);
        let mut changes = pin!(watcher(snapshots.clone(), config).backoff(Steadily).applied_objects());
        let wanted: Vec<_> =
            run.volumes.iter().map(|volume| self.snapshot(run, volume, consistency, clock::now())).collect();
        let mut creating = pin!(try_join_all(wanted.iter().map(|snapshot| self.create(snapshot))).fuse());
        let mut give_up = pin!(sleep_until(deadline));
        while run.volumes.iter().any(|volume| volume.state == SnapshotState::Pending) {
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Err(self.interrupted()),
                created = &mut creating => {
                    created?;
                    crash_point!("after-create");
                }
                change = changes.next() => if let Some(Ok(snapshot)) = change {
                    note_cut(run, &snapshot);
                },
                () = &mut give_up => {
                    // The watch may lag: one look decides. Nothing is thawed yet, so what is cut is cut in time.
                    let listed = snapshots.list(&ListParams::default().labels(&selector)).await;
                    for snapshot in listed.iter().flatten() {
                        note_cut(run, snapshot);
                    }
                    let uncut = run.volumes.iter().filter(|volume| volume.state == SnapshotState::Pending);
                    let uncut: Vec<_> = uncut.map(|volume| {
                        let found = listed.iter().flatten().find(|found| found.name_any() == volume.snapshot);
                        let error = found.and_then(|found| found.status.as_ref()?.error.as_ref()?.message.as_deref());
                        format!("{}: {}", volume.snapshot, error.unwrap_or("no error reported; is the snapshot-controller running?"))
                    }).collect();
                    if uncut.is_empty() {
                        return Ok(());
                    }
                    return Err(self.frozen_too_long(&format!("snapshots were not cut: {}", uncut.join("; "))));
                }
            }
        }
        Ok(())
    }

    /// Creates a snapshot. That it exists already is success: the name is the run's and the claim's.
    async fn create(&self, snapshot: &VolumeSnapshot) -> std::result::Result<(), Failure> {
        let snapshots: Api<VolumeSnapshot> = Api::namespaced(self.cx.exec.clone(), &self.namespace);
        let name = snapshot.name_any();
        loop {
            let params =
                PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
            let created = timeout(CREATE_TIMEOUT, snapshots.create(&params, snapshot)).await;
            let created = match created {
                Ok(created) => created.map_err(Error::request("create the VolumeSnapshot")),
                Err(_elapsed) => Err(Error::NoAnswer { operation: "create the VolumeSnapshot" }),
            };
            match created {
                Ok(_) => return Ok(()),
                Err(err) if err.is_conflict() => {
                    let found = snapshots.get_opt(&name).await;
                    let is_ours = |found: &VolumeSnapshot| {
                        found.labels().get(RUN_LABEL) == snapshot.labels().get(RUN_LABEL)
                    };
                    match found {
                        Ok(Some(found)) if is_ours(&found) => return Ok(()),
                        Ok(Some(_)) => {
                            let message =
                                format!("VolumeSnapshot {name} exists and is not of this run: delete it");
                            return Err(fail("SnapshotNameTaken", message));
                        }
                        Ok(None) | Err(_) => sleep(RETRY_PAUSE).await,
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

    fn snapshot(
        &self,
        run: &CurrentRun,
        volume: &RunVolume,
        consistency: Consistency,
        now: Timestamp,
    ) -> VolumeSnapshot {
        let labels = [
            (BACKUP_LABEL, self.backup.name_any()),
            (BACKUP_NAMESPACE_LABEL, self.backup.namespace().unwrap_or_default()),
            (STATEFUL_SET_LABEL, self.backup.spec.stateful_set_ref.name.clone()),
            (RUN_LABEL, run.id.to_string()),
        ];
        let annotations = [
            (CLAIM_ANNOTATION, volume.claim.clone()),
            (CLAIM_MANIFEST_ANNOTATION, self.claims.get(&volume.claim).cloned().unwrap_or_default()),
            (TEMPLATE_ANNOTATION, volume.template.clone()),
            (ORDINAL_ANNOTATION, volume.ordinal.to_string()),
            (SLOT_ANNOTATION, format!("{:?} {}", run.slot.due, run.slot.value)),
            (TIME_ANNOTATION, now.to_string()),
            (CONSISTENCY_ANNOTATION, consistency.as_str().to_owned()),
            (REPLICAS_ANNOTATION, run.replicas.to_string()),
            (VOLUMES_ANNOTATION, (run.volumes.len() + run.left_out.len()).to_string()),
        ];
        let owned = |(key, value): (&str, String)| (key.to_owned(), value);
        VolumeSnapshot {
            metadata: ObjectMeta {
                name: Some(volume.snapshot.clone()),
                labels: Some(labels.into_iter().map(owned).collect()),
                annotations: Some(annotations.into_iter().map(owned).collect()),
                ..ObjectMeta::default()
            },
            spec: VolumeSnapshotSpec {
                source: VolumeSnapshotSource {
                    persistent_volume_claim_name: Some(volume.claim.clone()),
                    volume_snapshot_content_name: None,
                },
                volume_snapshot_class_name: Some(volume.snapshot_class.clone()),
            },
            status: None,
        }
    }

    async fn thaw(&self, run: CurrentRun) -> CurrentRun {
        let due: Vec<_> = (0..run.pods.len()).filter(|at| run.pods[*at].thaw.is_some()).collect();
        let run = perform::thaw(&self.cx.exec, &self.namespace, &run, &due, None).await;
        for pod in &run.pods {
            if let Some(reason) = pod.thaw.as_ref().and_then(|thaw| thaw.message.as_deref()) {
                self.note(Note::warning(
                    "ThawFailed",
                    "Thaw",
                    format!("postBackupHook in pod {}: {reason}", pod.name),
                ));
            }
        }
        run
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
        let message = match spec.pre_backup_hook {
            Some(_) => {
                format!("{what} within maxFreezeSeconds ({}); the pods are thawed", spec.max_freeze_seconds)
            }
            None => format!("{what} within snapshotTimeoutSeconds ({})", spec.snapshot_timeout_seconds),
        };
        fail("FrozenTooLong", message)
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
