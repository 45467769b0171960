//! What every backup of the cluster needs. Pure.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt;
use sts_backup_api::conditions::{self, APPLIED, READY, WAITING};
use sts_backup_api::policy::StatefulSetBackupPolicy;
use sts_backup_api::snapshot::{DEFAULT_CLASS_ANNOTATION, VolumeSnapshotClass};

use super::observe::{ClusterFacts, LEASE};
use super::sidecar_checks::check_sidecars;
use super::{Finding, Read};
use sts_backup_service::table::age;

/// Our kinds' group and version.
const OURS: &str = "backup.sts-backup.io/v1alpha1";

/// The kinds that backups need, by group and version.
pub(super) const NEEDED_KINDS: [(&str, &[&str]); 2] = [
    (OURS, &["statefulsetbackups", "statefulsetbackuppolicies"]),
    ("snapshot.storage.k8s.io/v1", &["volumesnapshots", "volumesnapshotcontents", "volumesnapshotclasses"]),
];

/// A Lease that was renewed longer ago than its duration, this many times, has lost its holder: one renewal may
/// be missed, and clocks differ a little.
const STALE_DURATIONS: i64 = 2;

/// The duration of the agent's Lease when it does not say.
const LEASE_SECONDS: i64 = 15;

/// The kinds that the API server serves of one group and version.
#[derive(Debug)]
pub(super) struct ServedKinds {
    pub(super) group_version: &'static str,
    pub(super) kinds: Read<Vec<String>>,
}

/// Everything that is checked once.
pub(super) fn check_cluster(facts: &ClusterFacts, now: Timestamp) -> Vec<Finding> {
    let ClusterFacts { served, leases, deployments, daemon_sets, stateful_sets, classes, policies } = facts;
    let mut findings: Vec<_> = served.iter().map(check_kinds).collect();
    findings.extend(check_agent(leases, deployments, now));
    findings.push(check_snapshot_controller(deployments));
    findings.extend(check_classes(classes));
    findings.extend(check_sidecars(deployments, daemon_sets, stateful_sets));
    findings.extend(check_policies(policies));
    findings
}

/// Whether there can be backups at all.
pub(super) fn serves_backups(facts: &ClusterFacts) -> bool {
    // Who cannot see the kinds may still see the objects.
    facts.served.iter().filter(|served| served.group_version == OURS).all(|served| {
        served.kinds.as_ref().map_or(true, |kinds| kinds.iter().any(|kind| kind == "statefulsetbackups"))
    })
}

fn check_kinds(served: &ServedKinds) -> Finding {
    let ServedKinds { group_version, kinds } = served;
    let object = format!("CRDs of {group_version}");
    let kinds = match kinds {
        Ok(kinds) => kinds,
        Err(why) => return Finding::unread(object, why),
    };
    let needed = NEEDED_KINDS.iter().filter(|(of, _)| of == group_version).flat_map(|(_, needed)| *needed);
    let missing: Vec<_> =
        needed.filter(|needed| !kinds.iter().any(|kind| kind == **needed)).copied().collect();
    if missing.is_empty() {
        return Finding::ok(object, "installed");
    }
    let remedy = if *group_version == OURS {
        "install the chart sts-backup-agent, which brings them"
    } else {
        "install the CRDs and the snapshot-controller of github.com/kubernetes-csi/external-snapshotter, once a cluster"
    };
    Finding::fail(object, format!("not installed: {}", missing.join(", ")), remedy)
}

/// Whether policies do what they are for.
fn check_policies(policies: &Read<Vec<StatefulSetBackupPolicy>>) -> Vec<Finding> {
    match policies {
        Ok(policies) => policies.iter().flat_map(check_policy).collect(),
        Err(why) => vec![Finding::unread("StatefulSetBackupPolicies", why)],
    }
}

fn check_policy(policy: &StatefulSetBackupPolicy) -> Vec<Finding> {
    let name = policy.name_any();
    let object = format!("StatefulSetBackupPolicy {name}");
    let conditions = policy.status.as_ref().map(|status| &status.conditions[..]).unwrap_or_default();
    let bad = |type_| conditions::find(conditions, type_).filter(|condition| condition.status == "False");
    // That the spec cannot be used is why nothing is applied.
    let Some(condition) = bad(READY).or_else(|| bad(APPLIED)) else {
        return vec![Finding::ok(object, "its conditions are good")];
    };
    let Condition { type_, reason, message, .. } = condition;
    // What is waited for comes and goes.
    let finding = if reason == WAITING { Finding::warn } else { Finding::fail };
    vec![finding(
        object,
        format!("{type_} is False: {reason}: {message}"),
        format!("kubectl describe statefulsetbackuppolicy {name}"),
    )]
}

fn check_agent(
    leases: &Read<Vec<Lease>>,
    deployments: &Read<Vec<Deployment>>,
    now: Timestamp,
) -> Vec<Finding> {
    let leases = match leases {
        Ok(leases) => leases,
        Err(why) => return vec![Finding::unread(format!("Lease {LEASE}"), why)],
    };
    if leases.is_empty() {
        return vec![no_agent(deployments)];
    }
    let mut findings: Vec<_> = leases.iter().map(|lease| check_lease(lease, now)).collect();
    let alive: Vec<_> = leases.iter().filter(|lease| fresh(lease, now)).collect();
    if alive.len() > 1 {
        let namespaces: Vec<_> = alive.iter().filter_map(|lease| lease.namespace()).collect();
        findings.push(Finding::fail(
            "Agent",
            format!(
                "several are alive, in the namespaces {}: they do the same work twice",
                namespaces.join(", ")
            ),
            "uninstall all but one; replicas belong to one release",
        ));
    }
    findings
}

fn no_agent(deployments: &Read<Vec<Deployment>>) -> Finding {
    let label = |deployment: &&Deployment| {
        deployment.labels().get("app.kubernetes.io/name").is_some_and(|name| name == LEASE)
            || deployment.name_any() == LEASE
    };
    let installed = deployments.iter().flatten().find(label);
    match installed {
        Some(deployment) => {
            let namespace = deployment.namespace().unwrap_or_default();
            Finding::fail(
                format!("Deployment {namespace}/{}", deployment.name_any()),
                format!(
                    "{} of its pods available, and none has taken the Lease {LEASE}",
                    available(deployment)
                ),
                format!(
                    "kubectl describe deployment {} -n {namespace}, and its pods' logs",
                    deployment.name_any()
                ),
            )
        }
        None => Finding::fail(
            "Agent",
            format!("no Lease {LEASE} in any namespace: no backup runs"),
            "install the chart sts-backup-agent",
        ),
    }
}

fn renewed(lease: &Lease) -> Option<Timestamp> {
    lease.spec.as_ref()?.renew_time.as_ref().map(|time| time.0)
}

fn holder(lease: &Lease) -> Option<&str> {
    lease.spec.as_ref()?.holder_identity.as_deref().filter(|holder| !holder.is_empty())
}

fn fresh(lease: &Lease, now: Timestamp) -> bool {
    let seconds =
        lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds).map_or(LEASE_SECONDS, i64::from);
    let young = |renewed: Timestamp| now.as_second() - renewed.as_second() <= seconds * STALE_DURATIONS;
    holder(lease).is_some() && renewed(lease).is_some_and(young)
}

fn check_lease(lease: &Lease, now: Timestamp) -> Finding {
    let namespace = lease.namespace().unwrap_or_default();
    let object = format!("Lease {namespace}/{}", lease.name_any());
    let remedy = format!(
        "kubectl get pods -n {namespace}: is an agent running? This was judged by your machine's clock; if the agent runs, compare the clocks"
    );
    let since = renewed(lease).map_or("never".to_owned(), |at| format!("{} ago", age(at, now)));
    match holder(lease) {
        None => Finding::warn(object, format!("nobody holds it, last renewed {since}"), remedy),
        Some(holder) if fresh(lease, now) => {
            Finding::ok(object, format!("held by {holder}, renewed {since}"))
        }
        Some(holder) => Finding::warn(object, format!("held by {holder}, but last renewed {since}"), remedy),
    }
}

fn available(deployment: &Deployment) -> i32 {
    deployment.status.as_ref().and_then(|status| status.available_replicas).unwrap_or(0)
}

fn check_snapshot_controller(deployments: &Read<Vec<Deployment>>) -> Finding {
    let deployments = match deployments {
        Ok(deployments) => deployments,
        Err(why) => return Finding::unread("Deployment snapshot-controller", why),
    };
    let named = deployments.iter().find(|deployment| deployment.name_any().contains("snapshot-controller"));
    match named {
        Some(found) if available(found) > 0 => Finding::ok(
            format!("Deployment {}/{}", found.namespace().unwrap_or_default(), found.name_any()),
            "available",
        ),
        Some(found) => {
            let (namespace, name) = (found.namespace().unwrap_or_default(), found.name_any());
            Finding::warn(
                format!("Deployment {namespace}/{name}"),
                "no pod is available: no VolumeSnapshot is taken",
                format!("kubectl describe deployment {name} -n {namespace}"),
            )
        }
        None => Finding::warn(
            "Deployment snapshot-controller",
            "not found; managed clusters may hide it",
            "if VolumeSnapshots never become ready, install it from github.com/kubernetes-csi/external-snapshotter",
        ),
    }
}

fn is_default(class: &VolumeSnapshotClass) -> bool {
    class.annotations().get(DEFAULT_CLASS_ANNOTATION).is_some_and(|value| value == "true")
}

fn check_classes(classes: &Read<Vec<VolumeSnapshotClass>>) -> Vec<Finding> {
    let classes = match classes {
        Ok(classes) => classes,
        Err(why) => return vec![Finding::unread("VolumeSnapshotClasses", why)],
    };
    if classes.is_empty() {
        return vec![Finding::fail(
            "VolumeSnapshotClasses",
            "there is none: nothing can be snapshotted",
            "create one for your CSI driver, with deletionPolicy Retain if points must outlive their namespace",
        )];
    }
    let mut drivers: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for class in classes {
        let defaults = drivers.entry(&class.driver).or_default();
        if is_default(class) {
            defaults.push(class.name_any());
        }
    }
    let mut findings: Vec<_> =
        drivers.iter().map(|(driver, defaults)| check_defaults(driver, defaults)).collect();
    let deleting: Vec<_> =
        classes.iter().filter(|class| class.deletion_policy == "Delete").map(ResourceExt::name_any).collect();
    if !deleting.is_empty() {
        findings.push(Finding::warn(
            format!("VolumeSnapshotClass {}", deleting.join(", ")),
            "deletionPolicy is Delete: snapshots die with their namespace",
            "use a class with deletionPolicy Retain if points must outlive it",
        ));
    }
    findings
}

fn check_defaults(driver: &str, defaults: &[String]) -> Finding {
    let object = format!("CSI driver {driver}");
    match defaults {
        [one] => Finding::ok(object, format!("default VolumeSnapshotClass {one}")),
        [] => Finding::warn(
            object,
            "no default VolumeSnapshotClass: backups must name one",
            format!(
                "annotate one of the driver's classes: kubectl annotate volumesnapshotclass NAME {DEFAULT_CLASS_ANNOTATION}=true"
            ),
        ),
        several => Finding::fail(
            object,
            format!(
                "{} default VolumeSnapshotClasses, nothing says which is meant: {}",
                several.len(),
                several.join(", ")
            ),
            format!("leave one: kubectl annotate volumesnapshotclass NAME {DEFAULT_CLASS_ANNOTATION}-"),
        ),
    }
}

#[cfg(test)]
#[path = "cluster_checks_tests.rs"]
mod tests;
