//! What a `StatefulSetBackup` says of the run that somebody asked for: how far it is, or how it ended. Pure.

use kube::ResourceExt;
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::conditions::{self, INVALID_SCHEDULE, NAMESPACE_NOT_GRANTED, STATEFUL_SET_NOT_FOUND};
use sts_backup_api::names::REQUESTED_AT_ANNOTATION;
use sts_backup_api::run::{
    CurrentRun, Due, RecoveryPoint, RunPod, RunRecord, RunResult, RunStep, Slot, SnapshotState, ThawState,
};

use super::watch::WAITING;
use sts_backup_service::table::span;

/// The reasons for which the agent begins no run; it looks again when the cluster changes. Any other verdict is
/// that of the last preflight, and only another run can better it.
const BLOCKING: [&str; 3] = [NAMESPACE_NOT_GRANTED, STATEFUL_SET_NOT_FOUND, INVALID_SCHEDULE];

/// A run that somebody asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    uid: String,
    annotation: String,
    slot: Slot,
}

impl Asked {
    /// The run that the annotation asks the object with that uid for.
    pub(super) fn new(uid: &str, annotation: &str) -> Self {
        Self { uid: uid.to_owned(), annotation: annotation.to_owned(), slot: Slot::request(annotation) }
    }

    fn is(&self, slot: &Slot) -> bool {
        slot.due == Due::Request && slot.value == self.slot.value
    }
}

/// How far the run is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Progress {
    /// Not at its end; a line that says how far.
    Goes(String),
    /// The last attempt is over.
    Over { record: RunRecord, point: Option<RecoveryPoint> },
    /// It does not begin as long as that is so.
    CannotStart { reason: String, message: String },
    /// The backup was suspended before it began, so it will not.
    Suspended,
    /// Somebody asked again before it began, so it will not.
    Replaced { by: String },
    /// The object is gone.
    Deleted,
}

/// Why the agent begins no run of the spec as it is now.
pub(super) fn blocked(backup: &StatefulSetBackup) -> Option<(&str, &str)> {
    not_ready(backup).filter(|(reason, _)| BLOCKING.contains(reason))
}

/// Why the spec as it is now cannot be used, or could not in the last preflight.
pub(super) fn not_ready(backup: &StatefulSetBackup) -> Option<(&str, &str)> {
    let status = backup.status.as_ref()?;
    let ready = conditions::find(&status.conditions, conditions::READY)?;
    let of_this_spec =
        ready.observed_generation.is_none_or(|seen| backup.metadata.generation.is_none_or(|now| seen >= now));
    (ready.status == "False" && of_this_spec).then_some((&ready.reason, &ready.message))
}

/// How far the run is that was asked for; `None`: the object is gone.
pub(super) fn progress(backup: Option<&StatefulSetBackup>, asked: &Asked) -> Progress {
    let Some(backup) = backup.filter(|backup| backup.metadata.uid.as_deref() == Some(&asked.uid)) else {
        return Progress::Deleted;
    };
    let status = backup.status.as_ref();
    let current = status.and_then(|status| status.current_run.as_ref());
    if let Some(run) = current.filter(|run| asked.is(&run.slot)) {
        return Progress::Goes(how_far(backup, run));
    }

    let ended = status.iter().flat_map(|status| &status.history).filter(|run| asked.is(&run.slot));
    let last = ended.max_by_key(|run| run.slot.attempt);
    let annotation = backup.annotations().get(REQUESTED_AT_ANNOTATION);
    let replaced = annotation.filter(|annotation| **annotation != asked.annotation);
    if let Some(record) = last {
        let may_go_on = replaced.is_none() && blocked(backup).is_none() && !backup.spec.suspend;
        if record.next_attempt().is_some() && may_go_on {
            let attempt = record.slot.attempt;
            return Progress::Goes(format!("attempt {attempt} was interrupted; waiting for the next one"));
        }
        let mut points = status.iter().flat_map(|status| &status.recovery_points);
        let point = points.find(|point| point.id == record.id).cloned();
        return Progress::Over { record: record.clone(), point };
    }

    if let Some(by) = replaced {
        return Progress::Replaced { by: by.clone() };
    }
    if backup.spec.suspend {
        return Progress::Suspended;
    }
    if let Some((reason, message)) = blocked(backup) {
        return Progress::CannotStart { reason: reason.to_owned(), message: message.to_owned() };
    }
    Progress::Goes(match current {
        Some(other) => {
            format!("waiting for run {} to end, which is at: {}", other.id, how_far(backup, other))
        }
        None => waiting(backup).unwrap_or(WAITING).to_owned(),
    })
}

/// How far the run under way is, or what it waits for.
fn how_far(backup: &StatefulSetBackup, run: &CurrentRun) -> String {
    let waits = waiting(backup).filter(|_| run.step == RunStep::Preflight);
    waits.map_or_else(|| progress_line(run), str::to_owned)
}

/// What a run waits for before it touches anything, in the agent's words.
fn waiting(backup: &StatefulSetBackup) -> Option<&str> {
    let progressing = conditions::find(&backup.status.as_ref()?.conditions, conditions::PROGRESSING)?;
    ["Queued", "WaitingForStatefulSet"].contains(&progressing.reason.as_str()).then_some(&progressing.message)
}

/// How far a run is, in one line that changes only when something has happened.
pub(super) fn progress_line(run: &CurrentRun) -> String {
    let mut parts = Vec::new();
    let total = run.volumes.len();
    if total > 0 && run.step > RunStep::Preflight {
        let at_least = |state| run.volumes.iter().filter(|volume| reaches(volume.state, state)).count();
        parts.push(format!("{}/{total} volumes cut", at_least(SnapshotState::Cut)));
        if run.step >= RunStep::Thawing {
            parts.push(format!("{}/{total} ready", at_least(SnapshotState::Ready)));
        }
    }
    parts.extend(thaw_line(&run.pods));
    let mut line = step_word(run.step).to_owned();
    if !parts.is_empty() {
        line = format!("{line}: {}", parts.join(", "));
    }
    if run.slot.attempt > 1 {
        line = format!("attempt {}: {line}", run.slot.attempt);
    }
    if let Some(failure) = &run.failure {
        line = format!("{line}; the run fails: {}: {}", failure.reason, failure.message);
    }
    line
}

fn reaches(state: SnapshotState, least: SnapshotState) -> bool {
    let rank = |state| match state {
        SnapshotState::Pending => 0,
        SnapshotState::Cut => 1,
        SnapshotState::Ready => 2,
    };
    rank(state) >= rank(least)
}

/// The step, as people say it.
pub(super) fn step_word(step: RunStep) -> &'static str {
    match step {
        RunStep::Preflight => "preflight",
        RunStep::Frozen => "freezing and cutting",
        RunStep::Thawing => "thawing",
        RunStep::Readying => "waiting for the snapshots to be ready",
        RunStep::CleaningUp => "cleaning up",
    }
}

/// How many pods are thawed, and what keeps the others frozen.
fn thaw_line(pods: &[RunPod]) -> Option<String> {
    let duties: Vec<_> = pods.iter().filter_map(|pod| pod.thaw.as_ref().map(|duty| (pod, duty))).collect();
    let owed: Vec<_> = duties.iter().filter(|(_, duty)| duty.state == ThawState::Owed).collect();
    if duties.is_empty() {
        return None;
    }
    let mut line = format!("{}/{} pods thawed", duties.len() - owed.len(), duties.len());
    for (pod, duty) in owed {
        if let Some(message) = &duty.message {
            line = format!("{line}, {} failed {}: {message}", pod.name, times(duty.failures));
        }
    }
    Some(line)
}

fn times(failures: i32) -> String {
    if failures == 1 { "once".to_owned() } else { format!("{failures} times") }
}

/// The line that ends a run that left a recovery point.
pub(super) fn point_line(record: &RunRecord, point: Option<&RecoveryPoint>) -> String {
    let mut parts = Vec::new();
    if let Some(point) = point {
        parts.push(format!("{}/{} volumes", point.ready_volumes, point.expected_volumes));
    }
    parts.extend(record.freeze_ms.map(|frozen| format!("frozen {}", span(frozen))));
    parts.extend(record.cut_skew_ms.map(|skew| format!("cut skew {}", span(skew))));
    parts.extend(point.map(|point| point.consistency.as_str().to_owned()));
    if parts.is_empty() {
        // The status lists only the newest points: the record has the words.
        parts.push(record.message.clone());
    }
    format!("recovery point {}: {}", record.id, parts.join(", "))
}

/// The word of a result, as the API writes it.
pub(super) fn result_word(result: RunResult) -> &'static str {
    match result {
        RunResult::Completed => "Completed",
        RunResult::PartiallyFailed => "PartiallyFailed",
        RunResult::Failed => "Failed",
    }
}

#[cfg(test)]
#[path = "follow_tests.rs"]
mod tests;
