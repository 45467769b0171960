//! Watches the cluster, and tells what is known of it as plain facts: the only room that asks the API server questions.
//!
//! It judges nothing. Of each object it keeps what decisions need, and nothing else. The plugin, which reads once and does
//! not watch, makes its facts here too ([`World::of`]).

use std::borrow::Borrow;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

use futures::{StreamExt, TryStreamExt};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Namespace;
use kube::api::ObjectMeta;
use kube::core::PartialObjectMeta;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::watcher::{Config as WatcherConfig, Error as WatchError, Event, watcher};
use kube::runtime::{WatchStreamExt, reflector::store::WriterDropped};
use kube::{Api, Client, Resource, ResourceExt};
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use sts_backup_api::backup::{StatefulSetBackup, StatefulSetBackupStatus};
use sts_backup_api::coverage::newest_complete;
use sts_backup_api::names::{
    ALLOW_BACKUP_FROM_ANNOTATION, EXCLUDE_ANNOTATION, FROM_POLICY_LABEL, TEMPLATE_HASH_ANNOTATION,
};
use sts_backup_api::policy::StatefulSetBackupPolicy;
use sts_backup_service::telemetry;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::warn;

use crate::backup::observe::is_granted_by;
use crate::config::HookProfile;

/// How many objects of a list come at once: what is not kept of them is gone before the next ones come.
const PAGE: u32 = 100;

/// A `StatefulSet`, or a backup: namespace and name.
pub(crate) type Key = (String, String);

/// A `StatefulSet` as far as it is read: whether it has claims is all that matters of its spec.
#[derive(Resource, Clone, Debug, Deserialize)]
#[resource(inherit = "StatefulSet")]
pub(crate) struct KnownSet {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: KnownSetSpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct KnownSetSpec {
    #[serde(default)]
    volume_claim_templates: Vec<IgnoredAny>,
}

/// All that is known at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct World {
    pub(crate) policies: Vec<PolicyFacts>,
    pub(crate) sets: BTreeMap<Key, SetFacts>,
    /// Those that are known, and not being deleted.
    pub(crate) namespaces: HashMap<String, NamespaceFacts>,
    pub(crate) backups: Vec<BackupFacts>,
    /// The hooks that the agent's configuration names.
    pub(super) hook_profiles: Arc<BTreeMap<String, HookProfile>>,
}

/// A policy.
#[derive(Clone, Debug)]
pub(crate) struct PolicyFacts {
    pub(super) name: String,
    pub(crate) uid: String,
    pub(super) deleting: bool,
    pub(crate) object: Arc<StatefulSetBackupPolicy>,
}

/// A `StatefulSet`.
#[derive(Clone, Debug)]
pub(crate) struct SetFacts {
    pub(super) labels: BTreeMap<String, String>,
    pub(super) created: Timestamp,
    pub(crate) has_claims: bool,
    /// It carries the annotation that keeps policies away.
    pub(super) excluded: bool,
    pub(super) deleting: bool,
}

/// A namespace.
#[derive(Clone, Debug, Default)]
pub(crate) struct NamespaceFacts {
    pub(super) labels: BTreeMap<String, String>,
    /// It carries the annotation that keeps policies away.
    pub(super) excluded: bool,
}

/// A backup whose `StatefulSet` is in its own namespace, or in one that grants it.
#[derive(Clone, Debug)]
pub(crate) struct BackupFacts {
    pub(crate) key: Key,
    pub(super) uid: String,
    /// The uid of the policy that owns it; none: somebody wrote it by hand.
    pub(crate) owner: Option<String>,
    /// The policy that its label names.
    pub(crate) from_policy: Option<String>,
    pub(super) set: Key,
    pub(crate) newest: Option<Timestamp>,
    pub(super) deleting: bool,
    pub(crate) object: Arc<StatefulSetBackup>,
}

impl World {
    /// The facts of what was read. A backup of another namespace than its `StatefulSet`'s counts where it may be taken:
    /// else whoever writes one could keep a policy from its work.
    pub(crate) fn of(
        policies: impl IntoIterator<Item = Arc<StatefulSetBackupPolicy>>,
        backups: impl IntoIterator<Item = Arc<StatefulSetBackup>>,
        sets: &[impl Borrow<KnownSet>],
        namespaces: &[impl Borrow<PartialObjectMeta<Namespace>>],
    ) -> Self {
        let namespaces = || namespaces.iter().map(Borrow::borrow);
        let is_granted = |home: &str, to: &str| {
            namespaces().any(|namespace| namespace.name_any() == home && is_granted_by(namespace, to))
        };
        let backups = backups.into_iter().map(backup_facts).filter(|backup| {
            let (own, home) = (&backup.key.0, &backup.set.0);
            own == home || is_granted(home, own)
        });
        Self {
            policies: policies.into_iter().map(policy_facts).collect(),
            backups: backups.collect(),
            sets: sets.iter().map(Borrow::borrow).map(|set| (key_of(set), set_facts(set))).collect(),
            namespaces: namespaces()
                .filter(|namespace| namespace.metadata.deletion_timestamp.is_none())
                .map(|namespace| (namespace.name_any(), namespace_facts(namespace)))
                .collect(),
            hook_profiles: Arc::default(),
        }
    }
}

/// What is watched, as of now.
#[derive(Clone)]
pub(super) struct Stores {
    pub(super) policies: Store<StatefulSetBackupPolicy>,
    backups: Store<StatefulSetBackup>,
    sets: Store<KnownSet>,
    namespaces: Store<PartialObjectMeta<Namespace>>,
    hook_profiles: Arc<BTreeMap<String, HookProfile>>,
}

impl Stores {
    /// Watches in tasks, and notifies of every change of what is kept.
    pub(super) fn watch(
        client: &Client,
        hook_profiles: BTreeMap<String, HookProfile>,
        changed: &Arc<Notify>,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        Self {
            policies: follow(Api::all(client.clone()), (keep_of_policy, is_same_policy), changed, tasks),
            backups: follow(Api::all(client.clone()), (keep_of_backup, is_same_backup), changed, tasks),
            sets: follow(Api::all(client.clone()), (keep_of_set, is_same_set), changed, tasks),
            namespaces: follow(
                Api::all(client.clone()),
                (keep_of_namespace, is_same_namespace),
                changed,
                tasks,
            ),
            hook_profiles: Arc::new(hook_profiles),
        }
    }

    /// Waits until everything was listed once: before that nothing is known to be gone.
    pub(super) async fn ready(&self) -> Result<(), WriterDropped> {
        self.policies.wait_until_ready().await?;
        self.backups.wait_until_ready().await?;
        self.sets.wait_until_ready().await?;
        self.namespaces.wait_until_ready().await
    }

    /// The facts as they are now.
    pub(super) fn observe(&self) -> World {
        let (policies, backups) = (self.policies.state(), self.backups.state());
        World {
            hook_profiles: Arc::clone(&self.hook_profiles),
            ..World::of(policies, backups, &self.sets.state(), &self.namespaces.state())
        }
    }
}

/// Whether all that is kept of two objects is the same.
type IsSame<K> = fn(&K, &K) -> bool;

/// Watches a kind, keeps some of each object, and notifies of every change of that: most changes are of what is dropped.
fn follow<K>(
    api: Api<K>,
    (keep, is_same): (fn(&mut K), IsSame<K>),
    changed: &Arc<Notify>,
    tasks: &mut JoinSet<()>,
) -> Store<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    K::DynamicType: Eq + Hash + Clone,
{
    let (store, writer) = reflector::store();
    let changed = Arc::clone(changed);
    let config = WatcherConfig::default().page_size(PAGE);
    let known = store.clone();
    tasks.spawn(async move {
        let events = watcher(api, config).default_backoff().modify(keep);
        // Compared with what is known before that is replaced, and told afterwards.
        let is_news = AtomicBool::new(false);
        let events = events.inspect_ok(|event| {
            is_news.store(is_change(event, |object| known.get(&ObjectRef::from(object)), is_same), Relaxed);
        });
        let mut events = std::pin::pin!(events.reflect(writer));
        while let Some(event) = events.next().await {
            match event {
                Ok(_) if is_news.load(Relaxed) => changed.notify_one(),
                Ok(_) => {}
                Err(err) => tell(&err, &K::kind(&())),
            }
        }
    });
    store
}

/// Whether an event changes what is kept.
fn is_change<K>(event: &Event<K>, known: impl FnOnce(&K) -> Option<Arc<K>>, is_same: IsSame<K>) -> bool {
    match event {
        Event::Apply(object) => known(object).is_none_or(|known| !is_same(&known, object)),
        // Of a list that is read anew the end tells: what is not in it is gone.
        Event::Init | Event::InitApply(_) => false,
        Event::InitDone | Event::Delete(_) => true,
    }
}

fn tell(err: &WatchError, kind: &str) {
    warn!(error = %telemetry::chain(err), kind, "objects cannot be watched");
}

fn keep_of_metadata(metadata: &mut ObjectMeta, annotations: &[&str]) {
    metadata.managed_fields = None;
    if let Some(all) = &mut metadata.annotations {
        all.retain(|name, _| annotations.contains(&name.as_str()));
    }
}

fn keep_of_policy(policy: &mut StatefulSetBackupPolicy) {
    keep_of_metadata(&mut policy.metadata, &[]);
}

fn keep_of_set(set: &mut KnownSet) {
    keep_of_metadata(&mut set.metadata, &[EXCLUDE_ANNOTATION]);
    set.metadata.owner_references = None;
    // It counts changes of what is dropped.
    set.metadata.generation = None;
    set.spec.volume_claim_templates.truncate(1);
}

fn keep_of_namespace(namespace: &mut PartialObjectMeta<Namespace>) {
    keep_of_metadata(&mut namespace.metadata, &[EXCLUDE_ANNOTATION, ALLOW_BACKUP_FROM_ANNOTATION]);
}

fn keep_of_backup(backup: &mut StatefulSetBackup) {
    keep_of_metadata(&mut backup.metadata, &[TEMPLATE_HASH_ANNOTATION]);
    backup.status = backup.status.take().map(|mut status| {
        let newest = newest_complete(&status);
        let newest =
            status.recovery_points.drain(..).find(|point| point.complete && Some(point.time.0) == newest);
        StatefulSetBackupStatus { recovery_points: newest.into_iter().collect(), ..Default::default() }
    });
}

fn is_same_metadata(one: &ObjectMeta, other: &ObjectMeta) -> bool {
    let of = |metadata: &ObjectMeta| ObjectMeta { resource_version: None, ..metadata.clone() };
    of(one) == of(other)
}

fn is_same_policy(one: &StatefulSetBackupPolicy, other: &StatefulSetBackupPolicy) -> bool {
    is_same_metadata(&one.metadata, &other.metadata) && one.spec == other.spec && one.status == other.status
}

fn is_same_set(one: &KnownSet, other: &KnownSet) -> bool {
    let has_claims = |set: &KnownSet| !set.spec.volume_claim_templates.is_empty();
    is_same_metadata(&one.metadata, &other.metadata) && has_claims(one) == has_claims(other)
}

fn is_same_namespace(one: &PartialObjectMeta<Namespace>, other: &PartialObjectMeta<Namespace>) -> bool {
    is_same_metadata(&one.metadata, &other.metadata)
}

fn is_same_backup(one: &StatefulSetBackup, other: &StatefulSetBackup) -> bool {
    let newest = |backup: &StatefulSetBackup| backup.status.as_ref().and_then(newest_complete);
    is_same_metadata(&one.metadata, &other.metadata) && one.spec == other.spec && newest(one) == newest(other)
}

fn key_of<K: ResourceExt>(object: &K) -> Key {
    (object.namespace().unwrap_or_default(), object.name_any())
}

fn is_excluded<K: ResourceExt>(object: &K) -> bool {
    object.annotations().get(EXCLUDE_ANNOTATION).is_some_and(|value| value == "true")
}

fn policy_facts(object: Arc<StatefulSetBackupPolicy>) -> PolicyFacts {
    PolicyFacts {
        name: object.name_any(),
        uid: object.uid().unwrap_or_default(),
        deleting: object.metadata.deletion_timestamp.is_some(),
        object,
    }
}

fn set_facts(set: &KnownSet) -> SetFacts {
    SetFacts {
        labels: set.labels().clone(),
        created: set.creation_timestamp().map(|time| time.0).unwrap_or_default(),
        has_claims: !set.spec.volume_claim_templates.is_empty(),
        excluded: is_excluded(set),
        deleting: set.metadata.deletion_timestamp.is_some(),
    }
}

fn namespace_facts(namespace: &PartialObjectMeta<Namespace>) -> NamespaceFacts {
    NamespaceFacts { labels: namespace.labels().clone(), excluded: is_excluded(namespace) }
}

/// What is known of a backup.
pub(super) fn backup_facts(object: Arc<StatefulSetBackup>) -> BackupFacts {
    let key = key_of(&*object);
    let target = &object.spec.stateful_set_ref;
    let is_policy = |kind: &str, version: &str| {
        kind == StatefulSetBackupPolicy::kind(&())
            && version.split('/').next() == Some(&*StatefulSetBackupPolicy::group(&()))
    };
    let owner = object.owner_references().iter().find(|owner| is_policy(&owner.kind, &owner.api_version));
    BackupFacts {
        uid: object.uid().unwrap_or_default(),
        owner: owner.map(|owner| owner.uid.clone()),
        from_policy: object.labels().get(FROM_POLICY_LABEL).cloned(),
        set: (target.namespace_or(&key.0).to_owned(), target.name.clone()),
        newest: object.status.as_ref().and_then(newest_complete),
        deleting: object.metadata.deletion_timestamp.is_some(),
        key,
        object,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn only_what_matters_of_a_stateful_set_is_kept() {
        let mut set: KnownSet = serde_json::from_value(json!({
            "apiVersion": "apps/v1", "kind": "StatefulSet",
            "metadata": {
                "name": "db", "namespace": "shop", "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": { "tier": "gold" },
                "annotations": { EXCLUDE_ANNOTATION: "true", "kubectl.kubernetes.io/last": "long" },
                "managedFields": [{ "manager": "kubectl" }],
            },
            "spec": {
                "replicas": 3, "serviceName": "db", "selector": {}, "template": { "spec": { "containers": [] } },
                "volumeClaimTemplates": [{ "metadata": { "name": "data" } }, { "metadata": { "name": "log" } }],
            },
            "status": { "replicas": 3 },
        }))
        .unwrap();
        keep_of_set(&mut set);
        assert_eq!(set.metadata.managed_fields, None);
        assert_eq!(set.annotations().len(), 1);
        let facts = set_facts(&set);
        assert!(facts.has_claims && facts.excluded && !facts.deleting);
        assert_eq!(facts.labels["tier"], "gold");

        let without: KnownSet = serde_json::from_value(json!({ "metadata": { "name": "web" } })).unwrap();
        assert!(!set_facts(&without).has_claims);
    }

    #[test]
    fn of_a_backup_s_points_the_newest_complete_one_is_kept() {
        let point = |id: &str, day: u8, complete: bool| {
            json!({
                "id": id, "time": format!("2026-01-0{day}T00:00:00.000000Z"), "complete": complete, "readyVolumes": 1,
                "expectedVolumes": 1, "replicas": 1, "consistency": "Application", "sizeBytes": 1, "hold": false,
            })
        };
        let mut backup: StatefulSetBackup = serde_json::from_value(json!({
            "apiVersion": "backup.sts-backup.io/v1alpha1", "kind": "StatefulSetBackup",
            "metadata": { "name": "nightly", "namespace": "shop", "uid": "1" },
            "spec": { "statefulSetRef": { "name": "db" } },
            "status": { "missedRuns": 7, "recoveryPoints": [point("c", 3, false), point("b", 2, true), point("a", 1, true)] },
        }))
        .unwrap();
        keep_of_backup(&mut backup);
        let facts = backup_facts(Arc::new(backup));
        assert_eq!(facts.newest, Some("2026-01-02T00:00:00Z".parse().unwrap()));
        let status = facts.object.status.as_ref().unwrap();
        assert_eq!((status.recovery_points.len(), status.missed_runs), (1, 0));
        assert_eq!((facts.owner, facts.set), (None, ("shop".to_owned(), "db".to_owned())));
    }

    #[test]
    fn only_a_change_of_what_is_kept_is_news() {
        let backup = |version: &str, retention: Value, missed: u64, day: Option<u8>| {
            let points = day.map(|day| {
                json!({
                    "id": "a", "time": format!("2026-01-0{day}T00:00:00.000000Z"), "complete": true, "readyVolumes": 1,
                    "expectedVolumes": 1, "replicas": 1, "consistency": "Application", "sizeBytes": 1, "hold": false,
                })
            });
            let points: Vec<Value> = points.into_iter().collect();
            let mut backup: StatefulSetBackup = serde_json::from_value(json!({
                "apiVersion": "backup.sts-backup.io/v1alpha1", "kind": "StatefulSetBackup",
                "metadata": { "name": "nightly", "namespace": "shop", "resourceVersion": version },
                "spec": { "statefulSetRef": { "name": "db" }, "retentionPolicy": retention },
                "status": { "missedRuns": missed, "recoveryPoints": points },
            }))
            .unwrap();
            keep_of_backup(&mut backup);
            backup
        };
        let old = Arc::new(backup("1", json!(null), 0, Some(1)));
        let is_news =
            |event: Event<StatefulSetBackup>| is_change(&event, |_| Some(Arc::clone(&old)), is_same_backup);
        assert!(!is_news(Event::Apply(backup("2", json!(null), 7, Some(1)))), "that status is dropped");
        assert!(is_news(Event::Apply(backup("2", json!({ "keepLast": 3 }), 0, Some(1)))));
        assert!(is_news(Event::Apply(backup("2", json!(null), 0, Some(2)))), "a newer point");
        assert!(is_news(Event::Delete(backup("2", json!(null), 0, Some(1)))));
        assert!(!is_news(Event::InitApply(backup("2", json!(null), 0, Some(2)))));
        assert!(is_news(Event::InitDone));
        let created = Event::Apply(backup("1", json!(null), 0, None));
        assert!(is_change(&created, |_| None, is_same_backup));

        let set = |version: &str, generation: i64, tier: &str| {
            let mut set: KnownSet = serde_json::from_value(json!({
                "metadata": {
                    "name": "db", "resourceVersion": version, "generation": generation, "labels": { "tier": tier },
                },
                "spec": { "replicas": generation },
            }))
            .unwrap();
            keep_of_set(&mut set);
            set
        };
        assert!(is_same_set(&set("1", 1, "gold"), &set("2", 2, "gold")));
        assert!(!is_same_set(&set("1", 1, "gold"), &set("2", 1, "tin")));
    }

    #[test]
    fn only_a_policy_of_ours_is_an_owner() {
        let owned = |version: &str, kind: &str| {
            let backup = json!({
                "apiVersion": "backup.sts-backup.io/v1alpha1", "kind": "StatefulSetBackup",
                "metadata": {
                    "name": "x", "namespace": "shop",
                    "ownerReferences": [{ "apiVersion": version, "kind": kind, "name": "gold", "uid": "7" }],
                },
                "spec": { "statefulSetRef": { "name": "db" } },
            });
            backup_facts(Arc::new(serde_json::from_value(backup).unwrap())).owner
        };
        let kind = "StatefulSetBackupPolicy";
        assert_eq!(owned("backup.sts-backup.io/v1alpha1", kind), Some("7".to_owned()));
        assert_eq!(owned("backup.sts-backup.io/v1", kind), Some("7".to_owned()));
        assert_eq!(owned("example.com/v1", kind), None);
        assert_eq!(owned("backup.sts-backup.io/v1alpha1", "Other"), None);
    }
}
