//! What a preflight finds, as tables.

use serde_json::json;
use sts_backup_api::run::RunId;

use super::super::observe::ClassFacts;
use super::*;

fn claim(ordinal: i32) -> ClaimFacts {
    ClaimFacts {
        template: "data".to_owned(),
        ordinal,
        bound: true,
        deleting: false,
        driver: Some("csi".to_owned()),
    }
}

fn class(name: &str, driver: &str, is_default: bool) -> ClassFacts {
    ClassFacts { name: name.to_owned(), driver: driver.to_owned(), is_default }
}

fn pod(ordinal: i32, ready: &str) -> Pod {
    serde_json::from_value(json!({
        "metadata": { "name": format!("db-{ordinal}"), "namespace": "shop", "uid": format!("uid-{ordinal}") },
        "spec": { "containers": [{ "name": "main" }, { "name": "sidecar" }] },
        "status": { "phase": "Running", "conditions": [{ "type": "Ready", "status": ready }] },
    }))
    .unwrap()
}

/// Two healthy replicas with one claim each.
fn target() -> TargetFacts {
    TargetFacts {
        replicas: 2,
        start: 0,
        settled: true,
        templates: vec!["data".to_owned()],
        pods: (0..2).map(|ordinal| (ordinal, pod(ordinal, "True"))).collect(),
        claims: (0..2).map(|ordinal| (format!("data-db-{ordinal}"), claim(ordinal))).collect(),
        classes: vec![class("fast", "csi", true), class("slow", "csi", false), class("other", "nfs", true)],
    }
}

fn hooked() -> StatefulSetBackupSpec {
    let hook = json!({ "command": ["x"] });
    StatefulSetBackupSpec {
        pre_backup_hook: Some(serde_json::from_value(hook.clone()).unwrap()),
        post_backup_hook: Some(serde_json::from_value(hook).unwrap()),
        ..StatefulSetBackupSpec::new("db")
    }
}

fn planned(spec: &StatefulSetBackupSpec, target: &TargetFacts) -> Result<CurrentRun, Vec<Problem>> {
    let run = new_run("uid", Slot::request("now"), Timestamp::UNIX_EPOCH);
    let run = CurrentRun { id: RunId::from("r1".to_owned()), ..run };
    plan(&run, spec, "db", target, Timestamp::UNIX_EPOCH)
}

/// The only problem of a plan: its kind, and what it says.
fn problem_of(spec: &StatefulSetBackupSpec, target: &TargetFacts) -> (ProblemKind, String) {
    let mut problems = planned(spec, target).unwrap_err();
    let problem = problems.remove(0);
    assert_eq!(problems, [], "one problem expected beside {problem:?}");
    (problem.kind, problem.message)
}

#[test]
fn a_healthy_set_is_planned_with_every_claim_and_pod() {
    let run = planned(&hooked(), &target()).unwrap();
    let volumes: Vec<_> =
        run.volumes.iter().map(|volume| (volume.claim.as_str(), volume.snapshot.as_str())).collect();
    assert_eq!(volumes, [("data-db-0", "data-db-0-r1"), ("data-db-1", "data-db-1-r1")]);
    assert!(run.volumes.iter().all(|volume| volume.snapshot_class == "fast"));
    assert_eq!((run.step, run.replicas), (RunStep::Frozen, 2));
    for pod in &run.pods {
        assert_eq!(pod.freeze_container.as_deref(), Some("main"));
        assert!(pod.hooks_may_run_until.is_some());
        assert_eq!(pod.thaw.as_ref().unwrap().state, ThawState::Owed);
    }
}

#[test]
fn every_unfit_claim_is_named_with_what_is_wrong_with_it() {
    type Change = fn(&mut TargetFacts);
    let cases: [(Change, ProblemKind, &str); 6] = [
        (
            |target| drop(target.claims.remove("data-db-1")),
            ProblemKind::ClaimMissing,
            "PersistentVolumeClaim data-db-1 does not exist",
        ),
        (
            |target| target.claims.get_mut("data-db-1").unwrap().bound = false,
            ProblemKind::ClaimNotBound,
            "PersistentVolumeClaim data-db-1 is not bound",
        ),
        (
            |target| target.claims.get_mut("data-db-1").unwrap().deleting = true,
            ProblemKind::ClaimBeingDeleted,
            "PersistentVolumeClaim data-db-1 is being deleted",
        ),
        (
            |target| target.claims.get_mut("data-db-1").unwrap().driver = None,
            ProblemKind::NotACsiVolume,
            "PersistentVolumeClaim data-db-1 is on a volume without a CSI driver",
        ),
        (
            |target| target.claims.get_mut("data-db-1").unwrap().driver = Some("odd".to_owned()),
            ProblemKind::NoSnapshotClass,
            "the CSI driver odd has no VolumeSnapshotClass",
        ),
        (
            |target| {
                target.classes[0].is_default = false;
                drop(target.claims.remove("data-db-1"));
                target.replicas = 1;
            },
            ProblemKind::NoSnapshotClass,
            "the CSI driver csi has no default VolumeSnapshotClass",
        ),
    ];
    for (change, kind, text) in cases {
        let mut target = target();
        change(&mut target);
        let (found, message) = problem_of(&StatefulSetBackupSpec::new("db"), &target);
        assert_eq!(found, kind, "{message}");
        assert!(message.starts_with(text), "{message}");
    }
}

#[test]
fn two_default_classes_of_a_driver_are_no_choice() {
    let mut target = target();
    target.replicas = 1;
    target.classes[1].is_default = true;
    let (kind, message) = problem_of(&StatefulSetBackupSpec::new("db"), &target);
    assert_eq!(kind, ProblemKind::NoSnapshotClass);
    assert!(message.contains("fast and slow"), "{message}");
}

#[test]
fn the_named_class_is_taken_if_it_is_of_the_volume_s_driver() {
    let named = |class: &str| StatefulSetBackupSpec {
        volume_snapshot_class_name: Some(class.to_owned()),
        ..StatefulSetBackupSpec::new("db")
    };
    let mut target = target();
    target.replicas = 1;
    assert_eq!(planned(&named("slow"), &target).unwrap().volumes[0].snapshot_class, "slow");
    assert_eq!(problem_of(&named("other"), &target).0, ProblemKind::SnapshotClassOfAnotherDriver);
    assert_eq!(problem_of(&named("none"), &target).0, ProblemKind::NoSnapshotClass);
}

#[test]
fn a_partial_backup_leaves_out_claims_but_never_all_of_them() {
    let spec = StatefulSetBackupSpec { allow_partial: true, ..StatefulSetBackupSpec::new("db") };
    let mut target = target();
    target.claims.remove("data-db-1");
    let run = planned(&spec, &target).unwrap();
    assert_eq!((run.volumes.len(), run.left_out.len()), (1, 1));

    target.claims.remove("data-db-0");
    assert_eq!(planned(&spec, &target).unwrap_err().len(), 2);
}

#[test]
fn a_set_without_claims_or_with_too_many_is_refused() {
    let mut empty = target();
    empty.templates.clear();
    assert_eq!(problem_of(&StatefulSetBackupSpec::new("db"), &empty).0, ProblemKind::NothingToBackUp);

    let mut huge = target();
    huge.replicas = 101;
    assert_eq!(problem_of(&StatefulSetBackupSpec::new("db"), &huge).0, ProblemKind::TooManyClaims);
}

#[test]
fn a_template_that_does_not_exist_is_named_with_those_that_do() {
    let spec = StatefulSetBackupSpec {
        volume_claim_templates: vec!["data".to_owned(), "logs".to_owned()],
        ..StatefulSetBackupSpec::new("db")
    };
    let (kind, message) = problem_of(&spec, &target());
    assert_eq!(kind, ProblemKind::UnknownTemplate);
    assert!(message.contains("no volumeClaimTemplate logs") && message.contains("some of data"), "{message}");
}

#[test]
fn a_set_scaled_to_zero_is_backed_up_by_the_claims_it_left_and_without_hooks() {
    let mut target = target();
    target.replicas = 0;
    target.pods.clear();
    let run = planned(&hooked(), &target).unwrap();
    assert_eq!((run.volumes.len(), run.pods.len()), (2, 0));

    target.claims.clear();
    assert_eq!(problem_of(&hooked(), &target).0, ProblemKind::NothingToBackUp);
}

#[test]
fn ordinals_begin_where_the_set_says() {
    let mut target = target();
    target.start = 5;
    target.replicas = 1;
    let (kind, message) = problem_of(&StatefulSetBackupSpec::new("db"), &target);
    assert_eq!(kind, ProblemKind::ClaimMissing);
    assert!(message.contains("data-db-5"), "{message}");
}

#[test]
fn pods_that_cannot_take_a_hook_are_named_with_the_reason() {
    let changed = |change: fn(&mut Pod)| {
        let mut target = target();
        change(target.pods.get_mut(&1).unwrap());
        problem_of(&hooked(), &target)
    };
    let phase = |pod: &mut Pod, phase: &str| pod.status.as_mut().unwrap().phase = Some(phase.to_owned());
    assert!(changed(|pod| *pod = super::tests::pod(1, "False")).1.starts_with("Pod db-1 is not Ready"));
    let terminating: fn(&mut Pod) =
        |pod| pod.metadata.deletion_timestamp = Some(Timestamp::UNIX_EPOCH.into());
    assert!(changed(terminating).1.starts_with("Pod db-1 is terminating"));
    let mut done = target();
    phase(done.pods.get_mut(&1).unwrap(), "Succeeded");
    assert!(problem_of(&hooked(), &done).1.starts_with("Pod db-1 has completed"));
    let mut gone = target();
    gone.pods.remove(&1);
    assert_eq!(problem_of(&hooked(), &gone).0, ProblemKind::PodMissing);
}

#[test]
fn without_hooks_pods_do_not_matter() {
    let mut target = target();
    target.pods.clear();
    assert_eq!(planned(&StatefulSetBackupSpec::new("db"), &target).unwrap().pods, []);
}

#[test]
fn where_a_failed_hook_may_be_ignored_an_unready_pod_is_too_and_nothing_is_owed_to_it() {
    let mut spec = hooked();
    spec.pre_backup_hook.as_mut().unwrap().on_error = OnError::Continue;
    let mut target = target();
    target.pods.remove(&1);
    let run = planned(&spec, &target).unwrap();
    let pods: Vec<_> = run.pods.iter().map(|pod| pod.name.as_str()).collect();
    assert_eq!(pods, ["db-0"]);
}

#[test]
fn a_hook_for_the_first_pod_runs_in_the_one_with_the_lowest_ordinal() {
    let mut spec = hooked();
    spec.pre_backup_hook.as_mut().unwrap().pods = HookPods::First;
    let run = planned(&spec, &target()).unwrap();
    let frozen: Vec<_> = run.pods.iter().map(|pod| pod.freeze_container.is_some()).collect();
    assert_eq!(frozen, [true, false]);
    assert!(run.pods.iter().all(|pod| pod.thaw.is_some()));
}

#[test]
fn a_container_that_does_not_exist_is_named_for_each_pod() {
    let mut spec = hooked();
    spec.pre_backup_hook.as_mut().unwrap().container_name = Some("postgres".to_owned());
    let problems = planned(&spec, &target()).unwrap_err();
    assert!(problems.iter().all(|problem| problem.kind == ProblemKind::ContainerNotFound));
    assert!(problems[0].message.contains("main, sidecar"), "{}", problems[0].message);
}
