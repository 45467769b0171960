//! What one backup needs, and what its conditions say. Pure.

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use sts_backup_api::backup::{Hook, HookPods, OnError, StatefulSetBackup};
use sts_backup_api::conditions;
use sts_backup_api::run::RunResult;
use sts_backup_api::snapshot::VolumeSnapshotClass;

use super::claim_checks::{check_claims, ordinals};
use super::observe::TargetFacts;
use super::{Finding, Level, Read};
use crate::plugin::remedy::{remedy, thaw_trouble};
use crate::plugin::table::count;

/// On a pod: the container that kubectl and hooks mean when none is named.
const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";

/// Everything that is checked for a backup.
pub(super) fn check_backup(
    backup: &StatefulSetBackup,
    targets: &TargetFacts,
    classes: &Read<Vec<VolumeSnapshotClass>>,
    now: Timestamp,
) -> Vec<Finding> {
    let mut findings = check_conditions(backup, now);
    let own = backup.namespace().unwrap_or_default();
    let target = &backup.spec.stateful_set_ref;
    let namespace = target.namespace_or(&own);
    let object = format!("StatefulSet {namespace}/{}", target.name);
    let Some(facts) = targets.namespaces.get(namespace) else { return findings };
    let sets = match &facts.stateful_sets {
        Ok(sets) => sets,
        Err(why) => {
            findings.push(Finding::unread(object, why));
            return findings;
        }
    };
    let Some(set) = sets.iter().find(|set| set.name_any() == target.name) else {
        findings.push(Finding::fail(
            object,
            format!("does not exist; StatefulSetBackup {own}/{} names it", backup.name_any()),
            remedy("StatefulSetNotFound", &own, &backup.name_any()),
        ));
        return findings;
    };
    findings.extend(check_claims(backup, set, facts, targets, classes));
    for (field, hook) in
        [("preBackupHook", &backup.spec.pre_backup_hook), ("postBackupHook", &backup.spec.post_backup_hook)]
    {
        if let Some(hook) = hook {
            findings.extend(check_hook(field, hook, set, &facts.pods));
        }
    }
    findings
}

fn check_conditions(backup: &StatefulSetBackup, now: Timestamp) -> Vec<Finding> {
    let (namespace, name) = (backup.namespace().unwrap_or_default(), backup.name_any());
    let object = format!("StatefulSetBackup {namespace}/{name}");
    let Some(status) = &backup.status else {
        return vec![Finding::warn(
            object,
            "the agent has not looked at it",
            "if it was not made just now, look at the agent: is it alive?",
        )];
    };
    if let (Some(seen), Some(generation)) = (status.observed_generation, backup.metadata.generation)
        && seen < generation
    {
        return vec![Finding::warn(
            object,
            "the agent has not looked at its newest spec",
            "if it was not changed just now, look at the agent: is it alive?",
        )];
    }
    let mut findings = Vec::new();
    if let Some(trouble) = thaw_trouble(backup, now) {
        findings.push(Finding::fail(object.clone(), trouble, remedy("ThawFailed", &namespace, &name)));
    }
    let partial = status.history.first().is_some_and(|run| run.result == RunResult::PartiallyFailed);
    let checks = [
        (conditions::READY, Level::Fail),
        (conditions::LAST_BACKUP_SUCCEEDED, if partial { Level::Warn } else { Level::Fail }),
    ];
    for (type_, level) in checks {
        let condition = conditions::find(&status.conditions, type_);
        if let Some(condition) = condition.filter(|condition| condition.status == "False") {
            findings.push(Finding::bad(
                level,
                object.clone(),
                format!("{type_} is False: {}: {}", condition.reason, condition.message),
                advice(&condition.reason, &namespace, &name),
            ));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok(object, "its conditions are good"));
    }
    findings
}

/// The remedy; to call for this check again would be none.
fn advice(reason: &str, namespace: &str, name: &str) -> String {
    let advice = remedy(reason, namespace, name);
    if advice.contains("stsbackup doctor") {
        format!("kubectl stsbackup describe {name} -n {namespace} shows its runs and events")
    } else {
        advice
    }
}

/// Whether a hook finds every pod that it runs in ready, and its container there.
fn check_hook(field: &str, hook: &Hook, set: &StatefulSet, pods: &Read<Vec<Pod>>) -> Vec<Finding> {
    let namespace = set.namespace().unwrap_or_default();
    let object = format!("{field} of StatefulSet {namespace}/{}", set.name_any());
    let pods = match pods {
        Ok(pods) => pods,
        Err(why) => return vec![Finding::unread(object, why)],
    };
    let level = match hook.on_error {
        OnError::Fail => Level::Fail,
        OnError::Continue => Level::Warn,
    };
    let ordinals = match hook.pods {
        HookPods::All => ordinals(set),
        HookPods::First => ordinals(set).start..ordinals(set).start.saturating_add(1).min(ordinals(set).end),
    };
    let expected: Vec<_> = ordinals.map(|ordinal| format!("{}-{ordinal}", set.name_any())).collect();
    let unfit = |name: &String| {
        let pod = pods.iter().find(|pod| pod.name_any() == *name);
        let (reason, remedy) = hook_pod(hook, pod).err()?;
        Some(Finding::bad(level, format!("Pod {namespace}/{name}"), format!("{field}: {reason}"), remedy))
    };
    let findings: Vec<_> = expected.iter().filter_map(unfit).collect();
    if findings.is_empty() {
        return vec![Finding::ok(object, format!("{} ready for it", count(expected.len(), "pod")))];
    }
    findings
}

fn hook_pod(hook: &Hook, pod: Option<&Pod>) -> Result<(), (String, String)> {
    let Some(pod) = pod else {
        return Err((
            "the pod does not exist".to_owned(),
            "kubectl describe statefulset tells what keeps it away".to_owned(),
        ));
    };
    let containers: Vec<_> =
        pod.spec.iter().flat_map(|spec| &spec.containers).map(|container| container.name.as_str()).collect();
    let named = hook.container_name.as_deref().filter(|name| !name.is_empty());
    let meant = named.or_else(|| pod.annotations().get(DEFAULT_CONTAINER).map(String::as_str));
    if let Some(container) = meant.filter(|container| !containers.contains(container)) {
        return Err((
            format!("the pod has no container {container}"),
            format!("write in containerName one of: {}", containers.join(", ")),
        ));
    }
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let mut ready = conditions.filter(|condition| condition.type_ == "Ready");
    if ready.any(|condition| condition.status == "True") {
        return Ok(());
    }
    Err(("the pod is not ready".to_owned(), "kubectl describe pod tells why".to_owned()))
}

#[cfg(test)]
#[path = "backup_checks_tests.rs"]
mod tests;
