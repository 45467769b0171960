//! What the controller works with in this process, and what only this process knows: who watches for whom.
//! Everything else is in the cluster.

use std::sync::Arc;

use dashmap::DashMap;
use kube::runtime::events::Reporter;
use kube::runtime::reflector::ObjectRef;
use kube::{Client, Resource, ResourceExt};
use sts_backup_api::restore::StatefulSetRestore;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::metrics::RestoreMetrics;
use crate::events::{self, Note};
use crate::lease::Leadership;
use crate::occupancy::{Holder, Occupancy, SetName};
use crate::reconciler::Failures;

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
    /// Who has which `StatefulSet` in hand.
    pub(super) occupancy: Arc<Occupancy>,
    /// Asks for a reconciliation.
    pub(super) wake: mpsc::UnboundedSender<ObjectRef<StatefulSetRestore>>,
    /// What watches for the restores under way, by uid.
    pub(super) watches: DashMap<String, CancellationToken>,
    pub(super) failures: Failures,
}

/// The `StatefulSet` that a restore is of.
pub(super) fn set_name(restore: &StatefulSetRestore) -> SetName {
    let own = restore.namespace().unwrap_or_default();
    let target = &restore.spec.stateful_set_ref;
    (target.namespace_or(&own).to_owned(), target.name.clone())
}

impl Context {
    /// Takes the `StatefulSet` in hand; or says who has it.
    pub(super) fn occupy(&self, restore: &StatefulSetRestore) -> Result<(), Holder> {
        self.occupancy.occupy(&set_name(restore), &Holder::of(restore))
    }

    /// Who else has the `StatefulSet` in hand.
    pub(super) fn busy_with(&self, restore: &StatefulSetRestore) -> Option<Holder> {
        self.occupancy.other(&set_name(restore), &Holder::of(restore))
    }

    /// Lets others have it, and ends what watches for this one.
    pub(super) fn vacate(&self, restore: &StatefulSetRestore) {
        if let Some((_, watch)) = self.watches.remove(&restore.uid().unwrap_or_default()) {
            watch.cancel();
        }
        self.occupancy.vacate(&set_name(restore), &Holder::of(restore));
    }

    /// A restore is gone: lets others have its `StatefulSet`, and ends what watches for it.
    pub(super) fn forget(&self, gone: &ObjectRef<StatefulSetRestore>) {
        if let Some((_, watch)) = gone.extra.uid.as_ref().and_then(|uid| self.watches.remove(uid)) {
            watch.cancel();
        }
        self.occupancy.forget(gone);
        self.failures.forget(gone);
    }

    /// Publishes an Event, beside what is going on.
    pub(super) fn publish<K: Resource<DynamicType = ()>>(&self, about: &K, note: Note) {
        let (client, reporter, about) = (self.once.clone(), self.reporter.clone(), about.object_ref(&()));
        self.tasks.spawn(async move { events::publish(client, &reporter, about, note).await });
    }
}
