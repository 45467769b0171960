//! What stays, as tables, and by properties against a plain re-computation.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use proptest::prelude::*;
use sts_backup_api::run::Consistency;

use super::*;

/// A complete point of that time, which is also its id.
fn point(time: &str) -> RecoveryPoint {
    RecoveryPoint {
        id: RunId::from(time.to_owned()),
        time: MicroTime(time.parse().unwrap()),
        complete: true,
        ready_volumes: 2,
        expected_volumes: 2,
        replicas: 2,
        consistency: Consistency::Application,
        size_bytes: 1,
        hold: false,
    }
}

/// The same with that many of its two volumes.
fn incomplete(time: &str, ready_volumes: i32) -> RecoveryPoint {
    RecoveryPoint { complete: false, ready_volumes, ..point(time) }
}

fn policy(change: impl FnOnce(&mut RetentionPolicy)) -> RetentionPolicy {
    let mut policy = RetentionPolicy::default();
    change(&mut policy);
    policy
}

fn central_europe() -> TimeZone {
    TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap()
}

/// What is said of each point: `+` before the reason it stays, `-` before the reason it goes.
fn said(policy: &RetentionPolicy, zone: &TimeZone, points: &[RecoveryPoint], now: &str) -> Vec<String> {
    judge(Some(policy), zone, points, &BTreeSet::new(), now.parse().unwrap())
        .into_iter()
        .map(|Verdict { keep, why }| format!("{}{why}", if keep { "+" } else { "-" }))
        .collect()
}

const NOT_COUNTED: &str = "-no rule keeps it";

#[test]
fn nothing_goes_without_a_rule() {
    let points =
        [point("2026-02-03T02:00:00Z"), point("2001-01-01T00:00:00Z"), incomplete("2001-01-01T00:00:00Z", 0)];
    let now = "2026-02-03T03:00:00Z".parse().unwrap();
    for policy in [None, Some(RetentionPolicy::default())] {
        for verdict in judge(policy.as_ref(), &TimeZone::UTC, &points, &BTreeSet::new(), now) {
            assert_eq!(verdict, Verdict { keep: true, why: Why::NoPolicy });
        }
    }
}

#[test]
fn the_rules_are_a_union_and_say_which_of_them_keep_a_point() {
    let policy = policy(|policy| {
        policy.keep_last = Some(2);
        policy.keep_days = Some(1);
        policy.keep_daily = Some(2);
    });
    let points = [
        point("2026-02-03T20:00:00Z"),
        point("2026-02-03T10:00:00Z"),
        point("2026-02-03T01:00:00Z"),
        point("2026-02-02T20:00:00Z"),
        point("2026-02-02T10:00:00Z"),
        point("2026-02-01T20:00:00Z"),
    ];
    assert_eq!(
        said(&policy, &TimeZone::UTC, &points, "2026-02-03T22:00:00Z"),
        [
            "+keepLast, keepDays, keepDaily",
            "+keepLast, keepDays",
            "+keepDays",
            "+keepDaily",
            NOT_COUNTED,
            NOT_COUNTED
        ]
    );
}

#[test]
fn a_day_of_keep_days_is_24_hours_and_over_when_they_are() {
    let policy = policy(|policy| policy.keep_days = Some(2));
    let points =
        [point("2026-02-03T02:00:00Z"), point("2026-02-01T02:00:00.000001Z"), point("2026-02-01T02:00:00Z")];
    assert_eq!(
        said(&policy, &TimeZone::UTC, &points, "2026-02-03T02:00:00Z"),
        ["+keepDays", "+keepDays", NOT_COUNTED]
    );
}

#[test]
fn the_newest_complete_point_stays_however_old_it_is() {
    let policy = policy(|policy| policy.keep_days = Some(1));
    let points = [
        incomplete("2026-02-01T00:00:00Z", 1),
        incomplete("2026-01-01T00:00:00Z", 1),
        point("2020-01-02T00:00:00Z"),
        point("2020-01-01T00:00:00Z"),
    ];
    assert_eq!(
        said(&policy, &TimeZone::UTC, &points, "2026-02-03T00:00:00Z"),
        [
            "+incomplete, and none is newer",
            "-incomplete, more than 24 h old",
            "+the newest complete one",
            NOT_COUNTED
        ]
    );
}

#[test]
fn periods_are_those_of_the_calendar_in_the_zone_and_empty_ones_do_not_count() {
    let daily = policy(|policy| policy.keep_daily = Some(2));
    // 23:30 UTC is the next day in Central Europe. The days between do not count.
    let points = [
        point("2026-02-09T23:30:00Z"),
        point("2026-02-09T22:30:00Z"),
        point("2026-02-02T23:30:00Z"),
        point("2026-02-02T22:30:00Z"),
    ];
    let now = "2026-02-10T12:00:00Z";
    assert_eq!(
        said(&daily, &TimeZone::UTC, &points, now),
        ["+keepDaily", NOT_COUNTED, "+keepDaily", NOT_COUNTED]
    );
    assert_eq!(
        said(&daily, &central_europe(), &points, now),
        ["+keepDaily", "+keepDaily", NOT_COUNTED, NOT_COUNTED]
    );
}

#[test]
fn a_week_begins_on_monday_and_may_be_of_two_years() {
    let weekly = policy(|policy| policy.keep_weekly = Some(2));
    // 2026-01-01 is a Thursday: its week began on Monday, 2025-12-29.
    let points = [
        point("2026-01-04T12:00:00Z"),
        point("2025-12-29T12:00:00Z"),
        point("2025-12-28T12:00:00Z"),
        point("2025-12-21T12:00:00Z"),
    ];
    assert_eq!(
        said(&weekly, &TimeZone::UTC, &points, "2026-01-05T00:00:00Z"),
        ["+keepWeekly", NOT_COUNTED, "+keepWeekly", NOT_COUNTED]
    );
}

#[test]
fn an_hour_that_the_clock_repeats_is_two_hours() {
    let hourly = policy(|policy| policy.keep_hourly = Some(3));
    // 02:30 CET, 02:30 CEST, 01:30 CEST, 00:30 CEST.
    let points = [
        point("2026-10-25T01:30:00Z"),
        point("2026-10-25T00:30:00Z"),
        point("2026-10-24T23:30:00Z"),
        point("2026-10-24T22:30:00Z"),
    ];
    assert_eq!(
        said(&hourly, &central_europe(), &points, "2026-10-25T02:00:00Z"),
        ["+keepHourly", "+keepHourly", "+keepHourly", NOT_COUNTED]
    );
}

#[test]
fn months_and_years_are_counted_by_the_newest_of_each() {
    let points = [
        point("2026-01-31T00:00:00Z"),
        point("2026-01-01T00:00:00Z"),
        point("2025-12-31T00:00:00Z"),
        point("2025-06-01T00:00:00Z"),
        point("2024-06-01T00:00:00Z"),
    ];
    let now = "2026-02-01T00:00:00Z";
    assert_eq!(
        said(&policy(|policy| policy.keep_monthly = Some(3)), &TimeZone::UTC, &points, now),
        ["+keepMonthly", NOT_COUNTED, "+keepMonthly", "+keepMonthly", NOT_COUNTED]
    );
    assert_eq!(
        said(&policy(|policy| policy.keep_yearly = Some(2)), &TimeZone::UTC, &points, now),
        ["+keepYearly", NOT_COUNTED, "+keepYearly", NOT_COUNTED, NOT_COUNTED]
    );
}

#[test]
fn an_incomplete_point_goes_after_a_day_or_when_a_newer_one_is_complete() {
    let policy = policy(|policy| policy.keep_last = Some(1));
    let points = [
        incomplete("2026-02-03T03:00:00Z", 0),
        point("2026-02-03T02:00:00Z"),
        incomplete("2026-02-03T01:00:00Z", 1),
    ];
    assert_eq!(
        said(&policy, &TimeZone::UTC, &points, "2026-02-04T02:59:59Z"),
        ["+incomplete, less than 24 h old", "+keepLast", "-incomplete, and a newer one is complete"]
    );
    assert_eq!(
        said(&policy, &TimeZone::UTC, &points, "2026-02-04T03:00:00Z"),
        ["-incomplete, more than 24 h old", "+keepLast", "-incomplete, and a newer one is complete"]
    );
}

#[test]
fn while_none_is_complete_the_newest_with_any_data_stays() {
    let policy = policy(|policy| policy.keep_last = Some(1));
    let points = [
        incomplete("2026-02-03T00:00:00Z", 0),
        incomplete("2026-02-02T00:00:00Z", 1),
        incomplete("2026-02-01T00:00:00Z", 2),
    ];
    assert_eq!(
        said(&policy, &TimeZone::UTC, &points, "2026-03-01T00:00:00Z"),
        [
            "-incomplete, more than 24 h old",
            "+incomplete, and none is newer",
            "-incomplete, more than 24 h old"
        ]
    );
}

#[test]
fn what_is_held_or_in_use_stays() {
    let policy = policy(|policy| policy.keep_last = Some(1));
    let mut points = [
        point("2026-02-03T00:00:00Z"),
        point("2026-02-02T00:00:00Z"),
        point("2026-02-01T00:00:00Z"),
        incomplete("2026-01-02T00:00:00Z", 1),
        incomplete("2026-01-01T00:00:00Z", 1),
    ];
    points[1].hold = true;
    points[3].hold = true;
    let in_use = [points[2].id.clone(), points[4].id.clone()].into();
    let now = "2026-03-01T00:00:00Z".parse().unwrap();
    let whys: Vec<_> = judge(Some(&policy), &TimeZone::UTC, &points, &in_use, now)
        .into_iter()
        .map(|verdict| verdict.why)
        .collect();
    assert_eq!(whys, [Why::KeptBy(vec![Rule::Last]), Why::OnHold, Why::InUse, Why::OnHold, Why::InUse]);
}

#[test]
fn a_point_made_by_a_clock_that_was_ahead_stays_and_takes_no_other_point_s_place() {
    let policy = policy(|policy| {
        policy.keep_last = Some(1);
        policy.keep_yearly = Some(1);
    });
    let points = [
        point("2030-01-01T00:00:00Z"),
        point("2029-01-01T00:00:00Z"),
        incomplete("2028-01-01T00:00:00Z", 1),
        incomplete("2026-02-03T01:00:00Z", 1),
        point("2026-02-03T00:00:00Z"),
        point("2026-02-02T00:00:00Z"),
    ];
    assert_eq!(
        said(&policy, &TimeZone::UTC, &points, "2026-02-03T02:00:00Z"),
        [
            "+its time is in the future",
            "+its time is in the future",
            "+its time is in the future",
            "+incomplete, less than 24 h old",
            "+keepLast, keepYearly",
            NOT_COUNTED
        ]
    );
    // In a word: an agent whose clock is right again prunes as if the others were not there.
    assert_eq!(
        said(&policy, &TimeZone::UTC, &points[3..], "2026-02-03T02:00:00Z"),
        said(&policy, &TimeZone::UTC, &points, "2026-02-03T02:00:00Z")[3..]
    );
}

/// The period of a rule by jiff's own formatting.
fn period(rule: Rule, zone: &TimeZone, time: Timestamp) -> String {
    let format = match rule {
        Rule::Hourly => "%Y-%m-%d %H %:z",
        Rule::Daily => "%Y-%m-%d",
        Rule::Weekly => "%G-W%V",
        Rule::Monthly => "%Y-%m",
        Rule::Yearly => "%Y",
        Rule::Last | Rule::Days => unreachable!("not a rule of periods"),
    };
    time.to_zoned(zone.clone()).strftime(format).to_string()
}

const COUNTING: [Rule; 6] =
    [Rule::Last, Rule::Hourly, Rule::Daily, Rule::Weekly, Rule::Monthly, Rule::Yearly];

fn count_of(policy: &RetentionPolicy, rule: Rule) -> Option<i32> {
    match rule {
        Rule::Last => policy.keep_last,
        Rule::Days => policy.keep_days,
        Rule::Hourly => policy.keep_hourly,
        Rule::Daily => policy.keep_daily,
        Rule::Weekly => policy.keep_weekly,
        Rule::Monthly => policy.keep_monthly,
        Rule::Yearly => policy.keep_yearly,
    }
}

/// What each rule keeps, computed from its definition: the newest point of each of the newest periods that have any.
fn plainly_kept(
    policy: &RetentionPolicy,
    zone: &TimeZone,
    points: &[RecoveryPoint],
    now: Timestamp,
) -> BTreeMap<String, Vec<RunId>> {
    let mut candidates: Vec<_> =
        points.iter().filter(|point| point.complete && point.time.0 <= now).collect();
    candidates.sort_by(|one, other| (one.time.0, &one.id).cmp(&(other.time.0, &other.id)));
    let mut kept = BTreeMap::new();
    for rule in COUNTING {
        let Some(count) = count_of(policy, rule) else { continue };
        let mut newest_of = BTreeMap::new();
        for &point in &candidates {
            let period =
                if rule == Rule::Last { point.id.to_string() } else { period(rule, zone, point.time.0) };
            newest_of.insert(period, point);
        }
        let mut newest: Vec<_> = newest_of.into_values().collect();
        newest.sort_by(|one, other| (one.time.0, &one.id).cmp(&(other.time.0, &other.id)));
        let first = newest.len().saturating_sub(usize::try_from(count).unwrap());
        kept.insert(rule.field().to_owned(), newest[first..].iter().map(|point| point.id.clone()).collect());
    }
    if let Some(days) = policy.keep_days {
        let limit = now.as_microsecond() - i64::from(days) * 86_400_000_000;
        let young = candidates.iter().filter(|point| point.time.0.as_microsecond() > limit);
        kept.insert(Rule::Days.field().to_owned(), young.map(|point| point.id.clone()).collect());
    }
    kept
}

/// A backup with its points, as the property tests meet it.
#[derive(Clone, Debug)]
struct Case {
    policy: RetentionPolicy,
    zone: TimeZone,
    points: Vec<RecoveryPoint>,
    in_use: BTreeSet<RunId>,
    now: Timestamp,
}

impl Case {
    fn judged(&self) -> BTreeMap<RunId, Verdict> {
        let verdicts = judge(Some(&self.policy), &self.zone, &self.points, &self.in_use, self.now);
        assert_eq!(verdicts.len(), self.points.len());
        self.points.iter().map(|point| point.id.clone()).zip(verdicts).collect()
    }

    fn stays(&self) -> BTreeSet<RunId> {
        self.judged().into_iter().filter(|(_, verdict)| verdict.keep).map(|(id, _)| id).collect()
    }

    fn has_rules(&self) -> bool {
        self.policy != RetentionPolicy::default()
    }
}

fn age(point: &RecoveryPoint) -> (Timestamp, &RunId) {
    (point.time.0, &point.id)
}

/// What must hold of any verdicts.
fn check(case: &Case) {
    let verdicts = case.judged();
    let stays = |point: &RecoveryPoint| verdicts[&point.id].keep;
    if !case.has_rules() {
        assert!(case.points.iter().all(stays), "something goes without a rule");
        return;
    }
    let present = |point: &&RecoveryPoint| point.time.0 <= case.now;
    let newest =
        case.points.iter().filter(present).filter(|point| point.complete).max_by_key(|point| age(point));
    assert!(newest.is_none_or(stays), "the newest complete point goes");
    let with_data = case.points.iter().filter(present).filter(|point| point.ready_volumes > 0);
    let best = with_data.max_by_key(|point| age(point));
    let kept = plainly_kept(&case.policy, &case.zone, &case.points, case.now);
    for point in &case.points {
        let Verdict { keep, why } = &verdicts[&point.id];
        let spared = point.hold || case.in_use.contains(&point.id) || point.time.0 > case.now;
        assert!(!spared || *keep, "{} must not go: {why}", point.id);
        let rules: Vec<_> =
            kept.iter().filter(|(_, ids)| ids.contains(&point.id)).map(|(rule, _)| rule.clone()).collect();
        if spared {
            continue;
        }
        if point.complete {
            let is_newest = newest.is_some_and(|newest| newest.id == point.id);
            assert_eq!(*keep, is_newest || !rules.is_empty(), "{}: {why}, {rules:?}", point.id);
        } else {
            assert!(rules.is_empty(), "a rule counts the incomplete {}", point.id);
            let superseded = newest.is_some_and(|newest| age(newest) > age(point));
            let is_old = case.now.as_microsecond() - point.time.0.as_microsecond() >= 86_400_000_000;
            let is_best = best.is_some_and(|best| best.id == point.id);
            assert_eq!(*keep, !superseded && (!is_old || is_best), "{}: {why}", point.id);
        }
        if let Why::KeptBy(said) = why {
            let mut said: Vec<_> = said.iter().map(|rule| rule.field().to_owned()).collect();
            said.sort();
            assert_eq!(said, rules, "{}", point.id);
        }
    }
    for (rule, ids) in kept {
        let count = ids.len();
        let said = verdicts
            .iter()
            .filter(|(_, verdict)| matches!(&verdict.why, Why::KeptBy(by) if by.iter().any(|by| by.field() == rule)))
            .count();
        assert!(said <= count, "{rule} keeps {said}, not {count}");
        assert!(ids.iter().all(|id| verdicts[id].keep), "{rule} is not honoured");
    }
}

/// Around New Year, the two changes of the clock in 2026 and a leap day: close together, far apart, and at one time.
fn time() -> impl Strategy<Value = Timestamp> {
    let around = prop_oneof![
        Just("2026-01-01T00:00:00Z"),
        Just("2026-03-29T01:00:00Z"),
        Just("2026-10-25T01:00:00Z"),
        Just("2024-02-29T12:00:00Z"),
    ];
    let away = prop_oneof![
        (-4_i64..5).prop_map(|quarters| quarters * 900),
        -86_400_i64..86_400,
        (-30_i64..30).prop_map(|days| days * 86_400),
        -100_000_000_i64..100_000_000,
    ];
    (around, away).prop_map(|(time, away)| {
        Timestamp::from_second(time.parse::<Timestamp>().unwrap().as_second() + away).unwrap()
    })
}

fn a_point() -> impl Strategy<Value = RecoveryPoint> {
    (time(), prop::bool::weighted(0.8), 0..2, prop::bool::weighted(0.1)).prop_map(
        |(time, complete, ready, hold)| RecoveryPoint {
            time: MicroTime(time),
            complete,
            ready_volumes: if complete { 2 } else { ready },
            hold,
            ..point("2026-01-01T00:00:00Z")
        },
    )
}

fn count() -> impl Strategy<Value = Option<i32>> {
    prop_oneof![3 => Just(None), 2 => (1..6).prop_map(Some), 1 => Just(Some(100_000))]
}

fn a_policy() -> impl Strategy<Value = RetentionPolicy> {
    (count(), count(), count(), count(), count(), count(), count()).prop_map(
        |(keep_last, keep_days, keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly)| {
            RetentionPolicy {
                keep_last,
                keep_days,
                keep_hourly,
                keep_daily,
                keep_weekly,
                keep_monthly,
                keep_yearly,
            }
        },
    )
}

fn a_zone() -> impl Strategy<Value = TimeZone> {
    let zones = [
        "UTC0",
        "CET-1CEST,M3.5.0,M10.5.0/3",
        // Half an hour of daylight saving, and a clock that is put back to the day before.
        "<+1030>-10:30<+11>-11,M10.1.0,M4.1.0",
        "NST3:30NDT,M3.2.0/0:01,M11.1.0/0:01",
    ];
    prop::sample::select(zones.to_vec()).prop_map(|zone| TimeZone::posix(zone).unwrap())
}

fn a_case() -> impl Strategy<Value = Case> {
    let points = prop::collection::vec((a_point(), prop::bool::weighted(0.1)), 0..25);
    (a_policy(), a_zone(), points, time(), any::<bool>()).prop_map(|(policy, zone, points, now, later)| {
        let mut in_use = BTreeSet::new();
        let mut named = Vec::new();
        for (at, (mut point, used)) in points.into_iter().enumerate() {
            // The ids sort otherwise than the times.
            point.id = RunId::from(format!("run-{}", at * 7 % 25));
            if used {
                in_use.insert(point.id.clone());
            }
            named.push(point);
        }
        // As a rule no point is of the future.
        let newest = named.iter().map(|point| point.time.0).max().filter(|_| later);
        let now = newest.map_or(now, |newest| newest.max(now));
        Case { policy, zone, points: named, in_use, now }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn what_stays_is_what_the_rules_say(case in a_case()) {
        check(&case);
    }

    #[test]
    fn the_order_of_the_points_does_not_matter(case in a_case(), seed in any::<prop::sample::Index>()) {
        let mut other = case.clone();
        other.points.reverse();
        if !other.points.is_empty() {
            let by = seed.index(other.points.len());
            other.points.rotate_left(by);
        }
        prop_assert_eq!(case.judged(), other.judged());
    }

    #[test]
    fn after_pruning_nothing_more_goes_and_the_reasons_are_the_same(case in a_case()) {
        let before = case.judged();
        let mut pruned = case.clone();
        pruned.points.retain(|point| before[&point.id].keep);
        let after = pruned.judged();
        for (id, verdict) in &after {
            prop_assert_eq!(verdict, &before[id]);
        }
        check(&pruned);
    }

    #[test]
    fn a_pruning_that_was_interrupted_is_only_finished(case in a_case(), gone in any::<u32>()) {
        let stays = case.stays();
        let mut rest = case.clone();
        let mut at = 0;
        rest.points.retain(|point| {
            at += 1;
            stays.contains(&point.id) || gone & (1 << (at % 32)) == 0
        });
        prop_assert_eq!(rest.stays(), stays);
    }

    #[test]
    fn another_point_or_more_time_never_brings_one_back(
        case in a_case(), another in a_point(), hours in 0_i64..1000,
    ) {
        let stays = case.stays();
        let mut more = case.clone();
        more.points.push(RecoveryPoint { id: RunId::from("another".to_owned()), ..another });
        for id in more.stays() {
            prop_assert!(id.as_str() == "another" || stays.contains(&id), "{} came back", id);
        }
        let mut later = case.clone();
        later.now = later.now.checked_add(SignedDuration::from_hours(hours)).unwrap();
        for id in later.stays() {
            prop_assert!(stays.contains(&id), "{} came back", id);
        }
    }

    #[test]
    fn a_hold_or_a_larger_rule_changes_nothing_to_the_worse(
        case in a_case(), at in any::<prop::sample::Index>(), larger in a_policy(),
    ) {
        let stays = case.stays();
        if !case.points.is_empty() {
            let mut held = case.clone();
            let at = at.index(held.points.len());
            held.points[at].hold = true;
            let mut expected = stays.clone();
            expected.insert(held.points[at].id.clone());
            prop_assert_eq!(held.stays(), expected);
        }
        if case.has_rules() {
            let more = |one: Option<i32>, other: Option<i32>| one.max(other);
            let mut generous = case.clone();
            generous.policy = RetentionPolicy {
                keep_last: more(case.policy.keep_last, larger.keep_last),
                keep_days: more(case.policy.keep_days, larger.keep_days),
                keep_hourly: more(case.policy.keep_hourly, larger.keep_hourly),
                keep_daily: more(case.policy.keep_daily, larger.keep_daily),
                keep_weekly: more(case.policy.keep_weekly, larger.keep_weekly),
                keep_monthly: more(case.policy.keep_monthly, larger.keep_monthly),
                keep_yearly: more(case.policy.keep_yearly, larger.keep_yearly),
            };
            prop_assert!(stays.is_subset(&generous.stays()));
        }
    }
}
