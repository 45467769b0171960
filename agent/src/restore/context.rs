//! What the controller works with in this process, and what only this process knows: which restore has which
//! `StatefulSet` in hand, and who watches for whom. Everything else is in the cluster.

use dashmap::DashMap;
use kube::runtime::events::Reporter;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Client, Resource, ResourceExt};
use sts_backup_api::restore::StatefulSetRestore;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::metrics::RestoreMetrics;
use crate::events::{self, Note};
use crate::lease::Leadership;

/// A `StatefulSet`: namespace and name.
pub(super) type SetName = (String, String);

/// What the controller works with.
pub(super) struct Context {
    pub(super) client: Client,
    /// For Events: one that is sent twice is there twice.
    pub(super) once: Client,
    pub(super) leadership: Leadership,
    pub(super) reporter: Reporter,
    pub(super) metrics: RestoreMetrics,
    /// Cancelled when this replica is to stop: no new work.
    pub(super) stop: CancellationToken,
    pub(super) tasks: TaskTracker,
    pub(super) occupancy: Occupancy,
    pub(super) restores: Store<StatefulSetRestore>,
    /// Asks for a reconciliation.
    pub(super) wake: mpsc::UnboundedSender<ObjectRef<StatefulSetRestore>>,
    /// What watches for the restores under way, by uid.
    pub(super) watches: DashMap<String, CancellationToken>,
    /// Failed reconciliations in a row, by uid.
    pub(super) failures: DashMap<String, u32>,
}

/// The `StatefulSet` that a restore is of.
pub(super) fn set_name(restore: &StatefulSetRestore) -> SetName {
    let own = restore.namespace().unwrap_or_default();
    let target = &restore.spec.stateful_set_ref;
    (target.namespace_or(&own).to_owned(), target.name.clone())
}

/// Which restore has which `StatefulSet` in hand.
// The lead replaces this with crate::occupancy, which backups share.
#[derive(Debug, Default)]
pub(super) struct Occupancy {
    busy: DashMap<SetName, ObjectRef<StatefulSetRestore>>,
}

impl Occupancy {
    /// Marks a `StatefulSet` as in the hands of a restore; or names who has it.
    pub(super) fn occupy(&self, set: &SetName, holder: &ObjectRef<StatefulSetRestore>) -> Result<(), String> {
        let found = self.busy.entry(set.clone()).or_insert_with(|| holder.clone());
        if *found == *holder {
            return Ok(());
        }
        Err(format!("StatefulSetRestore {}/{}", found.namespace.as_deref().unwrap_or_default(), found.name))
    }

    /// Who has a `StatefulSet` in hand, if not this one.
    pub(super) fn busy_with(&self, set: &SetName, holder: &ObjectRef<StatefulSetRestore>) -> Option<String> {
        let found = self.busy.get(set).filter(|found| **found != *holder)?;
        Some(format!("StatefulSetRestore {}/{}", found.namespace.as_deref().unwrap_or_default(), found.name))
    }

    /// Lets others have it; whether it was in these hands.
    pub(super) fn vacate(&self, set: &SetName, holder: &ObjectRef<StatefulSetRestore>) -> bool {
        self.busy.remove_if(set, |_, found| found == holder).is_some()
    }
}

impl Context {
    /// Takes the `StatefulSet` in hand; or names who has it.
    pub(super) fn occupy(&self, restore: &StatefulSetRestore) -> Result<(), String> {
        // Call site 1 of the occupancy that backups share.
        self.occupancy.occupy(&set_name(restore), &ObjectRef::from_obj(restore))
    }

    /// Who else has the `StatefulSet` in hand.
    pub(super) fn busy_with(&self, restore: &StatefulSetRestore) -> Option<String> {
        self.occupancy.busy_with(&set_name(restore), &ObjectRef::from_obj(restore))
    }

    /// Lets others have it, and tells those restores that may wait for it; ends what watches for this one.
    pub(super) fn vacate(&self, restore: &StatefulSetRestore) {
        if let Some((_, watch)) = self.watches.remove(&restore.uid().unwrap_or_default()) {
            watch.cancel();
        }
        let (own, set) = (ObjectRef::from_obj(restore), set_name(restore));
        // Call site 2 of the occupancy that backups share.
        if !self.occupancy.vacate(&set, &own) {
            return;
        }
        for other in self.restores.state().iter().filter(|other| set_name(other) == set) {
            let _ = self.wake.send(ObjectRef::from_obj(&**other));
        }
    }

    /// Publishes an Event, beside what is going on.
    pub(super) fn publish<K: Resource<DynamicType = ()>>(&self, about: &K, note: Note) {
        let (client, reporter, about) = (self.once.clone(), self.reporter.clone(), about.object_ref(&()));
        self.tasks.spawn(async move { events::publish(client, &reporter, about, note).await });
    }
}
