//! When a backup's runs are due and what becomes of their points, in words. Pure.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use sts_backup_api::backup::{RetentionPolicy, StatefulSetBackup, StatefulSetBackupSpec};

use sts_backup_service::table::{age, second};

/// How long until then, as kubectl writes ages.
pub(super) fn until(at: Timestamp, now: Timestamp) -> String {
    if at > now { format!("in {}", age(now, at)) } else { "now".to_owned() }
}

/// The moment to the second, and how long until then.
pub(super) fn coming(at: Timestamp, now: Timestamp) -> String {
    format!("{} ({})", second(at), until(at, now))
}

/// The schedule, if there is one.
pub(super) fn schedule(spec: &StatefulSetBackupSpec) -> Option<&str> {
    spec.schedule.as_deref().filter(|schedule| !schedule.is_empty())
}

/// The time zone of schedule and retention.
pub(super) fn zone(spec: &StatefulSetBackupSpec) -> &str {
    spec.time_zone.as_deref().filter(|zone| !zone.is_empty()).unwrap_or("UTC")
}

/// All about the times of runs, in one line.
pub(super) fn schedule_line(spec: &StatefulSetBackupSpec) -> String {
    let Some(schedule) = schedule(spec) else {
        return "none: one run at creation, others when they are asked for".to_owned();
    };
    let mut line = format!("{schedule} ({}", zone(spec));
    let spread = spec.spread.and_then(|spread| SignedDuration::try_from(Duration::from(spread)).ok());
    if let Some(spread) = spread.filter(|spread| !spread.is_zero()) {
        line = format!("{line}, within {spread:#} of it");
    }
    if let Some(seconds) = spec.starting_deadline_seconds {
        line = format!("{line}, at most {:#} late", SignedDuration::from_secs(seconds));
    }
    format!("{line})")
}

/// When the next run begins by itself, in a line.
pub(super) fn next_line(backup: &StatefulSetBackup, now: Timestamp) -> String {
    let next = backup.status.as_ref().and_then(|status| status.next_schedule_time.as_ref());
    if backup.spec.suspend {
        "none: suspended".to_owned()
    } else if schedule(&backup.spec).is_none() {
        "none: no schedule".to_owned()
    } else {
        next.map_or("not known: the agent has not said".to_owned(), |next| coming(next.0, now))
    }
}

/// When the next run begins by itself, in a word.
pub(super) fn next_word(backup: &StatefulSetBackup, now: Timestamp) -> String {
    let next = backup.status.as_ref().and_then(|status| status.next_schedule_time.as_ref());
    match next {
        _ if backup.spec.suspend => "suspended".to_owned(),
        Some(next) => until(next.0, now),
        None => "-".to_owned(),
    }
}

/// The rules of a retentionPolicy, as its fields are written.
pub(super) fn retention_line(policy: Option<&RetentionPolicy>) -> String {
    let RetentionPolicy {
        keep_last,
        keep_days,
        keep_hourly,
        keep_daily,
        keep_weekly,
        keep_monthly,
        keep_yearly,
    } = policy.copied().unwrap_or_default();
    let rules = [
        ("keepLast", keep_last),
        ("keepDays", keep_days),
        ("keepHourly", keep_hourly),
        ("keepDaily", keep_daily),
        ("keepWeekly", keep_weekly),
        ("keepMonthly", keep_monthly),
        ("keepYearly", keep_yearly),
    ];
    let said: Vec<_> =
        rules.into_iter().filter_map(|(rule, count)| Some(format!("{rule} {}", count?))).collect();
    if said.is_empty() { "none: nothing is ever pruned".to_owned() } else { said.join(", ") }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn backup(spec: &Value, next: Option<&str>) -> StatefulSetBackup {
        let mut spec = spec.clone();
        spec["statefulSetRef"] = json!({ "name": "db" });
        serde_json::from_value(json!({
            "metadata": { "name": "nightly", "namespace": "shop" }, "spec": spec,
            "status": { "nextScheduleTime": next },
        }))
        .unwrap()
    }

    #[test]
    fn a_schedule_is_told_with_its_zone_and_what_bounds_it() {
        let line = |spec: Value| schedule_line(&backup(&spec, None).spec);
        assert_eq!(line(json!({})), "none: one run at creation, others when they are asked for");
        assert_eq!(line(json!({ "schedule": "" })), line(json!({})));
        assert_eq!(line(json!({ "schedule": "@daily", "timeZone": "" })), "@daily (UTC)");
        assert_eq!(
            line(json!({
                "schedule": "0 2 * * *", "timeZone": "Europe/Paris", "spread": "1h30m", "startingDeadlineSeconds": 300,
            })),
            "0 2 * * * (Europe/Paris, within 1h 30m of it, at most 5m late)"
        );
    }

    #[test]
    fn the_next_run_is_told_or_why_there_is_none() {
        let now = "2026-02-03T02:00:00Z".parse().unwrap();
        let said = |spec: Value, next: Option<&str>| {
            let backup = backup(&spec, next);
            (next_line(&backup, now), next_word(&backup, now))
        };
        let words = |line: &str, word: &str| (line.to_owned(), word.to_owned());
        let scheduled = json!({ "schedule": "@daily" });
        assert_eq!(
            said(scheduled.clone(), Some("2026-02-03T05:00:00Z")),
            words("2026-02-03T05:00:00Z (in 3h)", "in 3h")
        );
        assert_eq!(
            said(scheduled.clone(), Some("2026-02-03T01:59:59Z")),
            words("2026-02-03T01:59:59Z (now)", "now")
        );
        assert_eq!(said(scheduled, None), words("not known: the agent has not said", "-"));
        assert_eq!(said(json!({}), None), words("none: no schedule", "-"));
        assert_eq!(
            said(json!({ "schedule": "@daily", "suspend": true }), None),
            words("none: suspended", "suspended")
        );
    }

    #[test]
    fn a_policy_is_told_by_its_fields() {
        assert_eq!(retention_line(None), "none: nothing is ever pruned");
        assert_eq!(retention_line(Some(&RetentionPolicy::default())), retention_line(None));
        let policy =
            RetentionPolicy { keep_last: Some(3), keep_yearly: Some(1), ..RetentionPolicy::default() };
        assert_eq!(retention_line(Some(&policy)), "keepLast 3, keepYearly 1");
    }
}
