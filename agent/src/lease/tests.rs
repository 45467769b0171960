use k8s_openapi::jiff::Timestamp;
use tokio::task::JoinHandle;
use tokio::time::{advance, sleep};

use super::fake::{FakeApi, Fault};
use super::*;

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn config() -> LeaseConfig {
    LeaseConfig {
        name: "agent".to_owned(),
        duration: seconds(15),
        renew_deadline: seconds(10),
        retry: seconds(2),
    }
}

/// A replica under test.
struct Replica {
    leadership: Leadership,
    release: CancellationToken,
    task: JoinHandle<()>,
}

impl Replica {
    fn start(api: &FakeApi, name: &str) -> Self {
        let (elector, leadership) = Elector::new(api.client(), "backup", config(), name.to_owned());
        let release = CancellationToken::new();
        let task = tokio::spawn(elector.run(release.clone(), Health::new(seconds(60), "nothing")));
        Self { leadership, release, task }
    }

    async fn leading(api: &FakeApi, name: &str) -> Self {
        let replica = Self::start(api, name);
        replica.leadership.acquired().await;
        replica
    }

    async fn release(self) {
        self.release.cancel();
        self.task.await.expect("the elector ends");
    }
}

/// Another replica's write, at a time that our clock knows nothing of.
fn held_by(name: &str, renewed: i64) -> impl FnOnce(&mut Lease) {
    move |lease| {
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        spec.holder_identity = Some(name.to_owned());
        spec.lease_duration_seconds = Some(15);
        spec.lease_transitions = Some(4);
        spec.renew_time = Some(MicroTime(Timestamp::from_second(renewed).expect("a time")));
    }
}

#[tokio::test(start_paused = true)]
async fn the_next_step_follows_from_the_lease_and_from_what_we_believe() {
    let start = clock::monotonic();
    let record = |holder: &str| Record {
        holder: holder.to_owned(),
        duration: seconds(15),
        transitions: 4,
        unchanged_since: start,
    };
    let take = LeaseStep::Take { transitions: 5 };
    let wait = LeaseStep::Wait { until: start + seconds(15) };
    // holder (None: no lease), whether we believe to hold it, age of the record, step
    for (holder, held, age, step) in [
        (None, false, 0, LeaseStep::Create),
        (None, true, 0, LeaseStep::Create),
        (Some("we"), true, 2, LeaseStep::Renew),
        (Some("we"), false, 0, LeaseStep::Renew),
        (Some("we"), false, 99, LeaseStep::Renew),
        (Some(""), false, 0, take.clone()),
        (Some(""), true, 0, LeaseStep::Yield),
        (Some("other"), false, 0, wait.clone()),
        (Some("other"), false, 14, wait),
        (Some("other"), false, 15, take),
        (Some("other"), true, 0, LeaseStep::Yield),
        (Some("other"), true, 99, LeaseStep::Yield),
    ] {
        let record = holder.map(record);
        let decided = next_lease_step(record.as_ref(), "we", held, start + seconds(age));
        assert_eq!(decided, step, "{holder:?}, held: {held}, {age} s old");
    }
}

#[tokio::test(start_paused = true)]
async fn the_first_replica_makes_the_lease_and_leads() {
    let api = FakeApi::new();
    let replica = Replica::leading(&api, "a").await;
    assert!(replica.leadership.is_held());
    assert_eq!(replica.leadership.remaining(), seconds(15));
    let spec = api.spec();
    assert_eq!(spec.holder_identity.as_deref(), Some("a"));
    assert_eq!((spec.lease_duration_seconds, spec.lease_transitions), (Some(15), Some(0)));
    assert_eq!(spec.acquire_time, spec.renew_time);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_counts_from_when_it_was_sent() {
    let api = FakeApi::new();
    api.fails(Fault::Slow);
    let replica = Replica::leading(&api, "a").await;
    assert_eq!(replica.leadership.remaining(), seconds(14));
    sleep(seconds(60)).await;
    assert!(replica.leadership.is_held());
}

#[tokio::test(start_paused = true)]
async fn a_follower_takes_over_a_whole_lease_after_the_last_sign_of_life_it_saw() {
    for renewed in [0, 4_000_000_000] {
        let api = FakeApi::new();
        api.edit(held_by("gone", renewed));
        let start = clock::monotonic();
        let replica = Replica::start(&api, "b");
        replica.leadership.acquired().await;
        let waited = clock::monotonic() - start;
        assert!((seconds(15)..seconds(18)).contains(&waited), "{waited:?}, renewed at {renewed}");
        assert_eq!((api.holder(), api.spec().lease_transitions), ("b".to_owned(), Some(5)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_follower_never_takes_over_from_a_holder_that_renews() {
    let api = FakeApi::new();
    let replica = Replica::start(&api, "b");
    api.edit(held_by("a", 0));
    for renewal in 1..10 {
        sleep(seconds(10)).await;
        api.edit(held_by("a", renewal));
    }
    assert!(!replica.leadership.is_held());
    assert_eq!(api.holder(), "a");
}

#[tokio::test(start_paused = true)]
async fn labels_on_the_lease_are_no_sign_of_life() {
    let api = FakeApi::new();
    api.edit(held_by("gone", 0));
    let replica = Replica::start(&api, "b");
    for label in 0..4 {
        sleep(seconds(5)).await;
        api.edit(|lease| {
            lease.metadata.labels.get_or_insert_default().insert("n".to_owned(), label.to_string());
        });
    }
    assert!(replica.leadership.is_held());
}

#[tokio::test(start_paused = true)]
async fn a_leader_keeps_the_lease_through_foreign_edits_and_its_deletion() {
    let api = FakeApi::new();
    let replica = Replica::leading(&api, "a").await;
    api.edit(|lease| {
        lease.metadata.labels.get_or_insert_default().insert("team".to_owned(), "storage".to_owned());
    });
    sleep(seconds(20)).await;
    assert!(replica.leadership.is_held());
    assert_eq!(api.spec().lease_transitions, Some(0));
    api.delete();
    sleep(seconds(20)).await;
    assert!(replica.leadership.is_held());
    assert_eq!(api.holder(), "a");
}

#[tokio::test(start_paused = true)]
async fn leadership_is_lost_at_the_deadline_while_the_lease_still_protects_its_work() {
    for fault in [Fault::Status(500), Fault::Status(429), Fault::Status(403), Fault::Hang, Fault::LoseAnswer]
    {
        let api = FakeApi::new();
        let replica = Replica::leading(&api, "a").await;
        let led_from = clock::monotonic();
        api.fails(fault);
        replica.leadership.lost().await;
        assert_eq!(clock::monotonic() - led_from, seconds(10), "{fault:?}");
        assert!(!replica.leadership.is_held(), "{fault:?}");
        assert_eq!(replica.leadership.remaining(), seconds(5), "{fault:?}");
        api.fails(Fault::None);
        replica.task.await.expect("the elector ends");
        assert!(!replica.leadership.is_held(), "what is lost stays lost: {fault:?}");
        assert_eq!(replica.leadership.remaining(), seconds(5), "{fault:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn leadership_survives_an_outage_that_is_shorter_than_the_deadline() {
    for fault in [Fault::Status(500), Fault::Status(429), Fault::Hang, Fault::LoseAnswer] {
        let api = FakeApi::new();
        let replica = Replica::leading(&api, "a").await;
        api.fails(fault);
        sleep(seconds(7)).await;
        api.fails(Fault::None);
        sleep(seconds(30)).await;
        assert!(replica.leadership.is_held(), "{fault:?}");
        assert_eq!(api.spec().lease_transitions, Some(0), "{fault:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn leadership_is_lost_at_once_to_whoever_wrote_their_name() {
    for thief in ["thief", ""] {
        let api = FakeApi::new();
        let replica = Replica::leading(&api, "a").await;
        let led_from = clock::monotonic();
        api.edit(held_by(thief, 0));
        replica.leadership.lost().await;
        assert_eq!(clock::monotonic() - led_from, seconds(2), "with the next renewal");
        assert_eq!(replica.leadership.remaining(), Duration::ZERO);
        replica.task.await.expect("the elector ends");
        assert_eq!(api.holder(), thief);
    }
}

#[tokio::test(start_paused = true)]
async fn a_process_that_was_stopped_sees_by_itself_that_it_lost() {
    let leadership = Leadership::held_for_tests();
    assert!(leadership.is_held());
    advance(seconds(3600)).await;
    assert!(!leadership.is_held());
    assert_eq!(leadership.remaining(), Duration::ZERO);
    leadership.lost().await;
}

#[tokio::test(start_paused = true)]
async fn whoever_created_the_lease_without_hearing_so_leads_by_renewing_it() {
    let api = FakeApi::new();
    api.fails(Fault::LoseAnswer);
    let replica = Replica::start(&api, "a");
    sleep(seconds(1)).await;
    assert_eq!(api.holder(), "a");
    assert!(!replica.leadership.is_held());
    api.fails(Fault::None);
    replica.leadership.acquired().await;
    assert_eq!((api.holder(), api.spec().lease_transitions), ("a".to_owned(), Some(0)));
}

#[tokio::test(start_paused = true)]
async fn a_released_lease_is_taken_without_waiting() {
    let api = FakeApi::new();
    let first = Replica::leading(&api, "a").await;
    let second = Replica::start(&api, "b");
    sleep(seconds(5)).await;
    let leadership = first.leadership.clone();
    first.release().await;
    assert!(!leadership.is_held());
    leadership.lost().await;
    assert_eq!(api.holder(), "");
    let released = clock::monotonic();
    second.leadership.acquired().await;
    assert!(clock::monotonic() - released < seconds(3));
    assert_eq!((api.holder(), api.spec().lease_transitions), ("b".to_owned(), Some(1)));
}

#[tokio::test(start_paused = true)]
async fn a_lease_is_released_through_a_foreign_edit_but_never_anothers_lease() {
    let api = FakeApi::new();
    let replica = Replica::leading(&api, "a").await;
    api.edit(|lease| lease.metadata.labels = Some([("a".to_owned(), "b".to_owned())].into()));
    replica.release().await;
    assert_eq!(api.holder(), "");

    let api = FakeApi::new();
    let replica = Replica::leading(&api, "a").await;
    api.edit(held_by("thief", 0));
    replica.release().await;
    assert_eq!(api.holder(), "thief");
}

#[tokio::test(start_paused = true)]
async fn a_follower_that_ends_leaves_the_lease_alone() {
    let api = FakeApi::new();
    api.edit(held_by("a", 0));
    let before = api.spec();
    let replica = Replica::start(&api, "b");
    sleep(seconds(3)).await;
    replica.release().await;
    assert_eq!(api.spec(), before);
}

#[tokio::test(start_paused = true)]
async fn whatever_fails_two_replicas_never_lead_at_once() {
    let api = FakeApi::new();
    let faults =
        [Fault::Status(500), Fault::Hang, Fault::LoseAnswer, Fault::None, Fault::Status(409), Fault::None];
    let mut replicas = [Replica::start(&api, "0-0"), Replica::start(&api, "1-0")];
    let mut handovers = 0;
    let mut leader = None;
    for tick in 0..20_000_usize {
        sleep(Duration::from_millis(100)).await;
        // An arbitrary but repeatable walk through the faults, each for 0.7 to 12.6 s.
        let order = (tick / 7).wrapping_mul(0x9E37_79B1) >> 7;
        if tick % (7 * (1 + order % 18)) == 0 {
            api.fails(faults[order % faults.len()]);
        }
        for (place, replica) in replicas.iter_mut().enumerate() {
            if replica.task.is_finished() {
                *replica = Replica::start(&api, &format!("{place}-{tick}"));
            }
        }
        let leading: Vec<usize> = (0..2).filter(|place| replicas[*place].leadership.is_held()).collect();
        assert!(leading.len() < 2, "both lead at tick {tick}");
        if leading.first().is_some_and(|place| leader.replace(*place) != Some(*place)) {
            handovers += 1;
        }
    }
    assert!(handovers > 10, "only {handovers} handovers: the walk tests nothing");
}
