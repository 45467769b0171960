//! When runs are due: a schedule, its time zone, and what has come due since the last run.
//!
//! A *slot* is a time of the schedule; a run of it is due at the slot plus the object's own offset (`spread`).
//!
//! Where clocks change, slots are what Vixie cron made of them. A schedule that names times of day has each of them once a
//! day: one that the clock leaps over is at the end of the leap, one that the clock shows twice is at the first showing. A
//! schedule with `*` as its minute or hour is at every time that the clock shows, be it shown twice or never.

mod pattern;

use std::sync::LazyLock;
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::{TimeZone, TimeZoneDatabase};
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::backup::StatefulSetBackupSpec;
use pattern::{Pattern, Wall};

/// Passed slots are counted up to this many: a bound on what [`Timetable::look`] costs, about a year of hourly ones.
pub const MOST_COUNTED: usize = 10_000;

/// The least that a missed run may be late, seconds, unless the user says otherwise.
const LEAST_DEADLINE: i64 = 100;

/// The time zones that are part of the program: images have none, and the answer is to be the same on every machine.
static ZONES: LazyLock<TimeZoneDatabase> = LazyLock::new(TimeZoneDatabase::bundled);

/// Why runs cannot be timed; each says what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ScheduleError {
    /// The schedule cannot be read, or never fires.
    #[error("schedule {schedule:?}: {reason}; {remedy}")]
    Schedule {
        /// As the user wrote it.
        schedule: String,
        /// What is wrong.
        reason: String,
        /// What to do.
        remedy: String,
    },
    /// The IANA database has no such time zone.
    #[error(
        "timeZone {name:?}: the IANA database has no such time zone; write one such as Europe/Paris, or leave it out for UTC"
    )]
    TimeZone {
        /// As the user wrote it.
        name: String,
    },
    /// Runs would begin after the next one is due.
    #[error(
        "spread {spread:?}: it is not smaller than the smallest time between runs of schedule {schedule:?}, {gap:?}; write less than {gap:?}"
    )]
    Spread {
        /// What the user wrote.
        spread: Duration,
        /// As the user wrote it.
        schedule: String,
        /// The smallest time between runs.
        gap: Duration,
    },
}

/// The zone of `spec.timeZone`; absent or empty: UTC.
///
/// # Errors
///
/// When it names no zone of the IANA database. `Local` is none, as in a `CronJob`.
pub fn time_zone(name: Option<&str>) -> Result<TimeZone, ScheduleError> {
    let Some(name) = name.filter(|name| !name.is_empty()) else {
        return Ok(TimeZone::UTC);
    };
    let zone = ZONES.get(name).ok().filter(|zone| !zone.is_unknown());
    zone.ok_or_else(|| ScheduleError::TimeZone { name: name.to_owned() })
}

/// When the runs of one object are due.
#[derive(Clone, Debug)]
pub struct Timetable {
    pattern: Pattern,
    zone: TimeZone,
    /// From a slot to the beginning of its run, seconds.
    offset: i64,
    /// How late a run may begin, seconds; absent: by the schedule.
    deadline: Option<i64>,
}

/// What has come due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// The newest passed slot, if its run may still begin.
    pub due: Option<Timestamp>,
    /// How many slots have passed that are not `due`; counted up to [`MOST_COUNTED`].
    pub missed: i64,
    /// The newest passed slot, due or not; absent when none has passed.
    pub latest: Option<Timestamp>,
    /// When the next run begins by itself: the first slot that has not passed, plus the offset.
    pub next: Option<Timestamp>,
}

/// A time during which the clocks of a zone do not change. All of it in seconds.
struct Piece {
    /// Its first instant.
    start: i64,
    /// The first instant after it.
    end: i64,
    /// From UTC to the wall clock.
    offset: i64,
    /// The first time of the wall clock whose slot is in it.
    first: Wall,
}

impl Piece {
    fn wall(&self, instant: i64) -> Wall {
        instant.saturating_add(self.offset)
    }

    /// When a time of the wall clock is reached: one that was leapt over, at once.
    fn instant(&self, wall: Wall) -> i64 {
        wall.saturating_sub(self.offset).max(self.start)
    }
}

impl Timetable {
    /// The timetable of an object; none without a schedule. Objects with one schedule begin at different offsets, that
    /// of an object following from its `uid` alone.
    ///
    /// # Errors
    ///
    /// When the schedule, the time zone or the spread cannot be used.
    pub fn of(spec: &StatefulSetBackupSpec, uid: &str) -> Result<Option<Self>, ScheduleError> {
        let Some(schedule) = spec.schedule.as_deref().filter(|schedule| !schedule.is_empty()) else {
            return Ok(None);
        };
        let pattern = Pattern::parse(schedule)?;
        let spread = spec.spread.map(Duration::from).unwrap_or_default();
        // No two slots are nearer than a minute.
        if spread >= Duration::from_mins(1)
            && let Some(gap) = pattern.smallest_gap()
        {
            let gap = Duration::from_secs(gap.unsigned_abs());
            if spread >= gap {
                return Err(ScheduleError::Spread { spread, schedule: schedule.to_owned(), gap });
            }
        }
        Ok(Some(Self {
            pattern,
            zone: time_zone(spec.time_zone.as_deref())?,
            offset: offset(spread, uid),
            deadline: spec.starting_deadline_seconds,
        }))
    }

    /// What has come due after `since` until `now`: the slot `since` is done, and what is due exactly `now` has come due.
    /// Before the first run, `since` is when the object was created.
    #[must_use]
    pub fn look(&self, since: Timestamp, now: Timestamp) -> Look {
        let since = since.as_second();
        let until = now.as_second().saturating_sub(self.offset);
        let latest = self.previous(until).filter(|slot| *slot > since);
        let due = latest.filter(|slot| until - slot <= self.deadline(*slot));
        let passed = if latest.is_some() {
            let slots = std::iter::successors(self.next(since), |slot| self.next(*slot));
            slots.take(MOST_COUNTED).take_while(|slot| *slot <= until).count()
        } else {
            0
        };
        Look {
            due: due.map(timestamp),
            missed: i64::try_from(passed).unwrap_or(i64::MAX) - i64::from(due.is_some()),
            latest: latest.map(timestamp),
            // A slot that is done does not come again when the clock was put back.
            next: self.next(until.max(since)).map(|slot| timestamp(slot.saturating_add(self.offset))),
        }
    }

    /// From the next slot to the one after it: how often runs are expected.
    #[must_use]
    pub fn interval(&self, now: Timestamp) -> Option<Duration> {
        let next = self.next(now.as_second().saturating_sub(self.offset))?;
        Some(Duration::from_secs((self.next(next)? - next).unsigned_abs()))
    }

    /// When the first run after a time begins by itself: a slot, plus the offset.
    #[must_use]
    pub fn after(&self, time: Timestamp) -> Option<Timestamp> {
        let slot = self.next(time.as_second().saturating_sub(self.offset))?;
        Some(timestamp(slot.saturating_add(self.offset)))
    }

    /// The smallest time between two slots, by the wall clock; none: there is at most one.
    #[must_use]
    pub fn smallest_gap(&self) -> Option<Duration> {
        self.pattern.smallest_gap().map(|gap| Duration::from_secs(gap.unsigned_abs()))
    }

    /// How late the run of a slot may begin, seconds.
    fn deadline(&self, slot: i64) -> i64 {
        self.deadline.unwrap_or_else(|| {
            let gap = self.next(slot).map_or(0, |next| next - slot);
            LEAST_DEADLINE.max(gap / 2)
        })
    }

    /// The first slot after an instant.
    fn next(&self, after: i64) -> Option<i64> {
        let mut piece = self.piece(after);
        let mut from = piece.first.max(piece.wall(after).saturating_add(1));
        loop {
            let wall = self.pattern.next(from)?;
            if wall < piece.wall(piece.end) {
                return Some(piece.instant(wall));
            }
            piece = self.piece(piece.end);
            from = piece.first;
        }
    }

    /// The last slot at an instant or before it.
    fn previous(&self, until: i64) -> Option<i64> {
        let mut piece = self.piece(until);
        let mut from = piece.wall(until);
        loop {
            let wall = self.pattern.previous(from)?;
            if wall >= piece.first {
                return Some(piece.instant(wall));
            }
            piece = self.piece(piece.start.saturating_sub(1));
            from = piece.wall(piece.end).saturating_sub(1);
        }
    }

    /// The piece that an instant is in.
    fn piece(&self, at: i64) -> Piece {
        let offset = |instant| i64::from(self.zone.to_offset(timestamp(instant)).seconds());
        let start = self.zone.preceding(timestamp(at.saturating_add(1))).next();
        let start = start.map_or(i64::MIN, |change| change.timestamp().as_second());
        let end = self.zone.following(timestamp(at)).next();
        let end = end.map_or(i64::MAX, |change| change.timestamp().as_second());
        // A time of day is first shown after all that the clock showed before: not again when it was put back, and in
        // place of those that it leapt over.
        let shown_by = if self.pattern.every_time { start } else { start.saturating_sub(1) };
        Piece { start, end, offset: offset(at), first: start.saturating_add(offset(shown_by)) }
    }
}

/// The instant of so many seconds; the nearest there is, if that is beyond all times.
fn timestamp(seconds: i64) -> Timestamp {
    let nearest = if seconds < 0 { Timestamp::MIN } else { Timestamp::MAX };
    Timestamp::from_second(seconds).unwrap_or(nearest)
}

/// A whole number of seconds below `spread`, which follows from the uid: statuses hold whole seconds.
fn offset(spread: Duration, uid: &str) -> i64 {
    let digest: [u8; 32] = Sha256::digest(uid).into();
    let [first, second, third, fourth, ..] = digest;
    let part = u128::from(u32::from_be_bytes([first, second, third, fourth]));
    i64::try_from((u128::from(spread.as_secs()) * part) >> 32).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
