//! One simulated agent.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use rand::Rng;
use serde_json::value::RawValue;
use sts_backup_api::link::fleet_client::FleetClient;
use sts_backup_api::link::{
    AgentMessage, Applied, Have, Heartbeat, Hello, HubMessage, Object, ObjectKey, PROTOCOL, Status,
    agent_message, applied::Outcome, body_hash, hub_message, reconnect_pause, state_hash,
};
use sts_backup_api::report::{BACKUP, BackupReport};
use sts_backup_service::clock;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{ClientTlsConfig, Endpoint};

use super::crowd::{Crowd, Wanted};

/// As the agent has it.
const CONNECT: Duration = Duration::from_secs(10);
const PING_EVERY: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
const STREAM_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = 128 << 10;

/// Objects of one message.
const OBJECTS: usize = 100;

/// What an agent keeps between connections.
pub(super) struct Agent {
    crowd: Arc<Crowd>,
    number: usize,
    tls: ClientTlsConfig,
    have: BTreeMap<String, Vec<u8>>,
    revision: u64,
    store: String,
    /// Over how long the agents of a lost hub come back.
    spread: Duration,
}

/// How a connection ended.
enum Ended {
    /// The hub said when to come again.
    ComeAgain(Duration),
    /// It was there, and went without a word.
    Lost,
}

impl Agent {
    pub(super) fn new(crowd: Arc<Crowd>, number: usize, tls: ClientTlsConfig) -> Self {
        let (have, store) = (BTreeMap::new(), String::new());
        Self { crowd, number, tls, have, revision: 0, store, spread: Duration::ZERO }
    }

    /// Connects, and connects again, for ever.
    pub(super) async fn run(mut self) {
        let mut failures = 0_u32;
        loop {
            let pause = match self.connection().await {
                Ok(Ended::ComeAgain(pause)) => pause.mul_f64(rand::rng().random_range(0.5..1.5)),
                Ok(Ended::Lost) => {
                    failures = 1;
                    reconnect_pause(0, rand::random()) + self.spread.mul_f64(rand::random())
                }
                Err(error) => {
                    tracing::debug!(number = self.number, error = format!("{error:#}"), "no connection");
                    let pause = reconnect_pause(failures, rand::random());
                    failures = failures.saturating_add(1);
                    pause
                }
            };
            sleep(pause).await;
        }
    }

    async fn connection(&mut self) -> Result<Ended> {
        let endpoint = Endpoint::from_shared(format!("https://{}", self.crowd.hub))?
            .tls_config(self.tls.clone())?
            .connect_timeout(CONNECT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        let channel = timeout(CONNECT, endpoint.connect()).await??;
        let (outgoing, sent) = mpsc::channel(8);
        let mut wanted = self.crowd.wanted();
        let begun = wanted.borrow_and_update().clone();
        outgoing.send(message(agent_message::Message::Hello(self.hello(&begun)))).await?;
        let mut client = FleetClient::new(channel);
        let mut incoming = timeout(CONNECT, client.session(ReceiverStream::new(sent))).await??.into_inner();
        let welcome = match timeout(CONNECT, incoming.message()).await??.and_then(|said| said.message) {
            Some(hub_message::Message::Welcome(welcome)) => welcome,
            Some(hub_message::Message::RetryLater(later)) => {
                return Ok(Ended::ComeAgain(Duration::from_millis(later.retry_after_ms.into())));
            }
            said => bail!("no welcome: {said:?}"),
        };
        ensure!(welcome.protocol == PROTOCOL, "another protocol: {}", welcome.protocol);
        self.store = welcome.store_id;
        self.spread = Duration::from_millis(welcome.reconnect_spread_ms.into());
        let heartbeat = Duration::from_millis(welcome.heartbeat_ms.into());
        let crowd = Arc::clone(&self.crowd);
        let _connected = crowd.connected();
        let mut reports = Reports::of(self.number, begun);
        if welcome.want_full {
            reports.is_full = true;
        } else {
            reports.told = reports.of.objects;
        }
        match self.speak(&outgoing, &mut incoming, heartbeat, wanted, reports).await {
            Ok(ended) => Ok(ended),
            Err(error) => {
                tracing::debug!(number = self.number, error = format!("{error:#}"), "the connection ends");
                Ok(Ended::Lost)
            }
        }
    }

    /// Of what it has to report.
    fn state_hash(&self, wanted: &Wanted) -> Vec<u8> {
        let objects = (0..wanted.objects).map(|at| backup(self.number, at, wanted));
        let hashed = objects.map(|object| (object.key.unwrap_or_default(), body_hash(&object.body)));
        let mut objects: Vec<_> = hashed.collect();
        objects.sort_by(|(one, _), (other, _)| one.name.cmp(&other.name));
        state_hash(objects.iter().map(|(key, hash)| ([&*key.kind, &*key.namespace, &*key.name], &**hash)))
    }

    fn hello(&self, wanted: &Wanted) -> Hello {
        let have = self.have.iter().map(|(name, hash)| Have { name: name.clone(), hash: hash.clone() });
        Hello {
            protocol: PROTOCOL,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kubernetes_version: "v1.33.0".to_owned(),
            instance_id: format!("simulated-{}-{}", std::process::id(), self.number),
            store_id: self.store.clone(),
            applied_revision: self.revision,
            have: have.collect(),
            wall_clock_ms: clock::now().as_millisecond(),
            state_hash: self.state_hash(wanted),
        }
    }

    async fn speak(
        &mut self,
        outgoing: &mpsc::Sender<AgentMessage>,
        incoming: &mut Streaming<HubMessage>,
        heartbeat: Duration,
        mut wanted: watch::Receiver<Wanted>,
        mut reports: Reports,
    ) -> Result<Ended> {
        let mut is_under_way = false;
        let mut beat_at = clock::monotonic() + jittered(heartbeat);
        loop {
            if !is_under_way && let Some(status) = reports.next() {
                outgoing.send(message(agent_message::Message::Status(status))).await?;
                is_under_way = true;
            }
            tokio::select! {
                said = incoming.message() => match said?.and_then(|said| said.message) {
                    Some(hub_message::Message::Desired(desired)) => {
                        self.revision = desired.revision;
                        self.have.extend(desired.upserts.into_iter().map(|item| (item.name, item.hash)));
                        for name in &desired.removes {
                            self.have.remove(name);
                        }
                        self.crowd.applied(self.number);
                        let applied = Applied {
                            revision: desired.revision,
                            set_hash: desired.set_hash,
                            outcome: Outcome::Active.into(),
                            ..Applied::default()
                        };
                        outgoing.send(message(agent_message::Message::Applied(applied))).await?;
                    }
                    Some(hub_message::Message::StatusAck(_)) => {
                        is_under_way = false;
                        if reports.is_done() {
                            self.crowd.reported(self.number, reports.of.round);
                        }
                    }
                    Some(hub_message::Message::RetryLater(later)) => {
                        return Ok(Ended::ComeAgain(Duration::from_millis(later.retry_after_ms.into())));
                    }
                    Some(hub_message::Message::WantFull(_)) => {
                        reports = Reports { is_full: true, ..Reports::of(self.number, reports.of.clone()) };
                    }
                    Some(hub_message::Message::Welcome(_) | hub_message::Message::Heartbeat(_)) => {}
                    None => bail!("the hub has closed the connection"),
                },
                changed = wanted.changed() => {
                    changed?;
                    reports = Reports::of(self.number, wanted.borrow_and_update().clone());
                }
                () = sleep_until(beat_at) => {
                    beat_at = clock::monotonic() + jittered(heartbeat);
                    let wall_clock_ms = clock::now().as_millisecond();
                    let heartbeat = Heartbeat { wall_clock_ms, state_hash: Vec::new() };
                    outgoing.send(message(agent_message::Message::Heartbeat(heartbeat))).await?;
                }
            }
        }
    }
}

fn message(message: agent_message::Message) -> AgentMessage {
    AgentMessage { message: Some(message) }
}

fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.8..1.2))
}

/// What an agent has to report.
struct Reports {
    number: usize,
    of: Wanted,
    told: usize,
    sequence: u64,
    is_full: bool,
}

impl Reports {
    /// Of all its objects.
    fn of(number: usize, of: Wanted) -> Self {
        Self { number, of, told: 0, sequence: 0, is_full: false }
    }

    fn is_done(&self) -> bool {
        self.told == self.of.objects && !(self.is_full && self.sequence == 0)
    }

    fn next(&mut self) -> Option<Status> {
        if self.is_done() {
            return None;
        }
        let until = (self.told + OBJECTS).min(self.of.objects);
        let objects = (self.told..until).map(|at| backup(self.number, at, &self.of)).collect();
        self.sequence += 1;
        self.told = until;
        Some(Status {
            seq: self.sequence,
            full_begin: self.is_full && self.sequence == 1,
            full_end: self.is_full && self.is_done(),
            objects,
            gone: Vec::new(),
        })
    }
}

/// A backup after one more run than in the round before.
fn backup(agent: usize, at: usize, wanted: &Wanted) -> Object {
    let report = BackupReport::<Option<&RawValue>> {
        uid: format!("{agent:08}-0000-4000-8000-{at:012}"),
        created: Some(wanted.since),
        stateful_set: format!("shop/database-{at}"),
        policy: Some("gold".to_owned()),
        schedule: Some("0 2 * * *".to_owned()),
        rpo_seconds: Some(90_000),
        last_success: Some(wanted.last_run()),
        points: 7,
        runs: wanted.runs.iter().map(|run| Some(&**run)).collect(),
        ..BackupReport::default()
    };
    let key =
        ObjectKey { kind: BACKUP.to_owned(), namespace: "shop".to_owned(), name: format!("database-{at}") };
    Object { key: Some(key), body: serde_json::to_vec(&report).expect("texts and numbers are JSON") }
}
