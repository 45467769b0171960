//! What the agent's preflight says of one backup, and what its conditions say. Pure.

use std::iter;

use jiff::Timestamp;
use kube::ResourceExt;
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::conditions::{self, NAMESPACE_NOT_GRANTED, STATEFUL_SET_NOT_FOUND};
use sts_backup_api::run::{CurrentRun, RunResult};

use super::{Finding, Level, Read};
use crate::backup::observe::Target;
use crate::backup::preflight::{Problem, may_heal, rehearse};
use crate::plugin::remedy::{remedy, thaw_trouble};
use crate::plugin::table::count;

/// Everything that is checked for a backup.
pub(super) fn check_backup(
    backup: &StatefulSetBackup,
    target: &Read<Target>,
    now: Timestamp,
) -> Vec<Finding> {
    let mut findings = check_conditions(backup, now);
    let own = backup.namespace().unwrap_or_default();
    let set = &backup.spec.stateful_set_ref;
    let object = format!("StatefulSet {}/{}", set.namespace_or(&own), set.name);
    let refuse = |object, how: &str, reason| {
        let (reason, remedy) = (format!("{reason}: {how}"), remedy(reason, &own, &backup.name_any()));
        vec![Finding::fail(object, reason, remedy)]
    };
    findings.extend(match target {
        Err(why) => vec![Finding::unread(format!("{object}, its claims and its pods"), why)],
        Ok(Target::Read(facts)) => {
            let plan = rehearse(&backup.spec, &set.name, facts, now);
            let starting = plan.as_ref().is_err_and(|problems| may_heal(facts, problems));
            check_plan(&object, plan, starting)
        }
        Ok(Target::NotGranted) => {
            refuse(object, &format!("not in the namespace {own} of its backup"), NAMESPACE_NOT_GRANTED)
        }
        Ok(Target::Missing | Target::Unread | Target::Exists) => {
            refuse(object, "it does not exist", STATEFUL_SET_NOT_FOUND)
        }
    });
    findings
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

fn check_conditions(backup: &StatefulSetBackup, now: Timestamp) -> Vec<Finding> {
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
    for (type_, level) in checks {
        let condition = conditions::find(&status.conditions, type_);
        if let Some(condition) = condition.filter(|condition| condition.status == "False") {
            findings.push(Finding::bad(
                level,
                object.clone(),
                format!("{type_} is False: {}: {}", condition.reason, condition.message),
                advice(&condition.reason, &namespace, &name),
            ));
        }
    }
    if findings.is_empty() {
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
