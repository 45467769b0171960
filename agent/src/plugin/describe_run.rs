//! The parts of `describe` that speak of runs and their recovery points. Pure.

use jiff::Timestamp;
use sts_backup_api::run::{
    CurrentRun, Due, RecoveryPoint, RunPod, RunRecord, RunStep, RunVolume, Slot, SnapshotState, ThawState,
};

use super::describe::one_line;
use super::follow::{progress_line, result_word};
use sts_backup_service::table::{age, lines, moment, second, size, span, table};

/// A run under way: how far it is, and what is owed to whom.
pub(super) fn current_run(run: &CurrentRun, now: Timestamp) -> String {
    let CurrentRun { id, slot: _, started, volumes, left_out, pods, frozen_since, .. } = run;
    let mut said = vec![format!("{id}, started {}", moment(started.0, now)), progress_line(run)];
    let freezes = run.step == RunStep::Frozen && pods.iter().any(|pod| pod.freeze_container.is_some());
    if let Some(since) = frozen_since.as_ref().filter(|_| freezes) {
        said.push(format!("frozen for {}", age(since.0, now)));
    }
    said.extend(left_out.iter().map(|what| format!("left out: {}", one_line(what))));
    let mut text = lines(said);
    if !volumes.is_empty() {
        let rows: Vec<_> = volumes.iter().map(volume_row).collect();
        text.push_str(&table(&["CLAIM", "SNAPSHOT", "CLASS", "STATE"], &rows));
    }
    let rows: Vec<_> = pods.iter().filter_map(|pod| pod_row(pod, now)).collect();
    if !rows.is_empty() {
        text.push_str(&table(&["POD", "THAW", "FAILURES", "NEXT TRY", "MESSAGE"], &rows));
    }
    text
}

fn volume_row(volume: &RunVolume) -> Vec<String> {
    let state = match volume.state {
        SnapshotState::Pending => "not cut",
        SnapshotState::Cut => "cut",
        SnapshotState::Ready => "ready",
    };
    vec![volume.claim.clone(), volume.snapshot.clone(), volume.snapshot_class.clone(), state.to_owned()]
}

fn pod_row(pod: &RunPod, now: Timestamp) -> Option<Vec<String>> {
    let duty = pod.thaw.as_ref()?;
    let state = match duty.state {
        ThawState::Owed => "owed",
        ThawState::Thawed => "done",
        ThawState::Gone => "pod gone",
        ThawState::GivenUp => "given up",
    };
    let next = duty.not_before.as_ref().filter(|_| duty.state == ThawState::Owed);
    let next = next.map_or("-".to_owned(), |at| {
        if at.0 > now { format!("in {}", age(now, at.0)) } else { "now".to_owned() }
    });
    let message = one_line(duty.message.as_deref().unwrap_or("-"));
    Some(vec![pod.name.clone(), state.to_owned(), duty.failures.to_string(), next, message])
}

/// Recovery points.
pub(super) fn points(points: &[RecoveryPoint], now: Timestamp) -> String {
    if points.is_empty() {
        return String::new();
    }
    let row = |point: &RecoveryPoint| {
        vec![
            point.id.to_string(),
            second(point.time.0),
            age(point.time.0, now),
            format!("{}/{}", point.ready_volumes, point.expected_volumes),
            if point.complete { "yes" } else { "no" }.to_owned(),
            point.consistency.as_str().to_owned(),
            size(point.size_bytes),
            if point.hold { "yes" } else { "no" }.to_owned(),
        ]
    };
    table(
        &["POINT", "TIME", "AGE", "VOLUMES", "COMPLETE", "CONSISTENCY", "SIZE", "HOLD"],
        &points.iter().map(row).collect::<Vec<_>>(),
    )
}

/// What a run was due to, in a word.
fn due(slot: &Slot) -> String {
    let due = match slot.due {
        Due::Creation => "creation",
        Due::Request => "request",
        Due::Schedule => "schedule",
    };
    if slot.attempt > 1 { format!("{due} (attempt {})", slot.attempt) } else { due.to_owned() }
}

/// The finished runs that the status lists.
pub(super) fn history(history: &[RunRecord], now: Timestamp) -> String {
    if history.is_empty() {
        return String::new();
    }
    let milliseconds = |value: Option<i64>| value.map_or("-".to_owned(), span);
    let row = |run: &RunRecord| {
        vec![
            run.id.to_string(),
            age(run.started.0, now),
            due(&run.slot),
            span(run.duration_ms),
            milliseconds(run.freeze_ms),
            milliseconds(run.cut_skew_ms),
            result_word(run.result).to_owned(),
            run.reason.clone(),
            one_line(&run.message),
        ]
    };
    table(
        &["RUN", "AGE", "DUE", "DURATION", "FROZEN", "CUT SKEW", "RESULT", "REASON", "MESSAGE"],
        &history.iter().map(row).collect::<Vec<_>>(),
    )
}
