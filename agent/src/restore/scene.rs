//! What a restore meets in tests: `StatefulSet` shop/db with one template, its pods, claims, volumes and snapshots, all
//! healthy until a test changes something.

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::StatefulSet;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sts_backup_api::names::{
    BACKUP_LABEL, BACKUP_NAMESPACE_LABEL, CLAIM_ANNOTATION, CONSISTENCY_ANNOTATION, REPLICAS_ANNOTATION,
    RUN_LABEL, STATEFUL_SET_LABEL, TIME_ANNOTATION, VOLUMES_ANNOTATION,
};
use sts_backup_api::restore::StatefulSetRestore;
use sts_backup_api::snapshot::VolumeSnapshot;

use super::survey::Survey;

/// Reads an object as the API server writes it.
pub(super) fn object<K: DeserializeOwned>(value: Value) -> K {
    serde_json::from_value(value).unwrap()
}

pub(super) fn time(text: &str) -> Timestamp {
    text.parse().unwrap()
}

/// The present moment of all tests.
pub(super) fn now() -> Timestamp {
    time("2026-01-10T00:00:00Z")
}

/// A restore of `StatefulSet` db by a spec without its target.
pub(super) fn restore(spec: &Value) -> StatefulSetRestore {
    let mut spec = spec.clone();
    spec["statefulSetRef"] = json!({ "name": "db" });
    object(json!({
        "apiVersion": "backup.sts-backup.io/v1alpha1", "kind": "StatefulSetRestore",
        "metadata": { "name": "back", "namespace": "shop", "uid": "restore-uid" },
        "spec": spec,
    }))
}

/// `StatefulSet` db with that many replicas, claims of 1Gi, and no snapshot yet.
pub(super) fn survey(replicas: i32) -> Survey {
    let mut survey = Survey {
        granted: true,
        set: Some(set(replicas)),
        nodes: vec![node("n1", "a"), node("n2", "b")],
        ..Survey::default()
    };
    survey.classes.insert("fast".to_owned(), class("fast", "Immediate"));
    for ordinal in 0..replicas {
        add_replica(&mut survey, "data", ordinal);
        survey.pods.push(pod(ordinal));
    }
    survey
}

fn set(replicas: i32) -> StatefulSet {
    object(json!({
        "metadata": { "name": "db", "namespace": "shop", "uid": "set-uid", "generation": 3 },
        "spec": {
            "replicas": replicas, "serviceName": "db",
            "selector": { "matchLabels": { "app": "db" } }, "template": {},
            "volumeClaimTemplates": [template("data")],
        },
        "status": {
            "replicas": replicas, "observedGeneration": 3, "currentRevision": "db-1", "updateRevision": "db-1",
        },
    }))
}

pub(super) fn template(name: &str) -> Value {
    json!({
        "metadata": { "name": name, "labels": { "tier": "gold" } },
        "spec": {
            "accessModes": ["ReadWriteOnce"], "storageClassName": "fast",
            "resources": { "requests": { "storage": "1Gi" } },
        },
    })
}

pub(super) fn class<K: DeserializeOwned>(name: &str, binding: &str) -> K {
    object(json!({ "metadata": { "name": name }, "provisioner": "csi", "volumeBindingMode": binding }))
}

/// A node in a zone.
pub(super) fn node<K: DeserializeOwned>(name: &str, zone: &str) -> K {
    object(json!({ "metadata": { "name": name, "labels": { "zone": zone } }, "spec": {} }))
}

/// A running pod of the set on the first node.
pub(super) fn pod<K: DeserializeOwned>(ordinal: i32) -> K {
    let owner = json!({ "apiVersion": "apps/v1", "kind": "StatefulSet", "name": "db", "uid": "set-uid", "controller": true });
    object(json!({
        "metadata": {
            "name": format!("db-{ordinal}"), "namespace": "shop", "ownerReferences": [owner],
            "labels": { "controller-revision-hash": "db-1" },
        },
        "spec": {
            "nodeName": "n1", "containers": [],
            "volumes": [{ "name": "data", "persistentVolumeClaim": { "claimName": format!("data-db-{ordinal}") } }],
        },
        "status": { "phase": "Running" },
    }))
}

/// Adds the bound claim and the volume of a replica.
pub(super) fn add_replica(survey: &mut Survey, template: &str, ordinal: i32) {
    let (claim, volume) = (format!("{template}-db-{ordinal}"), format!("pv-{template}-{ordinal}"));
    survey.claims.insert(
        claim.clone(),
        object(json!({
            "metadata": {
                "name": claim, "namespace": "shop", "uid": format!("uid-{claim}"), "labels": { "app": "db" },
                "creationTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["kubernetes.io/pvc-protection"],
                "annotations": { "pv.kubernetes.io/bind-completed": "yes" },
            },
            "spec": {
                "accessModes": ["ReadWriteOnce"], "storageClassName": "fast", "volumeName": volume,
                "resources": { "requests": { "storage": "1Gi" } },
            },
            "status": { "phase": "Bound", "capacity": { "storage": "1Gi" } },
        })),
    );
    survey.volumes.insert(
        volume.clone(),
        object(json!({
            "metadata": { "name": volume, "uid": format!("uid-{volume}") },
            "spec": {
                "capacity": { "storage": "1Gi" }, "persistentVolumeReclaimPolicy": "Delete",
                "csi": { "driver": "csi", "volumeHandle": volume },
                "claimRef": { "name": claim, "namespace": "shop", "uid": format!("uid-{claim}") },
            },
        })),
    );
}

/// Adds the complete recovery point of a run, of the claims that there are now.
pub(super) fn take(survey: &mut Survey, run: &str, at: &str) {
    let claims: Vec<String> = survey.claims.keys().cloned().collect();
    for claim in &claims {
        let annotations = json!({
            CLAIM_ANNOTATION: claim, TIME_ANNOTATION: at, CONSISTENCY_ANNOTATION: "Application",
            REPLICAS_ANNOTATION: claims.len().to_string(), VOLUMES_ANNOTATION: claims.len().to_string(),
        });
        let labels = json!({
            STATEFUL_SET_LABEL: "db", BACKUP_LABEL: "nightly", BACKUP_NAMESPACE_LABEL: "shop", RUN_LABEL: run,
        });
        add_snapshot(
            survey,
            &format!("{claim}-{run}"),
            claim,
            at,
            &json!({ "labels": labels, "annotations": annotations }),
        );
    }
}

/// Adds a snapshot as the original operator took them, of one ordinal.
pub(super) fn take_original(survey: &mut Survey, backup: &str, template: &str, unix: i64, ordinal: i32) {
    let at = Timestamp::from_second(unix).unwrap().to_string();
    let labels = json!({ STATEFUL_SET_LABEL: "db", BACKUP_LABEL: backup });
    let name = format!("{backup}-{template}-{unix}-{ordinal}");
    add_snapshot(survey, &name, &format!("{template}-db-{ordinal}"), &at, &json!({ "labels": labels }));
}

/// Adds a ready snapshot of a claim with its content, cut a second after it was ordered.
pub(super) fn add_snapshot(survey: &mut Survey, name: &str, claim: &str, at: &str, metadata: &Value) {
    let content = format!("content-{name}");
    let mut snapshot: Value = json!({
        "apiVersion": "snapshot.storage.k8s.io/v1", "kind": "VolumeSnapshot", "metadata": metadata,
        "spec": { "source": { "persistentVolumeClaimName": claim } },
        "status": {
            "readyToUse": true, "restoreSize": "1Gi", "creationTime": at,
            "boundVolumeSnapshotContentName": content,
        },
    });
    let uid = format!("uid-{name}");
    for (field, value) in [("name", name), ("namespace", "shop"), ("uid", &uid), ("creationTimestamp", at)] {
        snapshot["metadata"][field] = json!(value);
    }
    survey.snapshots.push(object(snapshot));
    let cut = time(at).as_second() + 1;
    survey.contents.insert(
        content.clone(),
        object(json!({
            "apiVersion": "snapshot.storage.k8s.io/v1", "kind": "VolumeSnapshotContent",
            "metadata": { "name": content },
            "spec": {
                "deletionPolicy": "Delete", "driver": "csi",
                "volumeSnapshotRef": { "name": name, "namespace": "shop", "uid": uid },
            },
            "status": { "creationTime": cut * 1_000_000_000, "readyToUse": true, "restoreSize": 1 << 30 },
        })),
    );
}

/// The snapshot of that name, to change it.
pub(super) fn snapshot_mut<'a>(survey: &'a mut Survey, name: &str) -> &'a mut VolumeSnapshot {
    survey.snapshots.iter_mut().find(|snapshot| snapshot.metadata.name.as_deref() == Some(name)).unwrap()
}
