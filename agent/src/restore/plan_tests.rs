//! What a plan holds, and every reason why there is none, as tables.

use std::collections::BTreeMap;

use jiff::SignedDuration;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use proptest::collection::btree_set;
use proptest::prelude::{Just, Strategy, prop_assert, prop_assert_eq, proptest};
use serde_json::{Value, json};
use sts_backup_api::names::{ALLOW_CONTESTED_ANNOTATION, CLAIM_MANIFEST_ANNOTATION, RESTORE_LABEL};

use super::super::scene::{
    add_replica, add_snapshot, class, node, now, object, pod, restore, snapshot_mut, survey, take,
    take_original, template,
};
use super::*;

/// `replicas` replicas, all in the complete point r.
fn scene(replicas: i32) -> Survey {
    let mut survey = survey(replicas);
    take(&mut survey, "r", "2026-01-02T00:00:00Z");
    survey
}

fn latest() -> Value {
    json!({ "useLatestBackup": true })
}

fn of(replicas: &Value) -> Value {
    json!({ "useLatestBackup": true, "replicas": replicas })
}

fn planned(spec: &Value, survey: &Survey) -> Planned {
    match plan(&restore(spec), survey, now()) {
        Verdict::Go(planned) => *planned,
        verdict @ (Verdict::Refuse(_) | Verdict::Wait(_)) => unreachable!("{verdict:?}"),
    }
}

/// The reasons of a refusal and its messages; of a wait, the reason with a question mark.
fn refusal(restore: &StatefulSetRestore, survey: &Survey) -> (Vec<String>, String) {
    match plan(restore, survey, now()) {
        Verdict::Go(planned) => (Vec::new(), format!("{planned:?}")),
        Verdict::Wait(problem) => (vec![format!("{}?", problem.reason)], problem.message),
        Verdict::Refuse(problems) => (
            problems.iter().map(|problem| problem.reason.to_owned()).collect(),
            problems.into_iter().map(|problem| problem.message).collect::<Vec<_>>().join("\n"),
        ),
    }
}

fn set_mut(survey: &mut Survey) -> &mut StatefulSet {
    survey.set.as_mut().unwrap()
}

fn spec_mut(survey: &mut Survey) -> &mut k8s_openapi::api::apps::v1::StatefulSetSpec {
    set_mut(survey).spec.as_mut().unwrap()
}

fn label(survey: &mut Survey, name: &str) {
    set_mut(survey).labels_mut().insert(name.to_owned(), "team-app".to_owned());
}

fn claim_mut<'a>(survey: &'a mut Survey, name: &str) -> &'a mut PersistentVolumeClaim {
    survey.claims.get_mut(name).unwrap()
}

fn storage(size: &str) -> BTreeMap<String, Quantity> {
    BTreeMap::from([("storage".to_owned(), Quantity(size.to_owned()))])
}

/// Loses the claim of a replica, and its volume.
fn lose(survey: &mut Survey, claim: &str) {
    let lost = survey.claims.remove(claim).unwrap();
    survey.volumes.remove(&lost.spec.unwrap().volume_name.unwrap());
}

fn manifest(volume: &SwapVolume) -> Value {
    serde_json::from_str(&volume.manifest).unwrap()
}

#[test]
fn a_healthy_set_is_swapped_whole() {
    let Planned { plan, swap } = planned(&latest(), &scene(2));
    assert_eq!((plan.backup.as_deref(), plan.point.as_str()), (Some("nightly"), "r"));
    assert_eq!(plan.consistency, Some(Consistency::Application));
    assert_eq!((plan.replicas, plan.replicas_meanwhile), (2, 0));
    assert_eq!(plan.warnings, [""; 0]);
    let expected = |ordinal: i32| PlannedVolume {
        claim: format!("data-db-{ordinal}"),
        action: VolumeAction::Replace,
        snapshot: Some(format!("data-db-{ordinal}-r")),
        size_bytes: Some(1 << 30),
        old_volume: Some(format!("pv-data-{ordinal}")),
    };
    assert_eq!(plan.volumes, [expected(0), expected(1)]);

    assert_eq!((swap.step, swap.toward, swap.step_since.0), (SwapStep::Protecting, Toward::Restored, now()));
    assert_eq!((swap.stateful_set_uid.as_str(), swap.replicas, swap.replicas_meanwhile), ("set-uid", 2, 0));
    let volume = &swap.volumes[1];
    assert_eq!((volume.template.as_str(), volume.ordinal, &volume.node), ("data", 1, &None));
    assert_eq!((&volume.restored, volume.stagings), (&None, 0));
    let previous = volume.previous.as_ref().unwrap();
    assert_eq!((previous.name.as_str(), previous.uid.as_str()), ("pv-data-1", "uid-pv-data-1"));
    assert_eq!((previous.reclaim_policy.as_str(), previous.claim_uid.as_str()), ("Delete", "uid-data-db-1"));
    let kept: Value = serde_json::from_str(previous.manifest.as_ref().unwrap()).unwrap();
    assert_eq!(kept["spec"]["csi"]["volumeHandle"], "pv-data-1");
    assert_eq!(
        manifest(volume)["metadata"],
        json!({ "name": "data-db-1", "namespace": "shop", "labels": { "app": "db" } })
    );
}

#[test]
fn everything_that_is_in_the_way_of_the_claims_is_named() {
    type Change = fn(&mut Survey);
    let cases: [(Change, &str, &str); 17] = [
        (|survey| survey.granted = false, "NamespaceNotGranted?", "allow-restore-from=shop"),
        (|survey| survey.set = None, "StatefulSetNotFound", "StatefulSet shop/db does not exist"),
        (
            |survey| set_mut(survey).metadata.deletion_timestamp = Some(now().into()),
            "StatefulSetNotFound",
            "is being deleted",
        ),
        (|survey| survey.snapshots.clear(), "NoRecoveryPoint", "there is none at all"),
        (|survey| survey.contents.clear(), "SnapshotContentLost,SnapshotContentLost", "choose another"),
        (
            |survey| claim_mut(survey, "data-db-1").finalizers_mut().push("example.com/hold".to_owned()),
            "ForeignFinalizer",
            "PersistentVolumeClaim data-db-1 has the finalizer example.com/hold",
        ),
        (
            |survey| claim_mut(survey, "data-db-1").metadata.deletion_timestamp = Some(now().into()),
            "ClaimBeingDeleted",
            "PersistentVolumeClaim data-db-1 is being deleted",
        ),
        (
            |survey| claim_mut(survey, "data-db-1").status.as_mut().unwrap().phase = Some("Lost".to_owned()),
            "ClaimNotBound",
            "PersistentVolumeClaim data-db-1 is not bound",
        ),
        (|survey| drop(survey.volumes.remove("pv-data-1")), "VolumeMissing", "pv-data-1 of claim data-db-1"),
        (
            |survey| {
                let volume = survey.volumes.get_mut("pv-data-1").unwrap();
                volume.spec.as_mut().unwrap().claim_ref.as_mut().unwrap().uid = Some("other".to_owned());
            },
            "VolumeMissing",
            "is bound to another claim",
        ),
        (
            |survey| {
                let volume = survey.volumes.get_mut("pv-data-1").unwrap();
                volume.labels_mut().insert(RESTORE_LABEL.to_owned(), "earlier".to_owned());
            },
            "VolumeInUse",
            "in hand of the StatefulSetRestore with uid earlier",
        ),
        (
            |survey| {
                let csi = survey.volumes.get_mut("pv-data-1").unwrap().spec.as_mut().unwrap().csi.as_mut();
                csi.unwrap().driver = "old-csi".to_owned();
            },
            "SnapshotOfAnotherDriver",
            "the volume of PersistentVolumeClaim data-db-1 of old-csi",
        ),
        (
            |survey| survey.classes.get_mut("fast").unwrap().provisioner = "nfs".to_owned(),
            "SnapshotOfAnotherDriver,SnapshotOfAnotherDriver",
            "the storage class of PersistentVolumeClaim data-db-1 of nfs",
        ),
        (
            |survey| {
                claim_mut(survey, "data-db-1").spec.as_mut().unwrap().storage_class_name =
                    Some("gone".to_owned());
            },
            "NoStorageClass",
            "StorageClass gone of PersistentVolumeClaim data-db-1 does not exist",
        ),
        (
            |survey| {
                claim_mut(survey, "data-db-1").spec.as_mut().unwrap().storage_class_name =
                    Some(String::new());
            },
            "NoStorageClass",
            "PersistentVolumeClaim data-db-1 has no storage class",
        ),
        (
            |survey| {
                survey.classes.insert("fast".to_owned(), class("fast", "WaitForFirstConsumer"));
                survey.nodes.clear();
            },
            "NoNode,NoNode",
            "no schedulable one",
        ),
        (
            |survey| {
                drop(survey.volumes.remove("pv-data-0"));
                claim_mut(survey, "data-db-1").finalizers_mut().push("example.com/hold".to_owned());
                survey.classes.clear();
            },
            "VolumeMissing,NoStorageClass,ForeignFinalizer,NoStorageClass",
            "pv-data-0",
        ),
    ];
    for (change, reasons, text) in cases {
        let mut survey = scene(2);
        change(&mut survey);
        let (found, message) = refusal(&restore(&latest()), &survey);
        assert_eq!(found.join(","), reasons, "{message}");
        assert!(message.contains(text), "{message}");
    }
}

#[test]
fn a_pod_of_somebody_else_holds_a_claim_in_every_phase() {
    for phase in ["Pending", "Running", "Succeeded", "Failed"] {
        let mut survey = scene(2);
        survey.pods.push(object(json!({
            "metadata": { "name": "job", "namespace": "shop" },
            "spec": { "containers": [], "volumes": [{ "name": "v", "persistentVolumeClaim": { "claimName": "data-db-1" } }] },
            "status": { "phase": phase },
        })));
        let (found, message) = refusal(&restore(&latest()), &survey);
        assert_eq!(found, ["ClaimInUse"]);
        assert!(
            message.contains(&format!("Pod job ({phase}) uses PersistentVolumeClaim data-db-1")),
            "{message}"
        );
        // A claim that is not deleted may be used by whom it likes; where it goes with its pod, it may not.
        let only_first = json!({ "snapshotNames": ["data-db-0-r"] });
        assert_eq!(refusal(&restore(&only_first), &survey).0, [""; 0]);
        spec_mut(&mut survey).persistent_volume_claim_retention_policy =
            Some(object(json!({ "whenScaled": "Delete", "whenDeleted": "Retain" })));
        assert_eq!(refusal(&restore(&only_first), &survey).0, ["ClaimInUse"]);
    }
}

#[test]
fn what_is_only_on_its_way_is_waited_for() {
    let seconds_ago = |seconds| (now() - SignedDuration::from_secs(seconds)).to_string();
    let stuck = |age: i64, status: Value| {
        let mut survey = scene(1);
        add_snapshot(&mut survey, "manual", "data-db-0", &seconds_ago(age), &json!({}));
        snapshot_mut(&mut survey, "manual").status = Some(object(status));
        survey
    };
    let cut = json!({ "readyToUse": false, "creationTime": "2026-01-09T23:00:00Z" });
    for (age, status, reason) in [
        (30, json!({}), "SnapshotNotReady?"),
        (90, json!({}), "SnapshotNotReady"),
        (90, cut.clone(), "SnapshotNotReady?"),
        (3599, cut.clone(), "SnapshotNotReady?"),
        (3601, cut, "SnapshotNotReady"),
        (30, json!({ "error": { "message": "busy" } }), "SnapshotNotReady?"),
        (90, json!({ "creationTime": "2026-01-09T23:00:00Z", "error": {} }), "SnapshotNotReady"),
    ] {
        let (found, message) = refusal(&restore(&latest()), &stuck(age, status));
        assert_eq!(found, [reason]);
        assert!(message.contains("VolumeSnapshot manual of PersistentVolumeClaim data-db-0"), "{message}");
    }
    let mut going = stuck(30, json!({}));
    snapshot_mut(&mut going, "manual").metadata.deletion_timestamp = Some(now().into());
    assert_eq!(refusal(&restore(&latest()), &going).0, ["SnapshotNotReady"]);

    for (age, reason) in [(30, "ClaimNotBound?"), (90, "ClaimNotBound")] {
        let mut survey = scene(1);
        let claim = claim_mut(&mut survey, "data-db-0");
        claim.status.as_mut().unwrap().phase = Some("Pending".to_owned());
        claim.metadata.creation_timestamp = Some((now() - SignedDuration::from_secs(age)).into());
        assert_eq!(refusal(&restore(&latest()), &survey).0, [reason]);
    }
}

#[test]
fn a_rollout_is_waited_for_and_one_that_stops_on_its_way_is_refused() {
    let rolling = |strategy: Value, outdated: usize| {
        let mut survey = scene(2);
        spec_mut(&mut survey).update_strategy = Some(object(strategy));
        set_mut(&mut survey).status.as_mut().unwrap().update_revision = Some("db-2".to_owned());
        for pod in survey.pods.iter_mut().skip(outdated) {
            pod.labels_mut().insert("controller-revision-hash".to_owned(), "db-2".to_owned());
        }
        survey
    };
    for (strategy, outdated, reasons) in [
        (json!({}), 1, "RolloutInProgress?"),
        (json!({ "type": "RollingUpdate", "rollingUpdate": { "partition": 0 } }), 2, "RolloutInProgress?"),
        (json!({ "type": "RollingUpdate", "rollingUpdate": { "partition": 1 } }), 1, "RolloutInProgress"),
        (json!({ "type": "OnDelete" }), 1, "RolloutInProgress"),
        // All pods are there; with OnDelete the current revision stays behind for ever.
        (json!({ "type": "OnDelete" }), 0, ""),
    ] {
        let (found, message) = refusal(&restore(&latest()), &rolling(strategy, outdated));
        assert_eq!(found.join(","), reasons, "{message}");
    }
    for observed in [None, Some(2)] {
        let mut survey = scene(2);
        set_mut(&mut survey).status.as_mut().unwrap().observed_generation = observed;
        assert_eq!(refusal(&restore(&latest()), &survey).0, ["RolloutInProgress?"]);
    }
}

#[test]
fn whoever_else_may_scale_is_named_unless_somebody_allows_it() {
    type Change = fn(&mut Survey);
    let autoscaler =
        |labels: Value, target: Value| -> k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler {
            object(json!({
                "metadata": { "name": "hpa", "labels": labels },
                "spec": { "maxReplicas": 5, "scaleTargetRef": target },
            }))
        };
    let rivals: [(Change, &str); 6] = [
        (
            |survey| {
                let owner =
                    json!({ "apiVersion": "example.com/v1", "kind": "Postgres", "name": "main", "uid": "u" });
                set_mut(survey).metadata.owner_references = Some(vec![object(owner)]);
            },
            "Postgres main (example.com/v1)",
        ),
        (|survey| label(survey, "argocd.argoproj.io/instance"), "the Argo CD application team-app"),
        (
            |survey| {
                let annotations = set_mut(survey).annotations_mut();
                annotations
                    .insert("argocd.argoproj.io/tracking-id".to_owned(), "app:apps/StatefulSet".to_owned());
            },
            "the Argo CD application app:apps/StatefulSet",
        ),
        (|survey| label(survey, "kustomize.toolkit.fluxcd.io/name"), "the Flux Kustomization team-app"),
        (|survey| label(survey, "helm.toolkit.fluxcd.io/name"), "the Flux HelmRelease team-app"),
        (
            |survey| {
                survey.autoscalers.push(object(json!({
                    "metadata": { "name": "keda-hpa-db", "labels": { "scaledobject.keda.sh/name": "by-queue" } },
                    "spec": { "maxReplicas": 5, "scaleTargetRef": { "kind": "StatefulSet", "name": "db" } },
                })));
            },
            "the KEDA ScaledObject by-queue (HorizontalPodAutoscaler keda-hpa-db)",
        ),
    ];
    for (change, whose) in rivals {
        let mut survey = scene(2);
        change(&mut survey);
        let (found, message) = refusal(&restore(&latest()), &survey);
        assert_eq!(found, ["Contested"], "{whose}");
        assert!(message.contains(whose), "{message}");

        let mut allowing = restore(&latest());
        allowing.annotations_mut().insert(ALLOW_CONTESTED_ANNOTATION.to_owned(), "true".to_owned());
        assert_eq!(refusal(&allowing, &survey).0, [""; 0]);
        allowing.annotations_mut().insert(ALLOW_CONTESTED_ANNOTATION.to_owned(), "false".to_owned());
        assert_eq!(refusal(&allowing, &survey).0, ["Contested"]);
        set_mut(&mut survey)
            .annotations_mut()
            .insert(ALLOW_CONTESTED_ANNOTATION.to_owned(), "true".to_owned());
        let warnings = planned(&latest(), &survey).plan.warnings;
        assert!(warnings[0].contains(whose), "{warnings:?}");
    }

    // Charts write this label without any GitOps tool.
    let mut survey = scene(2);
    label(&mut survey, "app.kubernetes.io/instance");
    // An autoscaler leaves a set at 0 alone, but not one at 1; one of something else is none of ours.
    survey
        .autoscalers
        .push(autoscaler(json!({}), json!({ "apiVersion": "apps/v1", "kind": "Deployment", "name": "db" })));
    survey.autoscalers.push(autoscaler(
        json!({}),
        json!({ "apiVersion": "apps/v1", "kind": "StatefulSet", "name": "web" }),
    ));
    assert_eq!(planned(&of(&json!([1])), &survey).plan.replicas_meanwhile, 1);
    survey
        .autoscalers
        .push(autoscaler(json!({}), json!({ "apiVersion": "apps/v1", "kind": "StatefulSet", "name": "db" })));
    assert_eq!(refusal(&restore(&of(&json!([1]))), &survey).0, ["Contested"]);
    let warnings = planned(&latest(), &survey).plan.warnings;
    assert!(warnings[0].contains("HorizontalPodAutoscaler hpa scales StatefulSet db"), "{warnings:?}");
}

#[test]
fn pods_are_only_scaled_away_where_the_spec_allows_it() {
    let spec = json!({ "useLatestBackup": true, "replicas": [1], "scaleDown": false });
    let mut survey = scene(2);
    let (found, message) = refusal(&restore(&spec), &survey);
    assert_eq!(found, ["ScaleDownNotAllowed"]);
    assert!(
        message.contains("has 2 replicas and pods db-1") && message.contains("--replicas 1"),
        "{message}"
    );

    spec_mut(&mut survey).replicas = Some(1);
    assert_eq!(refusal(&restore(&spec), &survey).0, ["ScaleDownNotAllowed"]);
    survey.pods.pop();
    let Planned { plan, swap } = planned(&spec, &survey);
    assert_eq!((swap.replicas, swap.replicas_meanwhile, plan.expected_downtime_seconds), (1, 1, 0));

    spec_mut(&mut survey).replicas = Some(2);
    assert_eq!(refusal(&restore(&spec), &survey).0, ["ScaleDownNotAllowed"]);
}

#[test]
fn the_sum_of_all_new_volumes_must_fit_into_every_quota() {
    let quota = |hard: Value, used: Value| {
        let mut survey = scene(2);
        survey
            .quotas
            .push(object(json!({ "metadata": { "name": "q" }, "status": { "hard": hard, "used": used } })));
        refusal(&restore(&latest()), &survey)
    };
    let of_class = "fast.storageclass.storage.k8s.io";
    for (resource, fits, too_small) in [
        ("requests.storage".to_owned(), json!("2Gi"), json!("2047Mi")),
        ("persistentvolumeclaims".to_owned(), json!("2"), json!("1")),
        ("count/persistentvolumeclaims".to_owned(), json!("2"), json!("1")),
        (format!("{of_class}/requests.storage"), json!("2Gi"), json!("2047Mi")),
        (format!("{of_class}/persistentvolumeclaims"), json!("2"), json!("1")),
    ] {
        assert_eq!(quota(json!({ &resource: fits }), json!({})).0, [""; 0], "{resource}");
        let (found, message) = quota(json!({ &resource: too_small }), json!({}));
        assert_eq!(found, ["QuotaExceeded"], "{resource}");
        assert!(message.contains("ResourceQuota q has") && message.contains(&resource), "{message}");
    }
    assert_eq!(quota(json!({ "requests.storage": "4Gi" }), json!({ "requests.storage": "2Gi" })).0, [""; 0]);
    let (found, message) = quota(json!({ "requests.storage": "3Gi" }), json!({ "requests.storage": "2Gi" }));
    assert_eq!(found, ["QuotaExceeded"]);
    assert!(message.contains("1Gi left of requests.storage, and the new volumes need 2Gi"), "{message}");
    let other = "slow.storageclass.storage.k8s.io/requests.storage";
    assert_eq!(quota(json!({ other: "0", "pods": "0" }), json!({})).0, [""; 0]);
}

#[test]
fn a_set_goes_down_to_the_lowest_ordinal_that_is_restored() {
    // start, replicas, the ordinals that are named: replicas meanwhile; what happens to which ordinal.
    let cases: [(i32, i32, Value, i32, &str); 9] = [
        (0, 3, json!([]), 0, "Replace 0, Replace 1, Replace 2"),
        (0, 3, json!([2]), 2, "Replace 2"),
        (0, 3, json!([1]), 1, "Replace 1, Keep 2"),
        (0, 3, json!([0, 2]), 0, "Replace 0, Keep 1, Replace 2"),
        // Scaled down since: the claims are restored, the replicas stay.
        (0, 1, json!([]), 0, "Replace 0, Replace 1, Replace 2"),
        (0, 1, json!([2]), 1, "Replace 2"),
        (0, 0, json!([]), 0, "Replace 0, Replace 1, Replace 2"),
        (1, 2, json!([2]), 1, "Replace 2"),
        (1, 2, json!([]), 0, "Replace 0, Replace 1, Replace 2"),
    ];
    for (start, replicas, named, meanwhile, actions) in cases {
        let mut survey = scene(3);
        spec_mut(&mut survey).replicas = Some(replicas);
        spec_mut(&mut survey).ordinals = Some(object(json!({ "start": start })));
        let Planned { plan, swap } = planned(&of(&named), &survey);
        let case = format!("start {start}, {replicas} replicas, {named}");
        assert_eq!((swap.replicas, swap.replicas_meanwhile), (replicas, meanwhile), "{case}");
        let found: Vec<_> = swap
            .volumes
            .iter()
            .zip(&plan.volumes)
            .map(|(volume, planned)| format!("{:?} {}", planned.action, volume.ordinal))
            .collect();
        assert_eq!(found.join(", "), actions, "{case}");
        assert!(swap.volumes.iter().all(|volume| volume.previous.is_some()), "{case}");
    }
}

#[test]
fn what_is_below_the_first_ordinal_takes_no_pod_down() {
    let mut survey = scene(3);
    spec_mut(&mut survey).replicas = Some(1);
    spec_mut(&mut survey).ordinals = Some(object(json!({ "start": 2 })));
    let Planned { plan, swap } = planned(&of(&json!([0])), &survey);
    assert_eq!((swap.replicas_meanwhile, plan.expected_downtime_seconds), (1, 0));
    let warnings = [
        "ordinals 0 of StatefulSet db do not run, and do not run afterwards: only their claims are restored",
        "pods db-2 keep the data that they have",
    ];
    assert_eq!(plan.warnings, warnings);
}

#[test]
fn a_kept_claim_of_a_pod_that_goes_is_protected_if_it_has_a_volume() {
    let only_first = json!({ "snapshotNames": ["data-db-0-r"] });
    let mut survey = scene(3);
    claim_mut(&mut survey, "data-db-2").status.as_mut().unwrap().phase = Some("Pending".to_owned());
    let Planned { plan, swap } = planned(&only_first, &survey);
    let actions: Vec<_> = plan.volumes.iter().map(|volume| (volume.claim.as_str(), volume.action)).collect();
    assert_eq!(actions, [("data-db-0", VolumeAction::Replace), ("data-db-1", VolumeAction::Keep)]);
    assert_eq!((&swap.volumes[1].snapshot, swap.volumes[1].size_bytes), (&None, 0));
    assert!(
        plan.warnings
            .contains(&"pods db-1 (restarted), db-2 (restarted) keep the data that they have".to_owned())
    );

    // One that is being deleted would be gone with its pod.
    claim_mut(&mut survey, "data-db-1").metadata.deletion_timestamp = Some(now().into());
    assert_eq!(refusal(&restore(&only_first), &survey).0, ["ClaimBeingDeleted"]);
}

#[test]
fn a_new_volume_is_as_large_as_the_largest_of_all_that_asks_for_one() {
    type Change = fn(&mut Survey);
    let cases: [(Change, i64, &str); 7] = [
        (|_| (), 1, "1Gi"),
        (
            |survey| {
                let resources = &mut claim_mut(survey, "data-db-0").spec.as_mut().unwrap().resources;
                resources.as_mut().unwrap().requests = Some(storage("2Gi"));
            },
            2,
            "2Gi",
        ),
        (
            |survey| claim_mut(survey, "data-db-0").status.as_mut().unwrap().capacity = Some(storage("3Gi")),
            3,
            "1Gi",
        ),
        (
            |survey| {
                survey.volumes.get_mut("pv-data-0").unwrap().spec.as_mut().unwrap().capacity =
                    Some(storage("4Gi"));
            },
            4,
            "1Gi",
        ),
        (
            |survey| {
                let template = &mut spec_mut(survey).volume_claim_templates.as_mut().unwrap()[0];
                template.spec.as_mut().unwrap().resources.as_mut().unwrap().requests = Some(storage("5Gi"));
            },
            5,
            "1Gi",
        ),
        (
            |survey| {
                let status = &mut snapshot_mut(survey, "data-db-0-r").status;
                status.as_mut().unwrap().restore_size = Some(Quantity("6Gi".to_owned()));
            },
            6,
            "1Gi",
        ),
        (
            |survey| {
                let content = survey.contents.get_mut("content-data-db-0-r").unwrap();
                content.status.as_mut().unwrap().restore_size = Some(7 << 30);
            },
            7,
            "1Gi",
        ),
    ];
    for (change, gibibytes, recorded) in cases {
        let mut survey = scene(1);
        change(&mut survey);
        let Planned { plan, swap } = planned(&latest(), &survey);
        assert_eq!(swap.volumes[0].size_bytes, gibibytes << 30);
        assert_eq!(plan.volumes[0].size_bytes, Some(gibibytes << 30));
        assert_eq!(manifest(&swap.volumes[0])["spec"]["resources"]["requests"]["storage"], recorded);
    }
}

#[test]
fn a_claim_that_is_gone_is_made_as_its_snapshot_or_its_template_says() {
    let mut survey = scene(2);
    lose(&mut survey, "data-db-1");
    let remembered = json!({
        "metadata": {
            "name": "data-db-1", "namespace": "elsewhere", "labels": { "app": "was" },
            "annotations": { "pv.kubernetes.io/bind-completed": "yes", "team": "a" },
        },
        "spec": {
            "accessModes": ["ReadWriteOnce"], "storageClassName": "fast", "volumeName": "gone",
            "resources": { "requests": { "storage": "3Gi" } },
        },
    });
    let remember = |survey: &mut Survey, text: String| {
        let annotations = snapshot_mut(survey, "data-db-1-r").annotations_mut();
        annotations.insert(CLAIM_MANIFEST_ANNOTATION.to_owned(), text);
    };
    remember(&mut survey, remembered.to_string());
    let Planned { plan, swap } = planned(&latest(), &survey);
    assert_eq!((plan.volumes[1].action, &plan.volumes[1].old_volume), (VolumeAction::Create, &None));
    let (volume, made) = (&swap.volumes[1], manifest(&swap.volumes[1]));
    assert_eq!((&volume.previous, volume.size_bytes), (&None, 3 << 30));
    assert_eq!(
        made["metadata"],
        json!({ "name": "data-db-1", "namespace": "shop", "labels": { "app": "was" }, "annotations": { "team": "a" } })
    );
    assert_eq!(made["spec"].get("volumeName"), None);

    // What is no manifest, or one of another claim, says nothing: the StatefulSet would make it so.
    for text in ["", "{", &remembered.to_string().replace("data-db-1", "data-db-7")] {
        remember(&mut survey, text.to_owned());
        let made = manifest(&planned(&latest(), &survey).swap.volumes[1]);
        let labels = json!({ "app": "db", "tier": "gold" });
        assert_eq!(made["metadata"], json!({ "name": "data-db-1", "namespace": "shop", "labels": labels }));
        assert_eq!(made["spec"]["resources"]["requests"]["storage"], "1Gi");
    }
}

#[test]
fn a_point_of_the_original_is_restored_also_without_any_claim() {
    let mut survey = survey(2);
    take_original(&mut survey, "my-db", "data", 1_000_000, 0);
    take_original(&mut survey, "my-db", "data", 1_000_003, 1);
    for claim in ["data-db-0", "data-db-1"] {
        lose(&mut survey, claim);
    }
    let template = &mut spec_mut(&mut survey).volume_claim_templates.as_mut().unwrap()[0];
    template.spec.as_mut().unwrap().storage_class_name = None;
    assert_eq!(refusal(&restore(&latest()), &survey).0, ["NoStorageClass", "NoStorageClass"]);

    let mut old: k8s_openapi::api::storage::v1::StorageClass = class("old", "Immediate");
    old.metadata.creation_timestamp = Some((now() - SignedDuration::from_hours(1)).into());
    survey.classes.get_mut("fast").unwrap().metadata.creation_timestamp = Some(now().into());
    survey.classes.insert("old".to_owned(), old);
    for class in survey.classes.values_mut() {
        class
            .annotations_mut()
            .insert("storageclass.kubernetes.io/is-default-class".to_owned(), "true".to_owned());
    }
    let Planned { plan, swap } = planned(&latest(), &survey);
    assert_eq!(
        (plan.backup.as_deref(), plan.point.as_str(), plan.consistency),
        (Some("my-db"), "1000000", None)
    );
    assert!(plan.volumes.iter().all(|volume| volume.action == VolumeAction::Create));
    assert_eq!(manifest(&swap.volumes[0])["spec"]["storageClassName"], "fast");
    assert!(plan.warnings[0].starts_with("nobody wrote down"), "{:?}", plan.warnings);
}

#[test]
fn volumes_that_wait_for_a_consumer_are_made_where_their_pod_can_use_them() {
    let zone = |zone: &str| {
        object(json!({ "required": { "nodeSelectorTerms": [
            { "matchExpressions": [{ "key": "zone", "operator": "In", "values": [zone] }] },
        ] } }))
    };
    let waiting = |reach: &str| {
        let mut survey = scene(2);
        survey.classes.insert("fast".to_owned(), class("fast", "WaitForFirstConsumer"));
        survey.nodes.push(node("n3", "b"));
        if !reach.is_empty() {
            survey.volumes.get_mut("pv-data-1").unwrap().spec.as_mut().unwrap().node_affinity =
                Some(zone(reach));
        }
        survey
    };
    let node_of = |survey: &Survey| planned(&of(&json!([1])), survey).swap.volumes[0].node.clone().unwrap();
    let cordon = |survey: &mut Survey, at: usize| {
        survey.nodes[at].spec.as_mut().unwrap().unschedulable = Some(true);
    };
    let taint = |survey: &mut Survey, at: usize| {
        let taint = json!({ "key": "dedicated", "effect": "NoSchedule" });
        survey.nodes[at].spec.as_mut().unwrap().taints = Some(vec![object(taint)]);
    };

    assert_eq!(node_of(&waiting("a")), "n1", "where its pod is");
    let mut survey = waiting("a");
    taint(&mut survey, 0);
    assert_eq!(node_of(&survey), "n1", "where its pod is, a pod may tolerate a taint");
    assert_eq!(node_of(&waiting("b")), "n3", "its pod is where the old volume cannot be reached");
    let mut survey = waiting("b");
    cordon(&mut survey, 2);
    assert_eq!(node_of(&survey), "n2", "a schedulable node of the zone");
    let mut survey = waiting("b");
    taint(&mut survey, 2);
    assert_eq!(node_of(&survey), "n2", "rather one without a taint");
    let mut survey = waiting("");
    survey.pods.clear();
    cordon(&mut survey, 0);
    assert_eq!(node_of(&survey), "n3", "not the same one for every ordinal");
    let mut survey = waiting("a");
    cordon(&mut survey, 0);
    assert_eq!(node_of(&survey), "n3", "any, where none reaches the old volume");
    taint(&mut survey, 1);
    taint(&mut survey, 2);
    assert_eq!(node_of(&survey), "n3", "a tainted one is better than none");

    // All volumes of a pod, kept or gone, are at one place.
    let mut survey = survey_of_two_templates();
    survey.classes.insert("fast".to_owned(), class("fast", "WaitForFirstConsumer"));
    survey.volumes.get_mut("pv-wal-0").unwrap().spec.as_mut().unwrap().node_affinity = Some(zone("b"));
    lose(&mut survey, "data-db-0");
    let volumes = planned(&latest(), &survey).swap.volumes;
    assert_eq!([&volumes[0].node, &volumes[1].node].map(|node| node.as_deref()), [Some("n2"), Some("n2")]);
}

fn survey_of_two_templates() -> Survey {
    let mut survey = survey(1);
    add_replica(&mut survey, "wal", 0);
    spec_mut(&mut survey).volume_claim_templates.as_mut().unwrap().push(object(template("wal")));
    take(&mut survey, "r", "2026-01-02T00:00:00Z");
    survey
}

#[test]
fn downtime_is_expected_by_pods_and_claims() {
    for (replicas, policy, templates, seconds) in [
        (3, "OrderedReady", 1, 6),
        (1, "OrderedReady", 1, 2),
        (3, "Parallel", 2, 3),
        (8, "OrderedReady", 2, 18),
        (10, "Parallel", 2, 7),
    ] {
        let mut survey = survey(replicas);
        if templates == 2 {
            spec_mut(&mut survey).volume_claim_templates.as_mut().unwrap().push(object(template("wal")));
            for ordinal in 0..replicas {
                add_replica(&mut survey, "wal", ordinal);
            }
        }
        take(&mut survey, "r", "2026-01-02T00:00:00Z");
        spec_mut(&mut survey).pod_management_policy = Some(policy.to_owned());
        let found = planned(&latest(), &survey).plan.expected_downtime_seconds;
        assert_eq!(found, seconds, "{policy} {replicas} x {templates}");
    }
}

#[test]
fn the_user_is_warned_of_what_may_surprise() {
    let warned = |spec: &Value, survey: &Survey, text: &str| {
        let warnings = planned(spec, survey).plan.warnings;
        assert!(warnings.iter().any(|warning| warning.contains(text)), "{text}: {warnings:?}");
    };
    let mut survey = scene(2);
    spec_mut(&mut survey).persistent_volume_claim_retention_policy =
        Some(object(json!({ "whenScaled": "Delete", "whenDeleted": "Retain" })));
    warned(&latest(), &survey, "whenScaled: Delete");
    survey.volumes.get_mut("pv-data-1").unwrap().spec.as_mut().unwrap().persistent_volume_reclaim_policy =
        Some("Retain".to_owned());
    warned(&latest(), &survey, "old volumes pv-data-1 have the reclaim policy Retain");
    spec_mut(&mut survey).replicas = Some(0);
    warned(&latest(), &survey, "is scaled to 0 and stays so");
    for snapshot in &mut survey.snapshots {
        snapshot.metadata.annotations.as_mut().unwrap().retain(|name, _| !name.ends_with("consistency"));
    }
    warned(&latest(), &survey, "as after a power cut");
    let only_data = json!({ "snapshotNames": ["data-db-0-r"] });
    warned(&only_data, &survey_of_two_templates(), "claims wal-db-0 keep their data beside restored ones");
}

#[test]
fn the_hash_changes_with_what_is_done_and_with_nothing_else() {
    type Change = fn(&mut Survey);
    let hash = |survey: &Survey| planned(&of(&json!([1])), survey).plan.hash;
    let first = hash(&scene(3));
    let others: [Change; 5] = [
        |survey| claim_mut(survey, "data-db-1").metadata.uid = Some("again".to_owned()),
        |survey| {
            let claim = claim_mut(survey, "data-db-1").spec.as_mut().unwrap();
            claim.volume_name = Some("pv-other".to_owned());
            let volume = survey.volumes.remove("pv-data-1").unwrap();
            survey.volumes.insert("pv-other".to_owned(), volume);
        },
        |survey| spec_mut(survey).replicas = Some(2),
        |survey| take(survey, "r2", "2026-01-03T00:00:00Z"),
        |survey| lose(survey, "data-db-1"),
    ];
    for (at, change) in others.into_iter().enumerate() {
        let mut survey = scene(3);
        change(&mut survey);
        // A volume is of the claim that it names.
        for claim in survey.claims.values() {
            let name = claim.spec.as_ref().unwrap().volume_name.as_ref().unwrap();
            let volume = survey.volumes.get_mut(name).unwrap().spec.as_mut().unwrap();
            volume.claim_ref.as_mut().unwrap().uid.clone_from(&claim.metadata.uid);
        }
        assert_ne!(hash(&survey), first, "change {at}");
    }
    let mut survey = scene(3);
    spec_mut(&mut survey).pod_management_policy = Some("Parallel".to_owned());
    survey.volumes.get_mut("pv-data-1").unwrap().spec.as_mut().unwrap().persistent_volume_reclaim_policy =
        Some("Retain".to_owned());
    assert_eq!(hash(&survey), first, "only downtime and warnings differ");
    let later = plan(&restore(&of(&json!([1]))), &scene(3), now() + SignedDuration::from_hours(1));
    assert!(matches!(later, Verdict::Go(planned) if planned.plan.hash == first), "only the time differs");
}

#[test]
fn sets_with_more_claims_than_a_status_holds_are_refused() {
    let (found, message) = refusal(&restore(&latest()), &scene(101));
    assert_eq!(found, ["TooManyClaims"]);
    assert!(message.contains("101 claims"), "{message}");
    assert_eq!(planned(&latest(), &scene(100)).swap.volumes.len(), 100);
}

#[test]
fn an_orphan_s_snapshot_of_another_set_holds_nothing() {
    let mut survey = scene(1);
    survey.claims.insert("data-web-0".to_owned(), PersistentVolumeClaim::default());
    add_snapshot(&mut survey, "stuck", "data-web-0", "2026-01-01T00:00:00Z", &json!({}));
    snapshot_mut(&mut survey, "stuck").status = None;
    let mut other: Pod = pod(0);
    other.metadata.name = Some("web-0".to_owned());
    other.spec.as_mut().unwrap().volumes = None;
    other.metadata.owner_references = None;
    survey.pods.push(other);
    assert_eq!(planned(&latest(), &survey).swap.volumes.len(), 1);
}

proptest! {
    /// Whatever is restored of whatever set: every pod that would use a claim in exchange goes, every claim with a volume
    /// of a pod that goes is protected, and what is not restored is not exchanged.
    #[test]
    fn no_claim_of_a_pod_that_goes_is_left_out(
        start in 0..3_i32,
        replicas in 0..6_i32,
        (claims, named) in (1..8_i32).prop_flat_map(|claims| (Just(claims), btree_set(0..claims, 1..=4))),
    ) {
        let mut survey = scene(claims);
        spec_mut(&mut survey).replicas = Some(replicas);
        spec_mut(&mut survey).ordinals = Some(object(json!({ "start": start })));
        let Planned { plan, swap } = planned(&of(&json!(named)), &survey);

        prop_assert_eq!(swap.replicas, replicas);
        prop_assert!((0..=replicas).contains(&swap.replicas_meanwhile));
        let runs_on = start..start + swap.replicas_meanwhile;
        let goes = start + swap.replicas_meanwhile..start + replicas;
        for ordinal in 0..claims {
            let of_ordinal: Vec<_> = swap.volumes.iter().filter(|volume| volume.ordinal == ordinal).collect();
            let restored = named.contains(&ordinal);
            prop_assert!(!(restored && runs_on.contains(&ordinal)));
            prop_assert_eq!(of_ordinal.len(), usize::from(restored || goes.contains(&ordinal)));
            for volume in of_ordinal {
                prop_assert_eq!(volume.snapshot.is_some(), restored);
                prop_assert!(volume.previous.is_some());
            }
        }
        prop_assert_eq!(plan.volumes.len(), swap.volumes.len());
    }
}
