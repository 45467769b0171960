//! What the controller works with in this process, and what only this process knows: running hooks. Everything else is in the cluster.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
use crate::occupancy::{Holder, Occupancy, SetName};
use crate::reconciler::Failures;

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
    pub(super) sections: Arc<DashMap<String, CancellationToken>>,
    pub(super) tasks: TaskTracker,
    /// Who has which `StatefulSet` in hand.
    pub(super) occupancy: Arc<Occupancy>,
    /// How much may be under way at once.
    pub(super) queue: Mutex<Queue<ObjectRef<StatefulSetBackup>>>,
    pub(super) backups: Store<StatefulSetBackup>,
    /// Asks for a reconciliation.
    pub(super) wake: mpsc::UnboundedSender<ObjectRef<StatefulSetBackup>>,
    pub(super) failures: Failures,
}

/// The `StatefulSet` that a backup is of.
pub(super) fn set_name(backup: &StatefulSetBackup) -> SetName {
    let own = backup.namespace().unwrap_or_default();
    let target = &backup.spec.stateful_set_ref;
    (target.namespace_or(&own).to_owned(), target.name.clone())
}

impl Context {
    /// Takes the `StatefulSet` in hand for a run of this backup; or says who has it.
    pub(super) fn occupy(&self, backup: &StatefulSetBackup) -> Result<(), Holder> {
        self.occupancy.occupy(&set_name(backup), &Holder::of(backup))
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

    /// A run is over: lets others run, and tells those that may wait for it.
    pub(super) fn vacate(&self, backup: &StatefulSetBackup) {
        self.leave_queue(&ObjectRef::from_obj(backup));
        self.occupancy.vacate(&set_name(backup), &Holder::of(backup));
    }

    /// A backup is gone, perhaps with a run: that is over once nothing is frozen; the end of its section comes back here.
    pub(super) fn forget(&self, gone: &ObjectRef<StatefulSetBackup>) {
        if let Some(section) = gone.extra.uid.as_ref().and_then(|uid| self.sections.get(uid)) {
            section.cancel();
        }
        self.leave_queue(gone);
        self.occupancy.forget(gone);
        self.failures.forget(gone);
    }

    fn leave_queue(&self, backup: &ObjectRef<StatefulSetBackup>) {
        for waiting in self.queue().leave(backup) {
            let _ = self.wake.send(waiting);
        }
    }

    /// Who else has the `StatefulSet` in hand.
    pub(super) fn busy_with(&self, backup: &StatefulSetBackup) -> Option<String> {
        let other = self.occupancy.other(&set_name(backup), &Holder::of(backup));
        other.map(|other| other.to_string())
    }

    /// Publishes an Event about a backup, beside what is going on.
    pub(super) fn publish(&self, backup: &StatefulSetBackup, note: Note) {
        let (client, reporter, about) = (self.exec.clone(), self.reporter.clone(), backup.object_ref(&()));
        self.tasks.spawn(async move { events::publish(client, &reporter, about, note).await });
    }
}
