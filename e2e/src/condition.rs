//! Waits for states of the API, by watching: a test neither sleeps nor polls.
//!
//! A failure names the object, what was awaited, for how long, and the state last seen.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::{Stream, StreamExt};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{Event, Node, PersistentVolumeClaim, Pod};
use k8s_openapi::api::storage::v1::CSINode;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watch_object, watcher};
use kube::{Api, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sts_backup_api::snapshot::VolumeSnapshot;

/// A kind that the kit can wait for.
pub trait Watched:
    Resource<DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned + Send + 'static
{
}

impl<K> Watched for K where
    K: Resource<DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned + Send + 'static
{
}

/// Waits until `holds` is true of the object `name`, which may not exist yet, and returns it in that state.
///
/// Every state that the API server sends is looked at, in order, so a state that lasts a moment is not missed
/// once the watch runs. `what` completes the sentence "… is not *ready*".
///
/// # Errors
/// After `timeout`. Errors of the watch do not end the wait, for a test may restart the API server; the last
/// one is part of the failure.
pub async fn await_condition<K: Watched>(
    api: &Api<K>,
    name: &str,
    what: &str,
    timeout: Duration,
    holds: impl Fn(&K) -> bool,
) -> Result<K> {
    await_state(api, name, what, timeout, |object| object.filter(|object| holds(object))).await
}

/// Waits until `object` is gone, as read from the API server; one of the same name made anew does not count.
///
/// # Errors
/// After `timeout`; the failure shows the finalizers that are left.
pub async fn await_deleted<K: Watched>(api: &Api<K>, object: &K, timeout: Duration) -> Result<()> {
    let uid = object.uid().context("an object of the API server has a uid")?;
    let gone = |now: Option<K>| now.is_none_or(|now| now.uid().as_ref() != Some(&uid)).then_some(());
    await_state(api, &object.name_any(), "deleted", timeout, gone).await
}

async fn await_state<K: Watched, T>(
    api: &Api<K>,
    name: &str,
    what: &str,
    timeout: Duration,
    answer: impl Fn(Option<K>) -> Option<T>,
) -> Result<T> {
    let mut last_seen = "nothing yet".to_owned();
    let states = watch_object(api.clone(), name).default_backoff();
    let found = first_answer(Box::pin(states), timeout, |object| {
        last_seen = summary(object.as_ref());
        answer(object)
    });
    found.await.map_err(|missed| {
        let path = api.resource_url();
        missed.because(format!("{path}/{name} is not {what} after {timeout:?}; last seen: {last_seen}"))
    })
}

/// A wait that ran into its timeout, with the watch's last error if it had any.
struct Missed(Option<watcher::Error>);

impl Missed {
    fn because(self, failure: String) -> anyhow::Error {
        match self.0 {
            Some(err) => anyhow::Error::new(err).context(failure),
            None => anyhow::Error::msg(failure),
        }
    }
}

/// The first answer to what a watch sends. Errors of the watch do not end the wait, for a test may restart the
/// API server.
async fn first_answer<E, T>(
    mut watch: impl Stream<Item = watcher::Result<E>> + Unpin,
    timeout: Duration,
    mut answer: impl FnMut(E) -> Option<T>,
) -> Result<T, Missed> {
    let mut last_error = None;
    let found = async {
        while let Some(sent) = watch.next().await {
            match sent.map(&mut answer) {
                Ok(Some(answer)) => return Some(answer),
                Ok(None) => {}
                Err(err) => last_error = Some(err),
            }
        }
        None
    };
    let found = tokio::time::timeout(timeout, found).await;
    found.ok().flatten().ok_or(Missed(last_error))
}

/// The part of an object that tells why a wait goes on: its status, and what holds up a deletion.
fn summary<K: Watched>(object: Option<&K>) -> String {
    let Some(object) = object else { return "no such object".to_owned() };
    let status =
        serde_json::to_value(object).ok().and_then(|mut object| object.get_mut("status").map(Value::take));
    let mut summary = json!({ "status": status });
    if let Some(deleted) = &object.meta().deletion_timestamp {
        summary["deletionTimestamp"] = json!(deleted);
        summary["finalizers"] = json!(object.meta().finalizers);
    }
    summary.to_string()
}

/// Waits for an Event of `reason` about an object named `about`, and returns it.
///
/// # Errors
/// After `timeout`; errors of the watch do not end the wait.
pub async fn await_event(events: &Api<Event>, about: &str, reason: &str, timeout: Duration) -> Result<Event> {
    let fields = format!("involvedObject.name={about},reason={reason}");
    let watch = watcher(events.clone(), watcher::Config::default().fields(&fields));
    let seen = first_answer(Box::pin(watch.default_backoff().applied_objects()), timeout, Some).await;
    seen.map_err(|missed| missed.because(format!("no event {reason} about {about} after {timeout:?}")))
}

/// Waits for an object of the kind of which `counts` is true, whatever its name, and returns it.
///
/// # Errors
/// After `timeout`; errors of the watch do not end the wait.
pub async fn await_any<K: Watched>(
    api: &Api<K>,
    what: &str,
    timeout: Duration,
    counts: impl Fn(&K) -> bool,
) -> Result<K> {
    let watch = watcher(api.clone(), watcher::Config::default()).default_backoff().applied_objects();
    let found = first_answer(Box::pin(watch), timeout, |object| Some(object).filter(&counts)).await;
    found.map_err(|missed| missed.because(format!("{what}: there is none after {timeout:?}")))
}

/// Waits until no object of the kind is left of which `counts` is true.
///
/// # Errors
/// After `timeout`, naming those that are left; errors of the watch do not end the wait.
pub async fn await_none<K: Watched>(
    api: &Api<K>,
    what: &str,
    timeout: Duration,
    counts: impl Fn(&K) -> bool,
) -> Result<()> {
    let mut left = BTreeSet::new();
    let mut listed = false;
    let watch = watcher(api.clone(), watcher::Config::default()).default_backoff();
    let gone = first_answer(Box::pin(watch), timeout, |event| {
        match event {
            // A new list, for instance after an error: what was known is void until it is whole.
            watcher::Event::Init => {
                left.clear();
                listed = false;
            }
            watcher::Event::InitDone => listed = true,
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) if counts(&object) => {
                left.insert(object.name_any());
            }
            watcher::Event::InitApply(object)
            | watcher::Event::Apply(object)
            | watcher::Event::Delete(object) => {
                left.remove(&object.name_any());
            }
        }
        (listed && left.is_empty()).then_some(())
    });
    gone.await.map_err(|missed| missed.because(format!("{what} are left after {timeout:?}: {left:?}")))
}

/// The claim has a volume.
#[must_use]
pub fn pvc_bound(claim: &PersistentVolumeClaim) -> bool {
    claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound")
}

/// The controller has seen the current spec and `replicas` pods, no more and no fewer, are ready.
pub fn statefulset_ready(replicas: i32) -> impl Fn(&StatefulSet) -> bool {
    move |set| {
        set.status.as_ref().is_some_and(|status| {
            status.observed_generation == set.metadata.generation
                && status.replicas == replicas
                && status.ready_replicas.unwrap_or(0) == replicas
        })
    }
}

/// The controller has seen the current spec and the deployment is available.
#[must_use]
pub fn deployment_available(deployment: &Deployment) -> bool {
    deployment.status.as_ref().is_some_and(|status| {
        status.observed_generation == deployment.metadata.generation
            && status
                .conditions
                .iter()
                .flatten()
                .any(|condition| condition.type_ == "Available" && condition.status == "True")
    })
}

/// The controller has seen the current spec, and all its pods are of that spec and available.
#[must_use]
pub fn deployment_rolled_out(deployment: &Deployment) -> bool {
    let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas);
    deployment.status.as_ref().is_some_and(|status| {
        status.observed_generation == deployment.metadata.generation
            && status.updated_replicas.unwrap_or(0) == wanted.unwrap_or(1)
            && status.available_replicas.unwrap_or(0) == wanted.unwrap_or(1)
            && status.replicas.unwrap_or(0) == wanted.unwrap_or(1)
    })
}

/// The controller has seen the current spec, and every node that should have the pod runs the newest, ready.
#[must_use]
pub fn daemonset_ready(set: &DaemonSet) -> bool {
    set.status.as_ref().is_some_and(|status| {
        status.observed_generation == set.metadata.generation
            && status.desired_number_scheduled > 0
            && status.updated_number_scheduled == Some(status.desired_number_scheduled)
            && status.number_ready == status.desired_number_scheduled
    })
}

/// The node takes pods.
#[must_use]
pub fn node_ready(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// The kubelet of the node has the CSI driver `name`.
pub fn has_csi_driver(name: &str) -> impl Fn(&CSINode) -> bool + '_ {
    move |node| node.spec.drivers.iter().any(|driver| driver.name == name)
}

/// All containers of the pod are ready.
#[must_use]
pub fn pod_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// The pod's containers have all ended, for better (`Succeeded`) or worse (`Failed`).
#[must_use]
pub fn pod_finished(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// The storage has cut the snapshot: what is written from now on is not in it. It may not be ready yet.
#[must_use]
pub fn snapshot_cut(snapshot: &VolumeSnapshot) -> bool {
    snapshot.status.as_ref().is_some_and(|status| status.creation_time.is_some())
}

/// A volume can be made from the snapshot.
#[must_use]
pub fn snapshot_ready(snapshot: &VolumeSnapshot) -> bool {
    snapshot.status.as_ref().is_some_and(|status| status.ready_to_use == Some(true))
}
