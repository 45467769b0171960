//! Which recovery points stay. Pure: no client, no clock; it deletes nothing.
//!
//! A complete point stays if any rule of the retentionPolicy keeps it, if somebody holds or uses it, or if it is the
//! newest. An incomplete one, which a failed or partial run left, stays for a day or until a newer point is complete, and
//! for longer while no point is newer.
//! Without a retentionPolicy, or with an empty one, nothing is ever pruned, not even what a failed run left.
//!
//! A point whose time is still to come was made before the agent's clock was set back. It is no newer than the others,
//! however it looks: it stays, and takes no other point's place. So whatever a wrong clock wrote, the rules go by the
//! points that are older than now.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::fmt::{self, Display, Formatter};

use jiff::civil::DateTime;
use jiff::tz::{Offset, TimeZone};
use jiff::{SignedDuration, Timestamp};
use sts_backup_api::backup::RetentionPolicy;
use sts_backup_api::run::{RecoveryPoint, RunId};

const DAY: SignedDuration = SignedDuration::from_hours(24);

/// Whether a recovery point stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) keep: bool,
    pub(crate) why: Why,
}

/// What decided, the strongest reason first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// It stays: there is no rule to prune by.
    NoPolicy,
    /// It stays: one of its snapshots has the label that says so.
    OnHold,
    /// It stays: a volume is being made from it.
    InUse,
    /// It stays: the clock that its time is from was ahead.
    InTheFuture,
    /// It stays: these rules count it.
    KeptBy(Vec<Rule>),
    /// It stays: no complete point is newer.
    NewestComplete,
    /// It stays: incomplete, but no point with any data is newer.
    BestThereIs,
    /// It stays for the present: incomplete and not a day old.
    StillRecent,
    /// It goes: complete, and no rule counts it.
    NotCounted,
    /// It goes: incomplete, and a newer one is complete.
    Superseded,
    /// It goes: incomplete for a day.
    Incomplete,
}

impl From<Why> for Verdict {
    fn from(why: Why) -> Self {
        let keep = match why {
            Why::NoPolicy
            | Why::OnHold
            | Why::InUse
            | Why::InTheFuture
            | Why::KeptBy(_)
            | Why::NewestComplete
            | Why::BestThereIs
            | Why::StillRecent => true,
            Why::NotCounted | Why::Superseded | Why::Incomplete => false,
        };
        Self { keep, why }
    }
}

impl Display for Why {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::NoPolicy => "no retentionPolicy: nothing is ever pruned",
            Self::OnHold => "on hold",
            Self::InUse => "a volume is being made from it",
            Self::InTheFuture => "its time is in the future",
            Self::KeptBy(rules) => {
                let names: Vec<_> = rules.iter().map(|rule| rule.field()).collect();
                return formatter.write_str(&names.join(", "));
            }
            Self::NewestComplete => "the newest complete one",
            Self::BestThereIs => "incomplete, and none is newer",
            Self::StillRecent => "incomplete, less than 24 h old",
            Self::NotCounted => "no rule keeps it",
            Self::Superseded => "incomplete, and a newer one is complete",
            Self::Incomplete => "incomplete, more than 24 h old",
        })
    }
}

/// A rule of a retentionPolicy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    Last,
    Days,
    Hourly,
    Daily,
    Weekly,
    Monthly,
    Yearly,
}

impl Rule {
    /// The field of the retentionPolicy.
    fn field(self) -> &'static str {
        match self {
            Self::Last => "keepLast",
            Self::Days => "keepDays",
            Self::Hourly => "keepHourly",
            Self::Daily => "keepDaily",
            Self::Weekly => "keepWeekly",
            Self::Monthly => "keepMonthly",
            Self::Yearly => "keepYearly",
        }
    }
}

/// One verdict for each of the points, in their order, which does not matter. `in_use` are the points that a volume is
/// being made from; the point of a run that is under way must not be among `points`.
pub(crate) fn judge(
    policy: Option<&RetentionPolicy>,
    zone: &TimeZone,
    points: &[RecoveryPoint],
    in_use: &BTreeSet<RunId>,
    now: Timestamp,
) -> Vec<Verdict> {
    let Some(policy) = policy.filter(|policy| **policy != RetentionPolicy::default()) else {
        return points.iter().map(|_| Why::NoPolicy.into()).collect();
    };
    // Newest first; as the points of a status are ordered.
    let mut order: Vec<usize> = (0..points.len()).filter(|&at| points[at].time.0 <= now).collect();
    order.sort_by_key(|&at| Reverse(age_key(&points[at])));
    let complete: Vec<usize> = order.iter().copied().filter(|&at| points[at].complete).collect();
    let newest_complete = complete.first().map(|&at| &points[at]);
    // The newest data of a backup does not go because it could be better.
    let best_incomplete = order.iter().map(|&at| &points[at]).find(|point| point.ready_volumes > 0);
    let kept_by = kept_by(policy, zone, points, &complete, now);

    let why = |(point, rules): (&RecoveryPoint, Vec<Rule>)| {
        if point.hold {
            Why::OnHold
        } else if in_use.contains(&point.id) {
            Why::InUse
        } else if point.time.0 > now {
            Why::InTheFuture
        } else if !rules.is_empty() {
            Why::KeptBy(rules)
        } else if point.complete {
            let is_newest = newest_complete.is_some_and(|newest| newest.id == point.id);
            if is_newest { Why::NewestComplete } else { Why::NotCounted }
        } else if newest_complete.is_some_and(|newest| age_key(newest) > age_key(point)) {
            Why::Superseded
        } else if now.duration_since(point.time.0) < DAY {
            Why::StillRecent
        } else if best_incomplete.is_some_and(|best| best.id == point.id) {
            Why::BestThereIs
        } else {
            Why::Incomplete
        }
    };
    points.iter().zip(kept_by).map(|judged| why(judged).into()).collect()
}

/// Greater means newer.
fn age_key(point: &RecoveryPoint) -> (Timestamp, &RunId) {
    (point.time.0, &point.id)
}

/// The rules that count each of the points; `complete` are the places of those that can be counted, newest first.
fn kept_by(
    policy: &RetentionPolicy,
    zone: &TimeZone,
    points: &[RecoveryPoint],
    complete: &[usize],
    now: Timestamp,
) -> Vec<Vec<Rule>> {
    let mut kept_by = vec![Vec::new(); points.len()];
    for &at in complete.iter().take(quota(policy.keep_last)) {
        kept_by[at].push(Rule::Last);
    }
    if let Some(days) = policy.keep_days {
        let is_young = |point: &RecoveryPoint| now.duration_since(point.time.0) < DAY * days;
        for &at in complete.iter().filter(|&&at| is_young(&points[at])) {
            kept_by[at].push(Rule::Days);
        }
    }
    let periods: [(Rule, Option<i32>, PeriodOf); 5] = [
        (Rule::Hourly, policy.keep_hourly, hour),
        (Rule::Daily, policy.keep_daily, day),
        (Rule::Weekly, policy.keep_weekly, week),
        (Rule::Monthly, policy.keep_monthly, month),
        (Rule::Yearly, policy.keep_yearly, year),
    ];
    for (rule, count, period) in periods {
        let quota = quota(count);
        let mut seen = BTreeSet::new();
        for &at in complete {
            if seen.len() == quota {
                break;
            }
            let offset = zone.to_offset(points[at].time.0);
            if seen.insert(period(offset.to_datetime(points[at].time.0), offset)) {
                kept_by[at].push(rule);
            }
        }
    }
    kept_by
}

/// How many points a rule keeps; the schema admits no negative ones.
fn quota(count: Option<i32>) -> usize {
    count.and_then(|count| usize::try_from(count).ok()).unwrap_or(0)
}

/// Tells the periods of one rule apart: year, month or week, day, hour, and the hour's offset in seconds.
type Period = (i16, i8, i8, i8, i32);

/// The period that a time of a zone's clock is in.
type PeriodOf = fn(DateTime, Offset) -> Period;

fn hour(local: DateTime, offset: Offset) -> Period {
    // The hour that a clock repeats in autumn is two hours.
    (local.year(), local.month(), local.day(), local.hour(), offset.seconds())
}

fn day(local: DateTime, _: Offset) -> Period {
    (local.year(), local.month(), local.day(), 0, 0)
}

fn week(local: DateTime, _: Offset) -> Period {
    // The days around New Year are of a week that can be of the other year.
    let date = local.iso_week_date();
    (date.year(), date.week(), 0, 0, 0)
}

fn month(local: DateTime, _: Offset) -> Period {
    (local.year(), local.month(), 0, 0, 0)
}

fn year(local: DateTime, _: Offset) -> Period {
    (local.year(), 0, 0, 0, 0)
}

#[cfg(test)]
#[path = "retention_tests.rs"]
mod tests;
