//! What makes the controller look at a restore, apart from the restore itself: its `StatefulSet`, the volumes that it has in
//! hand, and while it is under way the pods, claims and snapshots of its namespace.
//!
//! Each is a stream of its own, so that one that fails and pauses holds up no other.

use std::fmt::Debug;
use std::future::ready;
use std::sync::Arc;

use futures::stream::BoxStream;
use futures::{Stream, StreamExt, stream};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use kube::core::{NamespaceResourceScope, PartialObjectMeta};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher::Config as WatcherConfig;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use sts_backup_api::names::RESTORE_LABEL;
use sts_backup_api::restore::StatefulSetRestore;
use sts_backup_api::snapshot::VolumeSnapshot;
use sts_backup_api::swap::{Swap, SwapVolume};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;

use super::context::{Context, set_name};
use super::facts::under_way;
use crate::occupancy::SetName;

/// The restores that a change of some `StatefulSet` concerns: those that have not ended.
pub(super) fn stateful_set_changes(
    client: Client,
    store: Store<StatefulSetRestore>,
) -> impl Stream<Item = ObjectRef<StatefulSetRestore>> + Send + 'static {
    // A change of the status is one of the metadata too: its resource version is another one.
    let sets: Api<PartialObjectMeta<StatefulSet>> = Api::all(client);
    let changes = watcher(sets, WatcherConfig::default()).default_backoff().touched_objects();
    changes.filter_map(|set| ready(set.ok())).flat_map(move |set| {
        let name = (set.namespace().unwrap_or_default(), set.name_any());
        let is_concerned = |restore: &Arc<StatefulSetRestore>| {
            let has_ended = restore.status.as_ref().is_some_and(|status| status.completion_time.is_some());
            !has_ended && set_name(restore) == name
        };
        let concerned = store.state().into_iter().filter(is_concerned);
        stream::iter(concerned.map(|restore| ObjectRef::from_obj(&*restore)).collect::<Vec<_>>())
    })
}

/// The restores whose `StatefulSet` somebody has let go.
pub(super) fn freed_sets(
    freed: mpsc::UnboundedReceiver<SetName>,
    store: Store<StatefulSetRestore>,
) -> impl Stream<Item = ObjectRef<StatefulSetRestore>> + Send + 'static {
    UnboundedReceiverStream::new(freed).flat_map(move |set| {
        let concerned = store.state().into_iter().filter(|restore| set_name(restore) == set);
        stream::iter(concerned.map(|restore| ObjectRef::from_obj(&*restore)).collect::<Vec<_>>())
    })
}

/// The restores whose volumes change.
pub(super) fn volume_changes(
    client: Client,
    store: Store<StatefulSetRestore>,
) -> impl Stream<Item = ObjectRef<StatefulSetRestore>> + Send + 'static {
    let volumes: Api<PartialObjectMeta<PersistentVolume>> = Api::all(client);
    let changes =
        watcher(volumes, WatcherConfig::default().labels(RESTORE_LABEL)).default_backoff().touched_objects();
    changes.filter_map(move |volume| {
        let uid = volume.ok().and_then(|volume| volume.labels().get(RESTORE_LABEL).cloned());
        let restore = uid.and_then(|uid| store.find(|restore| restore.uid().as_ref() == Some(&uid)));
        let restore = restore
            .filter(|restore| restore.status.as_ref().is_some_and(|status| under_way(status).is_some()));
        ready(restore.map(|restore| ObjectRef::from_obj(&*restore)))
    })
}

/// Looks for changes of the pods, claims and snapshots of a restore under way, until it has ended.
pub(super) fn watch(cx: &Arc<Context>, restore: &StatefulSetRestore, swap: &Swap) {
    let uid = restore.uid().unwrap_or_default();
    if cx.watches.contains_key(&uid) {
        return;
    }
    let end: CancellationToken = cx.stop.child_token();
    cx.watches.insert(uid.clone(), end.clone());
    let (own, wake, client) = (ObjectRef::from_obj(restore), cx.wake.clone(), cx.client.clone());
    let (namespace, set) = set_name(restore);
    let names =
        |name: fn(&SwapVolume) -> Option<String>| swap.volumes.iter().filter_map(name).collect::<Vec<_>>();
    let (claims, snapshots) =
        (names(|volume| Some(volume.claim.clone())), names(|volume| volume.snapshot.clone()));
    cx.tasks.spawn(async move {
        // A foreign pod may name a claim too; that is rare, and looked at again in a while.
        let prefix = format!("{set}-");
        let pods = touched::<Pod>(&client, &namespace, move |pod| pod.name_any().starts_with(&prefix));
        let claims = touched::<PersistentVolumeClaim>(&client, &namespace, move |claim| {
            claims.contains(&claim.name_any()) || claim.labels().get(RESTORE_LABEL) == Some(&uid)
        });
        let snapshots = touched::<VolumeSnapshot>(&client, &namespace, move |snapshot| {
            snapshots.contains(&snapshot.name_any())
        });
        let mut changes = stream::select_all([pods, claims, snapshots]);
        let wake_up = async {
            while changes.next().await.is_some() {
                // Without a receiver the controller has ended, and nobody is to be woken.
                let _ = wake.send(own.clone());
            }
        };
        end.run_until_cancelled(wake_up).await;
    });
}

/// The changes of some objects of a namespace.
fn touched<K>(
    client: &Client,
    namespace: &str,
    matters: impl Fn(&PartialObjectMeta<K>) -> bool + Send + 'static,
) -> BoxStream<'static, ()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Send + Sync + 'static,
{
    let objects: Api<PartialObjectMeta<K>> = Api::namespaced(client.clone(), namespace);
    watcher(objects, WatcherConfig::default())
        .default_backoff()
        .touched_objects()
        .filter_map(move |object| ready(object.ok().filter(&matters).map(|_| ())))
        .boxed()
}
