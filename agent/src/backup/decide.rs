//! Decides the next step of a backup from the facts and the time. Pure: no client, no clock.
//!
//! What is decided about a run is written to its status before it is done, or is harmless to repeat: so a crash
//! at any point leaves a status from which the same decisions follow. Two invariants hold after every step: a pod
//! in which a preBackupHook may have started is owed a thaw until it had one or is gone, and a preBackupHook is
//! never started by a second frozen section of the same run.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::ResourceExt;
use sts_backup_api::backup::{Hook, OnError, StatefulSetBackupStatus};
use sts_backup_api::conditions::{DELETED, INTERRUPTED, NAMESPACE_NOT_GRANTED, STATEFUL_SET_NOT_FOUND};
use sts_backup_api::names::RUN_LABEL;
use sts_backup_api::points::{is_cut, is_in_use, is_ready, points_of};
use sts_backup_api::run::{
    CurrentRun, Failure, RecoveryPoint, RunId, RunPod, RunRecord, RunResult, RunStep, RunVolume, Slot,
    SnapshotState, ThawState,
};
use sts_backup_api::schedule::time_zone;
use sts_backup_api::snapshot::VolumeSnapshot;

use super::due::{Due, Missed, due, overlapped, requested};
use super::observe::{BackupFacts, Target};
use super::preflight::{Problem, may_heal, plan};
use super::retention::judge;
use super::status::not_granted;
use crate::hooks::Outcome;

/// How long a run waits for a `StatefulSet` that is still starting, as when both were created together.
const PATIENCE: Duration = Duration::from_mins(5);

/// The longest wait before a failed thaw is tried again.
const MAX_THAW_PAUSE: Duration = Duration::from_secs(30);

/// How long after its record a frozen section may start its hooks. A later one starts none: so whoever finds the
/// record knows by when every hook has run into its timeout.
pub(super) const START_WITHIN: Duration = Duration::from_secs(5);

/// What to do next.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum BackupStep {
    /// Hold the object until its run is over.
    AddFinalizer,
    /// Let the object go.
    RemoveFinalizer,
    /// Write down a run that is due, and the scheduled times before it that were missed; nothing is touched yet.
    Begin { run: CurrentRun, missed: i64 },
    /// Write down that scheduled times have passed without a run.
    Skip { missed: Missed, why: Skipped },
    /// Write down that a request is not honoured: the backup is suspended.
    RefuseRequest,
    /// Delete a recovery point that no rule keeps. One at a time: what was looked at before must not decide what goes.
    Prune(Pruned),
    /// Write down what is owed to the pods, then freeze, cut and thaw.
    Freeze(CurrentRun),
    /// Write down how far the run is.
    Record(CurrentRun),
    /// Run the postBackupHook in these of the run's pods.
    Thaw(Vec<usize>),
    /// Delete these snapshots, then move the failed run to the history.
    CleanUp { doomed: Vec<String>, record: RunRecord },
    /// Move the run to the history.
    Finish(RunRecord),
    /// Delete snapshots that appeared after their run had failed and left none.
    DeleteLate(Vec<String>),
    /// End the frozen section early: it thaws.
    Cancel,
    /// Nothing can be done before something happens, or before that time.
    Wait { why: Wait, until: Option<Timestamp> },
    /// No run is due.
    Idle(Idle),
}

/// Why scheduled times passed without a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Skipped {
    /// Nobody was there in time.
    TooLate,
    /// This run was still under way.
    Overlap(RunId),
}

/// A recovery point that goes, as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pruned {
    pub(super) point: RunId,
    /// Why nothing keeps it.
    pub(super) why: String,
    pub(super) snapshots: Vec<Doomed>,
}

/// A snapshot that goes, if it is still as it was when that was decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Doomed {
    pub(super) name: String,
    pub(super) uid: Option<String>,
    pub(super) resource_version: Option<String>,
}

/// What a run waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// Another backup, or a restore, has the same `StatefulSet` in hand.
    Queued { behind: String },
    /// Too many snapshots are under way.
    NoRoom { limit: String },
    /// The frozen section is under way.
    Section,
    /// The `StatefulSet` is starting.
    StatefulSet { missing: String },
    /// A thaw failed, or must be repeated.
    Thaw,
    /// Snapshots are becoming ready; what the storage says of those where it failed.
    Snapshots { trouble: Option<String> },
}

/// Why no run is due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Idle {
    NothingDue,
    NotGranted,
    NoStatefulSet,
    Suspended,
    InvalidSchedule(String),
}

/// The next step of a backup.
pub(super) fn next_backup_step(facts: &BackupFacts, now: Timestamp) -> BackupStep {
    if facts.in_section {
        return if facts.deleting {
            BackupStep::Cancel
        } else {
            BackupStep::Wait { why: Wait::Section, until: None }
        };
    }
    let Some(run) = &facts.status.current_run else { return without_run(facts, now) };
    // Not while a thaw may be owed: nothing comes before that.
    if matches!(run.step, RunStep::Preflight | RunStep::Readying | RunStep::CleaningUp) && !facts.deleting {
        let missed = overlapped(facts, now);
        if missed.latest.is_some() {
            return BackupStep::Skip { missed, why: Skipped::Overlap(run.id.clone()) };
        }
    }
    match run.step {
        // Before anything is touched that would need it; and not before the run begins, which is not to be later for it.
        RunStep::Preflight if !facts.has_finalizer && !facts.deleting => BackupStep::AddFinalizer,
        RunStep::Preflight => after_preflight(facts, run, now),
        RunStep::Frozen => after_interruption(facts, run),
        RunStep::Thawing => next_thaw(run, now),
        RunStep::Readying => until_ready(facts, run, now),
        RunStep::CleaningUp => clean_up(facts, run, now),
    }
}

fn without_run(facts: &BackupFacts, now: Timestamp) -> BackupStep {
    let idle = |why| if facts.has_finalizer { BackupStep::RemoveFinalizer } else { BackupStep::Idle(why) };
    let late = late_snapshots(facts, now);
    if !late.is_empty() {
        return BackupStep::DeleteLate(late);
    }
    if facts.deleting {
        return idle(Idle::NothingDue);
    }
    match facts.target {
        Target::NotGranted => return idle(Idle::NotGranted),
        Target::Missing => return idle(Idle::NoStatefulSet),
        Target::Unread | Target::Exists | Target::Read(_) => {}
    }
    if facts.spec.suspend && requested(facts).is_some() {
        return BackupStep::RefuseRequest;
    }
    let Due { slot, missed } = match due(facts, now) {
        Ok(due) => due,
        Err(err) => return idle(Idle::InvalidSchedule(err.to_string())),
    };
    if facts.spec.suspend {
        return idle(Idle::Suspended);
    }
    if let Some(slot) = slot {
        return match &facts.busy_with {
            // Its thaw would end our freeze.
            Some(other) => BackupStep::Wait { why: Wait::Queued { behind: other.clone() }, until: None },
            None => BackupStep::Begin { run: new_run(&facts.uid, slot, now), missed: missed.count },
        };
    }
    if missed.latest.is_some() {
        return BackupStep::Skip { missed, why: Skipped::TooLate };
    }
    // A restore may be reading the point that would go.
    if facts.busy_with.is_some() {
        return idle(Idle::NothingDue);
    }
    pruned(facts, now).map_or_else(|| idle(Idle::NothingDue), BackupStep::Prune)
}

/// The oldest recovery point that goes.
fn pruned(facts: &BackupFacts, now: Timestamp) -> Option<Pruned> {
    let zone = time_zone(facts.spec.time_zone.as_deref()).ok()?;
    let snapshots = facts.snapshots.as_ref()?;
    let points = points_of(snapshots, &facts.status.history);
    let in_use = snapshots.iter().filter(|snapshot| is_in_use(snapshot));
    let in_use: BTreeSet<_> =
        in_use.filter_map(|snapshot| Some(RunId::from(snapshot.labels().get(RUN_LABEL)?.clone()))).collect();
    let verdicts = judge(facts.spec.retention_policy.as_ref(), &zone, &points, &in_use, now);
    let goes = points.iter().zip(verdicts).filter(|(_, verdict)| !verdict.keep);
    let (point, verdict) = goes.rev().find(|(point, _)| !is_damaged(facts, point))?;
    let members = facts.snapshots_of(&point.id);
    let members = members.iter().filter(|(_, snapshot)| snapshot.metadata.deletion_timestamp.is_none());
    let doomed = members.map(|(name, snapshot)| Doomed {
        name: (*name).to_owned(),
        uid: snapshot.uid(),
        resource_version: snapshot.resource_version(),
    });
    Some(Pruned { point: point.id.clone(), why: verdict.why.to_string(), snapshots: doomed.collect() })
}

/// Whether a point was complete and no longer is, as far as the status knows. What is left of it is no leftover of a failed
/// run: it may become complete again, as when contents are restored after their snapshots, or be all that is left.
fn is_damaged(facts: &BackupFacts, point: &RecoveryPoint) -> bool {
    let StatefulSetBackupStatus { recovery_points, history, .. } = &facts.status;
    let was_complete = recovery_points.iter().any(|known| known.id == point.id && known.complete)
        || history.iter().any(|run| run.id == point.id && run.result == RunResult::Completed);
    was_complete && !point.complete
}

/// What is left of runs that left nothing: snapshots that were still being cut when their run failed, or that came after.
/// An API server can carry out a request long after it was given up, or after the agent that sent it has died.
fn late_snapshots(facts: &BackupFacts, now: Timestamp) -> Vec<String> {
    let left_none = facts.status.history.iter().filter(|run| run.kept_volumes == Some(0));
    let snapshots = left_none.flat_map(|run| facts.snapshots_of(&run.id));
    let is_doomed = |snapshot: &VolumeSnapshot| {
        !is_being_cut(snapshot, now) && snapshot.metadata.deletion_timestamp.is_none()
    };
    snapshots.filter(|(_, snapshot)| is_doomed(snapshot)).map(|(name, _)| name.to_owned()).collect()
}

/// How soon the snapshot-controller gives a snapshot its content, if it is there.
const CONTENT_WITHIN: Duration = Duration::from_secs(5);

/// csi-snapshotter comes back to a snapshot that is deleted during its cut only after minutes, in which it holds its
/// claim and its namespace. One that gets no content was never shown to it.
fn is_being_cut(snapshot: &VolumeSnapshot, now: Timestamp) -> bool {
    let status = snapshot.status.as_ref();
    let has_failed = status.is_some_and(|status| status.error.is_some());
    let may_be_shown = has_content(snapshot) || untold_until(snapshot).is_some_and(|until| now < until);
    may_be_shown && !has_failed && !is_cut(snapshot)
}

fn has_content(snapshot: &VolumeSnapshot) -> bool {
    let status = snapshot.status.as_ref();
    status.is_some_and(|status| status.bound_volume_snapshot_content_name.is_some())
}

/// Until then nobody can tell whether a snapshot without a content gets one.
fn untold_until(snapshot: &VolumeSnapshot) -> Option<Timestamp> {
    let created = snapshot.creation_timestamp().filter(|_| !has_content(snapshot))?;
    Some(later(created.0, CONTENT_WITHIN))
}

/// A run of which nothing is decided yet.
pub(super) fn new_run(uid: &str, slot: Slot, now: Timestamp) -> CurrentRun {
    CurrentRun {
        id: RunId::new(uid, &slot, now),
        slot,
        started: MicroTime(now),
        step: RunStep::Preflight,
        replicas: 0,
        volumes: Vec::new(),
        left_out: Vec::new(),
        pods: Vec::new(),
        thaw_hook: None,
        frozen_since: None,
        cut_at: None,
        freeze_ms: None,
        cut_skew_ms: None,
        failure: None,
    }
}

fn after_preflight(facts: &BackupFacts, run: &CurrentRun, now: Timestamp) -> BackupStep {
    if facts.deleting {
        return fail(run, DELETED, "the StatefulSetBackup was deleted");
    }
    let target = match &facts.target {
        Target::Read(target) => target,
        Target::NotGranted => return fail(run, NAMESPACE_NOT_GRANTED, &not_granted(facts)),
        Target::Missing | Target::Unread | Target::Exists => {
            let message =
                format!("StatefulSet {} does not exist: nothing was snapshotted", facts.target_name());
            return fail(run, STATEFUL_SET_NOT_FOUND, &message);
        }
    };
    let problems = match plan(run, &facts.spec, &facts.spec.stateful_set_ref.name, target, now) {
        Ok(planned) => return BackupStep::Freeze(planned),
        Err(problems) => problems,
    };
    let deadline = later(run.started.0, PATIENCE);
    if now < deadline && may_heal(target, &problems) {
        return BackupStep::Wait {
            why: Wait::StatefulSet { missing: said(&problems) },
            until: Some(deadline),
        };
    }
    let reason = problems.first().map_or_else(String::new, |problem| problem.kind.to_string());
    fail(run, &reason, &format!("nothing was frozen or snapshotted: {}", said(&problems)))
}

fn said(problems: &[Problem]) -> String {
    problems.iter().map(|problem| problem.message.as_str()).collect::<Vec<_>>().join("; ")
}

/// The frozen section of this run was begun, and this process does not run it: its process died, or stopped.
fn after_interruption(facts: &BackupFacts, run: &CurrentRun) -> BackupStep {
    let may_be_frozen = run.pods.iter().any(|pod| pod.freeze_container.is_some());
    if let Target::NotGranted = facts.target {
        return fail(run, NAMESPACE_NOT_GRANTED, &not_granted(facts));
    }
    if !may_be_frozen && !facts.deleting {
        // Nothing was frozen, and every cut has its name: going on is no second attempt.
        return BackupStep::Freeze(run.clone());
    }
    // Some pods may be thawed already, and then nobody can tell a cut before the thaw from one after it: none of the
    // snapshots is trusted, and the run is begun anew.
    let mut run = run.clone();
    for volume in &mut run.volumes {
        volume.state = SnapshotState::Pending;
    }
    let (reason, message) = if facts.deleting {
        (DELETED, "the StatefulSetBackup was deleted during the freeze")
    } else {
        (INTERRUPTED, "the agent was stopped during the freeze")
    };
    fail(&run, reason, message)
}

fn next_thaw(run: &CurrentRun, now: Timestamp) -> BackupStep {
    let owed = |pod: &RunPod| pod.thaw.as_ref().filter(|thaw| thaw.state == ThawState::Owed).cloned();
    let owed: Vec<_> = run.pods.iter().enumerate().filter_map(|(at, pod)| Some((at, owed(pod)?))).collect();
    let is_due = |not_before: &Option<MicroTime>| not_before.as_ref().is_none_or(|time| time.0 <= now);
    let due: Vec<_> = owed.iter().filter(|(_, thaw)| is_due(&thaw.not_before)).map(|(at, _)| *at).collect();
    if !due.is_empty() {
        return BackupStep::Thaw(due);
    }
    if let Some(until) = owed.iter().filter_map(|(_, thaw)| Some(thaw.not_before.as_ref()?.0)).min() {
        return BackupStep::Wait { why: Wait::Thaw, until: Some(until) };
    }
    let step = if run.failure.is_some() { RunStep::CleaningUp } else { RunStep::Readying };
    BackupStep::Record(CurrentRun { step, ..run.clone() })
}

fn until_ready(facts: &BackupFacts, run: &CurrentRun, now: Timestamp) -> BackupStep {
    let run = with_snapshot_states(facts, run);
    let snapshots = facts.snapshots_of(&run.id);
    let is_gone =
        |name: &str| snapshots.get(name).is_none_or(|found| found.metadata.deletion_timestamp.is_some());
    let gone: Vec<_> =
        run.volumes.iter().map(|volume| volume.snapshot.as_str()).filter(|name| is_gone(name)).collect();
    if !gone.is_empty() {
        let message = format!("VolumeSnapshot {} was deleted before it was ready", gone.join(", "));
        return fail(&run, "SnapshotDeleted", &message);
    }
    let unready: Vec<_> = run.volumes.iter().filter(|volume| volume.state != SnapshotState::Ready).collect();
    if unready.is_empty() {
        return BackupStep::Finish(success(&run, now));
    }
    if facts.deleting {
        return fail(&run, DELETED, "the StatefulSetBackup was deleted before all snapshots were ready");
    }
    let cut_at = run.cut_at.as_ref().unwrap_or(&run.started).0;
    let deadline = later(cut_at, facts.spec.snapshot_timeout());
    let error_of = |volume: &RunVolume| trouble_of(snapshots.get(volume.snapshot.as_str())?);
    if now < deadline {
        let unchanged = facts.status.current_run.as_ref() == Some(&run);
        return if unchanged {
            let errors: Vec<_> = unready.iter().filter_map(|volume| error_of(volume)).collect();
            let trouble = (!errors.is_empty()).then(|| brief(&errors.join("; ")));
            BackupStep::Wait { why: Wait::Snapshots { trouble }, until: Some(deadline) }
        } else {
            BackupStep::Record(run)
        };
    }
    let told = unready
        .iter()
        .map(|volume| error_of(volume).unwrap_or_else(|| format!("{}: no error reported", volume.snapshot)));
    let message = format!(
        "not ready within snapshotTimeoutSeconds ({}): {}",
        facts.spec.snapshot_timeout_seconds,
        told.collect::<Vec<_>>().join("; ")
    );
    fail(&run, "SnapshotNotReady", &message)
}

/// What the storage says went wrong with a snapshot, with its name.
pub(super) fn trouble_of(snapshot: &VolumeSnapshot) -> Option<String> {
    let error = snapshot.status.as_ref()?.error.as_ref()?;
    Some(format!("{}: {}", snapshot.name_any(), error.message.as_deref().unwrap_or("no message")))
}

/// Removes every snapshot that was not ready when the run failed: an unready one holds its claim, and one that
/// becomes ready later must not complete the point of a failed run. Where nothing stays, what is being cut goes after.
fn clean_up(facts: &BackupFacts, run: &CurrentRun, now: Timestamp) -> BackupStep {
    let snapshots = facts.snapshots_of(&run.id);
    let is_kept = |volume: &RunVolume| {
        let is_ready_now = snapshots.get(volume.snapshot.as_str()).is_some_and(|snapshot| is_ready(snapshot));
        volume.state == SnapshotState::Ready && is_ready_now
    };
    // Nothing was created before the frozen section.
    let volumes = run.volumes.iter().filter(|_| run.frozen_since.is_some());
    let (kept, doomed): (Vec<_>, Vec<_>) = volumes.partition(|volume| is_kept(volume));
    let has_time = kept.is_empty() && !facts.deleting;
    // Only what carries the run's label, whatever the status says.
    let goes_now =
        |name: &str| snapshots.get(name).is_some_and(|snapshot| !has_time || !is_being_cut(snapshot, now));
    let doomed = || doomed.iter().map(|volume| volume.snapshot.as_str());
    let untold =
        doomed().filter(|name| !goes_now(name)).filter_map(|name| untold_until(snapshots.get(name)?));
    if let Some(until) = untold.max() {
        return BackupStep::Wait { why: Wait::Snapshots { trouble: None }, until: Some(until) };
    }
    let doomed = doomed().filter(|name| goes_now(name)).map(ToOwned::to_owned).collect();
    let kept_volumes = i32::try_from(kept.len()).ok();
    BackupStep::CleanUp { doomed, record: RunRecord { kept_volumes, ..failed(run, now) } }
}

/// The run is going to fail: first what is owed to pods, then the clean-up.
pub(super) fn failing(run: &CurrentRun, reason: &str, message: &str) -> CurrentRun {
    let failure = Failure { reason: reason.to_owned(), message: brief(message) };
    let owed = run.pods.iter().filter_map(|pod| pod.thaw.as_ref()).any(|thaw| thaw.state == ThawState::Owed);
    let step = if owed && run.step != RunStep::Preflight { RunStep::Thawing } else { RunStep::CleaningUp };
    CurrentRun { step, failure: Some(failure), ..run.clone() }
}

fn fail(run: &CurrentRun, reason: &str, message: &str) -> BackupStep {
    BackupStep::Record(failing(run, reason, message))
}

/// The run with its snapshots' states as they are. A state never goes back.
pub(super) fn with_snapshot_states(facts: &BackupFacts, run: &CurrentRun) -> CurrentRun {
    let snapshots = facts.snapshots_of(&run.id);
    let mut run = run.clone();
    for volume in &mut run.volumes {
        if let Some(snapshot) = snapshots.get(volume.snapshot.as_str()) {
            volume.state = match volume.state {
                SnapshotState::Pending | SnapshotState::Cut if is_ready(snapshot) => SnapshotState::Ready,
                SnapshotState::Pending if is_cut(snapshot) => SnapshotState::Cut,
                state @ (SnapshotState::Pending | SnapshotState::Cut | SnapshotState::Ready) => state,
            };
        }
    }
    run
}

/// What is known of an attempt to thaw a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ThawAttempt {
    /// The hook was run.
    Ran(Outcome),
    /// The pod is gone, or was replaced.
    PodGone,
}

/// The pod after an attempt to thaw it.
pub(super) fn after_thaw(pod: &RunPod, attempt: &ThawAttempt, hook: &Hook, now: Timestamp) -> RunPod {
    let mut pod = pod.clone();
    if let ThawAttempt::Ran(Outcome::Unknown { .. }) = attempt {
        // It may still be running, and must not thaw what a later run freezes.
        let until = MicroTime(later(now, hook.timeout()));
        pod.hooks_may_run_until = pod.hooks_may_run_until.max(Some(until));
    }
    let Some(thaw) = &mut pod.thaw else { return pod };
    let failure = match attempt {
        ThawAttempt::PodGone => {
            thaw.state = ThawState::Gone;
            None
        }
        ThawAttempt::Ran(Outcome::Succeeded) => {
            thaw.not_before = pod.hooks_may_run_until.take_if(|until| now < until.0);
            thaw.state = if thaw.not_before.is_some() { ThawState::Owed } else { ThawState::Thawed };
            None
        }
        ThawAttempt::Ran(Outcome::Failed { reason }) if hook.on_error == OnError::Continue => {
            thaw.state = ThawState::GivenUp;
            Some(reason)
        }
        // The hook is no thaw here: nothing was frozen.
        ThawAttempt::Ran(
            Outcome::Failed { reason } | Outcome::NotStarted { reason } | Outcome::Unknown { reason },
        ) if pod.freeze_container.is_none() => {
            thaw.state = ThawState::GivenUp;
            Some(reason)
        }
        ThawAttempt::Ran(
            Outcome::Failed { reason } | Outcome::NotStarted { reason } | Outcome::Unknown { reason },
        ) => {
            let pause =
                Duration::from_millis(500) * 2_u32.saturating_pow(thaw.failures.clamp(0, 10).unsigned_abs());
            thaw.not_before = Some(MicroTime(later(now, pause.min(MAX_THAW_PAUSE))));
            Some(reason)
        }
    };
    thaw.failures = if failure.is_some() { thaw.failures.saturating_add(1) } else { 0 };
    thaw.message = failure.cloned();
    pod
}

fn success(run: &CurrentRun, now: Timestamp) -> RunRecord {
    let (expected, left_out) = (run.volumes.len() + run.left_out.len(), run.left_out.join("; "));
    let count = format!("{}/{expected} volumes", run.volumes.len());
    if run.left_out.is_empty() {
        record(run, now, RunResult::Completed, "Completed", &count)
    } else {
        record(
            run,
            now,
            RunResult::PartiallyFailed,
            "ClaimsLeftOut",
            &format!("{count}; left out: {left_out}"),
        )
    }
}

fn failed(run: &CurrentRun, now: Timestamp) -> RunRecord {
    let unknown = Failure { reason: INTERRUPTED.to_owned(), message: "the run was interrupted".to_owned() };
    let Failure { reason, message } = run.failure.clone().unwrap_or(unknown);
    record(run, now, RunResult::Failed, &reason, &message)
}

fn record(run: &CurrentRun, now: Timestamp, result: RunResult, reason: &str, message: &str) -> RunRecord {
    RunRecord {
        id: run.id.clone(),
        slot: run.slot.clone(),
        started: run.started.clone(),
        duration_ms: milliseconds(run.started.0, now),
        freeze_ms: run.freeze_ms,
        cut_skew_ms: run.cut_skew_ms,
        result,
        kept_volumes: None,
        reason: reason.to_owned(),
        message: brief(message),
    }
}

/// A message that a status can keep many of. The storage's own words in it can be of any length.
fn brief(message: &str) -> String {
    const LONGEST: usize = 2048;
    message[..message.floor_char_boundary(LONGEST)].to_owned()
}

/// A moment so much later; what lies beyond all time is the end of time.
pub(super) fn later(time: Timestamp, by: Duration) -> Timestamp {
    SignedDuration::try_from(by).ok().and_then(|by| time.checked_add(by).ok()).unwrap_or(Timestamp::MAX)
}

/// From one moment to the next in milliseconds; 0 when the clock was set back.
pub(super) fn milliseconds(from: Timestamp, to: Timestamp) -> i64 {
    i64::try_from(to.duration_since(from).as_millis()).unwrap_or(i64::MAX).max(0)
}
