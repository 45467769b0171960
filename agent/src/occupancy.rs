//! Which object has a `StatefulSet` in hand: a backup that has a run of it, or a restore. One at a time: the thaw of one run
//! would end the freeze of another, and what a restore exchanges cannot be snapshotted.
//!
//! Known in the leading process only. Who takes the lead finds in the objects which have begun, marks them, and lets
//! nobody begin before all are marked: [`Occupancy::all_resumed`].

use std::fmt::{self, Debug, Display, Formatter};
use std::sync::{Mutex, PoisonError};

use dashmap::DashMap;
use futures::FutureExt;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Resource, ResourceExt};
use tokio::sync::{Barrier, mpsc};

/// A `StatefulSet`: namespace and name.
pub(crate) type SetName = (String, String);

/// How many kinds of objects take `StatefulSets` in hand: backups and restores.
const KINDS: usize = 2;

/// An object that has a `StatefulSet` in hand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Holder {
    kind: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
}

impl Holder {
    /// This object.
    pub(crate) fn of<K: Resource<DynamicType = ()>>(object: &K) -> Self {
        Self {
            kind: K::kind(&()).into_owned(),
            namespace: object.namespace().unwrap_or_default(),
            name: object.name_any(),
            uid: object.uid().unwrap_or_default(),
        }
    }

    /// Whether a store of its kind knows it; another one of its name is not it.
    pub(crate) fn is_in<K>(&self, store: &Store<K>) -> bool
    where
        K: Resource<DynamicType = ()> + Clone + 'static,
    {
        // Before the first list is complete nothing is known to be gone.
        store.wait_until_ready().now_or_never().is_none()
            || store
                .get(&ObjectRef::new(&self.name).within(&self.namespace))
                .is_some_and(|found| found.uid().as_ref() == Some(&self.uid))
    }
}

/// As people name it.
impl Display for Holder {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}/{}", self.kind, self.namespace, self.name)
    }
}

/// Whether an object exists.
type Exists = Box<dyn Fn(&Holder) -> bool + Send + Sync>;

/// Which object has which `StatefulSet` in hand.
pub(crate) struct Occupancy {
    held: DashMap<SetName, Holder>,
    kinds: DashMap<String, Exists>,
    listeners: Mutex<Vec<mpsc::UnboundedSender<SetName>>>,
    resumed: Barrier,
}

impl Debug for Occupancy {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Occupancy").field("held", &self.held).finish_non_exhaustive()
    }
}

impl Occupancy {
    pub(crate) fn new() -> Self {
        Self {
            held: DashMap::new(),
            kinds: DashMap::new(),
            listeners: Mutex::default(),
            resumed: Barrier::new(KINDS),
        }
    }

    /// Joins with a kind of objects, of which `exists` tells whether one is there: one that is gone without a trace holds
    /// nothing. What comes back tells which `StatefulSets` are free again.
    pub(crate) fn join<K: Resource<DynamicType = ()>>(
        &self,
        exists: impl Fn(&Holder) -> bool + Send + Sync + 'static,
    ) -> mpsc::UnboundedReceiver<SetName> {
        self.kinds.insert(K::kind(&()).into_owned(), Box::new(exists));
        let (told, freed) = mpsc::unbounded_channel();
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner).push(told);
        freed
    }

    /// Returns once every kind has marked what had begun before this process took the lead.
    pub(crate) async fn all_resumed(&self) {
        self.resumed.wait().await;
    }

    /// Marks what an earlier leader began.
    pub(crate) fn resume(&self, set: SetName, holder: Holder) {
        self.held.insert(set, holder);
    }

    /// Takes a `StatefulSet` in hand; or says who has it.
    pub(crate) fn occupy(&self, set: &SetName, holder: &Holder) -> Result<(), Holder> {
        let mut held = self.held.entry(set.clone()).or_insert_with(|| holder.clone());
        if *held == *holder || !self.exists(&held) {
            *held = holder.clone();
            return Ok(());
        }
        Err(held.clone())
    }

    /// Who else has a `StatefulSet` in hand.
    pub(crate) fn other(&self, set: &SetName, than: &Holder) -> Option<Holder> {
        let held = self.held.get(set)?.clone();
        (held != *than && self.exists(&held)).then_some(held)
    }

    /// Lets a `StatefulSet` go, if this object has it, and tells those that may wait for it.
    pub(crate) fn vacate(&self, set: &SetName, holder: &Holder) {
        if self.held.remove_if(set, |_, held| held == holder).is_none() {
            return;
        }
        for listener in self.listeners.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            // Who no longer listens has ended.
            let _ = listener.send(set.clone());
        }
    }

    /// Lets go what an object that is gone had in hand, by its kind and name: it no longer does so itself.
    pub(crate) fn forget<K: Resource<DynamicType = ()>>(&self, gone: &ObjectRef<K>) {
        let is_gone = |held: &Holder| {
            held.kind == K::kind(&())
                && held.name == gone.name
                && Some(&held.namespace) == gone.namespace.as_ref()
                && !self.exists(held)
        };
        let held = self.held.iter().map(|entry| (entry.key().clone(), entry.value().clone()));
        // Collected first: an entry that is being looked at is locked.
        let held: Vec<_> = held.filter(|(_, held)| is_gone(held)).collect();
        for (set, holder) in held {
            self.vacate(&set, &holder);
        }
    }

    fn exists(&self, holder: &Holder) -> bool {
        self.kinds.get(&holder.kind).is_none_or(|exists| exists(holder))
    }
}

#[cfg(test)]
mod tests {
    use sts_backup_api::backup::{StatefulSetBackup, StatefulSetBackupSpec};
    use sts_backup_api::restore::{StatefulSetRestore, StatefulSetRestoreSpec};

    use super::*;

    fn set() -> SetName {
        ("shop".to_owned(), "db".to_owned())
    }

    #[test]
    fn a_backup_and_a_restore_wait_for_each_other_and_are_told() {
        let occupancy = Occupancy::new();
        let mut freed = occupancy.join::<StatefulSetRestore>(|_| true);
        let backup = Holder::of(&StatefulSetBackup::new("nightly", StatefulSetBackupSpec::new("db")));
        let restore = Holder::of(&StatefulSetRestore::new("back", StatefulSetRestoreSpec::new("db")));
        assert_eq!(occupancy.occupy(&set(), &backup), Ok(()));
        assert_eq!(occupancy.occupy(&set(), &backup), Ok(()), "again");
        assert_eq!(occupancy.occupy(&set(), &restore), Err(backup.clone()));
        assert_eq!(occupancy.other(&set(), &restore), Some(backup.clone()));
        assert_eq!(occupancy.other(&set(), &backup), None);

        occupancy.vacate(&set(), &restore);
        assert!(freed.try_recv().is_err(), "it had nothing in hand");
        occupancy.vacate(&set(), &backup);
        assert_eq!(freed.try_recv(), Ok(set()));
        assert_eq!(occupancy.occupy(&set(), &restore), Ok(()));
    }

    #[test]
    fn what_is_gone_without_a_trace_holds_nothing() {
        let occupancy = Occupancy::new();
        let _freed = occupancy.join::<StatefulSetBackup>(|holder| holder.name != "gone");
        let [gone, there] = ["gone", "there"]
            .map(|name| Holder::of(&StatefulSetBackup::new(name, StatefulSetBackupSpec::new("db"))));
        occupancy.resume(set(), gone);
        assert_eq!(occupancy.other(&set(), &there), None);
        assert_eq!(occupancy.occupy(&set(), &there), Ok(()));
    }

    #[test]
    fn who_waits_for_an_object_that_goes_is_told() {
        let occupancy = Occupancy::new();
        let mut freed = occupancy.join::<StatefulSetBackup>(|holder| holder.name != "gone");
        let [gone, there] = ["gone", "there"].map(|name| {
            let mut backup = StatefulSetBackup::new(name, StatefulSetBackupSpec::new("db"));
            backup.metadata.namespace = Some("shop".to_owned());
            backup
        });
        let other_set = ("shop".to_owned(), "cache".to_owned());
        occupancy.resume(set(), Holder::of(&gone));
        occupancy.resume(other_set.clone(), Holder::of(&there));

        occupancy.forget::<StatefulSetRestore>(&ObjectRef::new("gone").within("shop"));
        occupancy.forget::<StatefulSetBackup>(&ObjectRef::new("gone").within("elsewhere"));
        occupancy.forget(&ObjectRef::from_obj(&there));
        assert!(freed.try_recv().is_err(), "it is there, or another one");
        occupancy.forget(&ObjectRef::from_obj(&gone));
        assert_eq!(freed.try_recv(), Ok(set()));
        assert!(freed.try_recv().is_err());
        assert_eq!(occupancy.other(&other_set, &Holder::of(&gone)), Some(Holder::of(&there)));
    }
}
