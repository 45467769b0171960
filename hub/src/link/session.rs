//! One agent's session: what it reports is written and acknowledged, what it lacks is sent, and its end is noticed.
//!
//! One `Desired` is under way at a time; what is newest counts when that is answered.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use sts_backup_api::link::{
    AgentMessage, Applied, Desired, Heartbeat, Hello, HubMessage, PROTOCOL, RetryLater, StatusAck, WantFull,
    Welcome, agent_message, applied::Outcome, hub_message,
};
use sts_backup_service::clock;
use sts_backup_service::telemetry::chain;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use tracing::{Instrument, info, info_span, warn};

use super::report::Written;
use crate::fleet::place::Known;
use crate::fleet::{Cluster, End, Fleet};
use crate::store::ObjectKey;

/// How long an agent may take to say who it is.
const HELLO: Duration = Duration::from_secs(10);

/// How long it may take to answer what it was sent, retries not counted: it says so when it retries.
const ANSWER: Duration = Duration::from_mins(1);

/// An agent counts as gone when it was silent for so many heartbeats: two that are a fifth late fit in.
const MISSED: u32 = 3;

/// Agents come again within this time after the hub said that it ends.
const COME_AGAIN_MS: u32 = 5000;

/// Messages that wait for an agent.
const OUTGOING: usize = 4;

type Outgoing = mpsc::Sender<Result<HubMessage, Status>>;

/// Starts a session; it ends when what it sends is dropped.
pub(super) fn start(
    fleet: Arc<Fleet>,
    cluster: Arc<Cluster>,
    messages: Streaming<AgentMessage>,
    address: SocketAddr,
    heartbeat: Duration,
) -> impl Stream<Item = Result<HubMessage, Status>> + Send + 'static {
    let (outgoing, sent) = mpsc::channel(OUTGOING);
    let span = info_span!("session", cluster = cluster.name(), %address);
    let session = async move {
        if let Err(status) = run(&fleet, &cluster, messages, &outgoing, address, heartbeat).await {
            // Nobody may be there to take it.
            let _ = outgoing.try_send(Err(status));
        }
    };
    tokio::spawn(session.instrument(span));
    ReceiverStream::new(sent)
}

async fn run(
    fleet: &Fleet,
    cluster: &Arc<Cluster>,
    mut messages: Streaming<AgentMessage>,
    outgoing: &Outgoing,
    address: SocketAddr,
    heartbeat: Duration,
) -> Result<(), Status> {
    let hello = first(&mut messages).await?;
    if hello.protocol != PROTOCOL {
        let reason =
            format!("the agent speaks version {} of the link, and the hub {PROTOCOL}", hello.protocol);
        warn!(reason, "an agent is refused");
        return Err(Status::failed_precondition(reason));
    }
    let want_full = !is_told(fleet, cluster, &hello.state_hash).await?;
    let begun = fleet.begin(cluster, &hello, address, clock::now());
    info!(version = hello.agent_version, kubernetes = hello.kubernetes_version, "an agent is connected");
    let welcome = Welcome {
        protocol: PROTOCOL,
        store_id: fleet.store.id().to_string(),
        session_id: begun.id.to_string(),
        cluster_name: cluster.name(),
        hub_time_ms: clock::now().as_millisecond(),
        heartbeat_ms: u32::try_from(heartbeat.as_millis()).unwrap_or(u32::MAX),
        reconnect_spread_ms: u32::try_from(fleet.spread().as_millis()).unwrap_or(u32::MAX),
        want_full,
    };
    let mut session = Session {
        fleet,
        cluster,
        outgoing,
        id: begun.id,
        known: Known {
            have: hello.have.into_iter().map(|have| (have.name, have.hash)).collect(),
            rejected: BTreeMap::new(),
            // A revision of another store says nothing; where the hub does not know what became of one, it asks again.
            answered: (hello.store_id == welcome.store_id && cluster.has_answer_to(hello.applied_revision))
                .then_some(hello.applied_revision),
        },
        under_way: None,
        is_held: None,
        written: Written::default(),
        kept: None,
    };
    let ended = async {
        session.send(hub_message::Message::Welcome(welcome)).await?;
        session.speak(messages, begun.end, begun.changed, heartbeat * MISSED).await
    };
    let ended = ended.await;
    fleet.end(cluster, begun.id);
    match &ended {
        Ok(why) => info!(why, "the session ends"),
        Err(status) => warn!(why = status.message(), "the session ends"),
    }
    ended.map(drop)
}

async fn first(messages: &mut Streaming<AgentMessage>) -> Result<Hello, Status> {
    let said = timeout(HELLO, messages.message()).await;
    let said = said.map_err(|_| Status::deadline_exceeded("the agent does not say who it is"))??;
    match said.and_then(|said| said.message) {
        Some(agent_message::Message::Hello(hello)) => Ok(hello),
        _ => Err(Status::failed_precondition("the first message is none of who the agent is")),
    }
}

/// Whether the hub has what the agent's hash says.
async fn is_told(fleet: &Fleet, cluster: &Cluster, hash: &[u8]) -> Result<bool, Status> {
    if hash.is_empty() {
        return Ok(false);
    }
    let known = fleet.store.state_hash(cluster.id).await;
    Ok(known.map_err(|error| Status::unavailable(chain(&error)))? == hash)
}

fn unwritten(error: &crate::store::StoreError) -> Status {
    let error = chain(error);
    warn!(error, "what an agent says cannot be written: it is not acknowledged, and comes again");
    Status::unavailable("the hub cannot write now")
}

struct Session<'a> {
    fleet: &'a Fleet,
    cluster: &'a Arc<Cluster>,
    outgoing: &'a Outgoing,
    id: uuid::Uuid,
    known: Known,
    /// What was sent and is not answered yet, and until when it has to be.
    under_way: Option<(Desired, Instant)>,
    /// The revision that the agent holds back, and whether it was confirmed as it was sent.
    is_held: Option<(u64, bool)>,
    written: Written,
    /// What was reported since the agent began to report all.
    kept: Option<BTreeSet<ObjectKey>>,
}

impl Session<'_> {
    /// Speaks until the agent goes, or has to; says why.
    async fn speak(
        &mut self,
        mut messages: Streaming<AgentMessage>,
        mut end: watch::Receiver<Option<End>>,
        mut changed: watch::Receiver<()>,
        patience: Duration,
    ) -> Result<&'static str, Status> {
        let mut heard = clock::monotonic();
        loop {
            self.offer().await?;
            let answer_by = self.under_way.as_ref().map(|(_, until)| *until);
            let silent_by = heard + patience;
            tokio::select! {
                biased;
                _ = end.changed() => {
                    return match *end.borrow() {
                        Some(End::Replaced) => Err(Status::aborted("a newer connection of this cluster has taken its place")),
                        Some(End::Revoked) | None => Err(Status::unauthenticated("the cluster is revoked")),
                    };
                }
                () = self.fleet.draining.cancelled() => {
                    let later = RetryLater { retry_after_ms: COME_AGAIN_MS, reason: "the hub ends".to_owned() };
                    self.send(hub_message::Message::RetryLater(later)).await?;
                    return Ok("the hub ends");
                }
                message = messages.message() => {
                    let Some(message) = message? else { return Ok("the agent has left") };
                    heard = clock::monotonic();
                    if !self.fleet.is_heard(self.cluster, self.id, clock::now()) {
                        return Err(Status::aborted("a newer connection of this cluster has taken its place"));
                    }
                    if let Some(message) = message.message
                        && self.take(message).await?
                    {
                        return Ok("the agent says goodbye");
                    }
                }
                _ = changed.changed() => {}
                () = sleep_until(answer_by.unwrap_or(silent_by)), if answer_by.is_some() => {
                    return Err(Status::deadline_exceeded("the agent does not answer what it was sent"));
                }
                () = sleep_until(silent_by) => {
                    return Err(Status::deadline_exceeded("the agent is silent"));
                }
            }
        }
    }

    /// Sends what is missing, if nothing is under way.
    async fn offer(&mut self) -> Result<(), Status> {
        if self.under_way.is_some() {
            return Ok(());
        }
        let Some(desired) = self.cluster.offer(&self.known) else { return Ok(()) };
        if self.is_held == Some((desired.revision, desired.confirmed)) {
            // It has it, and waits for somebody.
            return Ok(());
        }
        self.send(hub_message::Message::Desired(desired.clone())).await?;
        self.under_way = Some((desired, clock::monotonic() + ANSWER));
        Ok(())
    }

    /// Does what a message asks for; true: it is the last one.
    async fn take(&mut self, message: agent_message::Message) -> Result<bool, Status> {
        match message {
            agent_message::Message::Hello(_) => {
                return Err(Status::failed_precondition("the agent says twice who it is"));
            }
            agent_message::Message::Applied(applied) => self.applied(&applied),
            agent_message::Message::Status(status) => {
                if status.full_begin {
                    self.kept = Some(BTreeSet::new());
                }
                // The others wait with what they have sent, and that is little.
                let _turn = self.fleet.reporting.acquire().await;
                let report = self.written.take_apart(status.objects, status.gone)?;
                if let Some(kept) = &mut self.kept {
                    kept.extend(report.objects.iter().map(|object| object.key.clone()));
                }
                let (store, id) = (&self.fleet.store, self.cluster.id);
                store.report(id, report).await.map_err(|error| unwritten(&error))?;
                if status.full_end
                    && let Some(kept) = self.kept.take()
                {
                    store.keep_only(id, kept).await.map_err(|error| unwritten(&error))?;
                }
                self.send(hub_message::Message::StatusAck(StatusAck { seq: status.seq })).await?;
            }
            agent_message::Message::Heartbeat(heartbeat) => {
                if !heartbeat.state_hash.is_empty()
                    && !is_told(self.fleet, self.cluster, &heartbeat.state_hash).await?
                {
                    warn!("what the hub has of the cluster's objects is not what there is: all is asked for");
                    self.send(hub_message::Message::WantFull(WantFull {})).await?;
                }
                let answer =
                    Heartbeat { wall_clock_ms: clock::now().as_millisecond(), ..Heartbeat::default() };
                self.send(hub_message::Message::Heartbeat(answer)).await?;
            }
            agent_message::Message::Goodbye(_) => return Ok(true),
        }
        Ok(false)
    }

    /// Notes what became of what was sent.
    fn applied(&mut self, applied: &Applied) {
        let outcome = applied.outcome();
        let fits = |(sent, _): &(Desired, Instant)| sent.revision == applied.revision;
        if outcome == Outcome::Retrying {
            // It has its own patience.
            if let Some((_, until)) = self.under_way.as_mut().filter(|under_way| fits(under_way)) {
                *until = clock::monotonic() + ANSWER;
            }
        } else if let Some((sent, _)) = self.under_way.take_if(|under_way| fits(under_way)) {
            self.answered(sent, applied, outcome);
        } else if outcome == Outcome::Active {
            // Somebody in the cluster has accepted what was held back: it is sent once more, and answered.
            self.is_held = self.is_held.filter(|(revision, _)| *revision != applied.revision);
        }
        self.fleet.applied(self.cluster, applied, clock::now());
    }

    fn answered(&mut self, sent: Desired, applied: &Applied, outcome: Outcome) {
        if outcome == Outcome::Held {
            self.is_held = Some((sent.revision, sent.confirmed));
            return;
        }
        self.is_held = None;
        self.known.answered = Some(sent.revision);
        let rejected: BTreeMap<_, _> = applied.items.iter().map(|item| (&item.name, &item.hash)).collect();
        for item in sent.upserts {
            if rejected.contains_key(&item.name) {
                self.known.rejected.insert(item.name, item.hash);
            } else {
                self.known.rejected.remove(&item.name);
                self.known.have.insert(item.name, item.hash);
            }
        }
        for name in sent.removes {
            // One that cannot be removed is not asked for again and again.
            self.known.have.remove(&name);
        }
    }

    async fn send(&self, message: hub_message::Message) -> Result<(), Status> {
        let message = HubMessage { message: Some(message) };
        let sent = timeout(ANSWER, self.outgoing.send(Ok(message))).await;
        match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Status::unavailable("the agent is gone")),
            Err(_) => Err(Status::deadline_exceeded("the agent does not take what it is sent")),
        }
    }
}
