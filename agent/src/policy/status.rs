//! Turns a plan and what came of its writes into the status that users see, and into Events. Pure.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use sts_backup_api::conditions::{
    self, APPLIED, HOOK_PROFILE_NOT_FOUND, INVALID_SCHEDULE, INVALID_SELECTOR, NAME_TAKEN, READY, WAITING,
};
use sts_backup_api::coverage::{SetName, coverage};
use sts_backup_api::policy::{
    MAX_LISTED_CONFLICTS, MAX_LISTED_NAMES, PolicyConflict, StatefulSetBackupPolicyStatus,
};
use sts_backup_api::report::CoverageReport;

use super::decide::{PolicyPlan, Selected, Step, Verdict};
use super::observe::{Key, World};
use crate::events::Note;

/// A reason: the API server did not do what it was asked.
const WRITE_FAILED: &str = "WriteFailed";

/// How many names an Event or a message has.
const NAMED: usize = 5;

/// What came of a plan's steps.
#[derive(Clone, Debug, Default)]
pub(super) struct Results {
    /// The steps that are done.
    pub(super) done: BTreeSet<usize>,
    /// Those that were done before, without that it was seen yet.
    pub(super) done_before: BTreeSet<usize>,
    /// Some were for objects that had changed since they were looked at.
    pub(super) is_outdated: bool,
    /// Those that failed, now or before, and why.
    pub(super) failed: BTreeMap<usize, String>,
}

/// The status after the steps.
pub(super) fn next_status(
    plan: &PolicyPlan<'_>,
    results: &Results,
    now: Timestamp,
) -> StatefulSetBackupPolicyStatus {
    let policy = &plan.policy.object;
    let written = results.done.iter().chain(&results.done_before).map(|at| plan.steps[*at].key());
    let written: BTreeSet<&Key> = written.collect();
    let unprotected: Vec<SetName<'_>> = plan
        .selected
        .iter()
        .filter(|selected| !is_protected(selected, &written))
        .map(|selected| selected.set)
        .collect();
    let mut conflicts: Vec<PolicyConflict> = plan
        .conflicts
        .iter()
        .map(|(policy, conflict)| PolicyConflict {
            policy: (*policy).to_owned(),
            prevails: conflict.prevails,
            stateful_sets: count(conflict.sets),
            example: text(conflict.example),
        })
        .collect();
    // Those that take most from this policy are the ones to know of.
    conflicts.sort_by_key(|conflict| (!conflict.prevails, std::cmp::Reverse(conflict.stateful_sets)));
    conflicts.truncate(MAX_LISTED_CONFLICTS);
    let mut status = StatefulSetBackupPolicyStatus {
        observed_generation: policy.metadata.generation,
        conditions: policy.status.as_ref().map(|status| status.conditions.clone()).unwrap_or_default(),
        matched: count(plan.selected.len()),
        protected: count(plan.selected.len() - unprotected.len()),
        first_unprotected: first(&unprotected),
        overdue: count(plan.overdue.len()),
        first_overdue: first(&plan.overdue),
        conflicts,
    };
    let mut set = |type_, is_so, reason: &str, message: &str| {
        conditions::set(
            &mut status.conditions,
            type_,
            (is_so, reason, message),
            policy.metadata.generation,
            now,
        );
    };
    match &plan.problem {
        Some(problem) => set(READY, false, problem.reason, &problem.message),
        None => set(READY, true, "Usable", "the spec can be used"),
    }
    let (is_applied, reason, mut message) = applied(plan, results, &written);
    if let Some(more) = left_to_idle(plan) {
        message.push_str("; ");
        message.push_str(&more);
    }
    set(APPLIED, is_applied, reason, &message);
    status
}

/// What of the cluster is protected, whatever policies select.
pub(super) fn cluster_coverage(world: &World, now: Timestamp) -> CoverageReport {
    // Without an RPO nothing depends on the time.
    let found = coverage(world.protectees(), world.protections(), None, now);
    CoverageReport {
        stateful_sets: found.sets,
        unprotected: found.unprotected.len(),
        first_unprotected: first(&found.unprotected),
    }
}

fn is_protected(selected: &Selected<'_>, written: &BTreeSet<&Key>) -> bool {
    let Selected { set, verdict, protected_otherwise } = selected;
    let by_own = match verdict {
        Verdict::Backed { idle } => !idle,
        Verdict::Write { name, exists, idle } => {
            !idle && (*exists || written.contains(&(set.namespace.to_owned(), name.clone())))
        }
        Verdict::Unusable
        | Verdict::Yields { .. }
        | Verdict::HandWritten { .. }
        | Verdict::Awaits { .. }
        | Verdict::NameTaken { .. } => false,
    };
    by_own || *protected_otherwise
}

/// Whether all is written, and what is not.
fn applied(
    plan: &PolicyPlan<'_>,
    results: &Results,
    written: &BTreeSet<&Key>,
) -> (bool, &'static str, String) {
    if let Some((at, why)) = results.failed.first_key_value() {
        let (namespace, name) = plan.steps[*at].key();
        let message = format!(
            "{} of {} writes failed and are tried again; StatefulSetBackup {namespace}/{name}: {why}",
            results.failed.len(),
            plan.steps.len()
        );
        return (false, WRITE_FAILED, message);
    }
    let taken = plan.selected.iter().filter_map(|selected| match &selected.verdict {
        Verdict::NameTaken { backup } => Some(*backup),
        Verdict::Backed { .. }
        | Verdict::Write { .. }
        | Verdict::Unusable
        | Verdict::Yields { .. }
        | Verdict::HandWritten { .. }
        | Verdict::Awaits { .. } => None,
    });
    let taken: Vec<&Key> = taken.collect();
    if let Some((namespace, name)) = taken.first() {
        let message = format!(
            "{} StatefulSets have no backup: StatefulSetBackup {namespace}/{name} is not of this policy and stays as it \
             is; rename or delete it",
            taken.len()
        );
        return (false, NAME_TAKEN, message);
    }
    if let Some(problem) = &plan.problem {
        return (false, problem.reason, "nothing is written until the spec can be used".to_owned());
    }
    let waiting: Vec<SetName<'_>> = plan
        .selected
        .iter()
        .filter(|selected| match &selected.verdict {
            Verdict::Awaits { .. } => true,
            Verdict::Write { name, .. } => {
                !written.contains(&(selected.set.namespace.to_owned(), name.clone()))
            }
            Verdict::Backed { .. }
            | Verdict::Unusable
            | Verdict::Yields { .. }
            | Verdict::HandWritten { .. }
            | Verdict::NameTaken { .. } => false,
        })
        .map(|selected| selected.set)
        .collect();
    if !waiting.is_empty() {
        let message =
            format!("an earlier backup is still to go, or changed meanwhile, of {}", some(&waiting));
        return (false, WAITING, message);
    }
    (true, "Applied", "every StatefulSet that is this policy's has its backup".to_owned())
}

/// Which `StatefulSets` are left to backups that somebody wrote by hand, and that protect nothing.
fn left_to_idle(plan: &PolicyPlan<'_>) -> Option<String> {
    let is_left = |selected: &&Selected<'_>| {
        matches!(selected.verdict, Verdict::HandWritten { idle: true, .. }) && !selected.protected_otherwise
    };
    let left: Vec<SetName<'_>> = plan.selected.iter().filter(is_left).map(|selected| selected.set).collect();
    if left.is_empty() {
        return None;
    }
    Some(format!(
        "{} left to backups written by hand that begin no runs by themselves, and not protected: {}; schedule, \
         resume or delete these",
        left.len(),
        some(&left)
    ))
}

/// The Event about `StatefulSets` that are left to backups that protect nothing, unless the status said so before.
pub(super) fn idle_note(plan: &PolicyPlan<'_>, old: &StatefulSetBackupPolicyStatus) -> Option<Note> {
    let said = conditions::find(&old.conditions, APPLIED).map_or("", |condition| &condition.message);
    let left = left_to_idle(plan).filter(|left| !said.contains(left))?;
    Some(Note::warning("Unscheduled", "Select", left))
}

/// The Events about what was written.
pub(super) fn write_notes(plan: &PolicyPlan<'_>, results: &Results) -> Vec<Note> {
    let (mut created, mut updated, mut deleted) = (Vec::new(), Vec::new(), Vec::new());
    for step in results.done.iter().map(|at| &plan.steps[*at]) {
        let list = match step {
            Step::Create(_) => &mut created,
            Step::Update { .. } => &mut updated,
            Step::Delete { .. } => &mut deleted,
        };
        let (namespace, name) = step.key();
        list.push(SetName { namespace, name });
    }
    let mut notes = Vec::new();
    if !created.is_empty() {
        notes.push(Note::normal("BackupsCreated", "Create", format!("created: {}", some(&created))));
    }
    if !updated.is_empty() {
        let message = format!("updated to the template: {}", some(&updated));
        notes.push(Note::normal("BackupsUpdated", "Update", message));
    }
    if !deleted.is_empty() {
        let message = format!("removed, with their recovery points left as they are: {}", some(&deleted));
        notes.push(Note::normal("BackupsRemoved", "Remove", message));
    }
    notes
}

/// The Events about what has changed in the status.
pub(super) fn change_notes(
    old: &StatefulSetBackupPolicyStatus,
    new: &StatefulSetBackupPolicyStatus,
) -> Vec<Note> {
    let mut notes = Vec::new();
    for type_ in [READY, APPLIED] {
        let reason = |status: &StatefulSetBackupPolicyStatus| {
            conditions::find(&status.conditions, type_).map(|condition| condition.reason.clone())
        };
        let Some(condition) = conditions::find(&new.conditions, type_) else { continue };
        if condition.status == "False" && reason(old).as_ref() != Some(&condition.reason) {
            notes.extend(refusal(type_, &condition.reason, condition.message.clone()));
        }
    }
    for conflict in &new.conflicts {
        let is_known =
            |known: &PolicyConflict| known.policy == conflict.policy && known.prevails == conflict.prevails;
        if !old.conflicts.iter().any(is_known) {
            let PolicyConflict { policy, prevails, stateful_sets, example } = conflict;
            let who = if *prevails { "that policy" } else { "this policy" };
            let message = format!(
                "policy {policy} selects {stateful_sets} of the same StatefulSets, such as {example}: {who} backs them up, \
                 by its priority or name"
            );
            notes.push(Note::warning("Overlap", "Select", message));
        }
    }
    notes
}

/// The Event about a condition that became false.
fn refusal(type_: &str, reason: &str, message: String) -> Option<Note> {
    match (type_, reason) {
        (READY, HOOK_PROFILE_NOT_FOUND) => Some(Note::warning(HOOK_PROFILE_NOT_FOUND, "Refuse", message)),
        (READY, INVALID_SCHEDULE) => Some(Note::warning(INVALID_SCHEDULE, "Refuse", message)),
        (READY, INVALID_SELECTOR) => Some(Note::warning(INVALID_SELECTOR, "Refuse", message)),
        (APPLIED, NAME_TAKEN) => Some(Note::warning(NAME_TAKEN, "Create", message)),
        (APPLIED, WRITE_FAILED) => Some(Note::warning(WRITE_FAILED, "Write", message)),
        // Why nothing is applied the other condition says; what is waited for comes and goes.
        _ => None,
    }
}

fn count(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn text(set: SetName<'_>) -> String {
    format!("{}/{}", set.namespace, set.name)
}

fn first(sets: &[SetName<'_>]) -> Vec<String> {
    sets.iter().take(MAX_LISTED_NAMES).map(|set| text(*set)).collect()
}

/// The first names, and how many more there are.
fn some(sets: &[SetName<'_>]) -> String {
    let named: Vec<String> = sets.iter().take(NAMED).map(|set| text(*set)).collect();
    match sets.len().saturating_sub(NAMED) {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}
