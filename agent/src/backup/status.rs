//! Turns facts and the decided step into the status that users see, and into Events. Pure.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use sts_backup_api::backup::{MAX_LISTED_POINTS, Phase, StatefulSetBackupStatus};
use sts_backup_api::conditions::{
    self, INVALID_SCHEDULE, LAST_BACKUP_SUCCEEDED, NAMESPACE_NOT_GRANTED, PROGRESSING, READY,
    STATEFUL_SET_NOT_FOUND, THAWED,
};
use sts_backup_api::names::ALLOW_BACKUP_FROM_ANNOTATION;
use sts_backup_api::points::points_of;
use sts_backup_api::run::{
    CurrentRun, RecoveryPoint, RunId, RunPod, RunRecord, RunResult, RunStep, SnapshotState, ThawState,
    request_key,
};

use super::decide::{BackupStep, Idle, Pruned, Skipped, Wait};
use super::due::{Missed, begins_anew, next_run};
use super::observe::{BackupFacts, Target};
use crate::events::Note;

/// A run is due, or has begun, and others come first.
const QUEUED: &str = "Queued";

/// The thaw of a pod failed, and is repeated.
pub(super) const THAW_FAILED: &str = "ThawFailed";
/// The thaw of a pod failed, and its user said to let it be.
pub(super) const THAW_GIVEN_UP: &str = "ThawGivenUp";

/// The status after the step is written down, and before it is done.
pub(super) fn next_status(facts: &BackupFacts, step: &BackupStep, now: Timestamp) -> StatefulSetBackupStatus {
    let mut status = facts.status.clone();
    if begins_anew(facts) {
        status.last_schedule_time = Some(Time(now));
    }
    status.schedule = facts.spec.timing();
    status.observed_generation = facts.generation;

    let points = facts.snapshots.as_ref().map(|snapshots| points_of(snapshots, &status.history));
    match step {
        BackupStep::Begin { run, missed } => {
            status.current_run = Some(run.clone());
            status.last_request = facts.request.as_deref().map(request_key).or(status.last_request);
            status.missed_runs = status.missed_runs.saturating_add(*missed);
            // A further attempt at a run can be due to an older time than one that was skipped meanwhile.
            status.last_schedule_time = status.last_schedule_time.max(run.slot.scheduled().map(Time));
        }
        BackupStep::Freeze(run) | BackupStep::Record(run) => status.current_run = Some(run.clone()),
        BackupStep::Skip { missed, why: _ } => {
            status.missed_runs = status.missed_runs.saturating_add(missed.count);
            status.last_schedule_time = missed.latest.map(Time).or(status.last_schedule_time);
        }
        BackupStep::RefuseRequest => status.last_request = facts.request.as_deref().map(request_key),
        BackupStep::CleanUp { record, .. } | BackupStep::Finish(record) => {
            status.current_run = None;
            status.history.insert(0, record.clone());
            status.history.truncate(usize::try_from(facts.spec.history_limit).unwrap_or(1).max(1));
            let made =
                points.iter().flatten().find(|point| point.id == record.id).map(|point| point.time.clone());
            match record.result {
                RunResult::Completed => {
                    status.last_backup_time.clone_from(&made);
                    status.last_successful_time = made;
                }
                RunResult::PartiallyFailed => status.last_backup_time = made,
                RunResult::Failed => {}
            }
        }
        BackupStep::AddFinalizer
        | BackupStep::RemoveFinalizer
        | BackupStep::Thaw(_)
        | BackupStep::Cancel
        | BackupStep::DeleteLate(_)
        | BackupStep::Prune(_)
        | BackupStep::Wait { .. }
        | BackupStep::Idle(_) => {}
    }
    status.next_schedule_time = next_run(facts, now).filter(|_| !facts.deleting).map(Time);
    if let Some(points) = points {
        let complete = points.iter().filter(|point| point.complete).count();
        status.recovery_point_count = i64::try_from(complete).unwrap_or(i64::MAX);
        status.recovery_points = points.into_iter().take(MAX_LISTED_POINTS).collect();
    }
    set_conditions(facts, step, &mut status, now);
    status.phase = Some(phase(&status, facts.spec.suspend));
    status
}

fn phase(status: &StatefulSetBackupStatus, suspended: bool) -> Phase {
    if status.current_run.is_some() {
        return Phase::InProgress;
    }
    if suspended {
        return Phase::Suspended;
    }
    match status.history.first().map(|last| last.result) {
        Some(RunResult::Completed | RunResult::PartiallyFailed) => Phase::Ready,
        Some(RunResult::Failed) => Phase::Failed,
        // The original's own run at creation.
        None if status.last_backup_time.is_some() => Phase::Ready,
        None => Phase::Pending,
    }
}

fn set_conditions(
    facts: &BackupFacts,
    step: &BackupStep,
    status: &mut StatefulSetBackupStatus,
    now: Timestamp,
) {
    let StatefulSetBackupStatus { conditions, current_run, history, .. } = status;
    let mut set = |type_, (status, reason, message): (bool, &str, &str)| {
        conditions::set(conditions, type_, (status, reason, message), facts.generation, now);
    };

    // A preflight's verdict on the spec stands until the next preflight.
    match (&facts.target, step) {
        (Target::NotGranted, _) => set(READY, (false, NAMESPACE_NOT_GRANTED, &not_granted(facts))),
        (Target::Missing, _) => {
            let message = format!(
                "StatefulSet {} does not exist: create it, or delete this backup",
                facts.target_name()
            );
            set(READY, (false, STATEFUL_SET_NOT_FOUND, &message));
        }
        (_, BackupStep::Idle(Idle::InvalidSchedule(why))) => set(READY, (false, INVALID_SCHEDULE, why)),
        (_, BackupStep::Freeze(_)) => {
            set(READY, (true, "Usable", "the last preflight found all that a run needs"));
        }
        (Target::Read(_), BackupStep::Record(CurrentRun { failure: Some(failure), .. })) => {
            set(READY, (false, &failure.reason, &failure.message));
        }
        (Target::Exists, BackupStep::Idle(_)) => {
            let old = conditions::find(&facts.status.conditions, READY);
            let stale = [NAMESPACE_NOT_GRANTED, STATEFUL_SET_NOT_FOUND, INVALID_SCHEDULE];
            if old.is_none_or(|ready| ready.status == "True" || stale.contains(&ready.reason.as_str())) {
                set(READY, (true, "Usable", "the StatefulSet exists"));
            }
        }
        (Target::Unread | Target::Exists | Target::Read(_), _) => {}
    }

    if let Some(run) = current_run {
        if let BackupStep::Wait { why: Wait::NoRoom { limit }, .. } = step {
            set(PROGRESSING, (false, QUEUED, &no_room(run, limit)));
        } else {
            let (reason, message) = progress(run, step);
            set(PROGRESSING, (true, reason, &message));
        }
        if let Some((thawed, reason, message)) = thaw_state(run) {
            set(THAWED, (thawed, reason, &message));
        }
    } else {
        if let BackupStep::Wait { why: Wait::Queued { behind }, .. } = step {
            set(PROGRESSING, (false, QUEUED, &waiting_behind(behind)));
        } else if let BackupStep::Idle(Idle::Suspended) = step {
            set(PROGRESSING, (false, "Suspended", "no run begins until spec.suspend is false"));
        } else {
            set(PROGRESSING, (false, "Idle", "no run is under way"));
        }
        // A run ends only when nothing is owed to any pod. What was given up stays said until the next freeze.
        let thawed = conditions::find(&facts.status.conditions, THAWED);
        if thawed.is_some_and(|thawed| thawed.reason != THAW_GIVEN_UP) {
            set(THAWED, (true, "Thawed", "nothing is owed to any pod"));
        }
    }
    if let Some(RunRecord { id, result, reason, message, .. }) = history.first() {
        let message = format!("run {id}: {message}");
        set(LAST_BACKUP_SUCCEEDED, (*result == RunResult::Completed, reason, &message));
    }
}

fn waiting_behind(other: &str) -> String {
    format!("a run is due and waits for {other}, which has the same StatefulSet in hand")
}

fn no_room(run: &CurrentRun, limit: &str) -> String {
    format!("run {} waits before its freeze: {limit}", run.id)
}

/// Why a backup of another namespace's `StatefulSet` does not run.
pub(super) fn not_granted(facts: &BackupFacts) -> String {
    let (own, target) = (&facts.namespace, facts.target_namespace());
    format!(
        "StatefulSet {} is in another namespace, which does not let backups of {own} in: kubectl annotate namespace \
         {target} {ALLOW_BACKUP_FROM_ANNOTATION}={own}",
        facts.target_name()
    )
}

fn progress(run: &CurrentRun, step: &BackupStep) -> (&'static str, String) {
    if let BackupStep::Wait { why: Wait::StatefulSet { missing }, .. } = step {
        return (
            "WaitingForStatefulSet",
            format!("run {} waits for the StatefulSet to be ready: {missing}", run.id),
        );
    }
    let count = |state| run.volumes.iter().filter(|volume| volume.state == state).count();
    let (ready, all) = (count(SnapshotState::Ready), run.volumes.len());
    match run.step {
        RunStep::Preflight => ("Preflight", format!("run {} looks at the StatefulSet", run.id)),
        RunStep::Frozen => ("Frozen", format!("run {} freezes, cuts and thaws: {all} volumes", run.id)),
        RunStep::Thawing => ("Thawing", format!("run {} still owes pods a thaw", run.id)),
        RunStep::Readying => {
            let mut trouble = String::new();
            if let BackupStep::Wait { why: Wait::Snapshots { trouble: Some(said) }, .. } = step {
                trouble = format!("; the storage tries again: {said}");
            }
            ("Readying", format!("run {}: {ready}/{all} snapshots are ready{trouble}", run.id))
        }
        RunStep::CleaningUp => {
            ("CleaningUp", format!("run {} failed and removes its unready snapshots", run.id))
        }
    }
}

/// Whether pods may be frozen; none when no hook of the run freezes any.
fn thaw_state(run: &CurrentRun) -> Option<(bool, &'static str, String)> {
    let owed = |state| state == ThawState::Owed;
    let owing: Vec<_> = run
        .pods
        .iter()
        .filter(|pod| pod.freeze_container.is_some())
        .filter_map(|pod| Some((&pod.name, pod.thaw.as_ref()?)))
        .filter(|(_, thaw)| owed(thaw.state))
        .collect();
    let names = |pods: &[&String]| pods.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ");
    let frozen = run.pods.iter().filter(|pod| pod.freeze_container.is_some());
    let is_given_up = |pod: &&RunPod| pod.thaw.as_ref().is_some_and(|thaw| thaw.state == ThawState::GivenUp);
    let given_up: Vec<_> = frozen.filter(is_given_up).map(|pod| &pod.name).collect();
    let failed: Vec<_> = owing.iter().filter(|(_, thaw)| thaw.failures > 0).collect();
    match run.step {
        RunStep::Preflight => None,
        _ if run.pods.iter().all(|pod| pod.freeze_container.is_none()) => None,
        RunStep::Frozen => Some((false, "Frozen", format!("run {} has frozen pods, or is about to", run.id))),
        RunStep::Thawing if !failed.is_empty() => {
            let told: Vec<_> = failed
                .iter()
                .map(|(name, thaw)| format!("{name}: {}", thaw.message.as_deref().unwrap_or("unknown")))
                .collect();
            let message = format!(
                "the postBackupHook failed and is repeated: {}. Thaw by hand, or correct postBackupHook",
                told.join("; ")
            );
            Some((false, THAW_FAILED, message))
        }
        RunStep::Thawing if owing.iter().any(|(_, thaw)| thaw.not_before.is_none()) => Some((
            false,
            "Frozen",
            format!("run {} ended before its pods were thawed; they are next", run.id),
        )),
        RunStep::Thawing if !owing.is_empty() => {
            let pods: Vec<_> = owing.iter().map(|(name, _)| *name).collect();
            Some((false, "ThawDue", format!("owed once more, as a hook may still run: {}", names(&pods))))
        }
        RunStep::Thawing | RunStep::Readying | RunStep::CleaningUp if !given_up.is_empty() => {
            let message = format!(
                "the postBackupHook failed in {} and is not repeated, as its onError says: look whether it is frozen",
                names(&given_up)
            );
            Some((false, THAW_GIVEN_UP, message))
        }
        RunStep::Thawing | RunStep::Readying | RunStep::CleaningUp => {
            Some((true, "Thawed", "nothing is owed to any pod".to_owned()))
        }
    }
}

/// The Event that goes with a step, once it is written down.
pub(super) fn notes(facts: &BackupFacts, step: &BackupStep) -> impl Iterator<Item = Note> + use<> {
    note(facts, step).into_iter().chain(missed(step))
}

/// The Event of scheduled times that got no run.
fn missed(step: &BackupStep) -> Option<Note> {
    let (count, latest, why) = if let BackupStep::Begin { run: _, missed } = step {
        (*missed, None, &Skipped::TooLate)
    } else if let BackupStep::Skip { missed: Missed { count, latest }, why } = step {
        (*count, *latest, why)
    } else {
        return None;
    };
    if count == 0 {
        return None;
    }
    let latest = latest.map_or_else(String::new, |latest| format!(", the newest was due at {latest}"));
    let (reason, why) = match why {
        Skipped::TooLate => ("RunsMissed", "as none could be in time".to_owned()),
        Skipped::Overlap(run) => ("RunSkipped", format!("as run {run} was still under way")),
    };
    Some(Note::warning(reason, "Skip", format!("{count} scheduled runs are not begun, {why}{latest}")))
}

fn note(facts: &BackupFacts, step: &BackupStep) -> Option<Note> {
    let failing = |run: &CurrentRun| {
        let was_failing = facts.status.current_run.as_ref().is_some_and(|run| run.failure.is_some());
        run.failure.clone().filter(|_| !was_failing)
    };
    match step {
        BackupStep::Begin { run, missed: _ } => {
            let due = format!("{:?}", run.slot.due).to_lowercase();
            let attempt = match run.slot.attempt {
                1 => String::new(),
                attempt => format!(", attempt {attempt}"),
            };
            Some(Note::normal("BackupStarted", "Begin", format!("run {} (due by {due}{attempt})", run.id)))
        }
        BackupStep::Freeze(run) if run.pods.is_empty() => None,
        BackupStep::Freeze(run) => {
            let message =
                format!("run {}: hooks in {} pods, {} volumes", run.id, run.pods.len(), run.volumes.len());
            Some(Note::normal("Freezing", "Freeze", message))
        }
        BackupStep::Record(run) => failing(run).map(|failure| {
            let message = format!("run {} fails: {}: {}", run.id, failure.reason, failure.message);
            Note::warning("BackupFailing", "Abort", message)
        }),
        BackupStep::CleanUp { record, .. } | BackupStep::Finish(record) => Some(finished(record)),
        BackupStep::Wait { why: Wait::StatefulSet { missing }, .. } => {
            Some(Note::normal("WaitingForStatefulSet", "Preflight", missing.clone()))
        }
        BackupStep::Wait { why: Wait::Queued { behind }, .. } => {
            Some(Note::normal(QUEUED, "Wait", waiting_behind(behind)))
        }
        BackupStep::Wait { why: Wait::NoRoom { limit }, .. } => {
            let run = facts.status.current_run.as_ref()?;
            Some(Note::normal(QUEUED, "Wait", no_room(run, limit)))
        }
        BackupStep::Wait { why: Wait::Snapshots { trouble: Some(trouble) }, .. } => {
            Some(snapshot_error("Wait", trouble))
        }
        BackupStep::Idle(Idle::NotGranted) => {
            Some(Note::warning(NAMESPACE_NOT_GRANTED, "Refuse", not_granted(facts)))
        }
        BackupStep::Idle(Idle::InvalidSchedule(why)) => {
            Some(Note::warning(INVALID_SCHEDULE, "Refuse", why.clone()))
        }
        BackupStep::RefuseRequest => {
            let message = "a run was requested, and spec.suspend is true: set it to false, and request again";
            Some(Note::warning("RequestRefused", "Refuse", message.to_owned()))
        }
        BackupStep::Idle(Idle::NothingDue | Idle::NoStatefulSet | Idle::Suspended)
        | BackupStep::Wait { why: Wait::Section | Wait::Thaw | Wait::Snapshots { trouble: None }, .. }
        | BackupStep::Prune(_)
        | BackupStep::Skip { .. }
        | BackupStep::AddFinalizer
        | BackupStep::RemoveFinalizer
        | BackupStep::Thaw(_)
        | BackupStep::DeleteLate(_)
        | BackupStep::Cancel => None,
    }
}

/// The Event of an error that the storage reports of a snapshot.
pub(super) fn snapshot_error(action: &'static str, trouble: &str) -> Note {
    let message = format!("the storage reports an error and tries again: {trouble}");
    Note::warning("SnapshotError", action, message)
}

/// The Event of a recovery point that is deleted because no rule keeps it.
pub(super) fn pruned(point: &Pruned) -> Note {
    let Pruned { point, why, snapshots } = point;
    Note::normal(
        "Pruned",
        "Prune",
        format!("recovery point {point}: {why}; {} snapshots deleted", snapshots.len()),
    )
}

/// The Event of a recovery point that no rule keeps and that could not be deleted.
pub(super) fn not_pruned(point: &Pruned, why: &str) -> Note {
    Note::warning(
        "PruneFailed",
        "Prune",
        format!("recovery point {} is to go and cannot be deleted: {why}", point.point),
    )
}

/// The Events of recovery points that were complete and no longer are, though nobody deleted them as a whole.
pub(super) fn damaged(before: &StatefulSetBackupStatus, after: &StatefulSetBackupStatus) -> Vec<Note> {
    let was_complete =
        |id: &RunId| before.recovery_points.iter().any(|point| point.id == *id && point.complete);
    let damaged = after.recovery_points.iter().filter(|point| !point.complete && was_complete(&point.id));
    let note = |point: &RecoveryPoint| {
        let RecoveryPoint { id, ready_volumes, expected_volumes, .. } = point;
        let message = format!(
            "recovery point {id} is no longer complete, {ready_volumes}/{expected_volumes} volumes: a snapshot or its \
             content was deleted"
        );
        Note::warning("RecoveryPointIncomplete", "Look", message)
    };
    damaged.map(note).collect()
}

fn finished(record: &RunRecord) -> Note {
    let RunRecord { id, result, reason, message, .. } = record;
    let took =
        |what: &str, time: Option<i64>| time.map_or_else(String::new, |ms| format!(", {what} {ms} ms"));
    let measures =
        format!("{}{}", took("frozen for", record.freeze_ms), took("cut skew", record.cut_skew_ms));
    match result {
        RunResult::Completed => {
            Note::normal("BackupCompleted", "Finish", format!("recovery point {id}: {message}{measures}"))
        }
        RunResult::PartiallyFailed => Note::warning(
            "BackupPartiallyFailed",
            "Finish",
            format!("recovery point {id}: {message}{measures}"),
        ),
        RunResult::Failed => {
            Note::warning("BackupFailed", "Finish", format!("run {id}: {reason}: {message}"))
        }
    }
}
