//! Sessions over real connections: TLS, certificates of an own authority, and a client that speaks the protocol.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;

use jiff::{SignedDuration, Timestamp};
use sts_backup_api::identity::{ClusterId, TrustDomain};
use sts_backup_api::link::fleet_client::FleetClient;
use sts_backup_api::link::{
    Applied, Desired, Have, Heartbeat, Hello, PROTOCOL, Rejected, Status as Told, Welcome, agent_message,
    applied::Outcome, body_hash, hub_message, state_hash,
};
use sts_backup_service::clock;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Code;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

use super::tls::link_config;
use super::*;
use crate::pki::{Authority, Holder, Issued};
use crate::policies::PolicySet;
use crate::store::Store;

const DAY: Duration = Duration::from_hours(24);

struct Hub {
    directory: tempfile::TempDir,
    fleet: Arc<Fleet>,
    address: SocketAddr,
    tls: Arc<ArcSwap<ServerConfig>>,
    stop: CancellationToken,
    authority: Authority,
}

fn authority(domain: &str) -> Authority {
    Authority::of(&Authority::create(&domain.parse().unwrap(), clock::now()).unwrap()).unwrap()
}

fn id(number: u128) -> ClusterId {
    ClusterId::new(uuid::Uuid::from_u128(number))
}

fn write(directory: &Path, issued: &Issued, authority: &Authority) {
    std::fs::create_dir_all(directory).unwrap();
    std::fs::write(directory.join("tls.crt"), &issued.certificate).unwrap();
    std::fs::write(directory.join("tls.key"), &issued.key).unwrap();
    std::fs::write(directory.join("ca.crt"), authority.certificate()).unwrap();
}

impl Hub {
    async fn start() -> Self {
        Self::with_heartbeat(Duration::from_secs(30)).await
    }

    async fn with_heartbeat(heartbeat: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = authority("fleet.example.com");
        let files = directory.path().join("tls");
        let holder = Holder::Hub(vec!["localhost".to_owned()]);
        write(&files, &authority.issue(&holder, DAY, clock::now()).unwrap(), &authority);
        let store = Store::open(&directory.path().join("hub.db")).await.unwrap();
        let fleet = Arc::new(Fleet::open(store).await.unwrap());
        let tls = Arc::new(ArcSwap::from_pointee(link_config(&files).unwrap()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let domain: TrustDomain = "fleet.example.com".parse().unwrap();
        let served = serve(listener, Arc::clone(&tls), domain, Arc::clone(&fleet), heartbeat, stop.clone());
        tokio::spawn(served);
        Self { directory, fleet, address, tls, stop, authority }
    }

    async fn add(&self, number: u128, name: &str) {
        let labels = BTreeMap::from([("all".to_owned(), "x".to_owned())]);
        self.fleet.add(id(number), name, labels, clock::now()).await.unwrap();
    }

    /// These policies, by name and schedule.
    async fn place(&self, policies: &[(&str, &str)]) {
        let documents = policies.iter().map(|(name, schedule)| {
            format!(
                "---\napiVersion: hub.sts-backup.io/v1alpha1\nkind: FleetPolicy\nmetadata: {{name: {name}}}\nspec:\n  \
                 policy: {{template: {{spec: {{schedule: \"{schedule}\"}}}}}}\n"
            )
        });
        let policies = self.directory.path().join("policies");
        std::fs::create_dir_all(&policies).unwrap();
        std::fs::write(policies.join("all.yaml"), documents.collect::<String>()).unwrap();
        self.fleet.use_policies(PolicySet::load(&policies).unwrap(), clock::now()).await.unwrap();
    }

    fn certificate(&self, number: u128) -> Issued {
        self.authority.issue(&Holder::Cluster(id(number)), DAY, clock::now()).unwrap()
    }

    async fn connect(&self, number: u128) -> Result<Agent, tonic::Status> {
        Agent::connect(self.address, &self.certificate(number), &self.authority, Hello::default()).await
    }
}

/// A client that speaks the protocol, one message at a time.
struct Agent {
    outgoing: mpsc::Sender<AgentMessage>,
    incoming: Streaming<HubMessage>,
    welcome: Welcome,
}

impl Agent {
    async fn connect(
        address: SocketAddr,
        certificate: &Issued,
        authority: &Authority,
        hello: Hello,
    ) -> Result<Self, tonic::Status> {
        let tls = ClientTlsConfig::new()
            .domain_name("localhost")
            .ca_certificate(Certificate::from_pem(authority.certificate()))
            .identity(Identity::from_pem(&certificate.certificate, &certificate.key));
        let endpoint = Endpoint::from_shared(format!("https://{address}")).unwrap().tls_config(tls).unwrap();
        let refused = |error: tonic::transport::Error| {
            tonic::Status::unavailable(sts_backup_service::telemetry::chain(&error))
        };
        let mut client = FleetClient::new(endpoint.connect().await.map_err(refused)?);
        let (outgoing, sent) = mpsc::channel(8);
        let hello = Hello { protocol: if hello.protocol == 0 { PROTOCOL } else { hello.protocol }, ..hello };
        let hello = AgentMessage { message: Some(agent_message::Message::Hello(hello)) };
        outgoing.send(hello).await.unwrap();
        let mut incoming = client.session(ReceiverStream::new(sent)).await?.into_inner();
        let said = incoming.message().await?.and_then(|said| said.message);
        let Some(hub_message::Message::Welcome(welcome)) = said else { unreachable!("{said:?}") };
        Ok(Self { outgoing, incoming, welcome })
    }

    async fn say(&self, message: agent_message::Message) {
        self.outgoing.send(AgentMessage { message: Some(message) }).await.unwrap();
    }

    async fn hear(&mut self) -> Result<hub_message::Message, tonic::Status> {
        let said = self.incoming.message().await?;
        Ok(said.and_then(|said| said.message).expect("the hub says something"))
    }

    async fn desired(&mut self) -> Desired {
        let said = self.hear().await.unwrap();
        let hub_message::Message::Desired(desired) = said else { unreachable!("{said:?}") };
        desired
    }

    async fn answer(&self, desired: &Desired, outcome: Outcome, items: Vec<Rejected>) {
        let applied = Applied {
            revision: desired.revision,
            set_hash: desired.set_hash.clone(),
            outcome: outcome.into(),
            detail: String::new(),
            items,
        };
        self.say(agent_message::Message::Applied(applied)).await;
    }

    /// Returns when the hub has done all that was said before.
    async fn settle(&mut self) {
        self.say(agent_message::Message::Heartbeat(Heartbeat::default())).await;
        let said = self.hear().await.unwrap();
        assert!(matches!(said, hub_message::Message::Heartbeat(_)), "{said:?}");
    }
}

fn names(desired: &Desired) -> Vec<&str> {
    desired.upserts.iter().map(|item| &*item.name).collect()
}

#[tokio::test]
async fn a_policy_reaches_a_cluster_and_its_answer_the_hub() {
    let hub = Hub::start().await;
    hub.add(1, "prod").await;
    hub.place(&[("gold", "0 2 * * *"), ("silver", "0 3 * * *")]).await;
    let mut agent = hub.connect(1).await.unwrap();
    assert_eq!(agent.welcome.cluster_name, "prod");
    assert_eq!(agent.welcome.store_id, hub.fleet.store.id().to_string());
    let desired = agent.desired().await;
    assert_eq!((names(&desired), desired.total, desired.confirmed), (vec!["gold", "silver"], 2, false));
    let rejected = Rejected {
        name: "silver".to_owned(),
        hash: desired.upserts[1].hash.clone(),
        code: "NameTaken".to_owned(),
        detail: "a local one".to_owned(),
    };
    agent.answer(&desired, Outcome::Active, vec![rejected]).await;
    agent.settle().await;
    let state = hub.fleet.named("prod").unwrap().state();
    let applied = state.applied.unwrap();
    assert_eq!((applied.revision, applied.rejected["silver"].code.as_str()), (state.revision, "NameTaken"));

    // Of the next set only what is new is sent, and what was refused only as another one.
    hub.place(&[("bronze", "0 4 * * *"), ("silver", "0 3 * * *")]).await;
    let desired = agent.desired().await;
    assert_eq!((names(&desired), desired.removes.clone()), (vec!["bronze"], vec!["gold".to_owned()]));
    agent.answer(&desired, Outcome::Active, Vec::new()).await;
    hub.place(&[("bronze", "0 4 * * *"), ("silver", "0 5 * * *")]).await;
    let desired = agent.desired().await;
    assert_eq!(names(&desired), ["silver"]);
}

#[tokio::test]
async fn an_answer_that_the_hub_does_not_know_is_asked_for_again() {
    let hub = Hub::start().await;
    hub.add(1, "prod").await;
    hub.place(&[("gold", "0 1 * * *")]).await;
    let first = hub.connect(1).await.unwrap().desired().await;
    // It was answered, and the hub killed before it had written that.
    let gold = &first.upserts[0];
    let hello = Hello {
        store_id: hub.fleet.store.id().to_string(),
        applied_revision: first.revision,
        have: vec![Have { name: gold.name.clone(), hash: gold.hash.clone() }],
        ..Hello::default()
    };
    let connect = async || {
        Agent::connect(hub.address, &hub.certificate(1), &hub.authority, hello.clone()).await.unwrap()
    };
    let mut agent = connect().await;
    let again = agent.desired().await;
    assert_eq!((again.revision, again.upserts.len()), (first.revision, 0));
    agent.answer(&again, Outcome::Active, Vec::new()).await;
    agent.settle().await;
    connect().await.settle().await;
}

#[tokio::test]
async fn while_one_set_is_under_way_only_the_newest_waits() {
    let hub = Hub::start().await;
    hub.add(1, "prod").await;
    hub.place(&[("gold", "0 1 * * *")]).await;
    let mut agent = hub.connect(1).await.unwrap();
    let first = agent.desired().await;
    for hour in 2..6 {
        hub.place(&[("gold", &format!("0 {hour} * * *"))]).await;
    }
    agent.settle().await;
    agent.answer(&first, Outcome::Active, Vec::new()).await;
    let newest = agent.desired().await;
    assert_eq!(newest.revision, first.revision + 4);
    assert!(String::from_utf8_lossy(&newest.upserts[0].body).contains("0 5 * * *"));
}

#[tokio::test]
async fn what_is_held_back_is_sent_again_once_it_is_confirmed() {
    let hub = Hub::start().await;
    hub.add(1, "prod").await;
    hub.place(&[("gold", "0 1 * * *")]).await;
    let mut agent = hub.connect(1).await.unwrap();
    let desired = agent.desired().await;
    agent.answer(&desired, Outcome::Held, Vec::new()).await;
    agent.settle().await;
    agent.settle().await;
    hub.fleet.confirm("prod", clock::now()).await.unwrap();
    let again = agent.desired().await;
    assert_eq!((again.revision, again.confirmed), (desired.revision, true));
}

#[tokio::test]
async fn what_somebody_accepts_in_the_cluster_is_held_back_no_more() {
    let hub = Hub::start().await;
    hub.add(1, "prod").await;
    hub.place(&[("gold", "0 1 * * *")]).await;
    let mut agent = hub.connect(1).await.unwrap();
    let desired = agent.desired().await;
    agent.answer(&desired, Outcome::Held, Vec::new()).await;
    agent.settle().await;
    agent.answer(&desired, Outcome::Active, Vec::new()).await;
    let again = agent.desired().await;
    assert_eq!(again.revision, desired.revision);
    agent.answer(&again, Outcome::Active, Vec::new()).await;
    agent.settle().await;
    assert_eq!(hub.fleet.named("prod").unwrap().state().applied.unwrap().outcome, crate::fleet::ACTIVE);
}

#[tokio::test]
async fn a_status_is_acknowledged_when_it_is_written() {
    let hub = Hub::start().await;
    hub.add(1, "prod").await;
    let mut agent = hub.connect(1).await.unwrap();
    let object = |name: &str, body: &str| sts_backup_api::link::Object {
        key: Some(sts_backup_api::link::ObjectKey {
            kind: "StatefulSetBackup".to_owned(),
            namespace: "shop".to_owned(),
            name: name.to_owned(),
        }),
        body: body.as_bytes().to_vec(),
    };
    let runs = r#"{"uid":"u","runs":[{"id":"r1","started":"2026-01-01T00:00:00Z","result":"Completed"},
                   {"id":"r2","started":"2026-01-02T00:00:00Z","result":"Failed"}],"fieldOfALaterVersion":1}"#;
    for seq in 1..=2 {
        // The second time as after a reply that was lost.
        let status = Told {
            seq,
            full_begin: true,
            full_end: true,
            objects: vec![object("db", runs), object("cache", "{}")],
            gone: Vec::new(),
        };
        agent.say(agent_message::Message::Status(status)).await;
        let said = agent.hear().await.unwrap();
        assert!(matches!(&said, hub_message::Message::StatusAck(ack) if ack.seq == seq), "{said:?}");
    }
    let backups = hub.fleet.store.objects("StatefulSetBackup", None).await.unwrap();
    assert_eq!(backups.len(), 2);
    let history = hub.fleet.store.history("StatefulSetBackup", None, 10).await.unwrap();
    assert_eq!(history.iter().map(|(_, row)| &*row.run).collect::<Vec<_>>(), ["r2", "r1"]);

    let garbage = Told { seq: 3, objects: vec![object("db", "no JSON")], ..Told::default() };
    agent.say(agent_message::Message::Status(garbage)).await;
    assert_eq!(agent.hear().await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn all_is_reported_again_only_to_a_hub_that_lacks_something() {
    let hub = Hub::start().await;
    hub.add(1, "prod").await;
    let hash = |body: &str| {
        let told = body_hash(body.as_bytes());
        state_hash([(["StatefulSetBackup", "shop", "db"], &*told)])
    };
    let connect = async |state_hash| {
        let hello = Hello { state_hash, ..Hello::default() };
        Agent::connect(hub.address, &hub.certificate(1), &hub.authority, hello).await.unwrap()
    };
    let mut agent = connect(Vec::new()).await;
    assert!(agent.welcome.want_full);
    let key = sts_backup_api::link::ObjectKey {
        kind: "StatefulSetBackup".to_owned(),
        namespace: "shop".to_owned(),
        name: "db".to_owned(),
    };
    let object = sts_backup_api::link::Object { key: Some(key), body: b"{}".to_vec() };
    let status = Told { seq: 1, full_begin: true, full_end: true, objects: vec![object], gone: Vec::new() };
    agent.say(agent_message::Message::Status(status)).await;
    agent.hear().await.unwrap();
    assert!(connect(hash("{\"other\":1}")).await.welcome.want_full);
    let mut agent = connect(hash("{}")).await;
    assert!(!agent.welcome.want_full);

    let check = async |agent: &Agent, state_hash| {
        agent.say(agent_message::Message::Heartbeat(Heartbeat { wall_clock_ms: 0, state_hash })).await;
    };
    check(&agent, hash("{}")).await;
    assert!(matches!(agent.hear().await.unwrap(), hub_message::Message::Heartbeat(_)));
    check(&agent, hash("{\"other\":1}")).await;
    assert!(matches!(agent.hear().await.unwrap(), hub_message::Message::WantFull(_)));
}

#[tokio::test]
async fn who_is_not_let_in_is_told_why() {
    let hub = Hub::start().await;
    let said = hub.connect(1).await.err().unwrap();
    assert_eq!(said.code(), Code::Unauthenticated);
    assert!(said.message().contains("is not known here"), "{said:?}");

    hub.add(1, "prod").await;
    hub.fleet.revoke("prod", clock::now()).await.unwrap();
    let said = hub.connect(1).await.err().unwrap();
    assert!(said.message().contains("was revoked"), "{said:?}");

    hub.add(2, "prod-2").await;
    let newer = Hello { protocol: PROTOCOL + 1, ..Hello::default() };
    let said = Agent::connect(hub.address, &hub.certificate(2), &hub.authority, newer).await.err().unwrap();
    assert!(said.message().contains("version 2 of the link"), "{said:?}");
}

#[tokio::test]
async fn only_certificates_of_the_fleet_s_authority_for_clients_in_their_time_are_taken() {
    let hub = Hub::start().await;
    hub.add(1, "prod").await;
    let refused = async |issued: &Issued| {
        let refused = Agent::connect(hub.address, issued, &hub.authority, Hello::default()).await.err();
        let refused = refused.expect("it is refused");
        assert_ne!(refused.code(), Code::Unauthenticated, "it does not come so far: {refused:?}");
    };
    let foreign = authority("fleet.example.com");
    refused(&foreign.issue(&Holder::Cluster(id(1)), DAY, clock::now()).unwrap()).await;
    let long_ago: Timestamp = clock::now() - SignedDuration::from_hours(48);
    let expired = hub.authority.issue(&Holder::Cluster(id(1)), DAY, long_ago).unwrap();
    refused(&expired).await;
    let server = Holder::Hub(vec!["localhost".to_owned()]);
    refused(&hub.authority.issue(&server, DAY, clock::now()).unwrap()).await;
    hub.connect(1).await.unwrap();
}

#[tokio::test]
async fn revocation_ends_a_live_session() {
    let hub = Hub::start().await;
    hub.add(1, "prod").await;
    let mut agent = hub.connect(1).await.unwrap();
    hub.fleet.revoke("prod", clock::now()).await.unwrap();
    let ended = agent.hear().await.unwrap_err();
    assert!(ended.code() == Code::Unauthenticated && ended.message().contains("revoked"), "{ended:?}");
}

#[tokio::test]
async fn the_newest_connection_of_a_cluster_wins() {
    let hub = Hub::start().await;
    hub.add(1, "prod").await;
    hub.add(2, "other").await;
    let mut older = hub.connect(1).await.unwrap();
    let mut other = hub.connect(2).await.unwrap();
    let mut newer = hub.connect(1).await.unwrap();
    assert_eq!(older.hear().await.unwrap_err().code(), Code::Aborted);
    newer.settle().await;
    other.settle().await;
}

#[tokio::test]
async fn a_hub_that_ends_says_when_to_come_again() {
    let hub = Hub::start().await;
    hub.add(1, "prod").await;
    let mut agent = hub.connect(1).await.unwrap();
    hub.stop.cancel();
    hub.fleet.draining.cancel();
    let said = agent.hear().await.unwrap();
    assert!(matches!(&said, hub_message::Message::RetryLater(later) if later.retry_after_ms > 0), "{said:?}");
}

#[tokio::test]
async fn new_certificates_of_the_hub_are_used_for_new_connections() {
    let hub = Hub::start().await;
    hub.add(1, "prod").await;
    let mut before = hub.connect(1).await.unwrap();
    // Another authority altogether: who knew the old one trusts the hub no more.
    let renewed = authority("fleet.example.com");
    let files = hub.directory.path().join("renewed");
    let holder = Holder::Hub(vec!["localhost".to_owned()]);
    write(&files, &renewed.issue(&holder, DAY, clock::now()).unwrap(), &renewed);
    hub.tls.store(Arc::new(link_config(&files).unwrap()));
    before.settle().await;
    assert!(hub.connect(1).await.is_err());
    let issued = renewed.issue(&Holder::Cluster(id(1)), DAY, clock::now()).unwrap();
    Agent::connect(hub.address, &issued, &renewed, Hello::default()).await.unwrap();
}

#[tokio::test]
async fn who_sends_nothing_or_garbage_keeps_nobody_out() {
    let hub = Hub::start().await;
    hub.add(1, "prod").await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(TcpStream::connect(hub.address).await.unwrap());
    }
    let mut garbage = TcpStream::connect(hub.address).await.unwrap();
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    // An alert of TLS, and the end.
    garbage.read_to_end(&mut answer).await.unwrap();
    assert!(answer.len() < 16, "{answer:?}");
    hub.connect(1).await.unwrap().settle().await;
}

#[tokio::test]
async fn what_cannot_be_written_is_not_acknowledged() {
    let hub = Hub::start().await;
    hub.add(1, "prod").await;
    let mut agent = hub.connect(1).await.unwrap();
    agent.settle().await;
    hub.fleet.store.close().await;
    let status = Told { seq: 1, full_begin: true, full_end: true, ..Told::default() };
    agent.say(agent_message::Message::Status(status)).await;
    assert_eq!(agent.hear().await.unwrap_err().code(), Code::Unavailable);
}
