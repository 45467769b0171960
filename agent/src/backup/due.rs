//! What a backup is due, and when it is to be looked at again. Pure.
//!
//! A scheduled time is dealt with once: a run is begun for it, or it is missed. `status.lastScheduleTime` is how far that
//! has come. Nobody is surprised by a run: times that passed while the backup was suspended, or before the schedule was
//! written, do not count.

use std::time::Duration;

use jiff::Timestamp;
use sts_backup_api::backup::{Phase, StatefulSetBackupStatus};
use sts_backup_api::points::recovery_points;
use sts_backup_api::run::{RunStep, Slot, request_key};
use sts_backup_api::schedule::{Look, ScheduleError, Timetable};

use super::decide::later;
use super::observe::BackupFacts;

/// How far ahead of the clock a time may be that this or another replica's clock wrote.
const WRONG_CLOCK: Duration = Duration::from_hours(1);

/// For so long at most a run that has begun waits for others that are due.
const HEAD_START: Duration = Duration::from_secs(10);

/// What a backup is due.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Due {
    /// A run.
    pub(super) slot: Option<Slot>,
    /// Scheduled times that have passed and get no run.
    pub(super) missed: Missed,
}

/// Scheduled times that have passed and get no run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Missed {
    pub(super) count: i64,
    /// The newest time that is dealt with when these are.
    pub(super) latest: Option<Timestamp>,
}

/// What a backup without a run is due. A request comes first, and on a new object it also counts as the run at its
/// creation.
pub(super) fn due(facts: &BackupFacts, now: Timestamp) -> Result<Due, ScheduleError> {
    if let Some(slot) = requested(facts).map(Slot::request).or_else(|| interrupted(facts, now)) {
        return Ok(Due { slot: Some(slot), missed: Missed::default() });
    }
    if let Some(Look { due, missed, latest, .. }) = look(facts, now)? {
        return Ok(Due { slot: due.map(Slot::schedule), missed: Missed { count: missed, latest } });
    }
    let status = &facts.status;
    // The original wrote the time of its own run at creation.
    let has_begun = status.last_backup_time.is_some() || status.last_schedule_time.is_some();
    let is_new = status.history.is_empty() && !has_begun && !begins_anew(facts);
    let slot = (is_new && facts.spec.timing().is_none()).then(|| Slot::creation(facts.created));
    Ok(Due { slot, missed: Missed::default() })
}

/// The next attempt at a run that was interrupted. Not once a later time was dealt with: what is due is newer then, or is
/// not wanted any more.
fn interrupted(facts: &BackupFacts, now: Timestamp) -> Option<Slot> {
    let last = facts.status.history.first()?;
    let dealt_with = if begins_anew(facts) { Some(now) } else { last_time(facts) };
    last.next_attempt().filter(|_| dealt_with.is_none_or(|time| time <= last.started.0))
}

/// The scheduled times that have passed while a run is under way: they get none.
pub(super) fn overlapped(facts: &BackupFacts, now: Timestamp) -> Missed {
    let Ok(Some(Look { due, missed, latest, .. })) = look(facts, now) else { return Missed::default() };
    Missed { count: missed.saturating_add(i64::from(due.is_some())), latest }
}

/// The annotation that asks for a run, if that was not dealt with.
pub(super) fn requested(facts: &BackupFacts) -> Option<&str> {
    let request = facts.request.as_deref()?;
    (facts.status.last_request != Some(request_key(request))).then_some(request)
}

/// When the next scheduled run begins by itself.
pub(super) fn next_run(facts: &BackupFacts, now: Timestamp) -> Option<Timestamp> {
    look(facts, now).ok()??.next
}

/// Whether a run has begun and done nothing else, not long ago. Of many that are due at once all begin before any goes on,
/// which takes the API server's time: nobody's point is to be much later than was asked for.
pub(super) fn has_just_begun(status: &StatefulSetBackupStatus, now: Timestamp) -> bool {
    let run = status.current_run.as_ref().filter(|run| run.step == RunStep::Preflight);
    run.is_some_and(|run| is_within(run.started.0, HEAD_START, now))
}

/// Whether a scheduled time has just passed that nobody has dealt with.
pub(super) fn is_to_begin(status: &StatefulSetBackupStatus, now: Timestamp) -> bool {
    status.next_schedule_time.as_ref().is_some_and(|next| is_within(next.0, HEAD_START, now))
}

/// Whether `now` is at or after `time`, and not by `length` or more.
fn is_within(time: Timestamp, length: Duration, now: Timestamp) -> bool {
    time <= now && now < later(time, length)
}

/// What the schedule has had and is to have; none without one, and while it is suspended.
fn look(facts: &BackupFacts, now: Timestamp) -> Result<Option<Look>, ScheduleError> {
    let timetable = Timetable::of(&facts.spec, &facts.uid)?;
    Ok(timetable.filter(|_| !facts.spec.suspend).map(|timetable| timetable.look(since(facts, now), now)))
}

/// From when on scheduled times count.
fn since(facts: &BackupFacts, now: Timestamp) -> Timestamp {
    if begins_anew(facts) {
        return now;
    }
    let StatefulSetBackupStatus { last_backup_time, history, current_run, .. } = &facts.status;
    let since = last_time(facts).unwrap_or_else(|| {
        if !history.is_empty() || current_run.is_some() {
            return facts.created;
        }
        // The status is new, or was lost, or is the original's.
        let of_original = last_backup_time.as_ref().map(|time| time.0);
        let points = recovery_points(facts.snapshots.iter().flatten());
        let newest = points.first().map(|point| point.time.0).max(of_original);
        newest.map_or(facts.created, |newest| newest.max(facts.created))
    });
    // A time that is far ahead was written by a clock that was.
    if since > later(now, WRONG_CLOCK) { now } else { since }
}

fn last_time(facts: &BackupFacts) -> Option<Timestamp> {
    facts.status.last_schedule_time.as_ref().map(|time| time.0)
}

/// Whether scheduled times count from this moment on: the schedule was suspended until now, or is another one.
pub(super) fn begins_anew(facts: &BackupFacts) -> bool {
    let StatefulSetBackupStatus { phase, observed_generation, schedule, .. } = &facts.status;
    let is_changed = observed_generation.is_some() && *schedule != facts.spec.timing();
    !facts.spec.suspend && (*phase == Some(Phase::Suspended) || is_changed)
}

#[cfg(test)]
#[path = "due_tests.rs"]
mod tests;
