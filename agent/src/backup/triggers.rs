//! What makes the controller look at a backup, apart from the backup itself: its snapshots, its `StatefulSet`, and the
//! namespace of that.
//!
//! Each is a stream of its own, so that one that fails and pauses holds up no other.

use std::future::ready;
use std::sync::Arc;

use futures::{Stream, StreamExt, stream};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Namespace;
use kube::core::PartialObjectMeta;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher::{Config as WatcherConfig, Event as WatchEvent};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::conditions::{self, NAMESPACE_NOT_GRANTED, READY};
use sts_backup_api::names::{BACKUP_LABEL, BACKUP_NAMESPACE_LABEL, RUN_LABEL};
use sts_backup_api::run::RunStep;
use sts_backup_api::snapshot::VolumeSnapshot;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::context::set_name;
use super::observe::is_granted_by;
use crate::occupancy::SetName;

/// The backups whose snapshots change.
pub(super) fn snapshot_changes(
    client: Client,
    store: Store<StatefulSetBackup>,
) -> impl Stream<Item = ObjectRef<StatefulSetBackup>> + Send + 'static {
    let snapshots: Api<PartialObjectMeta<VolumeSnapshot>> = Api::all(client);
    watcher(snapshots, WatcherConfig::default().labels(RUN_LABEL))
        .default_backoff()
        .touched_objects()
        .filter_map(move |snapshot| {
            let snapshot = snapshot.ok();
            let concerned = snapshot.as_ref().and_then(backup_of).filter(|found| {
                // Labels can be written by anybody.
                let backup = store.get(found);
                backup.is_none_or(|backup| {
                    Some(set_name(&backup).0) == snapshot.as_ref().and_then(ResourceExt::namespace)
                })
            });
            ready(concerned)
        })
}

/// The backup whose run took a snapshot.
fn backup_of<K: ResourceExt>(snapshot: &K) -> Option<ObjectRef<StatefulSetBackup>> {
    let label = |name| snapshot.labels().get(name);
    Some(ObjectRef::new(label(BACKUP_LABEL)?).within(label(BACKUP_NAMESPACE_LABEL)?))
}

/// The backups that a change of some `StatefulSet` concerns.
pub(super) fn stateful_set_changes(
    client: Client,
    store: Store<StatefulSetBackup>,
) -> impl Stream<Item = ObjectRef<StatefulSetBackup>> + Send + 'static {
    let sets: Api<PartialObjectMeta<StatefulSet>> = Api::all(client);
    watcher(sets, WatcherConfig::default()).default_backoff().filter_map(|event| ready(event.ok())).flat_map(
        move |event| {
            let (set, is_gone) = match event {
                WatchEvent::Apply(set) | WatchEvent::InitApply(set) => (Some(set), false),
                WatchEvent::Delete(set) => (Some(set), true),
                WatchEvent::Init | WatchEvent::InitDone => (None, false),
            };
            stream::iter(set.map(|set| concerned(&store, &set, is_gone)).unwrap_or_default())
        },
    )
}

fn concerned(
    store: &Store<StatefulSetBackup>,
    set: &PartialObjectMeta<StatefulSet>,
    is_gone: bool,
) -> Vec<ObjectRef<StatefulSetBackup>> {
    let (name, namespace) = (set.name_any(), set.namespace().unwrap_or_default());
    let changed = (namespace, name);
    let is_concerned =
        |backup: &Arc<StatefulSetBackup>| set_name(backup) == changed && (is_gone || waits_for_set(backup));
    store
        .state()
        .iter()
        .filter(|backup| is_concerned(backup))
        .map(|backup| ObjectRef::from_obj(&**backup))
        .collect()
}

/// The backups that a namespace lets in, or no longer does.
pub(super) fn grant_changes(
    client: Client,
    store: Store<StatefulSetBackup>,
) -> impl Stream<Item = ObjectRef<StatefulSetBackup>> + Send + 'static {
    let namespaces: Api<PartialObjectMeta<Namespace>> = Api::all(client);
    watcher(namespaces, WatcherConfig::default())
        .default_backoff()
        .applied_objects()
        .filter_map(|namespace| ready(namespace.ok()))
        .flat_map(move |namespace| {
            let home = namespace.name_any();
            let is_concerned = |backup: &Arc<StatefulSetBackup>| {
                let own = backup.namespace().unwrap_or_default();
                let was_granted = !is_not_granted(backup);
                own != home && set_name(backup).0 == home && is_granted_by(&namespace, &own) != was_granted
            };
            let concerned = store.state().into_iter().filter(is_concerned);
            stream::iter(concerned.map(|backup| ObjectRef::from_obj(&*backup)).collect::<Vec<_>>())
        })
}

/// The backups of a `StatefulSet` that somebody has let go.
pub(super) fn freed_sets(
    freed: UnboundedReceiver<SetName>,
    store: Store<StatefulSetBackup>,
) -> impl Stream<Item = ObjectRef<StatefulSetBackup>> + Send + 'static {
    UnboundedReceiverStream::new(freed).flat_map(move |set| {
        let of_set = store.state().into_iter().filter(|backup| set_name(backup) == set);
        stream::iter(of_set.map(|backup| ObjectRef::from_obj(&*backup)).collect::<Vec<_>>())
    })
}

fn is_not_granted(backup: &StatefulSetBackup) -> bool {
    let ready = backup.status.as_ref().and_then(|status| conditions::find(&status.conditions, READY));
    ready.is_some_and(|ready| ready.reason == NAMESPACE_NOT_GRANTED)
}

/// A `StatefulSet` changes often; few changes matter to its backup.
fn waits_for_set(backup: &StatefulSetBackup) -> bool {
    let Some(status) = &backup.status else { return true };
    let in_preflight = status.current_run.as_ref().is_some_and(|run| run.step == RunStep::Preflight);
    in_preflight || conditions::find(&status.conditions, READY).is_none_or(|ready| ready.status != "True")
}
