//! One connection to the hub: who this is, what the hub wants, what there is to tell, and its end.
//!
//! One status and one `Desired` are under way at a time; what is newest is next.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use kube::runtime::watcher;
use rand::Rng;
use sts_backup_api::link::fleet_client::FleetClient;
use sts_backup_api::link::{
    AgentMessage, Applied, Desired, Goodbye, Heartbeat, Hello, HubMessage, MAX_MESSAGE, PROTOCOL, RetryLater,
    Welcome, agent_message, applied::Outcome, hub_message,
};
use sts_backup_service::clock;
use sts_backup_service::files::Watch;
use sts_backup_service::telemetry::chain;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;
use tonic::{Status as Refusal, Streaming};
use tracing::{info, warn};

use super::apply::Applier;
use super::identity::Identity;
use super::metrics::LinkMetrics;
use super::report::Reports;
use super::state::{NAME, State, obeyed};
use crate::app;
use crate::config::LinkConfig;
use crate::error::Error;

/// How long connecting may take, and the hub's first answer.
const CONNECT: Duration = Duration::from_secs(10);

/// A hub that is gone without a word is noticed after these two.
const PING_EVERY: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// What hyper would take before anybody reads it: its own windows are larger.
const STREAM_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = 128 << 10;

/// How long the hub may take to acknowledge a status.
const ACKNOWLEDGE: Duration = Duration::from_mins(1);

/// So many heartbeats without an answer, and the hub counts as gone.
const MISSED: u32 = 3;

/// No hub keeps a cluster away for longer.
const LONGEST_SPREAD: Duration = Duration::from_mins(5);

/// The pause between two looks at whether the hub has what it was told.
const CHECK: Duration = Duration::from_mins(10);

/// Messages that wait for the hub.
const OUTGOING: usize = 8;

type Anything = Box<dyn std::error::Error + Send + Sync>;

/// Why a connection ended.
pub(super) enum Ended {
    /// The agent ends.
    Stopped,
    /// The hub said when to come again, and why.
    ComeAgain { after: Duration, reason: String },
    /// There is a new certificate.
    Renewed,
    /// There was one, and it failed; the fleet of a hub that is gone comes back over so long.
    Lost { error: Anything, spread: Duration },
    /// There was none.
    Failed(Anything),
}

/// What connections have in common.
pub(super) struct Session {
    link: LinkConfig,
    client: Client,
    reports: Arc<Reports>,
    applier: Arc<Applier>,
    metrics: LinkMetrics,
    instance: String,
}

impl Session {
    pub(super) fn new(
        cx: &app::Context,
        link: LinkConfig,
        reports: Arc<Reports>,
        applier: Arc<Applier>,
        metrics: LinkMetrics,
    ) -> Self {
        let instance = format!("{}_{:016x}", cx.config.identity, rand::random::<u64>());
        Self { link, client: cx.exec_client.clone(), reports, applier, metrics, instance }
    }

    /// Connects and stays connected until something ends it.
    pub(super) async fn run(&mut self, stop: &CancellationToken) -> Ended {
        let ended = tokio::select! {
            biased;
            () = stop.cancelled() => Ok(Ended::Stopped),
            ended = self.connection(stop) => ended,
        };
        self.metrics.disconnected();
        ended.unwrap_or_else(Ended::Failed)
    }

    async fn connection(&self, stop: &CancellationToken) -> Result<Ended, Anything> {
        let directory = self.link.certificates.clone();
        let identity = read_identity(directory.clone()).await?;
        self.metrics.certificate(identity.until);
        identity.check(&directory, clock::now())?;
        let hub = &self.link.hub;
        let name = hub.rsplit_once(':').map_or(&**hub, |(name, _)| name).trim_matches(['[', ']']);
        let endpoint = Endpoint::from_shared(format!("https://{hub}"))?
            .tls_config(identity.tls(name))?
            .connect_timeout(CONNECT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        let channel = timeout(CONNECT, endpoint.connect()).await??;
        let mut fleet = FleetClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);

        let (outgoing, sent) = mpsc::channel(OUTGOING);
        outgoing.send(message(agent_message::Message::Hello(self.hello().await?))).await?;
        let mut incoming = timeout(CONNECT, fleet.session(ReceiverStream::new(sent))).await??.into_inner();
        let welcome = match timeout(CONNECT, incoming.message()).await??.and_then(|said| said.message) {
            Some(hub_message::Message::Welcome(welcome)) if welcome.protocol == PROTOCOL => welcome,
            Some(hub_message::Message::RetryLater(later)) => return Ok(come_again(later)),
            _ => return Err("the hub does not welcome the agent".into()),
        };
        let offset = welcome.hub_time_ms.saturating_sub(clock::now().as_millisecond());
        info!(
            hub = hub.as_str(),
            cluster = welcome.cluster_name,
            hub_clock_ahead_ms = offset,
            "linked to the hub"
        );
        self.metrics.connected();
        if welcome.want_full {
            self.reports.tell_all();
        }
        let spread = Duration::from_millis(welcome.reconnect_spread_ms.into()).min(LONGEST_SPREAD);
        let connected = Connected { session: self, outgoing, identity, directory, welcome };
        let ended = connected.speak(incoming, stop).await;
        Ok(ended.unwrap_or_else(|error| Ended::Lost { error, spread }))
    }

    async fn hello(&self) -> Result<Hello, Error> {
        let obeyed = self.applier.state.read().await?;
        let have = self.applier.have().await?;
        // It may be forbidden, and is worth no failure.
        let version = timeout(CONNECT, self.client.apiserver_version()).await.ok().and_then(Result::ok);
        Ok(Hello {
            protocol: PROTOCOL,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kubernetes_version: version.map(|version| version.git_version).unwrap_or_default(),
            instance_id: self.instance.clone(),
            store_id: obeyed.store,
            applied_revision: obeyed.revision,
            have,
            wall_clock_ms: clock::now().as_millisecond(),
            state_hash: self.reports.hello(),
        })
    }
}

async fn read_identity(directory: PathBuf) -> Result<Identity, Anything> {
    Ok(tokio::task::spawn_blocking(move || Identity::read(&directory)).await??)
}

fn come_again(later: RetryLater) -> Ended {
    Ended::ComeAgain { after: Duration::from_millis(later.retry_after_ms.into()), reason: later.reason }
}

fn message(message: agent_message::Message) -> AgentMessage {
    AgentMessage { message: Some(message) }
}

struct Connected<'a> {
    session: &'a Session,
    outgoing: mpsc::Sender<AgentMessage>,
    identity: Identity,
    directory: PathBuf,
    welcome: Welcome,
}

impl Connected<'_> {
    async fn speak(
        self,
        mut incoming: Streaming<HubMessage>,
        stop: &CancellationToken,
    ) -> Result<Ended, Anything> {
        let (wanted, wants) = mpsc::channel::<Desired>(1);
        let accepted = Notify::new();
        tokio::select! {
            ended = self.listen(&mut incoming, wanted, stop) => ended,
            ended = self.apply(wants, &accepted) => ended,
            () = watch_acceptance(&self.session.applier.state, &accepted) => Ok(Ended::Stopped),
            ended = self.watch_files() => ended,
        }
    }

    /// Tells what there is to tell, and takes what the hub says.
    async fn listen(
        &self,
        incoming: &mut Streaming<HubMessage>,
        wanted: mpsc::Sender<Desired>,
        stop: &CancellationToken,
    ) -> Result<Ended, Anything> {
        let pause = Duration::from_millis(u64::from(self.welcome.heartbeat_ms.max(1000)));
        let mut heard = clock::monotonic();
        let mut beat_at = heard + jittered(pause);
        let mut check_at = heard + jittered(CHECK);
        let mut unacknowledged: Option<(u64, Instant)> = None;
        loop {
            if unacknowledged.is_none()
                && let Some(status) = self.session.reports.next()
            {
                unacknowledged = Some((status.seq, clock::monotonic() + ACKNOWLEDGE));
                self.send(agent_message::Message::Status(status)).await?;
            }
            let acknowledged_by = unacknowledged.map(|(_, until)| until);
            tokio::select! {
                biased;
                () = stop.cancelled() => {
                    let goodbye = Goodbye { reason: "the agent ends".to_owned() };
                    self.send(agent_message::Message::Goodbye(goodbye)).await?;
                    return Ok(Ended::Stopped);
                }
                said = incoming.message() => {
                    let Some(said) = said? else { return Err("the hub has closed the connection".into()) };
                    heard = clock::monotonic();
                    self.session.metrics.heard();
                    match said.message {
                        Some(hub_message::Message::Desired(desired)) => {
                            // One is under way at a time: there is room unless the hub forgets that.
                            wanted.try_send(desired).map_err(|_| "the hub sends more than was answered")?;
                        }
                        Some(hub_message::Message::StatusAck(ack)) => {
                            unacknowledged = unacknowledged.filter(|(seq, _)| *seq != ack.seq);
                        }
                        Some(hub_message::Message::RetryLater(later)) => return Ok(come_again(later)),
                        Some(hub_message::Message::WantFull(_)) => self.session.reports.tell_all(),
                        // Of a newer hub, too.
                        Some(hub_message::Message::Welcome(_) | hub_message::Message::Heartbeat(_)) | None => {}
                    }
                }
                () = self.session.reports.changed(), if unacknowledged.is_none() => {}
                () = sleep_until(acknowledged_by.unwrap_or(beat_at)), if acknowledged_by.is_some() => {
                    if acknowledged_by.is_some_and(|until| until <= clock::monotonic()) {
                        return Err("the hub does not acknowledge what it is told".into());
                    }
                }
                () = sleep_until(beat_at) => {
                    if clock::monotonic().duration_since(heard) > pause * MISSED {
                        return Err("the hub does not answer".into());
                    }
                    beat_at = clock::monotonic() + jittered(pause);
                    let is_due = check_at <= clock::monotonic() && unacknowledged.is_none();
                    let checked = is_due.then(|| self.session.reports.told()).flatten();
                    if checked.is_some() {
                        check_at = clock::monotonic() + jittered(CHECK);
                    }
                    let state_hash = checked.unwrap_or_default();
                    let heartbeat = Heartbeat { wall_clock_ms: clock::now().as_millisecond(), state_hash };
                    self.send(agent_message::Message::Heartbeat(heartbeat)).await?;
                }
            }
        }
    }

    /// Does what the hub wants, one after the other, and says what has come of it. What is held back is tried again when
    /// somebody accepts it.
    async fn apply(&self, mut wants: mpsc::Receiver<Desired>, accepted: &Notify) -> Result<Ended, Anything> {
        let mut held: Option<Desired> = None;
        loop {
            let desired = tokio::select! {
                desired = wants.recv() => match desired {
                    Some(desired) => desired,
                    // Who listens ends the connection.
                    None => std::future::pending().await,
                },
                () = accepted.notified(), if held.is_some() => held.take().unwrap_or_default(),
            };
            let applied = self.apply_one(&desired).await?;
            self.session.metrics.applied(&applied);
            held = (applied.outcome() == Outcome::Held).then_some(desired);
            self.send(agent_message::Message::Applied(applied)).await?;
        }
    }

    async fn apply_one(&self, desired: &Desired) -> Result<Applied, Anything> {
        for failures in 0.. {
            match self.session.applier.apply(desired, &self.welcome.store_id).await {
                Ok(applied) => return Ok(applied),
                Err(error) => {
                    let pause = error.backoff(failures);
                    warn!(error = chain(&error), ?pause, "what the hub wants is not applied yet");
                    let retrying = Applied {
                        revision: desired.revision,
                        set_hash: desired.set_hash.clone(),
                        outcome: Outcome::Retrying.into(),
                        detail: chain(&error),
                        items: Vec::new(),
                    };
                    self.send(agent_message::Message::Applied(retrying)).await?;
                    sleep(pause).await;
                }
            }
        }
        unreachable!("it is tried until it is done")
    }

    /// Returns when there is another certificate than the one that this connection was made with.
    async fn watch_files(&self) -> Result<Ended, Anything> {
        let files = Watch::of(&self.directory);
        loop {
            // They may have changed since this connection was made.
            match read_identity(self.directory.clone()).await {
                Ok(found) if found != self.identity => return Ok(Ended::Renewed),
                Ok(_) => {}
                // What is connected stays connected.
                Err(error) => warn!(error = chain(&*error), "the link's certificate cannot be read"),
            }
            files.changed().await;
        }
    }

    async fn send(&self, what: agent_message::Message) -> Result<(), Anything> {
        let sent = timeout(ACKNOWLEDGE, self.outgoing.send(message(what))).await;
        sent.map_err(|_| "the hub takes nothing")?
            .map_err(|_| Refusal::unavailable("the connection is closed"))?;
        Ok(())
    }
}

/// Tells whenever the `ConfigMap` of the link has an acceptance that may be a new one.
async fn watch_acceptance(state: &State, accepted: &Notify) {
    let mut known = None;
    let mut maps = std::pin::pin!(watcher::watch_object(state.maps(), NAME));
    while let Some(found) = maps.next().await {
        let Ok(Some(map)) = found else { continue };
        let now = obeyed(&map).accepted;
        if now.is_some() && now != known {
            accepted.notify_one();
        }
        known = now;
    }
}

/// A fifth more or less: the agents of a fleet do not speak all at once.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.8..1.2))
}
