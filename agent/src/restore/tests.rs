//! The decisions of a restore in a model of a cluster: from every write boundary onward and back, and under every
//! interleaving of crashes, controllers, other people and time.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use proptest::prelude::*;
use serde_json::json;
use sts_backup_api::names::ROLLBACK_REQUESTED_AT_ANNOTATION;
use sts_backup_api::restore::{OnFailure, RestorePhase};
use sts_backup_api::swap::Toward;

use super::model::{Cluster, REPLICAS, Setting, swap_of};

fn settings() -> Vec<Setting> {
    let plain = Setting::default;
    vec![
        plain(),
        Setting { parallel: true, ..plain() },
        Setting { from: 1, ..plain() },
        Setting { deletes_claims: true, keeps_logs: true, ..plain() },
        Setting { deletes_claims: true, from: 1, parallel: true, keeps_logs: true, ..plain() },
        Setting { retain: true, ..plain() },
        Setting { lacks_last: true, ..plain() },
    ]
}

fn request_rollback(cluster: &mut Cluster) {
    if let Some(restore) = &mut cluster.restore {
        let annotations = restore.metadata.annotations.get_or_insert_default();
        annotations.insert(ROLLBACK_REQUESTED_AT_ANNOTATION.to_owned(), cluster.now.to_string());
    }
}

fn delete(cluster: &mut Cluster) {
    if let Some(restore) = &mut cluster.restore {
        restore.metadata.deletion_timestamp = Some(Time(cluster.now));
        cluster.collect_restore();
    }
}

/// Comes to rest, and looks whether all is well.
fn finish(cluster: &mut Cluster) -> Option<RestorePhase> {
    cluster.rest();
    let ended = cluster.ended;
    cluster.check_end(ended == Some(RestorePhase::Completed));
    ended
}

/// A restore whose agent dies after so many of its writes; false: it made fewer.
fn stopped_after(setting: &Setting, writes: usize) -> (Cluster, bool) {
    let mut cluster = Cluster::new(setting);
    while cluster.writes < writes {
        cluster.settle();
        if !cluster.agent().0 && cluster.ended.is_some() {
            return (cluster, false);
        }
    }
    cluster.crash(false);
    (cluster, true)
}

/// Each boundary between two writes of each setting.
fn at_each_boundary(mut then: impl FnMut(&Setting, Cluster)) {
    for setting in settings() {
        let mut boundaries = 0;
        loop {
            let (cluster, is_there) = stopped_after(&setting, boundaries);
            if !is_there {
                break;
            }
            then(&setting, cluster);
            boundaries += 1;
        }
        assert!(boundaries > 20, "only {boundaries} writes");
    }
}

#[test]
fn a_restore_completes_and_its_old_volumes_go_in_the_end() {
    for setting in settings() {
        let mut cluster = Cluster::new(&setting);
        assert_eq!(finish(&mut cluster), Some(RestorePhase::Completed), "{setting:?}");
    }
}

#[test]
fn a_restore_that_was_stopped_at_any_write_completes() {
    at_each_boundary(|setting, mut cluster| {
        assert_eq!(finish(&mut cluster), Some(RestorePhase::Completed), "{setting:?}");
    });
}

#[test]
fn a_restore_that_was_stopped_at_any_write_can_be_taken_back() {
    at_each_boundary(|setting, mut cluster| {
        request_rollback(&mut cluster);
        let ended = finish(&mut cluster);
        let had_begun = cluster.log.iter().any(|line| line == "Begin");
        let expected = [RestorePhase::RolledBack, RestorePhase::Failed];
        assert!(
            !had_begun || ended.is_some_and(|ended| expected.contains(&ended)),
            "{setting:?} {ended:?}\n{}",
            cluster.log.join("\n")
        );
    });
}

#[test]
fn a_restore_that_is_deleted_at_any_write_lets_go_of_all() {
    at_each_boundary(|setting, mut cluster| {
        delete(&mut cluster);
        finish(&mut cluster);
        assert!(cluster.restore.is_none(), "{setting:?}");
    });
}

#[test]
fn a_restore_that_is_scaled_up_by_somebody_at_any_write_serves_old_or_new_data() {
    at_each_boundary(|_, mut cluster| {
        cluster.change_set(&json!({ "spec": { "replicas": REPLICAS } }));
        finish(&mut cluster);
    });
}

#[test]
fn a_stateful_set_that_is_created_again_at_any_write_serves_old_or_new_data() {
    at_each_boundary(|_, mut cluster| {
        cluster.create_set_again();
        finish(&mut cluster);
    });
}

#[test]
fn without_its_stateful_set_a_restore_ends_with_the_claims_as_they_should_be() {
    at_each_boundary(|setting, mut cluster| {
        cluster.delete_set();
        let ended = finish(&mut cluster);
        assert!(ended.is_some(), "{setting:?}");
    });
}

#[test]
fn a_completed_restore_is_taken_back_within_its_window() {
    for setting in settings() {
        let mut cluster = Cluster::new(&setting);
        cluster.rest();
        request_rollback(&mut cluster);
        assert_eq!(finish(&mut cluster), Some(RestorePhase::RolledBack), "{setting:?}");
    }
}

#[test]
fn after_its_window_a_restore_is_not_taken_back() {
    let mut cluster = Cluster::new(&Setting::default());
    cluster.rest();
    cluster.pass(Duration::from_hours(2));
    request_rollback(&mut cluster);
    assert_eq!(finish(&mut cluster), Some(RestorePhase::Completed));
}

#[test]
fn pods_that_do_not_become_ready_get_their_old_data_back_where_that_is_wanted() {
    let setting = Setting { on_failure: OnFailure::Rollback, ..Setting::default() };
    let mut cluster = Cluster::new(&setting);
    cluster.is_new_broken = true;
    assert_eq!(finish(&mut cluster), Some(RestorePhase::RolledBack));
}

#[test]
fn a_volume_that_a_claim_without_a_past_has_is_given_back_after_it_all() {
    let mut cluster = Cluster::new(&Setting { from: 1, lacks_last: true, ..Setting::default() });
    // Somebody starts the pod for whose claim a new volume waits, and goes on changing the StatefulSet.
    while !cluster.log.last().is_some_and(|line| line.starts_with("pv-") && line.contains("\"data-db-2\"")) {
        cluster.settle();
        cluster.agent();
    }
    cluster.change_set(&json!({ "spec": { "replicas": REPLICAS } }));
    cluster.settle();
    assert!(cluster.pods.contains_key("db-2"), "{}", cluster.log.join("\n"));
    while swap_of(&cluster).is_some_and(|(_, toward)| toward == Toward::Restored) {
        if cluster.replicas() == 1 {
            let label = json!({ "a": cluster.writes.to_string() });
            cluster.change_set(&json!({ "spec": { "template": { "metadata": { "labels": label } } } }));
        }
        cluster.settle();
        cluster.agent();
        assert!(cluster.writes < 1000, "{}", cluster.log.join("\n"));
    }
    assert_eq!(finish(&mut cluster), Some(RestorePhase::RolledBack));
}

#[test]
fn a_new_volume_that_a_pod_wrote_to_before_the_others_went_is_made_anew() {
    let setting = Setting { deletes_claims: true, lacks_last: true, parallel: true, ..Setting::default() };
    let mut cluster = Cluster::new(&setting);
    while cluster.log.last().is_none_or(|line| line != "scale to 0") {
        cluster.settle();
        cluster.agent();
    }
    // Before anybody has noticed the order.
    cluster.change_set(&json!({ "spec": { "replicas": REPLICAS } }));
    assert_eq!(finish(&mut cluster), Some(RestorePhase::Completed));
    assert!(cluster.log.iter().any(|line| line == "Staging Restored None"), "{}", cluster.log.join("\n"));
}

#[test]
fn a_pod_that_somebody_starts_while_a_deleted_restore_lets_go_keeps_nothing() {
    at_each_boundary(|setting, mut cluster| {
        delete(&mut cluster);
        for _ in 0..100 {
            if cluster.log.last().is_some_and(|line| line.starts_with("Do { work: Release")) {
                cluster.change_set(&json!({ "spec": { "replicas": REPLICAS } }));
            }
            cluster.settle();
            cluster.agent();
        }
        finish(&mut cluster);
        assert!(cluster.restore.is_none(), "{setting:?}\n{}", cluster.log.join("\n"));
    });
}

fn pods(cluster: &Cluster) -> Vec<Option<String>> {
    cluster.pods.values().map(kube::ResourceExt::uid).collect()
}

#[test]
fn no_pod_goes_for_a_claim_that_could_not_be_deleted() {
    for setting in settings().into_iter().filter(|setting| !setting.lacks_last) {
        let mut cluster = Cluster::new(&setting);
        let before = pods(&cluster);
        cluster.hold_claim("data-db-2", true);
        assert_eq!(finish(&mut cluster), Some(RestorePhase::Failed), "{setting:?}");
        assert_eq!(pods(&cluster), before, "{setting:?}");
    }
}

#[test]
fn a_rollback_begins_once_nobody_holds_its_claims() {
    for setting in settings().into_iter().filter(|setting| !setting.lacks_last) {
        let mut cluster = Cluster::new(&setting);
        cluster.rest();
        let before = pods(&cluster);
        cluster.hold_claim("data-db-2", true);
        request_rollback(&mut cluster);
        cluster.rest();
        assert_eq!((cluster.ended, pods(&cluster)), (None, before), "{setting:?}");
        cluster.hold_claim("data-db-2", false);
        assert_eq!(finish(&mut cluster), Some(RestorePhase::RolledBack), "{setting:?}");
    }
}

#[test]
fn a_claim_that_its_user_deletes_while_pods_are_held_gets_its_data_again() {
    for setting in settings().into_iter().filter(|setting| !setting.retain && !setting.lacks_last) {
        let mut cluster = Cluster::new(&setting);
        cluster.is_new_broken = true;
        cluster.rest();
        assert_eq!(cluster.ended, None, "{setting:?}");
        cluster.empty_replica(if setting.parallel { 2 } else { setting.from });
        cluster.rest();
        cluster.is_new_broken = false;
        assert_eq!(finish(&mut cluster), Some(RestorePhase::Completed), "{setting:?}");
    }
}

/// Something that happens. The numbers choose which of several.
#[derive(Clone, Copy, Debug)]
enum Happening {
    /// The agent writes, or decides.
    Agent,
    /// It dies; its writes may be on their way.
    Crash(bool),
    /// One of them arrives.
    Late,
    StatefulSets,
    Kubelet(usize),
    Volumes,
    Collector,
    Settle,
    Time(u8),
    Scale(i32),
    EditTemplate,
    RequestRollback,
    Delete,
    LoseSnapshot,
    StorageDown(bool),
    NewBroken(bool),
    AllBroken(bool),
    Quota(usize),
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        40 => Just(Happening::Agent),
        3 => any::<bool>().prop_map(Happening::Crash),
        2 => Just(Happening::Late),
        14 => Just(Happening::StatefulSets),
        14 => any::<usize>().prop_map(Happening::Kubelet),
        14 => Just(Happening::Volumes),
        6 => Just(Happening::Collector),
        6 => Just(Happening::Settle),
        2 => any::<u8>().prop_map(Happening::Time),
        2 => (0..=REPLICAS).prop_map(Happening::Scale),
        1 => Just(Happening::EditTemplate),
        1 => Just(Happening::RequestRollback),
        1 => Just(Happening::Delete),
        1 => Just(Happening::LoseSnapshot),
        1 => any::<bool>().prop_map(Happening::StorageDown),
        1 => any::<bool>().prop_map(Happening::NewBroken),
        1 => any::<bool>().prop_map(Happening::AllBroken),
        1 => (0..4_usize).prop_map(Happening::Quota),
    ]
}

fn happen(cluster: &mut Cluster, happening: Happening) {
    match happening {
        Happening::Agent => {
            cluster.agent();
        }
        Happening::Crash(are_late) => cluster.crash(are_late),
        Happening::Late => {
            cluster.arrive();
        }
        Happening::StatefulSets => {
            cluster.stateful_set_controller();
        }
        Happening::Kubelet(choice) => {
            cluster.kubelet(choice);
        }
        Happening::Volumes => {
            cluster.volume_controller();
        }
        Happening::Collector => {
            cluster.collector();
        }
        Happening::Settle => cluster.settle(),
        Happening::Time(seconds) => cluster.pass(Duration::from_secs(u64::from(seconds))),
        // With whenScaled: Delete, who scales down deletes claims, and means to.
        Happening::Scale(replicas) if cluster.setting.deletes_claims && replicas < cluster.replicas() => {}
        Happening::Scale(replicas) => {
            cluster.change_set(&json!({ "spec": { "replicas": replicas } }));
            cluster.log.push(format!("somebody scales to {replicas}"));
        }
        Happening::EditTemplate => {
            cluster
                .change_set(&json!({ "spec": { "template": { "metadata": { "labels": { "a": "b" } } } } }));
        }
        Happening::RequestRollback => request_rollback(cluster),
        Happening::Delete => delete(cluster),
        Happening::LoseSnapshot => {
            cluster.snapshots.pop_first();
        }
        Happening::StorageDown(is_down) => cluster.is_storage_down = is_down,
        Happening::NewBroken(is_broken) => cluster.is_new_broken = is_broken,
        Happening::AllBroken(is_broken) => cluster.is_all_broken = is_broken,
        Happening::Quota(quota) => cluster.quota = quota,
    }
    cluster.check();
}

fn setting() -> impl Strategy<Value = Setting> {
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (flags, prop_oneof![3 => Just(0), 1 => Just(1)], any::<bool>()).prop_map(
        |((parallel, deletes_claims, keeps_logs, retain, lacks_last), from, rolls_back)| Setting {
            parallel,
            deletes_claims,
            from,
            keeps_logs,
            lacks_last,
            retain,
            on_failure: if rolls_back { OnFailure::Rollback } else { OnFailure::Hold },
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 3000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_application_ends_with_old_or_new_data(
        setting in setting(),
        happenings in prop::collection::vec(happening(), 0..300),
    ) {
        let mut cluster = Cluster::new(&setting);
        for happening in happenings {
            happen(&mut cluster, happening);
        }
        // A quiet world.
        while cluster.arrive() {}
        cluster.is_storage_down = false;
        cluster.is_new_broken = false;
        cluster.is_all_broken = false;
        cluster.quota = usize::MAX;
        finish(&mut cluster);
    }
}
