//! What the controller works with in this process, and what only this process knows: running hooks, and which backup
//! has a run of which `StatefulSet`. Everything else is in the cluster.

use std::sync::{Mutex, MutexGuard, PoisonError};

use dashmap::DashMap;
use kube::runtime::events::Reporter;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Client, Resource, ResourceExt};
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::run::CurrentRun;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::metrics::BackupMetrics;
use super::queue::Queue;
use crate::events::{self, Note};
use crate::lease::Leadership;

/// A `StatefulSet`: namespace and name.
type SetName = (String, String);

/// What the controller works with.
pub(super) struct Context {
    pub(super) client: Client,
    /// For what must not be repeated behind our back.
    pub(super) exec: Client,
    pub(super) leadership: Leadership,
    pub(super) reporter: Reporter,
    pub(super) metrics: BackupMetrics,
    /// Cancelled when this replica is to stop: no new work, thaw what is frozen.
    pub(super) stop: CancellationToken,
    /// The runs whose hooks this process is running, by the uid of their object.
    pub(super) sections: DashMap<String, CancellationToken>,
    pub(super) tasks: TaskTracker,
    /// The backup that has a run of each `StatefulSet`: the thaw of another one would end its freeze.
    pub(super) busy: DashMap<SetName, ObjectRef<StatefulSetBackup>>,
    /// How much may be under way at once.
    pub(super) queue: Mutex<Queue<ObjectRef<StatefulSetBackup>>>,
    pub(super) backups: Store<StatefulSetBackup>,
    /// Asks for a reconciliation.
    pub(super) wake: mpsc::UnboundedSender<ObjectRef<StatefulSetBackup>>,
    /// Failed reconciliations in a row, by uid.
    pub(super) failures: DashMap<String, u32>,
}

/// The `StatefulSet` that a backup is of.
pub(super) fn set_name(backup: &StatefulSetBackup) -> SetName {
    let own = backup.namespace().unwrap_or_default();
    let target = &backup.spec.stateful_set_ref;
    (target.namespace_or(&own).to_owned(), target.name.clone())
}

impl Context {
    /// Marks a `StatefulSet` as having a run of this backup; or names the backup that has one.
    pub(super) fn occupy(&self, backup: &StatefulSetBackup) -> Result<(), String> {
        let own = ObjectRef::from_obj(backup);
        let mut holder = self.busy.entry(set_name(backup)).or_insert_with(|| own.clone());
        // One that is gone without a trace holds nothing.
        if *holder == own || self.backups.get(&holder).is_none() {
            *holder = own;
            return Ok(());
        }
        Err(holder.name.clone())
    }

    /// Lets a run freeze, or says what it waits for.
    pub(super) fn admit(&self, backup: &StatefulSetBackup, run: &CurrentRun) -> Result<(), String> {
        let mut queue = self.queue();
        // One that is gone without a trace holds nothing.
        queue.retain(|other| self.backups.get(other).is_some());
        queue.enter(&ObjectRef::from_obj(backup), run)
    }

    /// The queue; no task that holds it can fail in between.
    pub(super) fn queue(&self) -> MutexGuard<'_, Queue<ObjectRef<StatefulSetBackup>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A run is over, or its object is gone: lets others run, and tells those that may wait for it.
    pub(super) fn vacate(&self, backup: &StatefulSetBackup) {
        let (own, set) = (ObjectRef::from_obj(backup), set_name(backup));
        for waiting in self.queue().leave(&own) {
            let _ = self.wake.send(waiting);
        }
        if self.busy.remove_if(&set, |_, holder| *holder == own).is_none() {
            return;
        }
        for other in self.backups.state().iter().filter(|other| set_name(other) == set) {
            let _ = self.wake.send(ObjectRef::from_obj(&**other));
        }
    }

    /// The other backup that has a run of the same `StatefulSet`.
    pub(super) fn busy_with(&self, backup: &StatefulSetBackup) -> Option<String> {
        let holder = self.busy.get(&set_name(backup))?.clone();
        (holder != ObjectRef::from_obj(backup) && self.backups.get(&holder).is_some()).then_some(holder.name)
    }

    /// Publishes an Event about a backup, beside what is going on.
    pub(super) fn publish(&self, backup: &StatefulSetBackup, note: Note) {
        let (client, reporter, about) = (self.exec.clone(), self.reporter.clone(), backup.object_ref(&()));
        self.tasks.spawn(async move { events::publish(client, &reporter, about, note).await });
    }
}
