//! Turns facts and the decided step into the status that users see, and into Events. Pure.

use jiff::Timestamp;
use sts_backup_api::backup::{MAX_LISTED_POINTS, Phase, StatefulSetBackupStatus};
use sts_backup_api::conditions::{
    self, LAST_BACKUP_SUCCEEDED, NAMESPACE_NOT_GRANTED, PROGRESSING, READY, STATEFUL_SET_NOT_FOUND, THAWED,
};
use sts_backup_api::points::recovery_points;
use sts_backup_api::run::{
    CurrentRun, RecoveryPoint, RunPod, RunRecord, RunResult, RunStep, SnapshotState, ThawState, request_key,
};
use sts_backup_api::snapshot::VolumeSnapshot;

use super::decide::{BackupStep, Idle, Wait};
use super::observe::{BackupFacts, Target};

/// The thaw of a pod failed, and is repeated.
pub(super) const THAW_FAILED: &str = "ThawFailed";
/// The thaw of a pod failed, and its user said to let it be.
pub(super) const THAW_GIVEN_UP: &str = "ThawGivenUp";

/// The status after the step is written down, and before it is done.
pub(super) fn next_status(facts: &BackupFacts, step: &BackupStep, now: Timestamp) -> StatefulSetBackupStatus {
    let mut status = facts.status.clone();
    status.observed_generation = facts.generation;

    let points = facts.snapshots.as_ref().map(|snapshots| points_of(snapshots, &status.history));
    match step {
        BackupStep::Begin(run) | BackupStep::Freeze(run) | BackupStep::Record(run) => {
            status.current_run = Some(run.clone());
        }
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
        | BackupStep::Wait { .. }
        | BackupStep::Idle(_) => {}
    }
    if let BackupStep::Begin(_) = step {
        status.last_request = facts.request.as_deref().map(request_key).or(status.last_request);
    }
    if let Some(points) = points {
        let complete = points.iter().filter(|point| point.complete).count();
        status.recovery_point_count = i64::try_from(complete).unwrap_or(i64::MAX);
        status.recovery_points = points.into_iter().take(MAX_LISTED_POINTS).collect();
    }
    set_conditions(facts, step, &mut status, now);
    status.phase = Some(phase(&status));
    status
}

/// The points that snapshots amount to. A snapshot that was created for a run just before its agent died can appear
/// after the clean-up: it does not make the point of a failed run complete.
fn points_of(snapshots: &[VolumeSnapshot], history: &[RunRecord]) -> Vec<RecoveryPoint> {
    let mut points = recovery_points(snapshots);
    for point in &mut points {
        let failed = history.iter().any(|run| run.id == point.id && run.result == RunResult::Failed);
        point.complete &= !failed;
    }
    points
}

fn phase(status: &StatefulSetBackupStatus) -> Phase {
    if status.current_run.is_some() {
        return Phase::InProgress;
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
        (Target::Elsewhere, _) => set(READY, (false, NAMESPACE_NOT_GRANTED, &not_granted(facts))),
        (Target::Missing, _) => {
            let message = format!(
                "StatefulSet {} does not exist: create it, or delete this backup",
                facts.target_name()
            );
            set(READY, (false, STATEFUL_SET_NOT_FOUND, &message));
        }
        (_, BackupStep::Freeze(_)) => {
            set(READY, (true, "Usable", "the last preflight found all that a run needs"));
        }
        (Target::Read(_), BackupStep::Record(CurrentRun { failure: Some(failure), .. })) => {
            set(READY, (false, &failure.reason, &failure.message));
        }
        (Target::Exists, BackupStep::Idle(_)) => {
            let old = conditions::find(&facts.status.conditions, READY);
            let stale = |reason: &str| reason == NAMESPACE_NOT_GRANTED || reason == STATEFUL_SET_NOT_FOUND;
            if old.is_none_or(|ready| ready.status == "True" || stale(&ready.reason)) {
                set(READY, (true, "Usable", "the StatefulSet exists"));
            }
        }
        (Target::Unread | Target::Exists | Target::Read(_), _) => {}
    }

    if let Some(run) = current_run {
        let (reason, message) = progress(run, step);
        set(PROGRESSING, (true, reason, &message));
        if let Some((thawed, reason, message)) = thaw_state(run) {
            set(THAWED, (thawed, reason, &message));
        }
    } else {
        if let BackupStep::Wait { why: Wait::Queued { behind }, .. } = step {
            set(PROGRESSING, (false, "Queued", &waiting_behind(behind)));
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
    format!(
        "a run is due and waits for the run of StatefulSetBackup {other}, which backs up the same StatefulSet"
    )
}

fn not_granted(facts: &BackupFacts) -> String {
    format!(
        "StatefulSet {} is in another namespace, which is not supported: create this StatefulSetBackup in the namespace \
         of its StatefulSet",
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
        RunStep::Readying => ("Readying", format!("run {}: {ready}/{all} snapshots are ready", run.id)),
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

/// What an Event says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Note {
    /// `Normal` or `Warning`.
    pub(super) kind: &'static str,
    pub(super) reason: &'static str,
    pub(super) action: &'static str,
    pub(super) message: String,
}

impl Note {
    pub(super) fn normal(reason: &'static str, action: &'static str, message: String) -> Self {
        Self { kind: "Normal", reason, action, message }
    }

    pub(super) fn warning(reason: &'static str, action: &'static str, message: String) -> Self {
        Self { kind: "Warning", reason, action, message }
    }
}

/// The Event that goes with a step, once it is written down.
pub(super) fn note(facts: &BackupFacts, step: &BackupStep) -> Option<Note> {
    let failing = |run: &CurrentRun| {
        let was_failing = facts.status.current_run.as_ref().is_some_and(|run| run.failure.is_some());
        run.failure.clone().filter(|_| !was_failing)
    };
    match step {
        BackupStep::Begin(run) => {
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
            Some(Note::normal("Queued", "Wait", waiting_behind(behind)))
        }
        BackupStep::Idle(Idle::NotGranted) => {
            Some(Note::warning(NAMESPACE_NOT_GRANTED, "Refuse", not_granted(facts)))
        }
        BackupStep::Idle(Idle::NothingDue | Idle::NoStatefulSet)
        | BackupStep::Wait { why: Wait::Section | Wait::Thaw | Wait::Snapshots, .. }
        | BackupStep::AddFinalizer
        | BackupStep::RemoveFinalizer
        | BackupStep::Thaw(_)
        | BackupStep::DeleteLate(_)
        | BackupStep::Cancel => None,
    }
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
