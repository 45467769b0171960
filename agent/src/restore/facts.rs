//! What is known of one restore at one moment, as plain values, and how they are found in the objects. Pure.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod, VolumeNodeAffinity};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::ResourceExt;
use sts_backup_api::names::{
    APPROVED_PLAN_ANNOTATION, EXPIRES_AT_ANNOTATION, FOR_CLAIM_ANNOTATION, RECLAIM_POLICY_ANNOTATION,
    RESTORE_FINALIZER, RESTORE_LABEL, ROLLBACK_REQUESTED_AT_ANNOTATION,
};
use sts_backup_api::points::bytes;
use sts_backup_api::restore::{StatefulSetRestore, StatefulSetRestoreStatus};
use sts_backup_api::run::request_key;
use sts_backup_api::swap::Swap;

use super::plan::Verdict;

/// All that is known of one restore at one moment.
pub(super) struct RestoreFacts {
    pub(super) restore: StatefulSetRestore,
    /// Its status; empty where it has none.
    pub(super) status: StatefulSetRestoreStatus,
    /// The backup or other restore that has the `StatefulSet` in hand.
    pub(super) busy_with: Option<String>,
    /// What planning says; none where nothing is to be planned.
    pub(super) verdict: Option<Verdict>,
    /// What the swap is about; none where it was not looked at.
    pub(super) world: Option<World>,
}

impl RestoreFacts {
    /// The object alone, before anything is looked at.
    pub(super) fn of(restore: &StatefulSetRestore, busy_with: Option<String>) -> Self {
        let status = restore.status.clone().unwrap_or_default();
        Self { restore: restore.clone(), status, busy_with, verdict: None, world: None }
    }

    pub(super) fn uid(&self) -> &str {
        self.restore.metadata.uid.as_deref().unwrap_or_default()
    }

    /// The namespace of the `StatefulSet`, and so of its pods and claims.
    pub(super) fn target_namespace(&self) -> &str {
        let own = self.restore.metadata.namespace.as_deref().unwrap_or_default();
        self.restore.spec.stateful_set_ref.namespace_or(own)
    }

    /// `StatefulSet namespace/name`, for messages.
    pub(super) fn set_name(&self) -> String {
        format!("StatefulSet {}/{}", self.target_namespace(), self.restore.spec.stateful_set_ref.name)
    }

    pub(super) fn is_deleting(&self) -> bool {
        self.restore.metadata.deletion_timestamp.is_some()
    }

    pub(super) fn has_finalizer(&self) -> bool {
        self.restore.finalizers().iter().any(|finalizer| finalizer == RESTORE_FINALIZER)
    }

    /// The hash of the plan that a user lets run.
    pub(super) fn approved(&self) -> Option<&str> {
        self.restore.annotations().get(APPROVED_PLAN_ANNOTATION).map(String::as_str)
    }

    /// A request to bring the old volumes back that is not handled yet, as the status keeps it.
    pub(super) fn rollback_request(&self) -> Option<String> {
        let request = self.restore.annotations().get(ROLLBACK_REQUESTED_AT_ANNOTATION)?;
        Some(request_key(request))
            .filter(|request| Some(request) != self.status.last_rollback_request.as_ref())
    }

    /// The swap under way.
    pub(super) fn under_way(&self) -> Option<&Swap> {
        under_way(&self.status)
    }

    /// It has ended, be it refused, done, given up or taken back.
    pub(super) fn is_over(&self) -> bool {
        self.status.completion_time.is_some()
    }
}

/// The swap of a restore that has begun and not ended.
pub(super) fn under_way(status: &StatefulSetRestoreStatus) -> Option<&Swap> {
    status.swap.as_ref().filter(|_| status.completion_time.is_none())
}

/// What a swap is about, as it is now.
#[derive(Clone, Debug, Default)]
pub(super) struct World {
    /// Objects can no longer be created there.
    pub(super) namespace_ending: bool,
    /// None: it does not exist.
    pub(super) set: Option<SetFacts>,
    /// The pods of the `StatefulSet`, and all others that name one of the swap's claims.
    pub(super) pods: Vec<PodFacts>,
    /// The claims of the swap and the staged ones, by name.
    pub(super) claims: BTreeMap<String, ClaimFacts>,
    /// The volumes of the swap, those that these claims have, and those with the restore's label, by name.
    pub(super) volumes: BTreeMap<String, VolumeFacts>,
    /// The snapshots that volumes can be made from; none where they were not looked at.
    pub(super) snapshots: Option<BTreeSet<String>>,
}

/// What was read of the cluster.
#[derive(Debug, Default)]
pub(super) struct Objects {
    pub(super) namespace_ending: bool,
    pub(super) set: Option<StatefulSet>,
    /// Those of the namespace.
    pub(super) pods: Vec<Pod>,
    /// Those of the namespace.
    pub(super) claims: Vec<PersistentVolumeClaim>,
    pub(super) volumes: Vec<PersistentVolume>,
    pub(super) snapshots: Option<BTreeSet<String>>,
}

impl World {
    /// What matters to the swap of the restore with that uid.
    pub(super) fn of(objects: &Objects, uid: &str, swap: &Swap) -> Self {
        let Objects { namespace_ending, set, pods, claims, volumes, snapshots } = objects;
        let set = set.as_ref().map(SetFacts::of);
        let ours: BTreeSet<_> = swap.volumes.iter().map(|volume| volume.claim.as_str()).collect();
        let pods = pods.iter().map(|pod| PodFacts::of(pod, set.as_ref()));
        let matters = |pod: &PodFacts| {
            pod.ordinal.is_some() || pod.claims.iter().any(|claim| ours.contains(claim.as_str()))
        };
        let pods = pods.filter(matters).collect();
        let claims = claims.iter().map(|claim| (claim.name_any(), ClaimFacts::of(claim)));
        let matters =
            |name: &str, claim: &ClaimFacts| ours.contains(name) || claim.restore.as_deref() == Some(uid);
        let claims = claims.filter(|(name, claim)| matters(name, claim)).collect();
        let volumes = volumes.iter().map(|volume| (volume.name_any(), VolumeFacts::of(volume))).collect();
        Self { namespace_ending: *namespace_ending, set, pods, claims, volumes, snapshots: snapshots.clone() }
    }
}

/// The `StatefulSet`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct SetFacts {
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) resource_version: Option<String>,
    pub(super) generation: i64,
    /// The generation that its controller has seen.
    pub(super) observed_generation: i64,
    pub(super) replicas: i32,
    /// The ordinal of the first replica.
    pub(super) start: i32,
    /// Claims go with their pods when it is scaled down.
    pub(super) deletes_claims: bool,
    /// Its pods come and go one after the other.
    pub(super) is_ordered: bool,
}

impl SetFacts {
    pub(super) fn of(set: &StatefulSet) -> Self {
        let (spec, status) = (set.spec.as_ref(), set.status.as_ref());
        let retention = spec.and_then(|spec| spec.persistent_volume_claim_retention_policy.as_ref());
        Self {
            name: set.name_any(),
            uid: set.uid().unwrap_or_default(),
            resource_version: set.resource_version(),
            generation: set.metadata.generation.unwrap_or_default(),
            observed_generation: status.and_then(|status| status.observed_generation).unwrap_or_default(),
            replicas: spec.and_then(|spec| spec.replicas).unwrap_or(1),
            start: spec.and_then(|spec| spec.ordinals.as_ref()?.start).unwrap_or_default(),
            is_ordered: spec.and_then(|spec| spec.pod_management_policy.as_deref()) != Some("Parallel"),
            deletes_claims: retention.and_then(|policy| policy.when_scaled.as_deref()) == Some("Delete"),
        }
    }
}

/// A pod.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PodFacts {
    pub(super) name: String,
    pub(super) uid: String,
    /// Its ordinal, where it is one of the `StatefulSet`.
    pub(super) ordinal: Option<i32>,
    pub(super) ready: bool,
    pub(super) ending: bool,
    /// The claims that it names.
    pub(super) claims: BTreeSet<String>,
}

impl PodFacts {
    pub(super) fn of(pod: &Pod, set: Option<&SetFacts>) -> Self {
        let owns = |set: &&SetFacts| {
            pod.owner_references().iter().any(|owner| owner.controller == Some(true) && owner.uid == set.uid)
        };
        let name = pod.name_any();
        let ordinal =
            set.filter(owns).and_then(|set| name.strip_prefix(&set.name)?.strip_prefix('-')?.parse().ok());
        let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
        let ready = conditions
            .into_iter()
            .flatten()
            .any(|condition| condition.type_ == "Ready" && condition.status == "True");
        let volumes = pod.spec.as_ref().and_then(|spec| spec.volumes.as_ref());
        let claims = volumes.into_iter().flatten();
        let claims =
            claims.filter_map(|volume| Some(volume.persistent_volume_claim.as_ref()?.claim_name.clone()));
        Self {
            uid: pod.uid().unwrap_or_default(),
            ordinal,
            ready,
            ending: pod.metadata.deletion_timestamp.is_some(),
            claims: claims.collect(),
            name,
        }
    }
}

/// A claim.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ClaimFacts {
    pub(super) uid: String,
    pub(super) phase: String,
    /// The volume that it has, or asks for.
    pub(super) volume: Option<String>,
    /// It is being deleted, or goes with its pod.
    pub(super) ending: bool,
    pub(super) finalizers: Vec<String>,
    /// The restore whose label it has.
    pub(super) restore: Option<String>,
}

impl ClaimFacts {
    pub(super) fn of(claim: &PersistentVolumeClaim) -> Self {
        let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone());
        // As the controller of StatefulSets has it with whenScaled: Delete, before it deletes the pod.
        let goes_with_pod = claim.owner_references().iter().any(|owner| owner.kind == "Pod");
        Self {
            uid: claim.uid().unwrap_or_default(),
            phase: claim.status.as_ref().and_then(|status| status.phase.clone()).unwrap_or_default(),
            volume: volume.filter(|volume| !volume.is_empty()),
            ending: claim.metadata.deletion_timestamp.is_some() || goes_with_pod,
            finalizers: claim.finalizers().to_vec(),
            restore: claim.labels().get(RESTORE_LABEL).cloned(),
        }
    }

    pub(super) fn is_bound(&self) -> bool {
        self.phase == "Bound" && !self.ending
    }
}

/// A volume.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct VolumeFacts {
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) resource_version: Option<String>,
    pub(super) phase: String,
    pub(super) policy: String,
    /// The restore whose label it has.
    pub(super) restore: Option<String>,
    /// The policy that it is to have in the end.
    pub(super) final_policy: Option<String>,
    pub(super) for_claim: Option<String>,
    pub(super) expires_at: Option<String>,
    pub(super) claim: Option<ClaimRef>,
    /// None: no volume of a CSI driver.
    pub(super) driver: Option<String>,
    pub(super) provisioned_by: Option<String>,
    pub(super) handle: Option<String>,
    pub(super) fs_type: Option<String>,
    pub(super) bytes: Option<i64>,
    pub(super) affinity: Option<VolumeNodeAffinity>,
}

/// The claim that a volume is bound to, or kept for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ClaimRef {
    pub(super) namespace: String,
    pub(super) name: String,
    /// None: the next claim of that name gets the volume.
    pub(super) uid: Option<String>,
}

/// On a volume, by who made it: <https://github.com/kubernetes/enhancements> and csi-provisioner.
const PROVISIONED_BY_ANNOTATION: &str = "pv.kubernetes.io/provisioned-by";

impl VolumeFacts {
    pub(super) fn of(volume: &PersistentVolume) -> Self {
        let spec = volume.spec.as_ref();
        let csi = spec.and_then(|spec| spec.csi.as_ref());
        let annotation = |name| volume.annotations().get(name).cloned();
        let claim = spec.and_then(|spec| spec.claim_ref.as_ref()).map(|claim| ClaimRef {
            namespace: claim.namespace.clone().unwrap_or_default(),
            name: claim.name.clone().unwrap_or_default(),
            uid: claim.uid.clone().filter(|uid| !uid.is_empty()),
        });
        let capacity = spec.and_then(|spec| spec.capacity.as_ref()?.get("storage"));
        Self {
            name: volume.name_any(),
            uid: volume.uid().unwrap_or_default(),
            resource_version: volume.resource_version(),
            phase: volume.status.as_ref().and_then(|status| status.phase.clone()).unwrap_or_default(),
            policy: spec
                .and_then(|spec| spec.persistent_volume_reclaim_policy.clone())
                .unwrap_or_else(|| "Retain".to_owned()),
            restore: volume.labels().get(RESTORE_LABEL).cloned(),
            final_policy: annotation(RECLAIM_POLICY_ANNOTATION),
            for_claim: annotation(FOR_CLAIM_ANNOTATION),
            expires_at: annotation(EXPIRES_AT_ANNOTATION),
            claim,
            driver: csi.map(|csi| csi.driver.clone()),
            provisioned_by: annotation(PROVISIONED_BY_ANNOTATION),
            handle: csi.map(|csi| csi.volume_handle.clone()),
            fs_type: csi.and_then(|csi| csi.fs_type.clone()).filter(|fs_type| !fs_type.is_empty()),
            bytes: capacity.and_then(|Quantity(capacity)| bytes(capacity)),
            affinity: spec.and_then(|spec| spec.node_affinity.clone()),
        }
    }

    /// The next claim of that name gets it.
    pub(super) fn is_armed_for(&self, namespace: &str, claim: &str) -> bool {
        self.is_for(namespace, claim) && self.claim.as_ref().is_some_and(|claim| claim.uid.is_none())
    }

    /// It names that claim, whichever of that name.
    pub(super) fn is_for(&self, namespace: &str, name: &str) -> bool {
        self.claim.as_ref().is_some_and(|claim| claim.namespace == namespace && claim.name == name)
    }

    /// Nothing has it, but something had.
    pub(super) fn is_free(&self) -> bool {
        matches!(self.phase.as_str(), "Released" | "Available")
    }
}
