//! What else can be in the way of a restore than its data and claims: a rollout, whoever else scales, quotas.
//!
//! Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::ResourceExt;
use sts_backup_api::names::ALLOW_CONTESTED_ANNOTATION;
use sts_backup_api::points::bytes;
use sts_backup_api::restore::StatefulSetRestore;
use sts_backup_api::swap::SwapVolume;

use super::claims::{class_of, quantity};
use super::plan::{Findings, Ground};

/// Labels and annotations by which `GitOps` tools mark what they apply, and whose they are. Charts write
/// `app.kubernetes.io/instance` without any such tool.
const GITOPS: [(&str, &str); 4] = [
    ("argocd.argoproj.io/tracking-id", "the Argo CD application"),
    ("argocd.argoproj.io/instance", "the Argo CD application"),
    ("kustomize.toolkit.fluxcd.io/name", "the Flux Kustomization"),
    ("helm.toolkit.fluxcd.io/name", "the Flux HelmRelease"),
];

/// Argo CD's field manager: before version 3 it marks nothing that charts do not write as well.
/// <https://argo-cd.readthedocs.io/en/stable/operator-manual/upgrading/2.14-3.0/>
const ARGO_CD: &str = "argocd-controller";

/// On an autoscaler that KEDA made.
const KEDA_LABEL: &str = "scaledobject.keda.sh/name";

/// Pods that are replaced by others of a new revision must not be scaled away: scaling to 0 completes a rollout that was
/// to stop on the way.
pub(super) fn rollout(ground: &Ground<'_>, findings: &mut Findings) {
    let set = ground.shape.set;
    let Some(status) = &ground.set.status else {
        let message = format!("the controller of StatefulSet {set} has not seen it yet: wait");
        findings.wait_or_refuse(true, "RolloutInProgress", message);
        return;
    };
    if status.observed_generation < ground.set.metadata.generation {
        let message = format!("the controller of StatefulSet {set} has not seen its last change yet: wait");
        findings.wait_or_refuse(true, "RolloutInProgress", message);
        return;
    }
    let (Some(current), Some(update)) = (&status.current_revision, &status.update_revision) else { return };
    // With OnDelete the current revision stays behind for ever; the pods tell.
    let outdated = ground.pods().filter(|(pod, _)| {
        pod.labels().get("controller-revision-hash").is_some_and(|revision| revision != update)
    });
    let outdated: Vec<_> = outdated.map(|(pod, _)| pod.name_any()).collect();
    if current == update || outdated.is_empty() {
        return;
    }
    let strategy = ground.set.spec.as_ref().and_then(|spec| spec.update_strategy.as_ref());
    let partition = strategy.and_then(|strategy| strategy.rolling_update.as_ref()?.partition).unwrap_or(0);
    let stops = partition > ground.shape.start
        || strategy.and_then(|strategy| strategy.type_.as_deref()) == Some("OnDelete");
    findings.wait_or_refuse(
        !stops,
        "RolloutInProgress",
        format!(
            "StatefulSet {set} is being rolled out from revision {current} to {update}, and pods {} are still to follow, \
             which a restore would complete: finish it, or kubectl rollout undo statefulset {set}",
            outdated.join(", ")
        ),
    );
}

/// Whoever else may scale the `StatefulSet` while claims are swapped is named, and the restore refused, unless an
/// annotation lets it run.
pub(super) fn contested(restore: &StatefulSetRestore, ground: &Ground<'_>, findings: &mut Findings) {
    let set = ground.shape.set;
    let mut rivals = Vec::new();
    for owner in ground.set.owner_references() {
        rivals.push(format!("{} {} ({}), which owns it", owner.kind, owner.name, owner.api_version));
    }
    for (mark, whose) in GITOPS {
        let found = ground.set.labels().get(mark).or_else(|| ground.set.annotations().get(mark));
        if let Some(name) = found {
            rivals.push(format!("{whose} {name}, which applies it"));
        }
    }
    let managers =
        || ground.set.metadata.managed_fields.iter().flatten().filter_map(|by| by.manager.as_deref());
    if rivals.is_empty() && managers().any(|manager| manager == ARGO_CD) {
        rivals.push("Argo CD, which applies it".to_owned());
    }
    for autoscaler in ground.survey.autoscalers.iter().filter(|autoscaler| targets(autoscaler, set)) {
        let name = autoscaler.name_any();
        if let Some(scaled) = autoscaler.labels().get(KEDA_LABEL) {
            // It also scales up from 0.
            rivals.push(format!("the KEDA ScaledObject {scaled} (HorizontalPodAutoscaler {name})"));
        } else if ground.meanwhile > 0 {
            rivals.push(format!("the HorizontalPodAutoscaler {name}"));
        } else if ground.going() > 0 {
            findings.warnings.push(format!(
                "HorizontalPodAutoscaler {name} scales StatefulSet {set}: it leaves it alone while it is at 0"
            ));
        }
    }
    let allows = |value: Option<&String>| value.is_some_and(|value| value == "true");
    let allowed = allows(restore.annotations().get(ALLOW_CONTESTED_ANNOTATION))
        || allows(ground.set.annotations().get(ALLOW_CONTESTED_ANNOTATION));
    for rival in rivals {
        if allowed {
            findings.warnings.push(format!("StatefulSet {set} may be scaled up in the middle by {rival}"));
        } else {
            findings.refuse(
                "Contested",
                format!(
                    "StatefulSet {set} may be scaled up in the middle by {rival}: pause that, and annotate the restore with \
                     {ALLOW_CONTESTED_ANNOTATION}=true"
                ),
            );
        }
    }
}

fn targets(autoscaler: &HorizontalPodAutoscaler, set: &str) -> bool {
    let target = autoscaler.spec.as_ref().map(|spec| &spec.scale_target_ref);
    target.is_some_and(|target| {
        let is_apps = target.api_version.as_deref().is_none_or(|version| version.starts_with("apps/"));
        target.kind == "StatefulSet" && target.name == set && is_apps
    })
}

/// With `scaleDown: false` the user sees to it that the pods are gone.
pub(super) fn scale_down(restore: &StatefulSetRestore, ground: &Ground<'_>, findings: &mut Findings) {
    if restore.spec.scale_down {
        return;
    }
    let (set, meanwhile) = (ground.shape.set, ground.meanwhile);
    let there = ground.pods().filter(|(_, ordinal)| *ordinal >= ground.lowest());
    let there: Vec<_> = there.map(|(pod, _)| pod.name_any()).collect();
    if there.is_empty() && ground.going() == 0 {
        return;
    }
    let pods = if there.is_empty() { String::new() } else { format!(" and pods {}", there.join(", ")) };
    findings.refuse(
        "ScaleDownNotAllowed",
        format!(
            "StatefulSet {set} has {} replicas{pods}, and scaleDown is false: kubectl scale statefulset {set} \
             --replicas {meanwhile}, and restore when the pods are gone",
            ground.shape.replicas
        ),
    );
}

/// All staged claims may exist at once, beside those there are: their sum must fit into every quota.
pub(super) fn quotas(volumes: &[SwapVolume], ground: &Ground<'_>, findings: &mut Findings) {
    let mut needs: BTreeMap<String, i64> = BTreeMap::new();
    for volume in volumes.iter().filter(|volume| volume.snapshot.is_some()) {
        let mut need = |resource: String, more: i64| {
            let sum = needs.entry(resource).or_default();
            *sum = sum.saturating_add(more);
        };
        need("requests.storage".to_owned(), volume.size_bytes);
        need("persistentvolumeclaims".to_owned(), 1);
        need("count/persistentvolumeclaims".to_owned(), 1);
        let manifest = serde_json::from_str::<PersistentVolumeClaim>(&volume.manifest);
        if let Some(class) = manifest.ok().as_ref().and_then(class_of) {
            let of_class = format!("{class}.storageclass.storage.k8s.io");
            need(format!("{of_class}/requests.storage"), volume.size_bytes);
            need(format!("{of_class}/persistentvolumeclaims"), 1);
        }
    }
    for quota in &ground.survey.quotas {
        let status = quota.status.as_ref();
        let hard = status.and_then(|status| status.hard.as_ref());
        let hard = hard.or_else(|| quota.spec.as_ref()?.hard.as_ref());
        let used = status.and_then(|status| status.used.as_ref());
        for (resource, need) in &needs {
            let Some(hard) = hard.and_then(|hard| bytes(&hard.get(resource)?.0)) else { continue };
            let used = used.and_then(|used| bytes(&used.get(resource)?.0)).unwrap_or(0);
            let left = hard.saturating_sub(used).max(0);
            if left >= *need {
                continue;
            }
            let is_size = resource.ends_with("requests.storage");
            let said = |amount: i64| if is_size { quantity(amount).0 } else { amount.to_string() };
            let (need, left) = (said(*need), said(left));
            findings.refuse(
                "QuotaExceeded",
                format!(
                    "ResourceQuota {} has {left} left of {resource}, and the new volumes need {need} beside the old ones: \
                     raise it until the restore is over, or restore some ordinals at a time by replicas",
                    quota.name_any()
                ),
            );
        }
    }
}
