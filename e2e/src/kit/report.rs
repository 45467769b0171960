//! Prints what a person needs to see why a test failed, before the namespace is removed.

use std::fmt::Debug;

use k8s_openapi::api::core::v1::{Event, PersistentVolumeClaim, Pod};
use kube::api::{ListParams, LogParams};
use kube::{Api, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sts_backup_api::snapshot::VolumeSnapshot;

use super::agent::Agent;
use super::local_agent::log_dir;
use super::{Namespace, agent};
use crate::condition::pod_ready;

/// Enough of a log to see why a container ended.
const LOG_LINES: i64 = 20;
/// Enough of an agent's log to see the end of a run.
const AGENT_LINES: usize = 60;

/// Prints pods, with the end of the logs of those that are not ready, claims, snapshots and Events of the namespace
/// to standard error, and what agents said. What cannot be read is said, and does not hide the rest.
pub(super) async fn print_state(ns: &Namespace) {
    eprintln!("--- state of namespace {} in {} ---", ns.name(), ns.cluster().name());
    let pods: Api<Pod> = ns.api();
    for pod in list(&pods).await {
        eprintln!("{}", line(&pod, &["phase", "conditions", "initContainerStatuses", "containerStatuses"]));
        if !pod_ready(&pod) {
            print_logs(&pods, &pod).await;
        }
    }
    for claim in list(&ns.api::<PersistentVolumeClaim>()).await {
        eprintln!("{}", line(&claim, &["phase", "capacity", "conditions"]));
    }
    for snapshot in list(&ns.api::<VolumeSnapshot>()).await {
        let parts = ["boundVolumeSnapshotContentName", "creationTime", "readyToUse", "restoreSize", "error"];
        eprintln!("{}", line(&snapshot, &parts));
    }
    let mut events = list(&ns.api::<Event>()).await;
    events.sort_by_key(|event| event.last_timestamp.clone().or_else(|| event.creation_timestamp()));
    for event in events {
        let about = &event.involved_object;
        eprintln!(
            "Event {} {} {} {}: {}",
            event.type_.as_deref().unwrap_or("-"),
            event.reason.as_deref().unwrap_or("-"),
            about.kind.as_deref().unwrap_or("-"),
            about.name.as_deref().unwrap_or("-"),
            event.message.as_deref().unwrap_or("-"),
        );
    }
    print_local_agents(ns);
    print_shared_agent(ns).await;
    eprintln!("--- end of the state of {} ---", ns.name());
}

async fn list<K>(api: &Api<K>) -> Vec<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
{
    match api.list(&ListParams::default()).await {
        Ok(list) => list.items,
        Err(err) => {
            eprintln!("{}: cannot be listed: {err}", K::plural(&()));
            Vec::new()
        }
    }
}

/// One line: kind, name, the named parts of the status, and whether it is being deleted.
fn line<K: Resource<DynamicType = ()> + Serialize>(object: &K, parts: &[&str]) -> String {
    let value = serde_json::to_value(object).unwrap_or_default();
    let status: serde_json::Map<String, Value> = parts
        .iter()
        .filter_map(|part| Some(((*part).to_owned(), value.get("status")?.get(*part)?.clone())))
        .collect();
    let deleted = object.meta().deletion_timestamp.as_ref();
    let deleting = deleted.map(|_| format!(" being deleted, finalizers {:?}", object.finalizers()));
    format!("{} {} {}{}", K::kind(&()), object.name_any(), json!(status), deleting.unwrap_or_default())
}

async fn print_logs(pods: &Api<Pod>, pod: &Pod) {
    let name = pod.name_any();
    let containers =
        pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten().chain(&spec.containers));
    for container in containers {
        let wanted = LogParams {
            container: Some(container.name.clone()),
            tail_lines: Some(LOG_LINES),
            ..LogParams::default()
        };
        match pods.logs(&name, &wanted).await {
            Ok(log) => log.lines().for_each(|line| eprintln!("  {name}/{}: {line}", container.name)),
            Err(err) => eprintln!("  {name}/{}: no log: {err}", container.name),
        }
    }
}

/// The ends of the logs of agents that ran as processes of the test; the files stay.
fn print_local_agents(ns: &Namespace) {
    let Ok(dir) = log_dir(ns.cluster(), ns.name()) else { return };
    for file in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let log = std::fs::read(file.path()).unwrap_or_default();
        eprintln!("The end of {}:", file.path().display());
        print_end(String::from_utf8_lossy(&log).lines());
    }
}

/// What the shared agent said of the namespace.
async fn print_shared_agent(ns: &Namespace) {
    let pods: Api<Pod> = Api::namespaced(ns.cluster().client(), agent::NAMESPACE);
    for pod in Agent::shared(ns.cluster()).pods().await.unwrap_or_default() {
        let log = pods.logs(&pod, &LogParams::default()).await.unwrap_or_default();
        eprintln!("What {pod} said of the namespace:");
        print_end(log.lines().filter(|line| line.contains(ns.name())));
    }
}

fn print_end<'log>(lines: impl Iterator<Item = &'log str>) {
    let lines: Vec<&str> = lines.collect();
    lines[lines.len().saturating_sub(AGENT_LINES)..].iter().for_each(|line| eprintln!("  {line}"));
}
