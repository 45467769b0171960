//! What the agent's preflight says of one backup and its times, and what its conditions say. Pure.

use std::iter;

use jiff::Timestamp;
use kube::ResourceExt;
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::conditions::{self, INVALID_SCHEDULE, NAMESPACE_NOT_GRANTED, STATEFUL_SET_NOT_FOUND};
use sts_backup_api::names::ALLOW_BACKUP_FROM_ANNOTATION;
use sts_backup_api::run::{CurrentRun, RunResult};
use sts_backup_api::schedule::{Timetable, time_zone};

use super::{Finding, Level, Read};
use crate::backup::observe::Target;
use crate::backup::preflight::{Problem, may_heal, rehearse};
use crate::plugin::remedy::{remedy, thaw_trouble};
use crate::plugin::timing::coming;
use sts_backup_service::table::count;

/// Everything that is checked for a backup.
pub(super) fn check_backup(
    backup: &StatefulSetBackup,
    target: &Read<Target>,
    now: Timestamp,
) -> Vec<Finding> {
    let mut seen = check_times(backup, now);
    seen.extend(check_target(backup, target, now));
    let mut findings = check_conditions(backup, &seen, now);
    findings.extend(seen);
    findings
}

/// What keeps runs from beginning at their times, and points from being pruned.
fn check_times(backup: &StatefulSetBackup, now: Timestamp) -> Vec<Finding> {
    let (namespace, name) = (backup.namespace().unwrap_or_default(), backup.name_any());
    let object = format!("StatefulSetBackup {namespace}/{name}");
    let spec = &backup.spec;
    let timetable = match Timetable::of(spec, &backup.uid().unwrap_or_default()) {
        Ok(timetable) => timetable,
        Err(err) => {
            let reason = format!("{INVALID_SCHEDULE}: {err}");
            return vec![Finding::fail(object, reason, remedy(INVALID_SCHEDULE, &namespace, &name))];
        }
    };
    let mut findings = Vec::new();
    if let (Some(_), Err(err)) = (&spec.retention_policy, time_zone(spec.time_zone.as_deref())) {
        let reason = format!("nothing is pruned: {err}");
        findings.push(Finding::fail(
            object.clone(),
            reason,
            format!("kubectl edit statefulsetbackup {name} -n {namespace}"),
        ));
    }
    if spec.suspend {
        findings.push(Finding::warn(
            object,
            "suspended: no run begins, and nothing is pruned",
            format!("if that is not meant: kubectl stsbackup resume {name} -n {namespace}"),
        ));
    } else if let Some(next) = timetable.and_then(|timetable| timetable.look(now, now).next) {
        findings.push(Finding::ok(object, format!("the next run begins at {}", coming(next, now))));
    }
    findings
}

/// What the next run would find.
fn check_target(backup: &StatefulSetBackup, target: &Read<Target>, now: Timestamp) -> Vec<Finding> {
    let own = backup.namespace().unwrap_or_default();
    let set = &backup.spec.stateful_set_ref;
    let home = set.namespace_or(&own);
    let object = format!("StatefulSet {home}/{}", set.name);
    match target {
        Err(why) => vec![Finding::unread(format!("{object}, its claims and its pods"), why)],
        Ok(Target::Read(facts)) => {
            let plan = rehearse(&backup.spec, &set.name, facts, now);
            let starting = plan.as_ref().is_err_and(|problems| may_heal(facts, problems));
            check_plan(&object, plan, starting)
        }
        Ok(Target::NotGranted) => vec![Finding::fail(
            object,
            format!("{NAMESPACE_NOT_GRANTED}: namespace {home} does not let backups of {own} in"),
            format!(
                "kubectl annotate namespace {home} {ALLOW_BACKUP_FROM_ANNOTATION}={own}; other namespaces that it names are separated by commas"
            ),
        )],
        Ok(Target::Missing | Target::Unread | Target::Exists) => vec![Finding::fail(
            object,
            format!("{STATEFUL_SET_NOT_FOUND}: it does not exist"),
            remedy(STATEFUL_SET_NOT_FOUND, &own, &backup.name_any()),
        )],
    }
}

/// What the agent's preflight makes of the `StatefulSet` as it is now.
fn check_plan(object: &str, plan: Result<CurrentRun, Vec<Problem>>, starting: bool) -> Vec<Finding> {
    let bad = |level, reason| Finding { level, object: object.to_owned(), reason, remedy: None };
    match plan {
        Ok(CurrentRun { volumes, pods, left_out, .. }) => {
            let mut ready = format!("{} can be snapshotted", count(volumes.len(), "claim"));
            if !pods.is_empty() {
                ready = format!("{ready}, {} ready for hooks", count(pods.len(), "pod"));
            }
            let left_out = left_out.into_iter().map(|why| bad(Level::Warn, format!("left out: {why}")));
            iter::once(Finding::ok(object, ready)).chain(left_out).collect()
        }
        Err(problems) if starting => {
            let why =
                |Problem { kind, message }| bad(Level::Warn, format!("still starting: {kind}: {message}"));
            problems.into_iter().map(why).collect()
        }
        Err(problems) => {
            let why = |Problem { kind, message }| bad(Level::Fail, format!("{kind}: {message}"));
            problems.into_iter().map(why).collect()
        }
    }
}

/// What the agent says, but for what was `seen` to be so.
fn check_conditions(backup: &StatefulSetBackup, seen: &[Finding], now: Timestamp) -> Vec<Finding> {
    let (namespace, name) = (backup.namespace().unwrap_or_default(), backup.name_any());
    let object = format!("StatefulSetBackup {namespace}/{name}");
    let Some(status) = &backup.status else {
        return vec![Finding::warn(
            object,
            "the agent has not looked at it",
            "if it was not made just now, look at the agent: is it alive?",
        )];
    };
    if let (Some(seen), Some(generation)) = (status.observed_generation, backup.metadata.generation)
        && seen < generation
    {
        return vec![Finding::warn(
            object,
            "the agent has not looked at its newest spec",
            "if it was not changed just now, look at the agent: is it alive?",
        )];
    }
    let mut findings = Vec::new();
    if let Some(trouble) = thaw_trouble(backup, now) {
        findings.push(Finding::fail(object.clone(), trouble, remedy("ThawFailed", &namespace, &name)));
    }
    let partial = status.history.first().is_some_and(|run| run.result == RunResult::PartiallyFailed);
    let checks = [
        (conditions::READY, Level::Fail),
        (conditions::LAST_BACKUP_SUCCEEDED, if partial { Level::Warn } else { Level::Fail }),
    ];
    let mut is_known = false;
    for (type_, level) in checks {
        let condition = conditions::find(&status.conditions, type_);
        if let Some(condition) = condition.filter(|condition| condition.status == "False") {
            let same = format!("{}: ", condition.reason);
            if seen.iter().any(|seen| seen.level == Level::Fail && seen.reason.starts_with(&same)) {
                is_known = true;
                continue;
            }
            findings.push(Finding::bad(
                level,
                object.clone(),
                format!("{type_} is False: {}: {}", condition.reason, condition.message),
                advice(&condition.reason, &namespace, &name),
            ));
        }
    }
    if findings.is_empty() && !is_known {
        findings.push(Finding::ok(object, "its conditions are good"));
    }
    findings
}

/// The remedy; to call for this check again would be none.
fn advice(reason: &str, namespace: &str, name: &str) -> String {
    let advice = remedy(reason, namespace, name);
    if advice.contains("stsbackup doctor") {
        format!("kubectl stsbackup describe {name} -n {namespace} shows its runs and events")
    } else {
        advice
    }
}

#[cfg(test)]
#[path = "backup_checks_tests.rs"]
mod tests;
