//! Decides for each claim of the pods that go what happens to it, or why it cannot.
//!
//! Pure. A claim that cannot be deleted, or whose volume could be lost with it, is found here, while nothing has been
//! touched: a deletion cannot be taken back.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{
    Node, NodeSelector, NodeSelectorRequirement, PersistentVolume, PersistentVolumeClaim, Pod,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use kube::core::ObjectMeta;
use sts_backup_api::names::{CLAIM_MANIFEST_ANNOTATION, RESTORE_LABEL};
use sts_backup_api::points::{bytes, is_cut, is_ready};
use sts_backup_api::snapshot::VolumeSnapshot;
use sts_backup_api::swap::{SwapPv, SwapVolume};

use super::choose::content_of;
use super::claims::{class_of, manifest, request_of};
use super::plan::{Findings, Ground};
use super::survey::{ClaimId, claim_named_by};

/// What is so young may only be on its way.
const YOUNG: SignedDuration = SignedDuration::from_mins(1);

/// How long storage may take to make a snapshot ready that it has cut.
const READY_WITHIN: SignedDuration = SignedDuration::from_hours(1);

/// On claims that are used by pods; goes by itself.
const PROTECTION_FINALIZER: &str = "kubernetes.io/pvc-protection";

/// On claims of which snapshots are being cut, by its beginning; goes by itself once they are ready.
const SNAPSHOT_FINALIZERS: &str = "snapshot.storage.kubernetes.io/";

/// What keeps a claim from being deleted, by its finalizers: a finalizer of somebody else, or a snapshot that is not ready.
pub(super) fn is_held_by(finalizer: &str) -> bool {
    finalizer != PROTECTION_FINALIZER
}

/// Whether a finalizer of a claim is none of those that go by themselves.
fn is_foreign(finalizer: &str) -> bool {
    is_held_by(finalizer) && !finalizer.starts_with(SNAPSHOT_FINALIZERS)
}

/// What becomes of a claim; none: nothing, or something was found in its way.
pub(super) fn swap_volume(
    id: &ClaimId,
    snapshot: Option<&VolumeSnapshot>,
    ground: &Ground<'_>,
    findings: &mut Findings,
) -> Option<SwapVolume> {
    let claim = ground.survey.claims.get(&id.name);
    if snapshot.is_none() && !claim.is_some_and(|claim| is_bound(claim) || is_deleting(&claim.metadata)) {
        // It has no data that could be lost.
        return None;
    }
    let found = findings.problems.len();
    let previous = claim.and_then(|claim| previous(claim, ground, findings));
    if let Some(claim) = claim
        && (snapshot.is_some() || ground.claims_go_with_pods())
    {
        deletable(claim, ground, findings);
    }
    let recorded = match claim {
        Some(claim) => manifest(claim),
        None => manifest_of_missing(id, snapshot, ground),
    };
    let (mut size_bytes, mut node) = (0, None);
    if let Some(snapshot) = snapshot {
        size_bytes = size(id, &recorded, snapshot, ground);
        node = place(id, &recorded, snapshot, ground, findings);
    }
    (findings.problems.len() == found).then(|| SwapVolume {
        claim: id.name.clone(),
        template: id.template.clone(),
        ordinal: id.ordinal,
        snapshot: snapshot.map(ResourceExt::name_any),
        snapshot_uid: snapshot.and_then(ResourceExt::uid),
        size_bytes,
        node,
        manifest: serde_json::to_string(&recorded).expect("a claim that was read can be written"),
        previous,
        restored: None,
        stagings: 0,
    })
}

fn is_bound(claim: &PersistentVolumeClaim) -> bool {
    claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound")
}

fn is_deleting(metadata: &ObjectMeta) -> bool {
    metadata.deletion_timestamp.is_some()
}

fn age(metadata: &ObjectMeta, now: Timestamp) -> SignedDuration {
    metadata.creation_timestamp.as_ref().map_or(SignedDuration::MAX, |Time(time)| now.duration_since(*time))
}

/// The volume that a claim has, as it is remembered.
fn previous(claim: &PersistentVolumeClaim, ground: &Ground<'_>, findings: &mut Findings) -> Option<SwapPv> {
    let name = claim.name_any();
    if is_deleting(&claim.metadata) {
        findings.refuse(
            "ClaimBeingDeleted",
            format!(
                "PersistentVolumeClaim {name} is being deleted: when it is gone, which its pods may hold up, restore again"
            ),
        );
        return None;
    }
    if !is_bound(claim) {
        let message = format!(
            "PersistentVolumeClaim {name} is not bound: see kubectl describe pvc {name}, or delete it"
        );
        findings.wait_or_refuse(age(&claim.metadata, ground.now) < YOUNG, "ClaimNotBound", message);
        return None;
    }
    let volume_name = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default();
    let lost = |what: &str| {
        format!("PersistentVolume {volume_name} of claim {name} {what}: mend that, or delete the claim")
    };
    let Some(volume) = ground.survey.volumes.get(volume_name) else {
        findings.refuse("VolumeMissing", lost("does not exist"));
        return None;
    };
    if is_deleting(&volume.metadata) {
        findings.refuse("VolumeMissing", lost("is being deleted"));
        return None;
    }
    let spec = volume.spec.as_ref();
    if spec.and_then(|spec| spec.claim_ref.as_ref()?.uid.as_ref()) != claim.metadata.uid.as_ref() {
        findings.refuse("VolumeMissing", lost("is bound to another claim"));
        return None;
    }
    if let Some(other) = volume.labels().get(RESTORE_LABEL) {
        findings.refuse(
            "VolumeInUse",
            format!(
                "PersistentVolume {volume_name} of claim {name} is in hand of the StatefulSetRestore with uid {other}: \
                 wait until that is over, or delete it; if it is gone, remove the label {RESTORE_LABEL}"
            ),
        );
        return None;
    }
    let mut kept = volume.clone();
    kept.metadata.managed_fields = None;
    Some(SwapPv {
        name: volume_name.to_owned(),
        uid: volume.uid().unwrap_or_default(),
        reclaim_policy: reclaim_policy(volume).to_owned(),
        claim_uid: claim.uid().unwrap_or_default(),
        manifest: Some(serde_json::to_string(&kept).expect("a volume that was read can be written")),
    })
}

/// What becomes of a volume when its claim goes; absent is what the API server makes of it.
fn reclaim_policy(volume: &PersistentVolume) -> &str {
    let policy = volume.spec.as_ref().and_then(|spec| spec.persistent_volume_reclaim_policy.as_deref());
    policy.unwrap_or("Retain")
}

/// Whether a claim goes when it is deleted: one that is stuck in its deletion cannot be taken back.
fn deletable(claim: &PersistentVolumeClaim, ground: &Ground<'_>, findings: &mut Findings) {
    let name = claim.name_any();
    for finalizer in claim.finalizers().iter().filter(|finalizer| is_foreign(finalizer)) {
        let message = format!(
            "PersistentVolumeClaim {name} has the finalizer {finalizer}, which would keep it from being deleted: see whose \
             it is, and remove it"
        );
        findings.refuse("ForeignFinalizer", message);
    }
    for pod in ground.survey.pods.iter().filter(|pod| names_claim(pod, &name) && !ground.owns(pod)) {
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Unknown");
        let message = format!(
            "Pod {} ({phase}) uses PersistentVolumeClaim {name} and would keep it from being deleted: delete the pod",
            pod.name_any()
        );
        findings.refuse("ClaimInUse", message);
    }
    let unready =
        ground.survey.snapshots.iter().filter(|one| claim_named_by(one) == Some(&name) && !is_ready(one));
    for snapshot in unready {
        let failed = snapshot.status.as_ref().is_some_and(|status| status.error.is_some());
        let within = if is_cut(snapshot) && !failed { READY_WITHIN } else { YOUNG };
        let is_young = !is_deleting(&snapshot.metadata) && age(&snapshot.metadata, ground.now) < within;
        let snapshot = snapshot.name_any();
        findings.wait_or_refuse(
            is_young,
            "SnapshotNotReady",
            format!(
                "VolumeSnapshot {snapshot} of PersistentVolumeClaim {name} is not ready and would keep the claim from being \
                 deleted: see kubectl describe volumesnapshot {snapshot}, or delete it"
            ),
        );
    }
}

fn names_claim(pod: &Pod, claim: &str) -> bool {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes
        .filter_map(|volume| volume.persistent_volume_claim.as_ref())
        .any(|source| source.claim_name == claim)
}

/// A claim that is gone, as it is made again: as its snapshot remembers it, or else as the `StatefulSet` would make it.
fn manifest_of_missing(
    id: &ClaimId,
    snapshot: Option<&VolumeSnapshot>,
    ground: &Ground<'_>,
) -> PersistentVolumeClaim {
    let remembered = snapshot.and_then(|snapshot| {
        let text = snapshot.metadata.annotations.as_ref()?.get(CLAIM_MANIFEST_ANNOTATION)?;
        serde_json::from_str::<PersistentVolumeClaim>(text).ok()
    });
    // Annotations can be written by anybody.
    let remembered = remembered.filter(|claim| claim.metadata.name.as_ref() == Some(&id.name));
    let mut claim = remembered.unwrap_or_else(|| {
        let mut claim = ground.shape.template(&id.template).cloned().unwrap_or_default();
        let selector = ground.set.spec.as_ref().and_then(|spec| spec.selector.match_labels.clone());
        claim.metadata.labels.get_or_insert_default().extend(selector.unwrap_or_default());
        claim
    });
    claim.metadata.name = Some(id.name.clone());
    claim.metadata.namespace.clone_from(&ground.set.metadata.namespace);
    if class_of(&claim).is_none() {
        claim.spec.get_or_insert_default().storage_class_name = ground.default_class();
    }
    manifest(&claim)
}

/// The size that a new volume is asked for: no smaller than what was asked for, what there was, what the `StatefulSet`'s own
/// claims would ask for, and what the snapshot needs.
fn size(
    id: &ClaimId,
    recorded: &PersistentVolumeClaim,
    snapshot: &VolumeSnapshot,
    ground: &Ground<'_>,
) -> i64 {
    let storage = |capacity: &BTreeMap<String, _>| -> Option<i64> {
        let quantity: &k8s_openapi::apimachinery::pkg::api::resource::Quantity = capacity.get("storage")?;
        bytes(&quantity.0)
    };
    let claim = ground.survey.claims.get(&id.name);
    let claimed = claim.and_then(|claim| storage(claim.status.as_ref()?.capacity.as_ref()?));
    let volume =
        ground.volume_of(&id.name).and_then(|volume| storage(volume.spec.as_ref()?.capacity.as_ref()?));
    let template = ground.shape.template(&id.template).and_then(request_of);
    let status = snapshot.status.as_ref();
    let restored = status.and_then(|status| bytes(&status.restore_size.as_ref()?.0));
    let content =
        content_of(snapshot, ground.survey).ok().and_then(|content| content.status.as_ref()?.restore_size);
    [request_of(recorded), claimed, volume, template, restored, content]
        .into_iter()
        .flatten()
        .max()
        .unwrap_or(0)
}

/// Whether the claim's storage class can make the new volume, and at which node it has to.
fn place(
    id: &ClaimId,
    recorded: &PersistentVolumeClaim,
    snapshot: &VolumeSnapshot,
    ground: &Ground<'_>,
    findings: &mut Findings,
) -> Option<String> {
    let name = &id.name;
    let Some(class_name) = class_of(recorded).filter(|class| !class.is_empty()) else {
        let message = format!(
            "PersistentVolumeClaim {name} has no storage class, so no new volume can be made for it: restore other ordinals"
        );
        findings.refuse("NoStorageClass", message);
        return None;
    };
    let Some(class) = ground.survey.classes.get(class_name) else {
        let message = format!(
            "StorageClass {class_name} of PersistentVolumeClaim {name} does not exist: create it again as it was"
        );
        findings.refuse("NoStorageClass", message);
        return None;
    };
    if let Ok(content) = content_of(snapshot, ground.survey) {
        let csi = ground.volume_of(name).and_then(|volume| volume.spec.as_ref()?.csi.as_ref());
        let of_volume = csi.map(|csi| ("the volume", &csi.driver));
        let (driver, snapshot) = (&content.spec.driver, snapshot.name_any());
        for (what, other) in [("the storage class", &class.provisioner)].into_iter().chain(of_volume) {
            if other != driver {
                let message = format!(
                    "VolumeSnapshot {snapshot} is of the CSI driver {driver}, {what} of PersistentVolumeClaim {name} of \
                     {other}: no such volume can be made from it; choose another point"
                );
                findings.refuse("SnapshotOfAnotherDriver", message);
            }
        }
    }
    if class.volume_binding_mode.as_deref() != Some("WaitForFirstConsumer") {
        return None;
    }
    let node = node_for(id.ordinal, ground);
    if node.is_none() {
        let message = format!(
            "StorageClass {class_name} of PersistentVolumeClaim {name} makes volumes for a node, and there is no schedulable \
             one: uncordon or add a node"
        );
        findings.refuse("NoNode", message);
    }
    node
}

/// The node that the new volumes of a replica are made at: where its pod is; or else one that all its volumes can be
/// reached from; or else any. Not always the first one, or all replicas would be tied to that.
fn node_for(ordinal: i32, ground: &Ground<'_>) -> Option<String> {
    let reach: Vec<&NodeSelector> = ground
        .shape
        .claims_of(ordinal)
        .filter_map(|claim| {
            ground.volume_of(&claim.name)?.spec.as_ref()?.node_affinity.as_ref()?.required.as_ref()
        })
        .collect();
    let reaches = |node: &Node| reach.iter().all(|selector| selects(selector, node));
    let schedulable = |node: &&Node| {
        node.spec.as_ref().is_none_or(|spec| spec.unschedulable != Some(true)) && !is_deleting(&node.metadata)
    };
    let untainted = |node: &&Node| {
        let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
        taints.into_iter().all(|taint| taint.effect == "PreferNoSchedule")
    };
    let mut nodes: Vec<&Node> = ground.survey.nodes.iter().filter(schedulable).collect();
    nodes.sort_by_key(|node| node.name_any());
    let pod = ground.pods().find(|(_, of)| *of == ordinal).map(|(pod, _)| pod);
    let present = pod.and_then(|pod| pod.spec.as_ref()?.node_name.as_deref());
    if let Some(node) = nodes.iter().find(|node| node.metadata.name.as_deref() == present && reaches(node)) {
        return Some(node.name_any());
    }
    let choices: [Vec<&Node>; 4] = [
        nodes.iter().copied().filter(untainted).filter(|node| reaches(node)).collect(),
        nodes.iter().copied().filter(|node| reaches(node)).collect(),
        nodes.iter().copied().filter(untainted).collect(),
        nodes,
    ];
    let choice = choices.iter().find(|choice| !choice.is_empty())?;
    let at = usize::try_from(ordinal).unwrap_or(0) % choice.len();
    Some(choice[at].name_any())
}

/// Whether a node is one that a volume can be reached from.
/// <https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/#NodeSelectorRequirement>
fn selects(selector: &NodeSelector, node: &Node) -> bool {
    let name = node.name_any();
    selector.node_selector_terms.iter().any(|term| {
        let expressions = term.match_expressions.as_deref().unwrap_or_default();
        let fields = term.match_fields.as_deref().unwrap_or_default();
        // A term without requirements matches nothing.
        !(expressions.is_empty() && fields.is_empty())
            && expressions.iter().all(|one| holds(one, node.labels().get(&one.key)))
            && fields.iter().all(|one| holds(one, (one.key == "metadata.name").then_some(&name)))
    })
}

fn holds(requirement: &NodeSelectorRequirement, found: Option<&String>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let compares = |holds: fn(&i64, &i64) -> bool| {
        let found = found.and_then(|found| found.parse().ok());
        let bound = values.first().and_then(|value| value.parse().ok());
        found.zip(bound).is_some_and(|(found, bound)| holds(&found, &bound))
    };
    match requirement.operator.as_str() {
        "In" => found.is_some_and(|found| values.contains(found)),
        "NotIn" => found.is_none_or(|found| !values.contains(found)),
        "Exists" => found.is_some(),
        "DoesNotExist" => found.is_none(),
        "Gt" => compares(i64::gt),
        "Lt" => compares(i64::lt),
        _ => false,
    }
}
