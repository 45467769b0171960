use std::str::FromStr;

use croner::Cron;
use croner::errors::CronError;
use jiff::Zoned;
use proptest::prelude::*;

use super::*;

fn at(time: &str) -> Timestamp {
    Timestamp::from_str(time).unwrap()
}

fn spec(schedule: &str, zone: &str) -> StatefulSetBackupSpec {
    StatefulSetBackupSpec {
        schedule: Some(schedule.to_owned()),
        time_zone: Some(zone.to_owned()),
        ..StatefulSetBackupSpec::new("db")
    }
}

fn timetable(schedule: &str, zone: &str) -> Timetable {
    Timetable::of(&spec(schedule, zone), "uid").unwrap().unwrap()
}

fn refusal(spec: &StatefulSetBackupSpec) -> String {
    Timetable::of(spec, "uid").unwrap_err().to_string()
}

/// The slots after `since` until `now`, oldest first, as the wall clock shows them.
fn slots(schedule: &str, zone: &str, since: &str, now: &str) -> Vec<String> {
    let timetable = timetable(schedule, zone);
    let slots = std::iter::successors(timetable.next(at(since).as_second()), |slot| timetable.next(*slot));
    slots
        .take_while(|slot| *slot <= at(now).as_second())
        .map(|slot| timestamp(slot).to_zoned(timetable.zone.clone()).strftime("%d %H:%M%:z").to_string())
        .collect()
}

#[test]
fn an_object_without_a_schedule_has_no_timetable() {
    assert!(Timetable::of(&StatefulSetBackupSpec::new("db"), "uid").unwrap().is_none());
    assert!(Timetable::of(&spec("", ""), "uid").unwrap().is_none());
}

#[test]
fn schedules_are_read_as_in_a_cronjob() {
    // 2026-01-01 is a Thursday.
    for (schedule, next) in [
        ("*/15 * * * *", "2026-01-01T00:15:00Z"),
        ("5/15 * * * *", "2026-01-01T00:05:00Z"),
        ("0 10-12/2 * * *", "2026-01-01T10:00:00Z"),
        ("7,9 3 * * *", "2026-01-01T03:07:00Z"),
        ("  30   2 * *  *  ", "2026-01-01T02:30:00Z"),
        ("0 0 ? * MON", "2026-01-05T00:00:00Z"),
        ("0 0 * FEB,mar *", "2026-02-01T00:00:00Z"),
        ("0 0 29 2 *", "2028-02-29T00:00:00Z"),
        // Sunday is 0, 7 and SUN; ranges end with any of them.
        ("0 0 * * 0", "2026-01-04T00:00:00Z"),
        ("0 0 * * 7", "2026-01-04T00:00:00Z"),
        ("0 0 * * sUN", "2026-01-04T00:00:00Z"),
        ("0 0 * * 6-7", "2026-01-03T00:00:00Z"),
        ("0 0 * * SAT-SUN", "2026-01-03T00:00:00Z"),
        ("0 0 * * 0-0", "2026-01-04T00:00:00Z"),
        ("0 0 * * 1-5", "2026-01-02T00:00:00Z"),
        ("0 0 * * 1-3", "2026-01-05T00:00:00Z"),
        ("0 0 * * */3", "2026-01-03T00:00:00Z"),
        ("0 0 * * 5/1", "2026-01-02T00:00:00Z"),
        // Either day field will do, if both say something.
        ("0 0 20 * MON", "2026-01-05T00:00:00Z"),
        ("0 0 2 * MON", "2026-01-02T00:00:00Z"),
        ("@hourly", "2026-01-01T01:00:00Z"),
        ("@daily", "2026-01-02T00:00:00Z"),
        ("@midnight", "2026-01-02T00:00:00Z"),
        ("@weekly", "2026-01-04T00:00:00Z"),
        ("@monthly", "2026-02-01T00:00:00Z"),
        ("@yearly", "2027-01-01T00:00:00Z"),
        ("@annually", "2027-01-01T00:00:00Z"),
    ] {
        let start = at("2026-01-01T00:00:00Z");
        assert_eq!(timetable(schedule, "").look(start, start).next, Some(at(next)), "{schedule}");
    }
}

#[test]
fn a_run_begins_after_a_time_at_the_next_slot_and_the_offset() {
    let office_hours = timetable("0 9 * * 1-5", "Europe/Berlin");
    // 2026-03-27 is a Friday, and clocks change on Sunday.
    let friday = at("2026-03-27T08:00:00Z");
    assert_eq!(office_hours.after(at("2026-03-27T07:59:59Z")), Some(friday));
    let monday = office_hours.after(friday).unwrap();
    assert_eq!(monday, at("2026-03-30T07:00:00Z"));
    assert_eq!(office_hours.after(monday), Some(at("2026-03-31T07:00:00Z")));

    let late = Timetable { offset: 600, ..timetable("@hourly", "") };
    let first = at("2026-01-01T00:10:00Z");
    assert_eq!(late.after(at("2026-01-01T00:09:59Z")), Some(first));
    assert_eq!(late.after(first), Some(at("2026-01-01T01:10:00Z")));
}

#[test]
fn what_cannot_be_read_is_refused_with_what_to_write_instead() {
    for (schedule, reason) in [
        (
            "0 0 * * * *",
            "it has 6 fields, not 5; write minute, hour, day of the month, month and day of the week: no seconds, no year",
        ),
        (
            "0 0 * *",
            "it has 4 fields, not 5; write minute, hour, day of the month, month and day of the week",
        ),
        ("   ", "it has 0 fields, not 5; write minute"),
        ("@every 1h", "@every has no fixed times; write five fields, such as */30 * * * *"),
        ("@reboot", "it is no known name; write five fields, or one of @hourly, @daily"),
        (
            "TZ=Europe/Paris 0 0 * * *",
            "a time zone in it is not read; write only the five fields here, and timeZone: Europe/Paris",
        ),
        (
            "CRON_TZ=UTC 0 0 * * *",
            "a time zone in it is not read; write only the five fields here, and timeZone: UTC",
        ),
        ("60 0 * * *", "\"60\" is no minute; write * or values of 0-59, such as"),
        ("0 24 * * *", "\"24\" is no hour;"),
        ("0 0 0 * *", "\"0\" is no day of the month;"),
        ("0 0 * 13 *", "\"13\" is no month;"),
        ("0 0 * * 8", "\"8\" is no day of the week;"),
        ("0 0 * * MO", "\"MO\" is no day of the week;"),
        ("0 0 * * 5-1", "\"5-1\" is no day of the week;"),
        ("0 0 * * MON#1", "\"MON#1\" is no day of the week;"),
        ("0 0 L * *", "\"L\" is no day of the month;"),
        ("*/0 * * * *", "\"*/0\" is no minute;"),
        ("*/60 * * * *", "\"*/60\" is no minute;"),
        ("1* * * * *", "\"1*\" is no minute;"),
        ("1,,2 * * * *", "\"1,,2\" is no minute;"),
        ("5-1 * * * *", "\"5-1\" is no minute;"),
        ("? * * * *", "\"?\" is no minute;"),
        ("0 0 * * 99999999999", "\"99999999999\" is no day of the week;"),
        ("0 0 30 2 *", "it never fires, as no month in it has such a day; write a day that exists"),
    ] {
        let refusal = refusal(&spec(schedule, ""));
        assert!(refusal.starts_with(&format!("schedule {:?}: {reason}", schedule.trim())), "{refusal}");
    }
}

#[test]
fn a_day_that_no_month_has_does_no_harm_beside_a_day_of_the_week() {
    let start = at("2026-01-01T00:00:00Z");
    let look = timetable("0 0 30 2 MON", "").look(start, start);
    assert_eq!(look.next, Some(at("2026-02-02T00:00:00Z")));
}

#[test]
fn time_zones_are_those_of_the_iana_database() {
    assert_eq!(time_zone(None).unwrap(), TimeZone::UTC);
    assert_eq!(time_zone(Some("")).unwrap(), TimeZone::UTC);
    assert_eq!(time_zone(Some("Europe/Berlin")).unwrap().iana_name(), Some("Europe/Berlin"));
    for name in ["Local", "local", "Europe/Atlantis", "Etc/Unknown", "+02:00", "CET-1CEST", " "] {
        let refusal = refusal(&spec("@daily", name));
        assert!(
            refusal.starts_with(&format!("timeZone {name:?}: the IANA database has no such")),
            "{refusal}"
        );
    }
}

#[test]
fn a_time_of_day_runs_once_a_day_when_clocks_change() {
    // Berlin leaps from 02:00 to 03:00 on 29 March 2026, and shows 02:00 to 03:00 twice on 25 October.
    let berlin = |schedule, since, now| slots(schedule, "Europe/Berlin", since, now);
    let (spring, summer) = ("2026-03-28T12:00:00Z", "2026-03-30T12:00:00Z");
    assert_eq!(berlin("30 2 * * *", spring, summer), ["29 03:00+02:00", "30 02:30+02:00"]);
    assert_eq!(berlin("0 3 * * *", spring, summer), ["29 03:00+02:00", "30 03:00+02:00"]);
    // Two times that become one are one.
    assert_eq!(
        berlin("15,45 2 * * *", spring, summer),
        ["29 03:00+02:00", "30 02:15+02:00", "30 02:45+02:00"]
    );
    assert_eq!(berlin("0 2,3 * * *", spring, summer), ["29 03:00+02:00", "30 02:00+02:00", "30 03:00+02:00"]);

    let (autumn, winter) = ("2026-10-24T12:00:00Z", "2026-10-26T12:00:00Z");
    assert_eq!(berlin("30 2 * * *", autumn, winter), ["25 02:30+02:00", "26 02:30+01:00"]);
    assert_eq!(berlin("0 3 * * *", autumn, winter), ["25 03:00+01:00", "26 03:00+01:00"]);
    assert_eq!(
        berlin("59 1,2 * * *", autumn, winter),
        ["25 01:59+02:00", "25 02:59+02:00", "26 01:59+01:00", "26 02:59+01:00"]
    );
}

#[test]
fn every_time_that_the_clock_shows_runs_when_clocks_change() {
    let berlin = |schedule, since, now| slots(schedule, "Europe/Berlin", since, now);
    assert_eq!(
        berlin("*/30 * * * *", "2026-03-29T00:00:00Z", "2026-03-29T01:30:00Z"),
        ["29 01:30+01:00", "29 03:00+02:00", "29 03:30+02:00"]
    );
    assert_eq!(
        berlin("0 * * * *", "2026-10-24T23:00:00Z", "2026-10-25T02:00:00Z"),
        ["25 02:00+02:00", "25 02:00+01:00", "25 03:00+01:00"]
    );
    assert_eq!(
        berlin("*/30 2 * * *", "2026-10-24T23:00:00Z", "2026-10-25T02:00:00Z"),
        ["25 02:00+02:00", "25 02:30+02:00", "25 02:00+01:00", "25 02:30+01:00"]
    );
    assert!(berlin("*/30 2 * * *", "2026-03-29T00:00:00Z", "2026-03-29T20:00:00Z").is_empty());
}

#[test]
fn a_day_that_a_zone_leapt_over_runs_at_the_end_of_the_leap() {
    // Samoa had no 30 December 2011; Brazil's clocks leapt at midnight.
    let (since, now) = ("2011-12-30T08:00:00Z", "2011-12-31T09:00:00Z");
    assert_eq!(slots("0 12 * * *", "Pacific/Apia", since, now), ["31 00:00+14:00", "31 12:00+14:00"]);
    assert_eq!(slots("0 12 30 12 *", "Pacific/Apia", since, now), ["31 00:00+14:00"]);
    assert_eq!(slots("0 * 30 12 *", "Pacific/Apia", since, now), Vec::<String>::new());
    assert_eq!(
        slots("0 0 * * *", "America/Sao_Paulo", "2018-11-03T12:00:00Z", "2018-11-05T12:00:00Z"),
        ["04 01:00-02:00", "05 00:00-02:00"]
    );
}

#[test]
fn the_newest_passed_slot_is_due_once_and_older_ones_are_missed() {
    let daily = timetable("0 2 * * *", "");
    let since = at("2026-01-01T02:00:00Z");
    let look = |now| daily.look(since, at(now));
    let nothing = Look { due: None, missed: 0, latest: None, next: Some(at("2026-01-02T02:00:00Z")) };
    assert_eq!(daily.look(since, since), nothing);
    assert_eq!(look("2026-01-02T01:59:59.9Z"), nothing);

    let first = Some(at("2026-01-02T02:00:00Z"));
    let second = Some(at("2026-01-03T02:00:00Z"));
    assert_eq!(look("2026-01-02T02:00:00Z"), Look { due: first, missed: 0, latest: first, next: second });
    // By default a run may be late by half the time to the next one.
    assert_eq!(look("2026-01-02T14:00:00Z"), Look { due: first, missed: 0, latest: first, next: second });
    assert_eq!(look("2026-01-02T14:00:01Z"), Look { due: None, missed: 1, latest: first, next: second });

    let third = Some(at("2026-01-04T02:00:00Z"));
    assert_eq!(look("2026-01-03T03:00:00Z"), Look { due: second, missed: 1, latest: second, next: third });
    assert_eq!(look("2026-01-03T23:00:00Z"), Look { due: None, missed: 2, latest: second, next: third });
    // Nothing is due again once it was begun.
    let done = daily.look(at("2026-01-03T02:00:00Z"), at("2026-01-03T03:00:00Z"));
    assert_eq!(done, Look { due: None, missed: 0, latest: None, next: third });
}

#[test]
fn a_run_is_late_by_what_the_user_admits_or_by_a_hundred_seconds_at_least() {
    let look = |schedule: &str, deadline, now| {
        let spec = StatefulSetBackupSpec { starting_deadline_seconds: deadline, ..spec(schedule, "") };
        let timetable = Timetable::of(&spec, "uid").unwrap().unwrap();
        timetable.look(at("2026-01-01T00:00:00Z"), at(now)).due.is_some()
    };
    assert!(look("@daily", Some(10), "2026-01-02T00:00:10Z"));
    assert!(!look("@daily", Some(10), "2026-01-02T00:00:11Z"));
    assert!(look("@daily", Some(80_000), "2026-01-02T22:00:00Z"));
    assert!(look("0,2 1 * * *", None, "2026-01-01T01:01:40Z"));
    assert!(!look("0,4 1 * * *", None, "2026-01-01T01:02:01Z"));
    assert!(look("0,4 1 * * *", None, "2026-01-01T01:02:00Z"));
}

#[test]
fn a_clock_that_was_put_back_brings_no_slot_again() {
    let since = at("2026-01-05T02:00:00Z");
    let look = timetable("0 2 * * *", "").look(since, at("2026-01-03T02:00:00Z"));
    assert_eq!(look, Look { due: None, missed: 0, latest: None, next: Some(at("2026-01-06T02:00:00Z")) });
}

#[test]
fn an_agent_that_was_away_for_years_counts_up_to_a_bound() {
    let minutely = timetable("* * * * *", "Europe/Berlin");
    let look = minutely.look(at("2020-01-01T00:00:00Z"), at("2026-01-01T00:00:00Z"));
    let latest = Some(at("2026-01-01T00:00:00Z"));
    assert_eq!(look, Look { due: latest, missed: 9_999, latest, next: Some(at("2026-01-01T00:01:00Z")) });
}

#[test]
fn a_schedule_ends_with_the_century() {
    let start = at("2100-12-31T00:00:00Z");
    let look = timetable("@daily", "").look(start, at("2101-01-01T00:00:00Z"));
    assert_eq!(look, Look { due: None, missed: 0, latest: None, next: None });
    assert_eq!(timetable("@daily", "").interval(start), None);
}

#[test]
fn no_time_is_too_early_or_too_late_to_look_at() {
    for schedule in ["*/5 1 * * *", "5 1 * * *"] {
        let timetable = timetable(schedule, "America/New_York");
        assert_eq!(timetable.look(Timestamp::MIN, Timestamp::MIN).latest, None);
        assert_eq!(timetable.look(Timestamp::MAX, Timestamp::MAX).next, None);
        assert_eq!(timetable.look(Timestamp::MIN, Timestamp::MAX).due, None);
    }
}

#[test]
fn the_interval_is_that_after_the_next_run() {
    let interval = |schedule, now| timetable(schedule, "Europe/Berlin").interval(at(now)).unwrap().as_secs();
    assert_eq!(interval("0 2 * * *", "2026-01-01T00:00:00Z"), 86_400);
    assert_eq!(interval("0 12 * * *", "2026-03-28T00:00:00Z"), 82_800);
    assert_eq!(interval("0 0 * * 1-5", "2026-01-01T12:00:00Z"), 3 * 86_400);
}

#[test]
fn a_spread_moves_the_beginning_and_not_the_slot() {
    let spread = |spread: &str, uid: &str| {
        let spec = StatefulSetBackupSpec { spread: Some(spread.parse().unwrap()), ..spec("0 2 * * *", "") };
        Timetable::of(&spec, uid).unwrap().unwrap()
    };
    let slot = at("2026-01-02T02:00:00Z");
    let since = at("2026-01-01T02:00:00Z");
    let timetable = spread("1h", "5b1a8b2c-0f4e-4f0e-9d2c-6f6a1a2b3c4d");
    let begin = timetable.look(since, since).next.unwrap();
    let delay = begin.as_second() - slot.as_second();
    // It follows from the uid: a value that changes moves every run there is.
    assert_eq!(delay, 637);
    assert_eq!(timetable.look(since, timestamp(begin.as_second() - 1)).latest, None);
    let look = timetable.look(since, begin);
    assert_eq!((look.due, look.latest, look.missed), (Some(slot), Some(slot), 0));
    // The deadline counts from the beginning.
    assert_eq!(timetable.look(since, timestamp(begin.as_second() + 43_200)).due, Some(slot));
    assert_eq!(timetable.look(since, timestamp(begin.as_second() + 43_201)).due, None);

    let offsets: Vec<_> =
        (0..1000).map(|uid: i32| offset(Duration::from_mins(10), &uid.to_string())).collect();
    assert!(offsets.iter().all(|offset| (0..600).contains(offset)));
    for minute in 0..10 {
        let count = offsets.iter().filter(|offset| **offset / 60 == minute).count();
        assert!((50..150).contains(&count), "{count} of 1000 begin in minute {minute}");
    }
    assert_eq!(spread("0s", "uid").offset, 0);
}

#[test]
fn a_spread_is_smaller_than_the_time_between_runs() {
    let with = |schedule: &str, spread: &str| StatefulSetBackupSpec {
        spread: Some(spread.parse().unwrap()),
        ..spec(schedule, "")
    };
    for (schedule, gap) in [
        ("* * * * *", 60),
        ("*/15 * * * *", 900),
        ("0,59 * * * *", 60),
        ("0 0,23 * * *", 3600),
        ("0 0,23 * * 1-5", 3600),
        ("0 2 * * *", 86_400),
        ("0 0 1 * *", 28 * 86_400),
        ("0 0 1,31 * *", 86_400),
        ("0 0 29 2 *", 4 * 365 * 86_400 + 86_400),
        ("0 0 15 * MON", 86_400),
    ] {
        assert!(Timetable::of(&with(schedule, &format!("{}s", gap - 1)), "uid").is_ok(), "{schedule}");
        let refusal = refusal(&with(schedule, &format!("{gap}s")));
        let reason = format!(
            "spread {gap}s: it is not smaller than the smallest time between runs of schedule {schedule:?}, {gap}s; write less than {gap}s"
        );
        assert_eq!(refusal, reason);
    }
}

/// Zones with leaps of half an hour, of an hour, of a day, at midnight, and without any.
const TRIED_ZONES: [&str; 8] = [
    "Europe/Berlin",
    "America/New_York",
    "Australia/Lord_Howe",
    "Asia/Kolkata",
    "America/Sao_Paulo",
    "Pacific/Apia",
    "Africa/Cairo",
    "UTC",
];

/// What one field says, and its values if it says no `*`.
type Said = (String, Option<Vec<u8>>);

fn said(values: std::ops::Range<u8>) -> impl Strategy<Value = Said> {
    prop_oneof![
        Just(("*".to_owned(), None)),
        prop::sample::select(vec![2, 3, 5, 6, 15]).prop_map(|step| (format!("*/{step}"), None)),
        values.clone().prop_map(|value| (value.to_string(), Some(vec![value]))),
        prop::collection::vec(values, 2..4).prop_map(|values| {
            let text = values.iter().map(u8::to_string).collect::<Vec<_>>().join(",");
            (text, Some(values))
        }),
    ]
}

fn days() -> impl Strategy<Value = String> {
    let day = prop::sample::select(vec!["*", "*", "*", "1-7", "25-31", "30", "29,30", "*/2", "4"]);
    let month = prop::sample::select(vec!["*", "*", "3,4,10", "OCT-DEC", "*/2"]);
    let weekday =
        prop::sample::select(vec!["*", "*", "0", "7", "SUN", "sat-sun", "1-5", "*/3", "MON,6", "5-7"]);
    (day, month, weekday).prop_map(|(day, month, weekday)| format!("{day} {month} {weekday}"))
}

/// An instant within three days of a change of the zone's clocks, if they ever changed.
fn near_a_change() -> impl Strategy<Value = Zoned> {
    let off = -3 * 86_400..3 * 86_400_i64;
    (prop::sample::select(TRIED_ZONES.to_vec()), 0..40_usize, off, any::<bool>()).prop_map(
        |(zone, change, off, whole)| {
            let zone = time_zone(Some(zone)).unwrap();
            let from = at("2004-01-01T00:00:00Z");
            let change = zone.following(from).nth(change).map_or(from, |change| change.timestamp());
            let off = if whole { off / 1800 * 1800 } else { off };
            timestamp(change.as_second() + off).to_zoned(zone)
        },
    )
}

/// The same schedule for croner: its times of day each alone, as it takes two of them for a `*`.
fn oracles((minute, minutes): &Said, (hour, hours): &Said, days: &str) -> Vec<Cron> {
    let each = match (minutes, hours) {
        (Some(minutes), Some(hours)) => hours
            .iter()
            .flat_map(|hour| minutes.iter().map(move |minute| format!("{minute} {hour} {days}")))
            .collect(),
        (None, _) | (_, None) => vec![format!("{minute} {hour} {days}")],
    };
    each.iter().map(|text| Cron::from_str(text).unwrap()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn slots_are_those_of_another_implementation(
        minute in said(0..60), hour in said(0..4), days in days(), now in near_a_change(),
    ) {
        let schedule = format!("{} {} {days}", minute.0, hour.0);
        let timetable = timetable(&schedule, now.time_zone().iana_name().unwrap());
        let oracles = oracles(&minute, &hour, &days);
        let found = |cron: &Cron| match cron.find_next_occurrence(&now, false) {
            Ok(found) => found.timestamp(),
            // It gives up in the day that Samoa leapt over, whose end this is.
            Err(error) => {
                assert!(matches!(error, CronError::TimeSearchLimitExceeded), "{error}");
                at("2011-12-30T10:00:00Z")
            }
        };
        let expected = oracles.iter().map(found).min();
        prop_assert_eq!(timetable.next(now.timestamp().as_second()).map(timestamp), expected, "next of {}", schedule);
    }

    #[test]
    fn looking_back_finds_what_looking_ahead_found(
        minute in said(0..60), hour in said(0..4), days in days(), now in near_a_change(),
    ) {
        let schedule = format!("{} {} {days}", minute.0, hour.0);
        let timetable = timetable(&schedule, now.time_zone().iana_name().unwrap());
        let now = now.timestamp().as_second();
        let next = timetable.next(now).unwrap();
        prop_assert!(next > now);
        prop_assert_eq!(timetable.previous(next), Some(next));
        let before = timetable.previous(next - 1);
        prop_assert!(before.is_none_or(|before| before <= now), "{:?} is between {} and {}", before, now, next);
        if let Some(before) = before {
            prop_assert_eq!(timetable.next(before), Some(next));
        }
    }
}
