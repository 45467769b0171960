//! What the hub is to be told: the newest state of each object that has changed since it last acknowledged one.
//!
//! However long the hub is away, there is one entry for each object; what has ended in the meantime rides on the objects.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::StreamExt;
use futures::future::{BoxFuture, ready};
use kube::runtime::watcher::{Config as WatcherConfig, Event};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::link::{Object, ObjectKey, Status, body_hash, state_hash};
use sts_backup_api::names::FROM_POLICY_LABEL;
use sts_backup_api::policy::StatefulSetBackupPolicy;
use sts_backup_api::report::{BACKUP, BackupReport, COVERAGE, CoverageReport, PolicyReport, RestoreReport};
use sts_backup_api::restore::StatefulSetRestore;
use tokio::sync::{Notify, watch};

use super::apply::{Applier, is_from_hub};

/// How much of bodies one message carries, bytes: thousands of clusters may report at once, and the hub holds a message of
/// each.
const CHUNK: usize = 64 << 10;

/// The most objects of one message.
const OBJECTS: usize = 500;

type Key = (String, String, String);

/// What is known of the cluster's objects, and what of it the hub does not know.
#[derive(Debug, Default)]
pub(super) struct Reports {
    inner: Mutex<Inner>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    /// The newest body of each object.
    bodies: BTreeMap<Key, Vec<u8>>,
    /// What the hub has to be told: of these, and that those are gone that have no body.
    untold: BTreeSet<Key>,
    /// RPOs of policies, seconds.
    rpos: BTreeMap<String, i64>,
    /// The kinds that have been listed once.
    listed: BTreeSet<String>,
    /// The first message of a session says that it is all.
    is_full: bool,
    sequence: u64,
}

impl Inner {
    fn hash(&self) -> Vec<u8> {
        let hashes: Vec<_> = self.bodies.iter().map(|(key, body)| (key, body_hash(body))).collect();
        state_hash(hashes.iter().map(|((kind, namespace, name), hash)| ([&**kind, namespace, name], &**hash)))
    }
}

/// How many kinds there are, that of the cluster as a whole among them.
const KINDS: usize = 4;

impl Reports {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when there may be something to tell.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The hash of all objects, as a session begins; empty: they are not all known yet. A hub that has what it says is told
    /// only of what changes from now on.
    pub(super) fn hello(&self) -> Vec<u8> {
        let mut inner = self.lock();
        if inner.listed.len() < KINDS {
            return Vec::new();
        }
        inner.untold.clear();
        inner.is_full = false;
        inner.hash()
    }

    /// The hash of all objects, if there is nothing to tell.
    pub(super) fn told(&self) -> Option<Vec<u8>> {
        let inner = self.lock();
        let is_told = inner.listed.len() == KINDS && inner.untold.is_empty() && !inner.is_full;
        is_told.then(|| inner.hash())
    }

    /// The hub is told of all.
    pub(super) fn tell_all(&self) {
        let mut inner = self.lock();
        inner.untold = inner.bodies.keys().cloned().collect();
        inner.is_full = true;
        drop(inner);
        self.changed.notify_one();
    }

    /// The next message; none: the hub knows everything, or not everything is known yet.
    pub(super) fn next(&self) -> Option<Status> {
        let mut inner = self.lock();
        if inner.listed.len() < KINDS || (inner.untold.is_empty() && !inner.is_full) {
            return None;
        }
        inner.sequence += 1;
        let (mut objects, mut gone, mut told, mut room) = (Vec::new(), Vec::new(), Vec::new(), CHUNK);
        for key in &inner.untold {
            let (kind, namespace, name) = key.clone();
            let as_sent = ObjectKey { kind, namespace, name };
            match inner.bodies.get(key) {
                Some(body) => {
                    if told.len() >= OBJECTS || (body.len() > room && !told.is_empty()) {
                        break;
                    }
                    room = room.saturating_sub(body.len());
                    objects.push(Object { key: Some(as_sent), body: body.clone() });
                }
                None => gone.push(as_sent),
            }
            told.push(key.clone());
        }
        let is_last = told.len() == inner.untold.len();
        // All of a report in one piece, or in pieces that only together are all.
        let is_full = inner.is_full;
        let status = Status { seq: inner.sequence, full_begin: is_full, full_end: is_last, objects, gone };
        for key in &told {
            inner.untold.remove(key);
        }
        inner.is_full = false;
        Some(status)
    }

    fn tell(&self, key: Key, body: Option<Vec<u8>>) {
        let mut inner = self.lock();
        match body {
            Some(body) => {
                if inner.bodies.get(&key) == Some(&body) {
                    return;
                }
                inner.bodies.insert(key.clone(), body);
            }
            None => {
                inner.bodies.remove(&key);
            }
        }
        inner.untold.insert(key);
        drop(inner);
        self.changed.notify_one();
    }

    /// A kind has been listed: of the others of it that were known, nothing is there any more.
    fn listed(&self, kind: &str, found: &BTreeSet<Key>) {
        let gone: Vec<_> =
            self.lock().bodies.keys().filter(|key| key.0 == kind && !found.contains(*key)).cloned().collect();
        for key in gone {
            self.tell(key, None);
        }
        self.lock().listed.insert(kind.to_owned());
        self.changed.notify_one();
    }

    fn rpo_of(&self, backup: &StatefulSetBackup) -> Option<i64> {
        self.lock().rpos.get(backup.labels().get(FROM_POLICY_LABEL)?).copied()
    }

    /// The backups of a policy are judged by its RPO, whichever of them is seen first.
    fn set_rpo(&self, policy: &str, rpo: Option<i64>) {
        let mut inner = self.lock();
        let before = match rpo {
            Some(rpo) => inner.rpos.insert(policy.to_owned(), rpo),
            None => inner.rpos.remove(policy),
        };
        if before == rpo {
            return;
        }
        let of_policy = |(key, told): (&Key, &Vec<u8>)| {
            let backup = Some(told).filter(|_| key.0 == BACKUP)?;
            let mut backup: BackupReport = serde_json::from_slice(backup).ok()?;
            (backup.policy.as_deref() == Some(policy)).then(|| {
                backup.rpo_seconds = rpo;
                (key.clone(), body(&backup))
            })
        };
        let changed: Vec<_> = inner.bodies.iter().filter_map(of_policy).collect();
        drop(inner);
        for (key, body) in changed {
            self.tell(key, Some(body));
        }
    }
}

fn key_of<K: Resource<DynamicType = ()>>(object: &K) -> Key {
    (K::kind(&()).into_owned(), object.namespace().unwrap_or_default(), object.name_any())
}

fn body(report: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(report).expect("texts and numbers are JSON")
}

/// Watches what there is to tell, for as long as it is polled.
pub(super) async fn observe(
    client: Client,
    mut coverage: watch::Receiver<Option<CoverageReport>>,
    reports: Arc<Reports>,
    applier: Arc<Applier>,
) {
    let (reports, applier) = (&*reports, &*applier);
    let backups = follow(Api::<StatefulSetBackup>::all(client.clone()), reports, |event| {
        if let Seen::There(backup) = &event {
            let rpo = reports.rpo_of(backup);
            reports.tell(key_of(backup), Some(body(&BackupReport::of(backup, rpo))));
        }
        Box::pin(ready(()))
    });
    let restores = follow(Api::<StatefulSetRestore>::all(client.clone()), reports, |event| {
        if let Seen::There(restore) = &event {
            reports.tell(key_of(restore), Some(body(&RestoreReport::of(restore))));
        }
        Box::pin(ready(()))
    });
    let policies = follow(Api::<StatefulSetBackupPolicy>::all(client), reports, |event| match event {
        Seen::There(policy) => {
            let rpo = policy.spec.rpo.map(|rpo| {
                let rpo: std::time::Duration = rpo.into();
                i64::try_from(rpo.as_secs()).unwrap_or(i64::MAX)
            });
            reports.set_rpo(&policy.name_any(), rpo);
            reports.tell(key_of(&policy), Some(body(&PolicyReport::of(&policy, is_from_hub(&policy)))));
            Box::pin(async move { applier.saw(&policy).await })
        }
        Seen::Gone(policy) => {
            reports.set_rpo(&policy.name_any(), None);
            Box::pin(async move { applier.lost(&policy).await })
        }
    });
    let coverage = async {
        loop {
            if let Some(known) = &*coverage.borrow_and_update() {
                let key = (COVERAGE.to_owned(), String::new(), COVERAGE.to_owned());
                reports.tell(key.clone(), Some(body(known)));
                reports.listed(COVERAGE, &BTreeSet::from([key]));
            }
            if coverage.changed().await.is_err() {
                // The controllers end, and this with them.
                return;
            }
        }
    };
    tokio::join!(backups, restores, policies, coverage);
}

enum Seen<K> {
    There(K),
    Gone(K),
}

async fn follow<'a, K>(objects: Api<K>, reports: &Reports, mut act: impl FnMut(Seen<K>) -> BoxFuture<'a, ()>)
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let kind = K::kind(&()).into_owned();
    let mut found = BTreeSet::new();
    // An error is told and waited for by the watch itself.
    let mut events = pin!(watcher(objects, WatcherConfig::default()).default_backoff());
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => found.clear(),
            Ok(Event::InitApply(object)) => {
                found.insert(key_of(&object));
                act(Seen::There(object)).await;
            }
            Ok(Event::InitDone) => reports.listed(&kind, &std::mem::take(&mut found)),
            Ok(Event::Apply(object)) => act(Seen::There(object)).await,
            Ok(Event::Delete(object)) => {
                reports.tell(key_of(&object), None);
                act(Seen::Gone(object)).await;
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        ("StatefulSetBackup".to_owned(), "shop".to_owned(), name.to_owned())
    }

    fn known() -> Reports {
        let reports = Reports::default();
        for kind in ["StatefulSetRestore", "StatefulSetBackupPolicy", COVERAGE] {
            reports.listed(kind, &BTreeSet::new());
        }
        reports
    }

    fn names(status: &Status) -> Vec<&str> {
        status.objects.iter().map(|object| &*object.key.as_ref().unwrap().name).collect()
    }

    #[test]
    fn nothing_is_told_before_everything_is_known() {
        let reports = known();
        reports.tell_all();
        reports.tell(key("a"), Some(b"1".to_vec()));
        assert!(reports.next().is_none());
        reports.listed("StatefulSetBackup", &BTreeSet::from([key("a")]));
        let status = reports.next().unwrap();
        assert_eq!((names(&status), status.full_begin, status.full_end), (vec!["a"], true, true));
        assert!(reports.next().is_none());
    }

    #[test]
    fn a_hub_that_has_everything_is_told_only_of_what_changes() {
        let reports = known();
        assert!(reports.hello().is_empty(), "not all is known yet");
        reports.tell(key("a"), Some(b"1".to_vec()));
        reports.listed("StatefulSetBackup", &BTreeSet::from([key("a")]));
        let hash = reports.hello();
        let told = body_hash(b"1");
        assert_eq!(hash, state_hash([(["StatefulSetBackup", "shop", "a"], &*told)]));
        assert_eq!((reports.next(), reports.told()), (None, Some(hash.clone())));
        reports.tell(key("b"), Some(b"1".to_vec()));
        assert_eq!(reports.told(), None);
        let status = reports.next().unwrap();
        assert_eq!((names(&status), status.full_begin), (vec!["b"], false));
        assert_ne!(reports.told(), Some(hash));
        reports.tell_all();
        assert_eq!(names(&reports.next().unwrap()), ["a", "b"]);
    }

    #[test]
    fn of_each_object_only_the_newest_state_is_told() {
        let reports = known();
        reports.listed("StatefulSetBackup", &BTreeSet::new());
        reports.tell_all();
        reports.next().unwrap();
        for body in [b"1", b"2", b"3"] {
            reports.tell(key("a"), Some(body.to_vec()));
        }
        let status = reports.next().unwrap();
        assert_eq!(
            (status.objects.len(), &*status.objects[0].body, status.full_begin),
            (1, &b"3"[..], false)
        );
        reports.tell(key("a"), Some(b"3".to_vec()));
        assert!(reports.next().is_none(), "nothing has changed");
        reports.tell(key("a"), None);
        let status = reports.next().unwrap();
        assert_eq!((status.objects.len(), &*status.gone[0].name), (0, "a"));
    }

    #[test]
    fn the_backups_of_a_policy_have_its_rpo_whichever_is_seen_first() {
        let reports = known();
        let backup: BackupReport =
            BackupReport { policy: Some("gold".to_owned()), ..BackupReport::default() };
        reports.tell(key("a"), Some(body(&backup)));
        reports.listed("StatefulSetBackup", &BTreeSet::from([key("a")]));
        reports.tell_all();
        let rpo_told = || {
            let status = reports.next()?;
            serde_json::from_slice::<BackupReport>(&status.objects[0].body).unwrap().rpo_seconds
        };
        assert_eq!(rpo_told(), None);
        reports.set_rpo("gold", Some(60));
        assert_eq!(rpo_told(), Some(60));
        reports.set_rpo("silver", Some(1));
        assert_eq!(rpo_told(), None, "nothing to tell");
    }

    #[test]
    fn what_a_new_list_does_not_have_is_gone() {
        let reports = known();
        reports.tell(key("a"), Some(b"1".to_vec()));
        reports.tell(key("b"), Some(b"1".to_vec()));
        reports.listed("StatefulSetBackup", &BTreeSet::from([key("b")]));
        reports.tell_all();
        let status = reports.next().unwrap();
        assert_eq!(names(&status), ["b"]);
    }

    #[test]
    fn all_of_a_large_cluster_comes_in_pieces_that_fit() {
        let reports = known();
        for at in 0..1200 {
            reports.tell(key(&format!("{at:04}")), Some(vec![b'x'; 2000]));
        }
        reports.listed("StatefulSetBackup", &(0..1200).map(|at| key(&format!("{at:04}"))).collect());
        reports.tell_all();
        let (mut count, mut ends) = (0, Vec::new());
        while let Some(status) = reports.next() {
            assert!(status.objects.iter().map(|object| object.body.len()).sum::<usize>() <= CHUNK);
            count += status.objects.len();
            ends.push((status.full_begin, status.full_end));
        }
        assert_eq!(count, 1200);
        assert_eq!(ends.first(), Some(&(true, false)));
        assert_eq!(ends.last(), Some(&(false, true)));
        assert!(ends[1..ends.len() - 1].iter().all(|piece| *piece == (false, false)), "{ends:?}");
    }
}
