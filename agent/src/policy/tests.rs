//! The decisions as tables, and under every interleaving of changes, crashes and caches that lag: a model of the
//! cluster, driven at random, with the invariants checked after each write.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use jiff::Timestamp;
use kube::ResourceExt;
use proptest::prelude::*;
use serde_json::{Value, json};
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::conditions::{self, APPLIED, READY};
use sts_backup_api::names::{FROM_POLICY_LABEL, TEMPLATE_HASH_ANNOTATION, policy_backup_name};
use sts_backup_api::policy::{StatefulSetBackupPolicy, StatefulSetBackupPolicyStatus};

use super::decide::{PolicyPlan, Step, Verdict, next_policy_steps};
use super::observe::{BackupFacts, Key, NamespaceFacts, PolicyFacts, SetFacts, World, backup_facts};
use super::perform::{Outcome, manifest};
use super::status::{Results, change_notes, idle_note, next_status, write_notes};
use super::take_down;
use crate::config::HookProfile;

/// A cluster that a test describes, and that obeys the steps as the API server does.
#[derive(Clone, Default)]
pub(super) struct Cluster {
    facts: World,
    /// What others say of a backup beside its policy, by uid.
    foreign: BTreeMap<String, Value>,
    uids: u32,
}

/// An empty one.
pub(super) fn world() -> Cluster {
    Cluster::default()
}

fn now() -> Timestamp {
    "2026-01-10T00:00:00Z".parse().unwrap()
}

fn key(path: &str) -> Key {
    let (namespace, name) = path.split_once('/').unwrap();
    (namespace.to_owned(), name.to_owned())
}

fn labels(labels: &[(&str, &str)]) -> BTreeMap<String, String> {
    labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

impl Cluster {
    pub(super) fn facts(&self) -> World {
        self.facts.clone()
    }

    pub(super) fn namespace(mut self, name: &str, with: &[(&str, &str)]) -> Self {
        let facts = NamespaceFacts { labels: labels(with), excluded: false };
        self.facts.namespaces.insert(name.to_owned(), facts);
        self
    }

    pub(super) fn excluded_namespace(mut self, name: &str) -> Self {
        self.facts.namespaces.get_mut(name).unwrap().excluded = true;
        self
    }

    pub(super) fn set(mut self, path: &str, with: &[(&str, &str)]) -> Self {
        let facts = SetFacts {
            labels: labels(with),
            created: "2026-01-01T00:00:00Z".parse().unwrap(),
            has_claims: true,
            excluded: false,
            deleting: false,
        };
        self.facts.sets.insert(key(path), facts);
        self
    }

    pub(super) fn excluded(mut self, path: &str) -> Self {
        self.facts.sets.get_mut(&key(path)).unwrap().excluded = true;
        self
    }

    /// A backup that somebody wrote, with the time of its newest complete point.
    pub(super) fn by_hand(mut self, path: &str, set: &str, newest: Option<&str>) -> Self {
        let (namespace, name) = key(path);
        self.add(&json!({
            "apiVersion": "backup.sts-backup.io/v1alpha1", "kind": "StatefulSetBackup",
            "metadata": { "namespace": namespace, "name": name },
            "spec": { "statefulSetRef": { "name": set } },
        }));
        self.backup_mut(path).newest = newest.map(|time| time.parse().unwrap());
        self
    }

    /// Its runs begin by themselves.
    pub(super) fn scheduled(mut self, path: &str) -> Self {
        Arc::make_mut(&mut self.backup_mut(path).object).spec.schedule = Some("@daily".to_owned());
        self
    }

    fn policy(mut self, name: &str, spec: &Value) -> Self {
        self.write_policy(name, spec);
        self
    }

    fn hook_profile(mut self, name: &str, command: &str) -> Self {
        let hook = serde_json::from_value(json!({ "command": [command] })).unwrap();
        let profiles = BTreeMap::from([(name.to_owned(), HookProfile { pre: Some(hook), post: None })]);
        self.facts.hook_profiles = Arc::new(profiles);
        self
    }

    fn write_policy(&mut self, name: &str, spec: &Value) {
        let old = self.facts.policies.iter().find(|policy| policy.name == name);
        let uid = old.map(|policy| policy.uid.clone());
        let uid = uid.unwrap_or_else(|| self.uid());
        let object = json!({
            "apiVersion": "backup.sts-backup.io/v1alpha1", "kind": "StatefulSetBackupPolicy",
            "metadata": { "name": name, "uid": uid, "generation": 1 }, "spec": spec,
        });
        let object: StatefulSetBackupPolicy = serde_json::from_value(object).unwrap();
        self.facts.policies.retain(|policy| policy.name != name);
        let facts = PolicyFacts { name: name.to_owned(), uid, deleting: false, object: Arc::new(object) };
        self.facts.policies.push(facts);
    }

    fn uid(&mut self) -> String {
        self.uids += 1;
        format!("uid-{}", self.uids)
    }

    fn add(&mut self, manifest: &Value) {
        let mut manifest = manifest.clone();
        manifest["metadata"]["uid"] = json!(self.uid());
        let object: StatefulSetBackup = serde_json::from_value(manifest).unwrap();
        self.facts.backups.push(backup_facts(Arc::new(object)));
    }

    fn backup_mut(&mut self, path: &str) -> &mut BackupFacts {
        self.facts.backups.iter_mut().find(|backup| backup.key == key(path)).unwrap()
    }

    fn plans(&self) -> Vec<PolicyPlan<'_>> {
        next_policy_steps(&self.facts, now())
    }

    /// Does what the API server does at a step; whether it was done.
    fn perform(&mut self, policy: &PolicyFacts, step: &Step, has_run: bool) -> bool {
        let at = self.facts.backups.iter().position(|backup| backup.key == *step.key());
        let is_this = |uid: &String, at: usize| self.facts.backups[at].uid == *uid;
        match (step, at) {
            (Step::Create(wanted), None) => self.add(&manifest(policy, wanted, None)),
            (Step::Update { wanted, uid, .. }, Some(at)) if is_this(uid, at) => {
                let old = self.facts.backups.remove(at);
                let applied = manifest(policy, wanted, Some(uid));
                let mut object = self.foreign.get(uid).cloned().unwrap_or_else(|| json!({}));
                merge(&mut object, &applied);
                let object: StatefulSetBackup = serde_json::from_value(object).unwrap();
                let facts = backup_facts(Arc::new(object));
                self.facts.backups.push(BackupFacts { newest: old.newest, deleting: old.deleting, ..facts });
            }
            (Step::Delete { uid, .. }, Some(at)) if is_this(uid, at) => {
                if has_run {
                    self.facts.backups[at].deleting = true;
                } else {
                    self.facts.backups.remove(at);
                }
            }
            (Step::Create(_), Some(at)) => {
                return self.facts.backups[at].owner.as_ref() == Some(&policy.uid);
            }
            (Step::Update { .. } | Step::Delete { .. }, _) => return false,
        }
        true
    }

    /// Does all steps until there is nothing more to do.
    fn settle(&mut self) {
        for _ in 0..20 {
            // The garbage collector, and runs that end.
            let policies: Vec<String> = self.facts.policies.iter().map(|policy| policy.uid.clone()).collect();
            self.facts.backups.retain(|backup| {
                !backup.deleting && backup.owner.as_ref().is_none_or(|owner| policies.contains(owner))
            });
            let facts = self.facts();
            let plans = next_policy_steps(&facts, now());
            if plans.iter().all(|plan| plan.steps.is_empty()) {
                return;
            }
            for plan in &plans {
                for step in &plan.steps {
                    self.perform(plan.policy, step, false);
                }
            }
        }
        let left: Vec<Step> = self.plans().into_iter().flat_map(|plan| plan.steps).collect();
        assert!(left.is_empty(), "it does not come to an end: {left:?}");
    }

    /// The backups by namespace and name, with their schedules.
    fn backups(&self) -> BTreeMap<String, String> {
        let show = |backup: &BackupFacts| {
            let schedule = backup.object.spec.schedule.clone().unwrap_or_default();
            (format!("{}/{}", backup.key.0, backup.key.1), schedule)
        };
        self.facts.backups.iter().map(show).collect()
    }

    fn status(&self, policy: &str) -> StatefulSetBackupPolicyStatus {
        let plans = self.plans();
        let plan = plans.iter().find(|plan| plan.policy.name == policy).unwrap();
        next_status(plan, &Results::default(), now())
    }
}

fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (name, value) in from {
                merge(into.entry(name.clone()).or_insert(Value::Null), value);
            }
        }
        (into, from) => into.clone_from(from),
    }
}

fn daily() -> Value {
    json!({ "template": { "spec": { "schedule": "@daily" } } })
}

/// The path of a policy's backup of a `StatefulSet`.
fn made(policy: &str, set: &str) -> String {
    let (namespace, name) = key(set);
    format!("{namespace}/{}", policy_backup_name(policy, &name))
}

fn condition(status: &StatefulSetBackupPolicyStatus, type_: &str) -> (String, String, String) {
    let found = conditions::find(&status.conditions, type_).unwrap();
    (found.status.clone(), found.reason.clone(), found.message.clone())
}

#[test]
fn a_policy_selects_by_namespace_labels_names_and_claims() {
    let mut cluster = world()
        .namespace("shop", &[("env", "prod")])
        .namespace("bank", &[("env", "prod")])
        .namespace("dev", &[("env", "dev")])
        .namespace("out", &[("env", "prod")])
        .excluded_namespace("out")
        .set("shop/db", &[("tier", "gold")])
        .set("shop/cache", &[("tier", "tin")])
        .set("shop/queue", &[("tier", "gold")])
        .set("shop/opted-out", &[("tier", "gold")])
        .excluded("shop/opted-out")
        .set("bank/db", &[("tier", "gold")])
        .set("bank/queue", &[("tier", "gold")])
        .set("bank/web", &[("tier", "gold")])
        .set("dev/db", &[("tier", "gold")])
        .set("out/db", &[("tier", "gold")])
        .set("unknown/db", &[("tier", "gold")])
        .policy(
            "gold",
            &json!({
                "namespaceSelector": { "matchLabels": { "env": "prod" } },
                "statefulSetSelector": { "matchExpressions": [{ "key": "tier", "operator": "NotIn", "values": ["tin"] }] },
                "exclude": ["bank/db", "queue"],
                "template": { "spec": { "schedule": "@daily" } },
            }),
        );
    cluster.facts.sets.get_mut(&key("bank/web")).unwrap().has_claims = false;
    cluster.settle();
    assert_eq!(cluster.backups(), [(made("gold", "shop/db"), "@daily".to_owned())].into());

    let mut cluster = world().namespace("shop", &[]).set("shop/db", &[]).policy("all", &daily());
    cluster.settle();
    assert_eq!(cluster.backups().len(), 1, "without selectors all are selected");
}

#[test]
fn a_backup_says_what_the_template_says_and_whose_it_is() {
    let mut cluster =
        world().namespace("shop", &[]).set("shop/db", &[]).hook_profile("postgres", "/freeze").policy(
            "gold",
            &json!({ "template": {
                "labels": { "team": "dba" }, "hookProfile": "postgres",
                "spec": { "schedule": "*/30 * * * *", "retentionPolicy": { "keepLast": 3 } },
            } }),
        );
    cluster.settle();
    let backup = &cluster.facts.backups[0];
    assert_eq!(backup.key, key(&made("gold", "shop/db")));
    assert_eq!(backup.owner.as_ref(), Some(&cluster.facts.policies[0].uid));
    let object = &backup.object;
    assert_eq!((&*object.labels()["team"], &*object.labels()[FROM_POLICY_LABEL]), ("dba", "gold"));
    assert_eq!(object.spec.retention_policy.unwrap().keep_last, Some(3));
    assert_eq!(object.spec.pre_backup_hook.as_ref().unwrap().command, ["/freeze"]);
    assert!(object.owner_references()[0].controller == Some(true));
}

#[test]
fn a_schedule_without_a_spread_gets_a_tenth_of_its_smallest_gap() {
    for (template, spread) in [
        (json!({ "schedule": "@daily" }), Some(600)),
        (json!({ "schedule": "*/30 * * * *" }), Some(180)),
        (json!({ "schedule": "0,5 0 * * *" }), Some(30)),
        (json!({ "schedule": "* * * * *" }), Some(6)),
        (json!({ "schedule": "@daily", "spread": "0s" }), Some(0)),
        (json!({ "schedule": "@daily", "spread": "1h" }), Some(3600)),
        (json!({}), None),
    ] {
        let policy = json!({ "template": { "spec": template } });
        let mut cluster = world().namespace("shop", &[]).set("shop/db", &[]).policy("gold", &policy);
        cluster.settle();
        let found = cluster.facts.backups[0].object.spec.spread.map(std::time::Duration::from);
        assert_eq!(found.map(|found| found.as_secs()), spread, "{template}");
    }
}

#[test]
fn a_change_of_the_template_reaches_every_backup_and_a_change_of_one_set_only_its_own() {
    let mut cluster = world()
        .namespace("shop", &[])
        .set("shop/a", &[("tier", "gold")])
        .set("shop/b", &[("tier", "gold")])
        .policy("gold", &daily());
    cluster.settle();
    cluster.write_policy("gold", &json!({ "template": { "spec": { "schedule": "@hourly" } } }));
    let steps = cluster.plans().remove(0).steps;
    assert!(steps.len() == 2 && steps.iter().all(|step| matches!(step, Step::Update { .. })), "{steps:?}");
    cluster.settle();
    assert!(cluster.backups().values().all(|schedule| schedule == "@hourly"));

    cluster.facts.sets.get_mut(&key("shop/a")).unwrap().excluded = true;
    let steps = cluster.plans().remove(0).steps;
    let [Step::Delete { key: deleted, .. }] = &steps[..] else { panic_with(&steps) };
    assert_eq!(*deleted, key(&made("gold", "shop/a")));
}

#[expect(clippy::panic, reason = "what the test found instead")]
fn panic_with(steps: &[Step]) -> ! {
    panic!("other steps: {steps:?}")
}

#[test]
fn a_backup_whose_stateful_set_is_gone_goes_and_comes_back_under_the_same_name() {
    let mut cluster = world().namespace("shop", &[]).set("shop/db", &[]).policy("gold", &daily());
    cluster.settle();
    let before = cluster.backups();
    cluster.facts.sets.clear();
    cluster.settle();
    assert_eq!(cluster.backups(), BTreeMap::new());
    cluster = cluster.set("shop/db", &[]);
    cluster.settle();
    assert_eq!(cluster.backups(), before);
}

#[test]
fn nothing_is_done_in_a_namespace_that_is_not_known_or_is_being_deleted() {
    let mut cluster = world().namespace("shop", &[]).set("shop/db", &[]).policy("gold", &daily());
    cluster.settle();
    cluster.facts.namespaces.clear();
    cluster.facts.sets.clear();
    assert!(cluster.plans()[0].steps.is_empty(), "{:?}", cluster.plans()[0].steps);
}

#[test]
fn of_two_policies_the_one_with_the_higher_priority_backs_up_and_both_say_so() {
    let mut cluster = world()
        .namespace("shop", &[])
        .set("shop/db", &[])
        .policy("b-silver", &daily())
        .policy("c-gold", &json!({ "priority": 5, "template": { "spec": { "schedule": "@hourly" } } }));
    cluster.settle();
    assert_eq!(cluster.backups(), [(made("c-gold", "shop/db"), "@hourly".to_owned())].into());
    for (policy, other, prevails, protected) in
        [("b-silver", "c-gold", true, 1), ("c-gold", "b-silver", false, 1)]
    {
        let status = cluster.status(policy);
        let [conflict] = &status.conflicts[..] else { unreachable!("{status:?}") };
        assert_eq!((conflict.policy.as_str(), conflict.prevails), (other, prevails));
        assert_eq!((conflict.stateful_sets, conflict.example.as_str()), (1, "shop/db"));
        assert_eq!((status.matched, status.protected), (1, protected), "{policy}");
        let notes = change_notes(&StatefulSetBackupPolicyStatus::default(), &status);
        assert!(notes.iter().any(|note| note.reason == "Overlap"), "{notes:?}");
        assert!(change_notes(&status, &status).is_empty());
    }

    // With the same priority the first by name.
    cluster.write_policy("a-bronze", &json!({ "priority": 5, "template": { "spec": {} } }));
    let plans = cluster.plans();
    let of = |name: &str| plans.iter().find(|plan| plan.policy.name == name).unwrap();
    assert!(of("a-bronze").steps.is_empty(), "the other's backup is still there");
    assert!(matches!(of("a-bronze").selected[0].verdict, Verdict::Awaits { .. }));
    assert!(matches!(of("c-gold").steps[..], [Step::Delete { .. }]));
    assert_eq!(of("c-gold").selected[0].verdict, Verdict::Yields { to: "a-bronze" });
    cluster.settle();
    assert_eq!(cluster.backups().into_keys().collect::<Vec<_>>(), [made("a-bronze", "shop/db")]);
}

#[test]
fn a_backup_written_by_hand_is_left_alone_and_takes_the_policy_s_place() {
    let mut cluster = world().namespace("shop", &[]).set("shop/db", &[]).policy("gold", &daily());
    cluster.settle();
    cluster = cluster.by_hand("shop/mine", "db", None);
    cluster.settle();
    assert_eq!(cluster.backups(), [("shop/mine".to_owned(), String::new())].into());
}

#[test]
fn a_backup_written_by_hand_protects_only_while_it_meets_the_rpo() {
    for (rpo, newest, protected, overdue) in [
        (Some("24h"), None, 0, 1),
        (Some("24h"), Some("2026-01-08T23:59:59Z"), 0, 1),
        (Some("24h"), Some("2026-01-09T00:00:01Z"), 1, 0),
        (None, Some("2026-01-09T00:00:01Z"), 0, 0),
    ] {
        let mut policy = daily();
        policy["rpo"] = json!(rpo);
        let cluster = world()
            .namespace("shop", &[])
            .set("shop/db", &[])
            .by_hand("shop/mine", "db", newest)
            .policy("gold", &policy);
        let status = cluster.status("gold");
        assert_eq!((status.matched, status.protected, status.overdue), (1, protected, overdue), "{newest:?}");
        let names = |count: i64| if count == 1 { vec!["shop/db".to_owned()] } else { vec![] };
        assert_eq!(status.first_unprotected, names(1 - protected));
        assert_eq!(status.first_overdue, names(overdue));
        assert!(cluster.plans()[0].steps.is_empty());

        // It is left alone as long as it is there, and the status and an Event say what that costs.
        let (is_so, _, message) = condition(&status, APPLIED);
        assert_eq!(is_so, "True");
        assert_eq!(message.contains("1 left to backups written by hand"), protected == 0, "{message}");
        let note = idle_note(&cluster.plans()[0], &StatefulSetBackupPolicyStatus::default());
        let said = note.map(|note| (note.kind, note.message.contains("shop/db")));
        assert_eq!(said, (protected == 0).then_some(("Warning", true)));
        assert_eq!(idle_note(&cluster.plans()[0], &status), None, "it is said once");
    }
}

#[test]
fn a_scheduled_backup_written_by_hand_needs_no_rpo_and_one_beside_it_is_no_matter() {
    let mut cluster = world()
        .namespace("shop", &[])
        .set("shop/db", &[])
        .by_hand("shop/a-now-and-then", "db", None)
        .by_hand("shop/nightly", "db", None)
        .policy("gold", &daily());
    cluster = cluster.scheduled("shop/nightly");
    let status = cluster.status("gold");
    assert_eq!((status.matched, status.protected), (1, 1));
    assert_eq!(idle_note(&cluster.plans()[0], &StatefulSetBackupPolicyStatus::default()), None);
}

#[test]
fn a_backup_of_a_template_without_a_schedule_protects_while_it_meets_the_rpo() {
    let policy = json!({ "rpo": "24h", "template": { "spec": {} } });
    let mut cluster = world().namespace("shop", &[]).set("shop/db", &[]).policy("gold", &policy);
    cluster.settle();
    assert_eq!(cluster.status("gold").protected, 0);
    cluster.facts.backups[0].newest = Some("2026-01-09T00:00:01Z".parse().unwrap());
    assert_eq!(cluster.status("gold").protected, 1);
    assert_eq!(cluster.plans()[0].look_again, Some("2026-01-10T00:00:01Z".parse().unwrap()));
}

/// Writes an owner on a backup.
fn own(cluster: &mut Cluster, path: &str, owner: &str) {
    cluster.backup_mut(path).owner = Some(owner.to_owned());
}

#[test]
fn a_surplus_backup_of_another_policy_takes_nothing_from_the_first_one() {
    let mut cluster = world()
        .namespace("shop", &[])
        .set("shop/db", &[])
        .policy("gold", &daily())
        .policy("silver", &daily());
    cluster.settle();
    let silver = cluster.facts.policies[1].uid.clone();
    cluster = cluster.by_hand("shop/surplus", "db", None);
    own(&mut cluster, "shop/surplus", &silver);
    let plans = cluster.plans();
    let of = |name: &str| plans.iter().find(|plan| plan.policy.name == name).unwrap();
    assert_eq!(of("gold").steps, []);
    assert_eq!(of("gold").selected[0].verdict, Verdict::Backed { idle: false });
    assert!(matches!(of("silver").steps[..], [Step::Delete { .. }]), "it is its owner's to delete");
    cluster.settle();
    assert_eq!(cluster.backups().into_keys().collect::<Vec<_>>(), [made("gold", "shop/db")]);
}

#[test]
fn an_owner_that_is_no_policy_makes_a_backup_one_written_by_hand() {
    let mut cluster = world()
        .namespace("shop", &[])
        .set("shop/db", &[])
        .by_hand("shop/mine", "db", None)
        .policy("gold", &daily());
    own(&mut cluster, "shop/mine", "uid-of-nobody");
    let plans = cluster.plans();
    assert_eq!(plans[0].steps, []);
    let verdict = &plans[0].selected[0].verdict;
    assert!(matches!(verdict, Verdict::HandWritten { idle: true, .. }), "{verdict:?}");
}

fn update(version: &str) -> Step {
    let mut cluster = world().namespace("shop", &[]).set("shop/db", &[]).policy("gold", &daily());
    cluster.settle();
    cluster.write_policy("gold", &json!({ "template": { "spec": { "schedule": "@hourly" } } }));
    Arc::make_mut(&mut cluster.facts.backups[0].object).metadata.resource_version = Some(version.to_owned());
    cluster.plans().remove(0).steps.remove(0)
}

#[test]
fn an_update_that_does_not_take_is_a_failure_that_waits_longer_each_time() {
    let step = update("12");
    assert!(matches!(&step, Step::Update { version: Some(version), .. } if version == "12"), "{step:?}");
    let mut failures = HashMap::new();
    for times in 1..4 {
        let mut results = Results::default();
        assert!(!take_down(&mut results, &mut failures, (0, &step), Ok(Outcome::Unchanged)));
        assert!(results.failed[&0].contains("mutating webhook") && results.done.is_empty());
        let failure = &failures[step.key()];
        assert_eq!((failure.times, failure.hash.as_deref()), (times, step.hash()));
    }
    let mut results = Results::default();
    assert!(take_down(&mut results, &mut failures, (0, &step), Ok(Outcome::Done)));
    assert!(results.done.contains(&0) && failures.is_empty());
}

#[test]
fn what_was_created_before_is_there_without_an_event() {
    let cluster = world().namespace("shop", &[]).set("shop/db", &[]).policy("gold", &daily());
    let plans = cluster.plans();
    let (mut results, mut failures) = (Results::default(), HashMap::new());
    let step = (0, &plans[0].steps[0]);
    assert!(take_down(&mut results, &mut failures, step, Ok(Outcome::Unchanged)));
    assert!(failures.is_empty());
    assert_eq!(write_notes(&plans[0], &results), []);
    let status = next_status(&plans[0], &results, now());
    assert_eq!((status.protected, condition(&status, APPLIED).0.as_str()), (1, "True"));

    let mut results = Results::default();
    assert!(take_down(&mut results, &mut failures, step, Ok(Outcome::Outdated)));
    assert!(results.is_outdated && results.failed.is_empty());
    assert_eq!(next_status(&plans[0], &results, now()).protected, 0);
}

#[test]
fn the_plan_says_when_the_next_stateful_set_becomes_overdue() {
    let mut policy = daily();
    policy["rpo"] = json!("48h");
    let cluster = world()
        .namespace("shop", &[])
        .set("shop/a", &[])
        .set("shop/b", &[])
        .by_hand("shop/a", "a", Some("2026-01-09T06:00:00Z"))
        .by_hand("shop/b", "b", Some("2026-01-09T05:00:00Z"))
        .policy("gold", &policy);
    assert_eq!(cluster.plans()[0].look_again, Some("2026-01-11T05:00:00Z".parse().unwrap()));
}

#[test]
fn an_object_that_has_the_name_of_a_backup_is_not_touched() {
    let path = made("gold", "shop/db");
    let mut cluster = world()
        .namespace("shop", &[])
        .set("shop/db", &[])
        .by_hand(&path, "other", None)
        .policy("gold", &daily());
    cluster.settle();
    assert_eq!(cluster.backups(), [(path.clone(), String::new())].into());
    let status = cluster.status("gold");
    let (is_so, reason, message) = condition(&status, APPLIED);
    assert_eq!((is_so.as_str(), reason.as_str()), ("False", "NameTaken"));
    assert!(message.contains(&path), "{message}");
    assert_eq!((status.matched, status.protected), (1, 0));
}

#[test]
fn backups_that_a_deleted_policy_of_the_name_left_behind_are_taken_over() {
    let mut cluster = world().namespace("shop", &[]).set("shop/db", &[]).policy("gold", &daily());
    cluster.settle();
    // kubectl delete --cascade=orphan
    let backup = &mut cluster.facts.backups[0];
    Arc::make_mut(&mut backup.object).metadata.owner_references = None;
    backup.owner = None;
    cluster.facts.policies.clear();
    cluster.write_policy("gold", &daily());
    cluster.settle();
    assert_eq!(cluster.facts.backups[0].owner.as_ref(), Some(&cluster.facts.policies[0].uid));
    assert_eq!(cluster.backups().len(), 1);
}

#[test]
fn a_spec_that_cannot_be_used_says_why_and_leaves_the_backups_as_they_are() {
    let template = |template: Value| json!({ "template": template });
    for (spec, reason, words) in [
        (
            template(json!({ "hookProfile": "nowhere", "spec": {} })),
            "HookProfileNotFound",
            "has no hook_profiles.nowhere",
        ),
        (template(json!({ "spec": { "schedule": "61 * * * *" } })), "InvalidSchedule", "61"),
        (
            template(json!({ "spec": { "timeZone": "Nowhere", "schedule": "@daily" } })),
            "InvalidSchedule",
            "Nowhere",
        ),
        (
            json!({
                "statefulSetSelector": { "matchExpressions": [{ "key": "a", "operator": "Near" }] },
                "template": { "spec": {} },
            }),
            "InvalidSelector",
            "statefulSetSelector cannot be used",
        ),
    ] {
        let mut cluster = world().namespace("shop", &[]).set("shop/db", &[]).policy("gold", &daily());
        cluster.settle();
        let before = cluster.backups();
        cluster.write_policy("gold", &spec);
        // Also one that would be new.
        cluster = cluster.set("shop/new", &[]);
        cluster.settle();
        assert_eq!(cluster.backups(), before, "{spec}");
        let status = cluster.status("gold");
        let (is_so, found, message) = condition(&status, READY);
        assert_eq!((is_so.as_str(), found.as_str()), ("False", reason));
        assert!(message.contains(words), "{message}");
        assert_eq!(condition(&status, APPLIED).0, "False");
        let notes = change_notes(&StatefulSetBackupPolicyStatus::default(), &status);
        assert_eq!(notes.iter().filter(|note| note.reason == reason).count(), 1, "{notes:?}");
    }
}

#[test]
fn what_the_template_leaves_open_others_may_set() {
    let mut cluster = world().namespace("shop", &[]).set("shop/db", &[]).policy(
        "gold",
        &json!({ "template": { "spec": { "schedule": "@daily", "volumeClaimTemplates": ["data"] } } }),
    );
    cluster.settle();
    let edit = |cluster: &mut Cluster, edit: fn(&mut StatefulSetBackup)| {
        edit(Arc::make_mut(&mut cluster.facts.backups[0].object));
        cluster.plans().remove(0).steps.len()
    };
    assert_eq!(edit(&mut cluster, |backup| backup.spec.suspend = true), 0);
    let status = cluster.status("gold");
    assert_eq!((status.matched, status.protected), (1, 0), "a suspended backup protects nothing");
    assert_eq!(edit(&mut cluster, |backup| backup.spec.starting_deadline_seconds = Some(5)), 0);
    assert_eq!(edit(&mut cluster, |backup| backup.spec.volume_claim_templates.push("log".to_owned())), 0);
    assert_eq!(edit(&mut cluster, |backup| backup.spec.schedule = Some("@hourly".to_owned())), 1);
    assert_eq!(edit(&mut cluster, |backup| backup.spec.schedule = Some("@daily".to_owned())), 0);
    let unmark = |backup: &mut StatefulSetBackup| {
        backup.annotations_mut().insert(TEMPLATE_HASH_ANNOTATION.to_owned(), "other".to_owned());
    };
    assert_eq!(edit(&mut cluster, unmark), 1, "a field that left the template may still be there");
}

#[test]
fn a_status_names_some_and_counts_all() {
    let mut cluster = world().namespace("shop", &[]).policy("gold", &{
        let mut policy = daily();
        policy["rpo"] = json!("24h");
        policy
    });
    for at in 0..100 {
        cluster = cluster.set(&format!("shop/s{at:03}"), &[]);
    }
    let plans = cluster.plans();
    let done = Results { done: (0..100).collect(), ..Results::default() };
    let status = next_status(&plans[0], &done, now());
    assert_eq!((status.matched, status.protected, status.overdue), (100, 100, 100));
    assert_eq!((status.first_unprotected.len(), status.first_overdue.len()), (0, 20));
    assert_eq!(condition(&status, APPLIED).0, "True");
    let notes = write_notes(&plans[0], &done);
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert!(notes[0].message.ends_with(" and 95 more"), "{}", notes[0].message);

    let failed = Results {
        failed: [(7, "no quota".to_owned())].into(),
        done: (8..100).collect(),
        ..Results::default()
    };
    let status = next_status(&plans[0], &failed, now());
    assert_eq!((status.protected, status.first_unprotected.len()), (92, 8));
    let (is_so, reason, message) = condition(&status, APPLIED);
    assert_eq!((is_so.as_str(), reason.as_str()), ("False", "WriteFailed"));
    assert!(message.contains("no quota") && message.contains("1 of 100"), "{message}");
}

/// Something that happens. The numbers choose which of several.
#[derive(Clone, Copy, Debug)]
enum Happening {
    /// The controller takes so many steps of what it has decided, and is then interrupted: by a crash, or to look anew.
    Steps(u8),
    /// The controller sees what the cluster is by now.
    See,
    SetComes(u8),
    SetGoes(u8),
    Label(u8),
    OptOut(u8),
    Policy(u8, u8),
    PolicyGoes(u8),
    Collect,
    ByHand(u8),
    ByHandGoes(u8),
    RunEnds,
    Edit(u8),
}

fn happening() -> impl Strategy<Value = Happening> {
    let any = any::<u8>;
    prop_oneof![
        8 => any().prop_map(Happening::Steps),
        8 => Just(Happening::See),
        3 => any().prop_map(Happening::SetComes),
        2 => any().prop_map(Happening::SetGoes),
        2 => any().prop_map(Happening::Label),
        1 => any().prop_map(Happening::OptOut),
        3 => (any(), any()).prop_map(|(which, what)| Happening::Policy(which, what)),
        1 => any().prop_map(Happening::PolicyGoes),
        2 => Just(Happening::Collect),
        1 => any().prop_map(Happening::ByHand),
        1 => any().prop_map(Happening::ByHandGoes),
        2 => Just(Happening::RunEnds),
        1 => any().prop_map(Happening::Edit),
    ]
}

/// The cluster, and what the controller has seen of it.
struct Model {
    cluster: Cluster,
    seen: World,
    /// The controller sees at once what has changed.
    sees_all: bool,
}

const SETS: [&str; 4] = ["shop/a", "shop/b", "bank/a", "bank/b"];
const POLICIES: [&str; 3] = ["gold", "silver", "tin"];

impl Model {
    fn new(sees_all: bool) -> Self {
        let cluster = world().namespace("shop", &[("env", "prod")]).namespace("bank", &[]);
        Self { seen: cluster.facts(), cluster, sees_all }
    }

    fn happen(&mut self, happening: Happening) {
        if self.sees_all {
            self.seen = self.cluster.facts();
        }
        let of = |choice: u8| key(SETS[usize::from(choice) % SETS.len()]);
        let facts = &mut self.cluster.facts;
        match happening {
            Happening::Steps(count) => self.steps(count),
            Happening::See => self.seen = self.cluster.facts(),
            Happening::SetComes(choice) => {
                let path = SETS[usize::from(choice) % SETS.len()];
                self.cluster = std::mem::take(&mut self.cluster).set(path, &[("tier", "gold")]);
            }
            Happening::SetGoes(choice) => drop(facts.sets.remove(&of(choice))),
            Happening::Label(choice) => {
                if let Some(set) = facts.sets.get_mut(&of(choice)) {
                    set.labels = labels(if choice > 127 { &[("tier", "gold")] } else { &[] });
                }
            }
            Happening::OptOut(choice) => {
                if let Some(set) = facts.sets.get_mut(&of(choice)) {
                    set.excluded = choice > 127;
                }
            }
            Happening::Policy(which, what) => {
                let selector = match what % 3 {
                    0 => json!({ "statefulSetSelector": { "matchLabels": { "tier": "gold" } } }),
                    1 => json!({ "namespaceSelector": { "matchLabels": { "env": "prod" } } }),
                    _ => json!({}),
                };
                let schedule = ["@daily", "@hourly", "not a schedule"][usize::from(what / 3) % 3];
                let spec = json!({ "schedule": schedule });
                let mut policy =
                    json!({ "priority": what % 4, "exclude": ["b"], "template": { "spec": spec } });
                if what % 5 > 0 {
                    policy["exclude"] = json!([]);
                }
                merge(&mut policy, &selector);
                let name = POLICIES[usize::from(which) % POLICIES.len()];
                self.cluster.write_policy(name, &policy);
            }
            Happening::PolicyGoes(choice) => {
                let name = POLICIES[usize::from(choice) % POLICIES.len()];
                facts.policies.retain(|policy| policy.name != name);
            }
            Happening::Collect => self.collect(),
            Happening::ByHand(choice) => {
                let (namespace, set) = of(choice);
                // Some take the name of a policy's backup.
                let name =
                    if choice > 127 { policy_backup_name(POLICIES[0], &set) } else { "mine".to_owned() };
                if !facts.backups.iter().any(|backup| backup.key == (namespace.clone(), name.clone())) {
                    let path = format!("{namespace}/{name}");
                    self.cluster = std::mem::take(&mut self.cluster).by_hand(&path, &set, None);
                }
            }
            Happening::ByHandGoes(choice) => {
                let namespace = of(choice).0;
                facts.backups.retain(|backup| backup.owner.is_some() || backup.key.0 != namespace);
            }
            Happening::RunEnds => facts.backups.retain(|backup| !backup.deleting),
            Happening::Edit(choice) => {
                let at = usize::from(choice) % facts.backups.len().max(1);
                if let Some(backup) = facts.backups.get_mut(at).filter(|backup| backup.owner.is_some()) {
                    let object = Arc::make_mut(&mut backup.object);
                    object.spec.schedule = Some("@weekly".to_owned());
                    object.spec.starting_deadline_seconds = Some(7);
                    let foreign = json!({ "spec": { "schedule": "@weekly", "startingDeadlineSeconds": 7 } });
                    self.cluster.foreign.insert(backup.uid.clone(), foreign);
                }
            }
        }
    }

    /// Backups whose policy is gone go, some time later.
    fn collect(&mut self) {
        let facts = &mut self.cluster.facts;
        let policies: Vec<String> = facts.policies.iter().map(|policy| policy.uid.clone()).collect();
        facts.backups.retain(|backup| backup.owner.as_ref().is_none_or(|owner| policies.contains(owner)));
    }

    fn steps(&mut self, count: u8) {
        let seen = self.seen.clone();
        let steps = next_policy_steps(&seen, now())
            .into_iter()
            .flat_map(|plan| plan.steps.into_iter().map(move |step| (plan.policy, step)));
        for (at, (policy, step)) in steps.take(usize::from(count % 8)).enumerate() {
            let by_hand = self.by_hand();
            self.cluster.perform(policy, &step, count > 127 && at == 0);
            assert!(
                self.by_hand() == by_hand,
                "{step:?} of {} touched what is not the policy's",
                policy.name
            );
            self.check();
        }
    }

    fn by_hand(&self) -> Vec<Value> {
        let by_hand = self.cluster.facts.backups.iter().filter(|backup| backup.owner.is_none());
        by_hand.map(|backup| json!(*backup.object)).collect()
    }

    /// What must hold after every write, where the controller sees all.
    fn check(&self) {
        if !self.sees_all {
            return;
        }
        for path in SETS {
            let of_set = |backup: &&BackupFacts| backup.set == key(path) && backup.owner.is_some();
            let owned = self.cluster.facts.backups.iter().filter(of_set).count();
            assert!(owned <= 1, "{path} has {owned} backups of policies");
        }
    }

    /// What must hold once nothing more happens.
    fn settle(&mut self) {
        self.cluster.settle();
        self.sees_all = true;
        self.check();
        let facts = self.cluster.facts();
        let plans = next_policy_steps(&facts, now());
        for path in SETS {
            let selecting = plans.iter().filter(|plan| {
                let is_this = |set: sts_backup_api::coverage::SetName<'_>| {
                    (set.namespace, set.name) == path.split_once('/').unwrap()
                };
                plan.selected.iter().any(|selected| is_this(selected.set))
            });
            // Plans are in the order of precedence.
            let first = selecting.map(|plan| plan.policy).next();
            let owned: Vec<&BackupFacts> = facts
                .backups
                .iter()
                .filter(|backup| backup.set == key(path) && backup.owner.is_some())
                .collect();
            let by_hand = |backup: &BackupFacts| backup.set == key(path) && backup.owner.is_none();
            match (first, owned.as_slice()) {
                (None, owned) => {
                    assert!(owned.is_empty(), "{path} is not selected, and backed up by {owned:?}");
                }
                (Some(policy), [backup]) => {
                    assert_eq!(backup.owner.as_ref(), Some(&policy.uid), "{path}");
                    assert!(!facts.backups.iter().any(by_hand), "{path} has one by hand as well");
                    let template = policy.object.spec.template.spec_for(&backup.set.1);
                    if template.schedule.as_deref() != Some("not a schedule") {
                        assert_eq!(backup.object.spec.schedule, template.schedule, "{path}");
                    }
                }
                (Some(policy), owned) => {
                    let taken = (key(path).0, policy_backup_name(&policy.name, &key(path).1));
                    let is_taken = facts.backups.iter().any(|backup| backup.key == taken);
                    let unusable = policy.object.spec.template.spec_for("").schedule.as_deref()
                        == Some("not a schedule");
                    let excused = facts.backups.iter().any(by_hand) || is_taken || unusable;
                    assert!(
                        owned.is_empty() && excused,
                        "{path} of {} is backed up by {owned:?}",
                        policy.name
                    );
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn a_crash_between_any_two_writes_converges_and_no_two_policies_back_up_one_stateful_set(
        happenings in prop::collection::vec(happening(), 0..60),
    ) {
        let mut model = Model::new(true);
        for happening in happenings {
            model.happen(happening);
        }
        model.settle();
    }

    #[test]
    fn caches_that_lag_do_no_harm(happenings in prop::collection::vec(happening(), 0..60)) {
        let mut model = Model::new(false);
        for happening in happenings {
            model.happen(happening);
        }
        model.settle();
    }
}
