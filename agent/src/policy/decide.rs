//! Which backups policies want, and what is to be written for that. Pure: facts in, steps out.
//!
//! At most one policy backs up a `StatefulSet`, and none does where somebody wrote a backup of it by hand. A backup that
//! a policy does not own is never written or deleted.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::ResourceExt;
use kube::core::{Selector, SelectorExt};
use serde_json::{Value, json};
use sts_backup_api::backup::StatefulSetBackupSpec;
use sts_backup_api::conditions::{HOOK_PROFILE_NOT_FOUND, INVALID_SCHEDULE, INVALID_SELECTOR};
use sts_backup_api::coverage::{Protectee, Protection, SetName, coverage, overdue_at};
use sts_backup_api::names::{TEMPLATE_HASH_ANNOTATION, policy_backup_name, short_hash};
use sts_backup_api::policy::StatefulSetBackupPolicySpec;
use sts_backup_api::schedule::Timetable;

use super::observe::{BackupFacts, Key, PolicyFacts, SetFacts, World};
use crate::config::HookProfile;

/// The longest spread that a policy gives a schedule by itself.
const MAX_SPREAD: Duration = Duration::from_mins(10);

/// What is to be done about one policy, and why the rest is not.
#[derive(Clone, Debug)]
pub(super) struct PolicyPlan<'a> {
    pub(super) policy: &'a PolicyFacts,
    /// Why its spec cannot be used; what it has made stays as it is.
    pub(super) problem: Option<Problem>,
    pub(super) steps: Vec<Step>,
    /// The `StatefulSets` that it selects, in order.
    pub(super) selected: Vec<Selected<'a>>,
    /// Other policies that select some of them.
    pub(super) conflicts: BTreeMap<&'a str, Conflict<'a>>,
    /// Those of the selected that are overdue, in order.
    pub(super) overdue: Vec<SetName<'a>>,
    /// When the answer changes by itself.
    pub(super) look_again: Option<Timestamp>,
}

/// Why a policy's spec cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) reason: &'static str,
    pub(super) message: String,
}

/// A write.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Step {
    /// Create the backup of a `StatefulSet`, unless its name is taken by now.
    Create(Wanted),
    /// Make a backup what the template says.
    Update {
        /// As it is to be.
        wanted: Wanted,
        /// Which object.
        uid: String,
        /// As it was when that was decided: what is still that after the write was not changed by it.
        version: Option<String>,
    },
    /// Delete a backup; its recovery points stay.
    Delete {
        /// Its namespace and name.
        key: Key,
        /// Which object.
        uid: String,
        /// As it was when that was decided: somebody may have made it their own since.
        version: Option<String>,
    },
}

/// A backup as a policy wants it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Wanted {
    /// Its namespace and name.
    pub(super) key: Key,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) spec: StatefulSetBackupSpec,
    pub(super) hash: String,
}

impl Step {
    /// The namespace and name of the backup.
    pub(super) fn key(&self) -> &Key {
        match self {
            Self::Create(wanted) | Self::Update { wanted, .. } => &wanted.key,
            Self::Delete { key, .. } => key,
        }
    }

    /// The hash of what is written; none: a deletion.
    pub(super) fn hash(&self) -> Option<&str> {
        match self {
            Self::Create(wanted) | Self::Update { wanted, .. } => Some(&wanted.hash),
            Self::Delete { .. } => None,
        }
    }
}

/// A `StatefulSet` that a policy selects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Selected<'a> {
    pub(super) set: SetName<'a>,
    pub(super) verdict: Verdict<'a>,
    /// A backup that is not this policy's, or that has no schedule, protects it: it is not suspended, and meets the
    /// RPO. Without an RPO one that is not this policy's and has a schedule does.
    pub(super) protected_otherwise: bool,
}

/// What a policy does about a `StatefulSet` that it selects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict<'a> {
    /// It has a backup of it, as the template says or as far as it can be used. It is idle if no run begins by itself,
    /// as it is suspended or has no schedule.
    Backed { idle: bool },
    /// One of that name is to be created, or to be updated where it exists.
    Write { name: String, exists: bool, idle: bool },
    /// The policy's spec cannot be used.
    Unusable,
    /// Another policy comes first.
    Yields { to: &'a str },
    /// Somebody wrote a backup of it by hand; idle, if no run of it begins by itself.
    HandWritten { backup: &'a Key, idle: bool },
    /// A backup of another policy, or an old one of this policy, is still to go.
    Awaits { backup: &'a Key },
    /// An object that is not the policy's has the name of the backup.
    NameTaken { backup: &'a Key },
}

/// What another policy has in common with a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Conflict<'a> {
    /// It comes before this one.
    pub(super) prevails: bool,
    pub(super) sets: usize,
    pub(super) example: SetName<'a>,
}

/// What each policy is to do.
pub(super) fn next_policy_steps(world: &World, now: Timestamp) -> Vec<PolicyPlan<'_>> {
    // The order of precedence. One that is being deleted gives way; the garbage collector takes its backups.
    let mut policies: Vec<&PolicyFacts> = world.policies.iter().filter(|policy| !policy.deleting).collect();
    policies.sort_by_key(|policy| (std::cmp::Reverse(policy.object.spec.priority), &policy.name));
    let policies: Vec<Prepared> = policies.into_iter().map(|policy| Prepared::of(policy, world)).collect();
    let index = Index::of(world);

    let mut plans: Vec<PolicyPlan> = policies.iter().map(Prepared::plan).collect();
    // What each policy's backup of each StatefulSet is to be called: all others of its backups are to go.
    let mut kept: Vec<BTreeSet<&Key>> = vec![BTreeSet::new(); policies.len()];
    for ((namespace, name), facts) in &world.sets {
        let set = SetName { namespace, name };
        let claims: Vec<usize> =
            (0..policies.len()).filter(|at| policies[*at].selects(world, set, facts)).collect();
        let Some(&first) = claims.first() else { continue };
        let (verdict, keeps) = policies[first].verdict(&index, set, &mut plans[first].steps);
        kept[first].extend(keeps);
        for &at in &claims {
            let rpo = policies[at].policy.object.spec.rpo.map(Duration::from);
            let verdict = if at == first {
                verdict.clone()
            } else {
                Verdict::Yields { to: &policies[first].policy.name }
            };
            let uid = &policies[at].policy.uid;
            let protected_otherwise = index.of_set(set).any(|backup| {
                let (is_own, protection) = (backup.owner.as_ref() == Some(uid), backup.protection());
                // What the verdict says of one of its own needs no point yet.
                (!is_own || !protection.scheduled)
                    && protection.protects(rpo, now)
                    && rpo.is_none_or(|rpo| protection.meets(rpo, now))
            });
            plans[at].selected.push(Selected { set, verdict, protected_otherwise });
            for &other in claims.iter().filter(|other| **other != at) {
                let name = policies[other].policy.name.as_str();
                let new = Conflict { prevails: other < at, sets: 0, example: set };
                plans[at].conflicts.entry(name).or_insert(new).sets += 1;
            }
        }
    }
    for ((policy, plan), kept) in policies.iter().zip(&mut plans).zip(&kept) {
        plan.steps.extend(policy.removals(world, kept));
        set_overdue(plan, world, now);
    }
    plans
}

fn set_overdue<'a>(plan: &mut PolicyPlan<'a>, world: &'a World, now: Timestamp) {
    let Some(rpo) = plan.policy.object.spec.rpo.map(Duration::from) else { return };
    let created = |set: SetName<'_>| world.sets[&(set.namespace.to_owned(), set.name.to_owned())].created;
    let sets = plan.selected.iter().map(|selected| {
        let set = selected.set;
        Protectee { set, created: created(set), excluded: false }
    });
    let found = coverage(sets, world.protections(), Some(rpo), now);
    (plan.overdue, plan.look_again) = (found.overdue, found.next_overdue);
    // Whether a backup still meets the RPO changes with the age of its points alone.
    let selected: BTreeSet<SetName<'_>> = plan.selected.iter().map(|selected| selected.set).collect();
    let of_selected = world.backups.iter().filter(|backup| selected.contains(&backup.protection().set));
    let changes = of_selected.filter_map(|backup| overdue_at(backup.newest?, rpo)).filter(|due| *due > now);
    plan.look_again = plan.look_again.into_iter().chain(changes).min();
}

impl World {
    /// All `StatefulSets`, and which of them need no protection: without claims, excluded, or in a namespace that is
    /// excluded or not known.
    pub(crate) fn protectees(&self) -> impl Iterator<Item = Protectee<'_>> {
        self.sets.iter().map(|((namespace, name), facts)| Protectee {
            set: SetName { namespace, name },
            created: facts.created,
            excluded: facts.excluded
                || !facts.has_claims
                || self.namespaces.get(namespace).is_none_or(|namespace| namespace.excluded),
        })
    }

    /// What each backup is worth to its `StatefulSet`.
    pub(crate) fn protections(&self) -> impl Iterator<Item = Protection<'_>> {
        self.backups.iter().map(BackupFacts::protection)
    }
}

impl BackupFacts {
    /// What it is worth to its `StatefulSet`.
    pub(crate) fn protection(&self) -> Protection<'_> {
        let set = SetName { namespace: &self.set.0, name: &self.set.1 };
        let spec = &self.object.spec;
        Protection { set, suspended: spec.suspend, scheduled: spec.schedule.is_some(), newest: self.newest }
    }
}

/// The backups, by what is asked for.
struct Index<'a> {
    by_key: HashMap<&'a Key, &'a BackupFacts>,
    by_set: HashMap<SetName<'a>, Vec<&'a BackupFacts>>,
    /// The uids of all policies, those that are being deleted included.
    policies: BTreeSet<&'a str>,
}

impl<'a> Index<'a> {
    fn of(world: &'a World) -> Self {
        let policies = world.policies.iter().map(|policy| policy.uid.as_str()).collect();
        let mut index = Self { by_key: HashMap::new(), by_set: HashMap::new(), policies };
        for backup in &world.backups {
            index.by_key.insert(&backup.key, backup);
            index.by_set.entry(backup.protection().set).or_default().push(backup);
        }
        index
    }

    fn of_set(&self, set: SetName<'a>) -> impl Iterator<Item = &'a BackupFacts> + '_ {
        self.by_set.get(&set).into_iter().flatten().copied()
    }

    /// Whether no policy has made it: who names an owner that does not exist wrote it by hand.
    fn is_by_hand(&self, backup: &BackupFacts) -> bool {
        backup.owner.as_ref().is_none_or(|owner| !self.policies.contains(owner.as_str()))
    }
}

/// A policy, read once for all `StatefulSets`.
struct Prepared<'a> {
    policy: &'a PolicyFacts,
    /// Of namespaces and of `StatefulSets`.
    selectors: Result<(Selector, Selector), Problem>,
    template: Result<Template, Problem>,
}

/// What a policy's backups are made from, but for the name of the `StatefulSet`.
struct Template {
    labels: BTreeMap<String, String>,
    spec: StatefulSetBackupSpec,
    hash: String,
}

impl<'a> Prepared<'a> {
    fn of(policy: &'a PolicyFacts, world: &World) -> Self {
        let spec = &policy.object.spec;
        let namespaces = selector("namespaceSelector", spec.namespace_selector.as_ref());
        let sets = selector("statefulSetSelector", spec.stateful_set_selector.as_ref());
        Self {
            policy,
            selectors: namespaces.and_then(|namespaces| Ok((namespaces, sets?))),
            template: template(spec, &world.hook_profiles),
        }
    }

    fn plan(&self) -> PolicyPlan<'a> {
        let problem = self.selectors.as_ref().err().or(self.template.as_ref().err());
        PolicyPlan {
            policy: self.policy,
            problem: problem.cloned(),
            steps: Vec::new(),
            selected: Vec::new(),
            conflicts: BTreeMap::new(),
            overdue: Vec::new(),
            look_again: None,
        }
    }

    fn selects(&self, world: &World, set: SetName<'_>, facts: &SetFacts) -> bool {
        let Ok((namespaces, sets)) = &self.selectors else { return false };
        let Some(namespace) = world.namespaces.get(set.namespace) else { return false };
        let is_set = |excluded: &String| match excluded.split_once('/') {
            Some((namespace, name)) => namespace == set.namespace && name == set.name,
            None => excluded == set.name,
        };
        let SetFacts { labels, created: _, has_claims, excluded, deleting } = facts;
        *has_claims
            && !excluded
            && !deleting
            && !namespace.excluded
            && namespaces.matches(&namespace.labels)
            && sets.matches(labels)
            && !self.policy.object.spec.exclude.iter().any(is_set)
    }

    /// What is to be done about a `StatefulSet` that no other policy has before this one; and the policy's backup that
    /// is to stay.
    fn verdict(
        &self,
        index: &Index<'a>,
        set: SetName<'a>,
        steps: &mut Vec<Step>,
    ) -> (Verdict<'a>, Option<&'a Key>) {
        let name = policy_backup_name(&self.policy.name, set.name);
        let key = (set.namespace.to_owned(), name);
        let is_ours = |backup: &BackupFacts| self.may_be(backup, &key);
        let by_hand = index.of_set(set).filter(|backup| index.is_by_hand(backup) && !is_ours(backup));
        // Of several the one that begins runs by itself says how well the StatefulSet is off.
        let by_hand = by_hand.min_by_key(|backup| (backup.protection().is_idle(), &backup.key));
        if let Some(by_hand) = by_hand {
            let idle = by_hand.protection().is_idle();
            return (Verdict::HandWritten { backup: &by_hand.key, idle }, None);
        }
        let found = index.by_key.get(&key).copied();
        // Its policy deletes it as soon as it sees that it is not the first any more. That is no reason to give up one
        // that is there: whoever writes the other's owner on an object would else take the backup away.
        let has_own = found.is_some_and(|found| is_ours(found) && found.protection().set == set);
        if let Some(other) = index.of_set(set).find(|backup| !is_ours(backup) && !has_own) {
            return (Verdict::Awaits { backup: &other.key }, None);
        }
        if let Some(found) = found.filter(|found| !is_ours(found) || found.protection().set != set) {
            return (Verdict::NameTaken { backup: &found.key }, None);
        }
        if let Some(going) = found.filter(|found| found.deleting) {
            return (Verdict::Awaits { backup: &going.key }, None);
        }
        let wanted = match (&self.template, found) {
            (Ok(template), _) => template.wanted(&self.policy.name, key.clone(), set.name),
            (Err(_), None) => return (Verdict::Unusable, None),
            (Err(_), Some(found)) => {
                let idle = found.protection().is_idle();
                return (Verdict::Backed { idle }, Some(&found.key));
            }
        };
        let Some(found) = found else {
            let idle = wanted.spec.suspend || wanted.spec.schedule.is_none();
            steps.push(Step::Create(wanted));
            return (Verdict::Write { name: key.1, exists: false, idle }, None);
        };
        // Where the template says nothing, people may suspend or schedule a backup.
        let idle = wanted.spec.suspend || found.protection().is_idle();
        if wanted.is_written(found, &self.policy.uid) {
            return (Verdict::Backed { idle }, Some(&found.key));
        }
        let version = found.object.resource_version();
        steps.push(Step::Update { wanted, uid: found.uid.clone(), version });
        (Verdict::Write { name: key.1, exists: true, idle }, Some(&found.key))
    }

    /// Whether the policy may write a backup of that name: it made it, or a policy of its name did that was deleted and
    /// left its backups behind.
    fn may_be(&self, backup: &BackupFacts, key: &Key) -> bool {
        match &backup.owner {
            Some(owner) => *owner == self.policy.uid && backup.key == *key,
            None => backup.from_policy.as_ref() == Some(&self.policy.name) && backup.key == *key,
        }
    }

    /// The policy's own backups that are to go.
    fn removals<'w>(&'w self, world: &'w World, kept: &'w BTreeSet<&Key>) -> impl Iterator<Item = Step> + 'w {
        // Nobody knows what a policy selects whose selectors cannot be read, or what is in a namespace that is not known.
        let is_known =
            |backup: &&BackupFacts| self.selectors.is_ok() && world.namespaces.contains_key(&backup.set.0);
        let own = world.backups.iter().filter(|backup| backup.owner.as_ref() == Some(&self.policy.uid));
        own.filter(is_known).filter(|backup| !backup.deleting && !kept.contains(&backup.key)).map(|backup| {
            Step::Delete {
                key: backup.key.clone(),
                uid: backup.uid.clone(),
                version: backup.object.resource_version(),
            }
        })
    }
}

fn selector(field: &str, selector: Option<&LabelSelector>) -> Result<Selector, Problem> {
    let read = Selector::try_from(selector.cloned().unwrap_or_default());
    read.map_err(|err| Problem {
        reason: INVALID_SELECTOR,
        message: format!("{field} cannot be used: {err}; correct it. The policy's backups stay as they are"),
    })
}

/// What a policy's backups are made from.
fn template(
    policy: &StatefulSetBackupPolicySpec,
    profiles: &BTreeMap<String, HookProfile>,
) -> Result<Template, Problem> {
    let template = &policy.template;
    let mut spec = template.spec_for("");
    if let Some(name) = &template.hook_profile {
        let HookProfile { pre, post } = profiles.get(name).ok_or_else(|| Problem {
            reason: HOOK_PROFILE_NOT_FOUND,
            message: format!(
                "the agent's configuration has no hook_profiles.{name}: add it there, or name another one. The policy's \
                 backups stay as they are"
            ),
        })?;
        (spec.pre_backup_hook, spec.post_backup_hook) = (pre.clone(), post.clone());
    }
    let timetable = Timetable::of(&spec, "").map_err(|err| Problem {
        reason: INVALID_SCHEDULE,
        message: format!("the template's {err}. The policy's backups stay as they are"),
    })?;
    if spec.spread.is_none() {
        let gap = timetable.and_then(|timetable| timetable.smallest_gap());
        // Whole seconds, as a spread is written.
        let tenth = gap.map(|gap| Duration::from_secs((gap / 10).as_secs()).min(MAX_SPREAD));
        spec.spread = tenth.map(Into::into);
    }
    let labels = template.labels.clone();
    let hash = short_hash(&[&json!({ "labels": labels, "spec": spec }).to_string()]);
    Ok(Template { labels, spec, hash })
}

impl Template {
    fn wanted(&self, policy: &str, key: Key, set: &str) -> Wanted {
        let Self { labels, spec, hash } = self;
        let mut spec = spec.clone();
        set.clone_into(&mut spec.stateful_set_ref.name);
        let mut labels = labels.clone();
        labels.insert(sts_backup_api::names::FROM_POLICY_LABEL.to_owned(), policy.to_owned());
        Wanted { key, labels, spec, hash: hash.clone() }
    }
}

impl Wanted {
    /// The spec as it is applied.
    pub(super) fn applied_spec(&self) -> Value {
        let mut spec = json!(self.spec);
        // Unless the template suspends all, that is left to people who want to suspend one.
        if let Some(fields) = spec.as_object_mut().filter(|_| !self.spec.suspend) {
            fields.remove("suspend");
        }
        spec
    }

    /// Whether the backup is what an apply would make of it. What is no part of the template is left to others; that
    /// nothing of an earlier template is left the hash tells.
    fn is_written(&self, found: &BackupFacts, policy_uid: &str) -> bool {
        let object = &found.object;
        found.owner.as_deref() == Some(policy_uid)
            && object.annotations().get(TEMPLATE_HASH_ANNOTATION) == Some(&self.hash)
            && self.labels.iter().all(|(label, value)| object.labels().get(label) == Some(value))
            && (object.spec == self.spec || says(&json!(object.spec), &self.applied_spec()))
    }
}

/// Whether all that is `wanted` is in what is `found`.
fn says(found: &Value, wanted: &Value) -> bool {
    match (found, wanted) {
        (Value::Object(found), Value::Object(wanted)) => wanted.iter().all(|(name, wanted)| {
            found.get(name).is_some_and(|found| match (name.as_str(), found, wanted) {
                // A set, to which others may add.
                ("volumeClaimTemplates", Value::Array(found), Value::Array(wanted)) => {
                    wanted.iter().all(|template| found.contains(template))
                }
                _ => says(found, wanted),
            })
        }),
        _ => found == wanted,
    }
}
