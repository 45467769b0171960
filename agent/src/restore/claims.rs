//! The claims that a restore makes: those that it stages new volumes by, and those that are made again.
//!
//! Pure. A manifest keeps what is the user's; what controllers wrote into a claim, about a volume that it is not to have
//! any more, is left out: a claim that is made with it is Lost, or collected with a pod that is gone.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    PersistentVolumeClaim, PersistentVolumeClaimSpec, TypedLocalObjectReference, VolumeResourceRequirements,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::core::ObjectMeta;
use sts_backup_api::names::{RESTORE_LABEL, staged_claim_name};
use sts_backup_api::points::bytes;
use sts_backup_api::swap::SwapVolume;

/// Where volumes that wait for their first consumer are made, without a pod.
const SELECTED_NODE_ANNOTATION: &str = "volume.kubernetes.io/selected-node";

/// The older way to name the storage class of a claim.
const CLASS_ANNOTATION: &str = "volume.beta.kubernetes.io/storage-class";

/// Annotations that tell of a claim's volume, by their beginning.
const OF_VOLUME: [&str; 3] = ["pv.kubernetes.io/", "volume.kubernetes.io/", "volume.beta.kubernetes.io/"];

/// The storage class of a claim; an empty one is none.
pub(super) fn class_of(claim: &PersistentVolumeClaim) -> Option<&str> {
    let class = claim.spec.as_ref().and_then(|spec| spec.storage_class_name.as_deref());
    class.or_else(|| Some(claim.metadata.annotations.as_ref()?.get(CLASS_ANNOTATION)?.as_str()))
}

/// What a claim asks for, bytes.
pub(super) fn request_of(claim: &PersistentVolumeClaim) -> Option<i64> {
    bytes(&claim.spec.as_ref()?.resources.as_ref()?.requests.as_ref()?.get("storage")?.0)
}

/// The claim as it is made again: what is the user's, and no volume. It asks for what it asked for before.
pub(super) fn manifest(claim: &PersistentVolumeClaim) -> PersistentVolumeClaim {
    let spec = claim.spec.clone().unwrap_or_default();
    let mut annotations = claim.metadata.annotations.clone().unwrap_or_default();
    annotations.retain(|name, _| !OF_VOLUME.iter().any(|of_volume| name.starts_with(of_volume)));
    PersistentVolumeClaim {
        metadata: ObjectMeta {
            name: claim.metadata.name.clone(),
            namespace: claim.metadata.namespace.clone(),
            labels: claim.metadata.labels.clone(),
            annotations: Some(annotations).filter(|annotations| !annotations.is_empty()),
            ..ObjectMeta::default()
        },
        spec: Some(PersistentVolumeClaimSpec {
            storage_class_name: class_of(claim).map(ToOwned::to_owned),
            volume_name: None,
            data_source: None,
            data_source_ref: None,
            ..spec
        }),
        status: None,
    }
}

/// The claim by which a new volume is made for `volume` from its snapshot, by the restore with that uid. It is not the
/// user's: it has none of their labels and annotations, so nothing of theirs selects it.
pub(super) fn staged_claim(restore_uid: &str, volume: &SwapVolume) -> PersistentVolumeClaim {
    let recorded = recorded(volume);
    let spec = recorded.spec.unwrap_or_default();
    let selected = |node: &String| BTreeMap::from([(SELECTED_NODE_ANNOTATION.to_owned(), node.clone())]);
    PersistentVolumeClaim {
        metadata: ObjectMeta {
            name: Some(staged_claim_name(&volume.claim, restore_uid, volume.stagings)),
            namespace: recorded.metadata.namespace,
            labels: Some(BTreeMap::from([(RESTORE_LABEL.to_owned(), restore_uid.to_owned())])),
            annotations: volume.node.as_ref().map(selected),
            ..ObjectMeta::default()
        },
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: spec.access_modes,
            storage_class_name: spec.storage_class_name,
            volume_mode: spec.volume_mode,
            // A volume of another one would not bind to the claim.
            volume_attributes_class_name: spec.volume_attributes_class_name,
            resources: Some(request(None, volume.size_bytes)),
            data_source: volume.snapshot.clone().map(|name| TypedLocalObjectReference {
                api_group: Some("snapshot.storage.k8s.io".to_owned()),
                kind: "VolumeSnapshot".to_owned(),
                name,
            }),
            ..PersistentVolumeClaimSpec::default()
        }),
        status: None,
    }
}

/// The claim of `volume` as it is made again, for the `PersistentVolume` of that name.
///
/// For the volume that was made from the snapshot it asks for that one's size, if that is more than before. For the
/// previous one, which may be smaller, it asks for what it asked for before.
pub(super) fn final_claim(volume: &SwapVolume, pv: &str) -> PersistentVolumeClaim {
    let mut claim = recorded(volume);
    claim.metadata.name = Some(volume.claim.clone());
    let is_restored = volume.restored.as_ref().is_some_and(|restored| restored.name == pv);
    let grows = is_restored && request_of(&claim).is_none_or(|asked| asked < volume.size_bytes);
    let spec = claim.spec.get_or_insert_default();
    spec.volume_name = Some(pv.to_owned());
    if grows {
        spec.resources = Some(request(spec.resources.take(), volume.size_bytes));
    }
    claim
}

/// The claim as the status remembers it. What is no manifest any more gives a claim that the API server refuses.
fn recorded(volume: &SwapVolume) -> PersistentVolumeClaim {
    serde_json::from_str(&volume.manifest).unwrap_or_default()
}

fn request(resources: Option<VolumeResourceRequirements>, size_bytes: i64) -> VolumeResourceRequirements {
    let mut resources = resources.unwrap_or_default();
    resources.requests.get_or_insert_default().insert("storage".to_owned(), quantity(size_bytes));
    resources
}

/// Bytes as Kubernetes writes them: in the largest unit of which they are a whole number.
pub(super) fn quantity(bytes: i64) -> Quantity {
    let units = [(1 << 40, "Ti"), (1 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki")];
    let unit = units.into_iter().find(|(unit, _)| bytes >= *unit && bytes % unit == 0);
    Quantity(unit.map_or_else(|| bytes.to_string(), |(unit, suffix)| format!("{}{suffix}", bytes / unit)))
}

#[cfg(test)]
mod tests {
    use kube::ResourceExt;
    use serde_json::{Value, json};
    use sts_backup_api::swap::SwapPv;

    use super::*;

    fn claim(value: Value) -> PersistentVolumeClaim {
        serde_json::from_value(value).unwrap()
    }

    /// A claim as it is in a cluster, with all that controllers write into one.
    fn lived_in() -> PersistentVolumeClaim {
        claim(json!({
            "metadata": {
                "name": "data-db-0", "namespace": "shop", "uid": "u", "resourceVersion": "7",
                "creationTimestamp": "2026-01-01T00:00:00Z", "labels": { "app": "db" },
                "annotations": {
                    "team": "a",
                    "kubectl.kubernetes.io/last-applied-configuration": "{}",
                    "pv.kubernetes.io/bind-completed": "yes",
                    "pv.kubernetes.io/bound-by-controller": "yes",
                    "volume.kubernetes.io/selected-node": "n1",
                    "volume.kubernetes.io/storage-provisioner": "csi",
                    "volume.beta.kubernetes.io/storage-provisioner": "csi",
                },
                "finalizers": ["kubernetes.io/pvc-protection"],
                "ownerReferences": [{ "apiVersion": "v1", "kind": "Pod", "name": "db-0", "uid": "gone" }],
                "managedFields": [{ "manager": "m" }],
            },
            "spec": {
                "accessModes": ["ReadWriteOnce"], "storageClassName": "fast", "volumeMode": "Filesystem",
                "selector": { "matchLabels": { "disk": "ssd" } },
                "resources": { "requests": { "storage": "1.5Gi" } },
                "volumeName": "pv-old",
                "dataSource": { "kind": "VolumeSnapshot", "name": "s0", "apiGroup": "snapshot.storage.k8s.io" },
                "dataSourceRef": { "kind": "VolumeSnapshot", "name": "s0", "apiGroup": "snapshot.storage.k8s.io" },
            },
            "status": { "phase": "Bound" },
        }))
    }

    fn volume() -> SwapVolume {
        let pv = |name: &str| SwapPv {
            name: name.to_owned(),
            uid: "u".to_owned(),
            reclaim_policy: "Delete".to_owned(),
            claim_uid: "c".to_owned(),
            manifest: None,
        };
        SwapVolume {
            claim: "data-db-0".to_owned(),
            template: "data".to_owned(),
            ordinal: 0,
            snapshot: Some("s1".to_owned()),
            snapshot_uid: None,
            size_bytes: 2 << 30,
            node: Some("n2".to_owned()),
            manifest: serde_json::to_string(&manifest(&lived_in())).unwrap(),
            previous: Some(pv("pv-old")),
            restored: Some(pv("pv-new")),
            stagings: 0,
        }
    }

    #[test]
    fn a_manifest_is_what_the_user_wrote_and_nothing_of_the_volume() {
        assert_eq!(
            serde_json::to_value(manifest(&lived_in())).unwrap(),
            json!({
                "apiVersion": "v1", "kind": "PersistentVolumeClaim",
                "metadata": {
                    "name": "data-db-0", "namespace": "shop", "labels": { "app": "db" },
                    "annotations": { "team": "a", "kubectl.kubernetes.io/last-applied-configuration": "{}" },
                },
                "spec": {
                    "accessModes": ["ReadWriteOnce"], "storageClassName": "fast", "volumeMode": "Filesystem",
                    "selector": { "matchLabels": { "disk": "ssd" } },
                    "resources": { "requests": { "storage": "1.5Gi" } },
                },
            })
        );
    }

    #[test]
    fn a_class_that_is_named_by_the_older_annotation_is_kept() {
        let old = claim(json!({
            "metadata": { "name": "c", "annotations": { CLASS_ANNOTATION: "slow" } }, "spec": {},
        }));
        let manifest = manifest(&old);
        assert_eq!(manifest.metadata.annotations, None);
        assert_eq!(manifest.spec.unwrap().storage_class_name.as_deref(), Some("slow"));
    }

    #[test]
    fn a_staged_claim_has_nothing_of_the_user_s_but_what_its_volume_must_be() {
        assert_eq!(
            serde_json::to_value(staged_claim("r-uid", &volume())).unwrap(),
            json!({
                "apiVersion": "v1", "kind": "PersistentVolumeClaim",
                "metadata": {
                    "name": staged_claim_name("data-db-0", "r-uid", 0), "namespace": "shop",
                    "labels": { RESTORE_LABEL: "r-uid" },
                    "annotations": { SELECTED_NODE_ANNOTATION: "n2" },
                },
                "spec": {
                    "accessModes": ["ReadWriteOnce"], "storageClassName": "fast", "volumeMode": "Filesystem",
                    "resources": { "requests": { "storage": "2Gi" } },
                    "dataSource": { "kind": "VolumeSnapshot", "name": "s1", "apiGroup": "snapshot.storage.k8s.io" },
                },
            })
        );
        let immediate = SwapVolume { node: None, ..volume() };
        assert_eq!(staged_claim("r-uid", &immediate).metadata.annotations, None);
        let again = SwapVolume { stagings: 1, ..volume() };
        assert_ne!(staged_claim("r-uid", &again).name_any(), staged_claim("r-uid", &volume()).name_any());
    }

    #[test]
    fn only_for_the_restored_volume_the_claim_asks_for_more_than_before() {
        let asked = |volume: &SwapVolume, pv: &str| {
            let claim = final_claim(volume, pv);
            assert_eq!(claim.name_any(), "data-db-0");
            let spec = claim.spec.unwrap();
            assert_eq!(spec.volume_name.as_deref(), Some(pv));
            spec.resources.unwrap().requests.unwrap()["storage"].0.clone()
        };
        assert_eq!(asked(&volume(), "pv-new"), "2Gi");
        assert_eq!(asked(&volume(), "pv-old"), "1.5Gi");
        let same = SwapVolume { size_bytes: 3 << 29, ..volume() };
        assert_eq!(asked(&same, "pv-new"), "1.5Gi");
    }

    #[test]
    fn sizes_are_written_in_the_largest_whole_unit() {
        for (size, expected) in
            [(0, "0"), (1, "1"), (1024, "1Ki"), (1025, "1025"), (3 << 29, "1536Mi"), (2 << 40, "2Ti")]
        {
            assert_eq!(quantity(size).0, expected);
            assert_eq!(bytes(expected), Some(size));
        }
    }
}
