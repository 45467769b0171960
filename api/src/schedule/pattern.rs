//! Five cron fields, on a wall clock that never jumps.
//!
//! The only user of the crate `cron`, which reads expressions as Quartz does: six or seven fields, Sunday is 1, and a
//! day must fit both day fields. Here they are read as in a `CronJob`. Zones are no matter of this module: `cron` skips
//! the times in a gap and repeats those of a repeated hour in the wrong order.

use std::collections::BTreeSet;
use std::str::FromStr;

use chrono::{DateTime, Utc};
use cron::Schedule;

use super::ScheduleError;

/// What a wall clock shows, as seconds since it showed the beginning of 1970.
pub(super) type Wall = i64;

/// The beginning of 2000, from where patterns are tried.
const A_BEGINNING: Wall = 946_684_800;

/// So many times show the smallest gap: those of a year of days, or of some days with all their neighbours.
const TIMES_TO_MEASURE: usize = 400;

/// What a schedule may be called instead of written.
const ALIASES: [(&str, &str); 7] = [
    ("@hourly", "0 * * * *"),
    ("@daily", "0 0 * * *"),
    ("@midnight", "0 0 * * *"),
    ("@weekly", "0 0 * * 0"),
    ("@monthly", "0 0 1 * *"),
    ("@yearly", "0 0 1 1 *"),
    ("@annually", "0 0 1 1 *"),
];

/// The fields, as they are named and what they hold.
const FIELDS: [(&str, &str); 5] = [
    ("minute", "0-59"),
    ("hour", "0-23"),
    ("day of the month", "1-31"),
    ("month", "1-12 or JAN-DEC"),
    ("day of the week", "0-7 or SUN-SAT, where 0 and 7 are Sunday"),
];

/// When a schedule is due by a wall clock; from 1970 to 2100, which is all that `cron` knows.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    /// A time that fits any of them is due: one for each restricted day field.
    schedules: Vec<Schedule>,
    /// Its minute or hour is a `*`: it asks for every time that the clock shows. Otherwise it asks for times of day.
    pub(super) every_time: bool,
}

impl Pattern {
    /// Reads `schedule` as a `CronJob` does.
    pub(super) fn parse(schedule: &str) -> Result<Self, ScheduleError> {
        let schedule = schedule.trim();
        let wrong = |reason: String, remedy: String| ScheduleError::Schedule {
            schedule: schedule.to_owned(),
            reason,
            remedy,
        };
        if schedule.starts_with("TZ=") || schedule.starts_with("CRON_TZ=") {
            let zone = schedule.split(['=', ' ']).nth(1).unwrap_or_default();
            return Err(wrong(
                "a time zone in it is not read".to_owned(),
                format!("write only the five fields here, and timeZone: {zone}"),
            ));
        }
        if schedule.starts_with("@every") {
            return Err(wrong(
                "@every has no fixed times".to_owned(),
                "write five fields, such as */30 * * * *".to_owned(),
            ));
        }
        let alias = ALIASES.into_iter().find(|(alias, _)| *alias == schedule);
        if alias.is_none() && schedule.starts_with('@') {
            return Err(wrong(
                "it is no known name".to_owned(),
                format!("write five fields, or one of {}", ALIASES.map(|(alias, _)| alias).join(", ")),
            ));
        }

        let text = alias.map_or(schedule, |(_, text)| text);
        let fields: Vec<_> = text.split_whitespace().collect();
        let &[minute, hour, day, month, weekday] = fields.as_slice() else {
            let remedy = "write minute, hour, day of the month, month and day of the week";
            let remedy =
                if fields.len() > 5 { format!("{remedy}: no seconds, no year") } else { remedy.to_owned() };
            return Err(wrong(format!("it has {} fields, not 5", fields.len()), remedy));
        };
        let unreadable = |field: usize| {
            let (name, values) = FIELDS[field];
            wrong(
                format!("{:?} is no {name}", fields[field]),
                format!("write * or values of {values}, such as 1, 1,3, 1-3 or */2"),
            )
        };
        let weekday = weekdays(weekday).ok_or_else(|| unreadable(4))?;
        let weekday = weekday.as_str();
        for (index, field) in [minute, hour, day, month].into_iter().enumerate() {
            let mut alone = ["*"; 4];
            alone[index] = field;
            // `cron` needs no space between fields, and would read two of them in 5*.
            if items(field).is_none() || quartz(alone, "*").is_none() {
                return Err(unreadable(index));
            }
        }

        let any = |field: &str| matches!(field, "*" | "?");
        let schedules = if any(day) || any(weekday) {
            vec![quartz([minute, hour, day, month], weekday)]
        } else {
            vec![quartz([minute, hour, day, month], "*"), quartz([minute, hour, "*", month], weekday)]
        };
        let schedules: Option<Vec<_>> = schedules.into_iter().collect();
        let pattern = Self {
            schedules: schedules.ok_or_else(|| unreadable(4))?,
            every_time: minute.contains('*') || hour.contains('*'),
        };
        if pattern.next(A_BEGINNING).is_none() {
            return Err(wrong(
                "it never fires, as no month in it has such a day".to_owned(),
                "write a day that exists".to_owned(),
            ));
        }
        Ok(pattern)
    }

    /// The first time at `from` or after it.
    pub(super) fn next(&self, from: Wall) -> Option<Wall> {
        let before = clock(from.max(0) - 1)?;
        self.schedules
            .iter()
            .filter_map(|schedule| schedule.after(&before).next())
            .min()
            .map(|time| time.timestamp())
    }

    /// The last time at `until` or before it.
    pub(super) fn previous(&self, until: Wall) -> Option<Wall> {
        // `cron` would take a year before the first one as one far ahead.
        let after = clock(until.saturating_add(1)).filter(|_| until >= 0)?;
        self.schedules
            .iter()
            .filter_map(|schedule| schedule.after(&after).next_back())
            .max()
            .map(|time| time.timestamp())
    }

    /// The smallest gap between times that follow each other, seconds: of the first 400 times since 2000.
    ///
    /// More would show nothing new: a pattern repeats its days, and one with so many times in few days has its smallest
    /// gap within each of them.
    pub(super) fn smallest_gap(&self) -> Option<i64> {
        let times = std::iter::successors(self.next(A_BEGINNING), |time| self.next(time + 1));
        let times: Vec<_> = times.take(TIMES_TO_MEASURE).collect();
        times.windows(2).map(|pair| pair[1] - pair[0]).min()
    }
}

fn clock(wall: Wall) -> Option<DateTime<Utc>> {
    DateTime::from_timestamp(wall, 0)
}

/// As `cron` reads it: with seconds, and with its days of the week.
fn quartz([minute, hour, day, month]: [&str; 4], weekday: &str) -> Option<Schedule> {
    Schedule::from_str(&format!("0 {minute} {hour} {day} {month} {weekday}")).ok()
}

/// One of the values that a field lists: a value or a range, and a step.
struct Item<'a> {
    first: &'a str,
    last: Option<&'a str>,
    step: Option<&'a str>,
}

/// What a field lists, if it is written as a field is.
fn items(field: &str) -> Option<Vec<Item<'_>>> {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let name = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphabetic());
    let item = |text| {
        let (values, step) = split(text, '/');
        let (first, last) = split(values, '-');
        let value = |text: &str| number(text) || name(text);
        let values_are_well =
            (value(first) && last.is_none_or(value)) || (matches!(first, "*" | "?") && last.is_none());
        (values_are_well && step.is_none_or(number)).then_some(Item { first, last, step })
    };
    field.split(',').map(item).collect()
}

fn split(text: &str, at: char) -> (&str, Option<&str>) {
    text.split_once(at).map_or((text, None), |(before, after)| (before, Some(after)))
}

/// The days of the week as `cron` counts them, Sunday being 1: a list, or `*`.
fn weekdays(field: &str) -> Option<String> {
    if matches!(field, "*" | "?") {
        return Some("*".to_owned());
    }
    let mut days = BTreeSet::new();
    for Item { first, last, step } in items(field)? {
        let (first, last) = match (first, last) {
            ("*" | "?", _) => (0, 6),
            (first, None) if step.is_some() => (weekday(first)?, 6),
            (first, last) => (weekday(first)?, weekday(last.unwrap_or(first))?),
        };
        // A range may end with Sunday as well as begin with it.
        let last = if last == 0 && first > 0 { 7 } else { last };
        let step = step.map_or(Some(1), |step| step.parse().ok())?;
        if first > last || !(1..=7).contains(&step) {
            return None;
        }
        days.extend((first..=last).step_by(step).map(|day| day % 7 + 1));
    }
    Some(days.into_iter().map(|day| day.to_string()).collect::<Vec<_>>().join(","))
}

/// A day of the week as cron counts it: 0 to 7, where both are Sunday.
fn weekday(text: &str) -> Option<u8> {
    const NAMES: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];
    let named = NAMES.iter().zip(0..).find(|(name, _)| name.eq_ignore_ascii_case(text));
    named.map(|(_, day)| day).or_else(|| text.parse().ok().filter(|day| *day <= 7))
}
