//! What a backup is due, and when it is to be looked at again. Pure.
//!
//! A scheduled time is dealt with once: a run is begun for it, or it is missed. `status.lastScheduleTime` is how far that
//! has come. Nobody is surprised by a run: times that passed while the backup was suspended, or before the schedule was
//! written, do not count.

use jiff::Timestamp;
use sts_backup_api::backup::{Phase, StatefulSetBackupStatus};
use sts_backup_api::run::{Slot, request_key};
use sts_backup_api::schedule::{Look, ScheduleError, Timetable};

use super::observe::BackupFacts;

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
    let look = look(facts, now)?;
    let status = &facts.status;
    let again = || {
        let last = status.history.first()?;
        // Not once a later time was dealt with: what is due is newer then, or was not wanted any more.
        let is_newest = status.last_schedule_time.as_ref().is_none_or(|time| time.0 <= last.started.0);
        last.next_attempt().filter(|_| is_newest)
    };
    if let Some(slot) = requested(facts).map(Slot::request).or_else(again) {
        return Ok(Due { slot: Some(slot), missed: Missed::default() });
    }
    let Some(Look { due, missed, latest, .. }) = look else {
        // The original wrote the time of its own run at creation.
        let has_begun = status.last_backup_time.is_some() || status.last_schedule_time.is_some();
        let is_new = status.history.is_empty() && !has_begun && !has_schedule(facts);
        let slot = is_new.then(|| Slot::creation(facts.created));
        return Ok(Due { slot, missed: Missed::default() });
    };
    Ok(Due { slot: due.map(Slot::schedule), missed: Missed { count: missed, latest } })
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

/// What the schedule has had and is to have; none without one, and while it is suspended.
fn look(facts: &BackupFacts, now: Timestamp) -> Result<Option<Look>, ScheduleError> {
    let timetable = Timetable::of(&facts.spec, &facts.uid)?;
    Ok(timetable.filter(|_| !facts.spec.suspend).map(|timetable| timetable.look(since(facts, now), now)))
}

fn has_schedule(facts: &BackupFacts) -> bool {
    facts.spec.schedule.as_deref().is_some_and(|schedule| !schedule.is_empty())
}

/// From when on scheduled times count.
fn since(facts: &BackupFacts, now: Timestamp) -> Timestamp {
    if begins_anew(facts, now) {
        return now;
    }
    let StatefulSetBackupStatus { last_schedule_time, last_backup_time, history, .. } = &facts.status;
    let of_original = last_backup_time.as_ref().filter(|_| history.is_empty()).map(|time| time.0);
    last_schedule_time.as_ref().map(|time| time.0).or(of_original).unwrap_or(facts.created)
}

/// Whether scheduled times count from this moment on: the schedule was suspended until now, or is a new one. A run that was
/// announced and has become due meanwhile is not forgotten over that.
pub(super) fn begins_anew(facts: &BackupFacts, now: Timestamp) -> bool {
    let status = &facts.status;
    if facts.spec.suspend {
        return false;
    }
    if status.phase == Some(Phase::Suspended) {
        return true;
    }
    let is_edited = status.observed_generation.is_some_and(|seen| Some(seen) != facts.generation);
    let is_announced = status.next_schedule_time.as_ref().is_some_and(|next| next.0 <= now);
    is_edited && !is_announced && has_schedule(facts)
}

#[cfg(test)]
#[path = "due_tests.rs"]
mod tests;
