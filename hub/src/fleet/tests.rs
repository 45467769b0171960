use sts_backup_api::link::Rejected;

use super::place::Known;
use super::*;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn id(number: u128) -> ClusterId {
    ClusterId::new(Uuid::from_u128(number))
}

fn labels(items: &[(&str, &str)]) -> BTreeMap<String, String> {
    items.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

struct Hub {
    directory: tempfile::TempDir,
    fleet: Fleet,
}

impl Hub {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let fleet = Self::open(&directory).await;
        Self { directory, fleet }
    }

    async fn open(directory: &tempfile::TempDir) -> Fleet {
        Fleet::open(Store::open(&directory.path().join("hub.db")).await.unwrap()).await.unwrap()
    }

    /// These policies, each for clusters with `tier` of its own name.
    async fn place(&self, policies: &[(&str, &str)]) {
        let documents = policies.iter().map(|(name, schedule)| {
            format!(
                "---\napiVersion: hub.sts-backup.io/v1alpha1\nkind: FleetPolicy\nmetadata: {{name: {name}}}\nspec:\n  \
                 clusterSelector: {{matchLabels: {{{name}: x}}}}\n  policy: {{template: {{spec: {{schedule: \"{schedule}\"}}}}}}\n"
            )
        });
        let policies = self.directory.path().join("policies");
        std::fs::create_dir_all(&policies).unwrap();
        std::fs::write(policies.join("all.yaml"), documents.collect::<String>()).unwrap();
        self.fleet.use_policies(PolicySet::load(&policies).unwrap(), at(9)).await.unwrap();
    }

    fn placed(&self, name: &str) -> (u64, Vec<(String, bool)>) {
        let state = self.fleet.named(name).unwrap().state();
        (state.revision, state.placed.into_iter().map(|(name, body)| (name, body.is_some())).collect())
    }
}

fn hello(instance: &str) -> Hello {
    Hello { instance_id: instance.to_owned(), ..Hello::default() }
}

fn address(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

#[tokio::test]
async fn a_cluster_gets_what_its_labels_select_and_a_new_revision_only_for_another_set() {
    let hub = Hub::new().await;
    hub.fleet.add(id(1), "prod", labels(&[("gold", "x")]), at(1)).await.unwrap();
    hub.place(&[("gold", "0 2 * * *"), ("silver", "0 3 * * *")]).await;
    assert_eq!(hub.placed("prod"), (1, vec![("gold".to_owned(), true)]));
    hub.place(&[("gold", "0 2 * * *"), ("silver", "0 4 * * *")]).await;
    assert_eq!(hub.placed("prod").0, 1, "nothing has changed for it");
    let changes = BTreeMap::from([("gold".to_owned(), None), ("silver".to_owned(), Some("x".to_owned()))]);
    hub.fleet.label("prod", &changes, at(2)).await.unwrap();
    let expected = vec![("gold".to_owned(), false), ("silver".to_owned(), true)];
    assert_eq!(hub.placed("prod"), (2, expected.clone()));
    // A cluster that is added later gets what is there.
    hub.fleet.add(id(2), "late", labels(&[("gold", "x")]), at(3)).await.unwrap();
    assert_eq!(hub.placed("late"), (1, vec![("gold".to_owned(), true)]));

    // After a restart with files that cannot be used: as before.
    hub.fleet.store.close().await;
    let again = Hub::open(&hub.directory).await;
    again.policies_are_bad("some error".to_owned());
    let state = again.named("prod").unwrap().state();
    let names = state.placed.iter().map(|(name, body)| (name.clone(), body.is_some()));
    assert_eq!((state.revision, names.collect::<Vec<_>>()), (2, expected));
}

#[tokio::test]
async fn names_and_ids_belong_to_one_cluster() {
    let hub = Hub::new().await;
    let none = BTreeMap::new;
    hub.fleet.add(id(1), "prod", none(), at(1)).await.unwrap();
    assert!(matches!(hub.fleet.add(id(2), "prod", none(), at(1)).await, Err(FleetError::NameTaken(_))));
    assert!(matches!(hub.fleet.add(id(1), "prod-2", none(), at(1)).await, Err(FleetError::IdTaken(_))));
    for bad in ["", "a b", "-a", &"a".repeat(64)] {
        assert!(
            matches!(hub.fleet.add(id(3), bad, none(), at(1)).await, Err(FleetError::Text { .. })),
            "{bad}"
        );
    }
    for (key, value) in [("", "x"), ("a/b/c", "x"), ("a", "x y"), ("/a", "x")] {
        let refused = hub.fleet.add(id(3), "c", labels(&[(key, value)]), at(1)).await;
        assert!(matches!(refused, Err(FleetError::Text { .. })), "{key}={value}");
    }
    hub.fleet.add(id(3), "c", labels(&[("example.com/env", "")]), at(1)).await.unwrap();
}

#[tokio::test]
async fn the_newest_connection_wins_and_the_older_one_counts_no_more() {
    let hub = Hub::new().await;
    hub.fleet.add(id(1), "prod", BTreeMap::new(), at(1)).await.unwrap();
    let cluster = hub.fleet.admit(id(1)).unwrap();
    let first = hub.fleet.begin(&cluster, &hello("a"), address(1), at(10));
    let second = hub.fleet.begin(&cluster, &hello("a"), address(2), at(11));
    assert_eq!(*first.end.borrow(), Some(End::Replaced));
    assert_eq!(*second.end.borrow(), None);
    assert!(!hub.fleet.is_heard(&cluster, first.id, at(12)));
    assert!(hub.fleet.is_heard(&cluster, second.id, at(12)));
    // The older one ends late: the newer one stays.
    hub.fleet.end(&cluster, first.id);
    assert_eq!(cluster.state().session.map(|session| session.id), Some(second.id));
    hub.fleet.end(&cluster, second.id);
    assert!(cluster.state().session.is_none());
    assert!(!cluster.state().is_flapping(), "one agent that comes again fights with nobody");
}

#[tokio::test]
async fn two_agents_with_one_identity_are_noticed() {
    let hub = Hub::new().await;
    hub.fleet.add(id(1), "prod", BTreeMap::new(), at(1)).await.unwrap();
    let cluster = hub.fleet.admit(id(1)).unwrap();
    for turn in 0..6 {
        let instance = if turn % 2 == 0 { "a" } else { "b" };
        hub.fleet.begin(&cluster, &hello(instance), address(1), at(10 + turn));
    }
    assert!(cluster.state().is_flapping());
    hub.fleet.begin(&cluster, &hello("a"), address(1), at(1000));
    assert!(!cluster.state().is_flapping());
}

#[tokio::test]
async fn a_revoked_cluster_is_let_in_no_more_and_its_session_ends() {
    let hub = Hub::new().await;
    assert_eq!(hub.fleet.admit(id(1)).unwrap_err(), Refusal::Unknown(id(1)));
    hub.fleet.add(id(1), "prod", BTreeMap::new(), at(1)).await.unwrap();
    let cluster = hub.fleet.admit(id(1)).unwrap();
    let session = hub.fleet.begin(&cluster, &hello("a"), address(1), at(10));
    hub.fleet.revoke("prod", at(11)).await.unwrap();
    assert_eq!(*session.end.borrow(), Some(End::Revoked));
    assert_eq!(hub.fleet.admit(id(1)).unwrap_err(), Refusal::Revoked("prod".to_owned(), at(11)));
    let late = hub.fleet.begin(&cluster, &hello("a"), address(1), at(12));
    assert_eq!(*late.end.borrow(), Some(End::Revoked), "it was let in before");
    hub.fleet.store.close().await;
    let again = Hub::open(&hub.directory).await;
    assert!(matches!(again.admit(id(1)), Err(Refusal::Revoked(..))), "also after a restart");
}

#[tokio::test]
async fn what_is_confirmed_is_the_revision_that_is_held() {
    let hub = Hub::new().await;
    hub.fleet.add(id(1), "prod", labels(&[("gold", "x")]), at(1)).await.unwrap();
    hub.place(&[("gold", "0 2 * * *")]).await;
    let cluster = hub.fleet.admit(id(1)).unwrap();
    assert!(matches!(hub.fleet.confirm("prod", at(2)).await, Err(FleetError::NothingHeld(_))));
    let held = Applied { revision: 1, outcome: Outcome::Held.into(), ..Applied::default() };
    hub.fleet.applied(&cluster, &held, at(3));
    assert_eq!(hub.fleet.confirm("prod", at(4)).await.unwrap(), 1);
    assert!(cluster.offer(&Known::default()).unwrap().confirmed);
    hub.place(&[("gold", "0 3 * * *")]).await;
    assert!(!cluster.offer(&Known::default()).unwrap().confirmed, "that is another one");
    assert!(matches!(hub.fleet.confirm("prod", at(5)).await, Err(FleetError::NothingHeld(_))));
}

#[tokio::test]
async fn what_an_agent_does_not_take_is_known_with_its_reason() {
    let hub = Hub::new().await;
    hub.fleet.add(id(1), "prod", BTreeMap::new(), at(1)).await.unwrap();
    let cluster = hub.fleet.admit(id(1)).unwrap();
    let item = Rejected { name: "gold".to_owned(), code: "NameTaken".to_owned(), ..Rejected::default() };
    let applied =
        Applied { revision: 3, outcome: Outcome::Active.into(), items: vec![item], ..Applied::default() };
    hub.fleet.applied(&cluster, &applied, at(3));
    let known = cluster.state().applied.unwrap();
    assert_eq!((known.revision, &*known.outcome), (3, ACTIVE));
    assert_eq!(known.rejected["gold"].code, "NameTaken");
}

#[tokio::test]
async fn what_agents_say_of_themselves_is_written_until_it_is() {
    let hub = Hub::new().await;
    hub.fleet.add(id(1), "prod", BTreeMap::new(), at(1)).await.unwrap();
    let cluster = hub.fleet.admit(id(1)).unwrap();
    let session = hub.fleet.begin(&cluster, &hello("a"), address(1), at(10));
    let applied = Applied { revision: 3, outcome: Outcome::Active.into(), ..Applied::default() };
    hub.fleet.applied(&cluster, &applied, at(11));
    hub.fleet.write_notes().await.unwrap();
    hub.fleet.store.close().await;
    let again = Hub::open(&hub.directory).await.named("prod").unwrap().state();
    assert_eq!(again.agent.unwrap().instance_id, "a");
    assert_eq!((again.applied.unwrap().revision, again.seen), (3, Some(at(10))));

    hub.fleet.write_notes().await.expect("there is nothing to write");
    hub.fleet.end(&cluster, session.id);
    for _ in 0..2 {
        hub.fleet.write_notes().await.expect_err("it is not forgotten, and the store is closed");
    }
}
