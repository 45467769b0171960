//! One cluster: what is known of it, and its connection.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sts_backup_api::identity::ClusterId;
use sts_backup_api::link::Desired;
use tokio::sync::watch;
use uuid::Uuid;

use super::place::{self, Known};
use crate::policies::PolicySet;
use crate::store::{ClusterRow, Placed, Placement};

/// An agent whose place another one takes this soon fights with somebody: both come again after two minutes at most.
const FLAPPING: Duration = Duration::from_mins(5);

/// How often in a row one agent takes another one's place before that is told.
const FLAPS: u32 = 3;

/// Why a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A newer connection has taken its place.
    Replaced,
    /// The cluster is let in no more.
    Revoked,
}

/// What an agent said of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentInfo {
    /// Its version.
    pub agent_version: String,
    /// That of its cluster.
    pub kubernetes_version: String,
    /// One life of one agent.
    pub instance_id: String,
    /// How far its clock is ahead of the hub's, milliseconds.
    pub clock_offset_ms: i64,
}

/// What an agent has made of what it was sent.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AppliedInfo {
    /// The revision that it speaks of.
    pub revision: u64,
    /// Active, Held or Retrying.
    pub outcome: String,
    /// Why it is held.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// What it does not take, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rejected: BTreeMap<String, RejectedInfo>,
    /// When it said so.
    pub at: Timestamp,
}

/// Why a policy is not active as it was sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RejectedInfo {
    /// A word for programs.
    pub code: String,
    /// A sentence for people.
    pub detail: String,
}

/// A cluster.
#[derive(Debug)]
pub struct Cluster {
    /// Its id.
    pub id: ClusterId,
    pub(super) state: Mutex<State>,
    pub(super) changed: watch::Sender<()>,
}

/// What is known of a cluster.
#[derive(Clone, Debug)]
pub struct State {
    /// What people call it.
    pub name: String,
    /// What policies select it by.
    pub labels: BTreeMap<String, String>,
    /// When it was added.
    pub added: Timestamp,
    /// From when on it is refused.
    pub revoked: Option<Timestamp>,
    /// Of what is placed on it.
    pub revision: u64,
    /// Up to which revision somebody has confirmed what its agent holds back.
    pub confirmed: u64,
    /// What is placed on it.
    pub placed: Placed,
    /// What its agent said of itself.
    pub agent: Option<AgentInfo>,
    /// What its agent has applied.
    pub applied: Option<AppliedInfo>,
    /// When it was last heard of.
    pub seen: Option<Timestamp>,
    /// Its connection; none: it is unknown how it is since it was last seen.
    pub session: Option<Session>,
    /// How often one agent has replaced another one in a row.
    flaps: u32,
}

impl State {
    /// A session begins, and takes the place of the one that it returns. Of a cluster that is revoked it ends at once.
    pub(super) fn begin(&mut self, session: Session, agent: AgentInfo, now: Timestamp) -> Option<Session> {
        if self.revoked.is_some() {
            // While it said who it is.
            session.end.send_replace(Some(End::Revoked));
        }
        let older = self.session.replace(session);
        let is_another = self.agent.as_ref().is_some_and(|before| before.instance_id != agent.instance_id);
        let fights = older.as_ref().is_some_and(|older| {
            let age = Duration::try_from(now.duration_since(older.since)).unwrap_or_default();
            is_another && age < FLAPPING
        });
        self.flaps = if fights { self.flaps.saturating_add(1) } else { 0 };
        self.agent = Some(agent);
        self.seen = Some(now);
        older
    }

    /// Whether two agents connect as this cluster.
    #[must_use]
    pub fn is_flapping(&self) -> bool {
        self.flaps >= FLAPS
    }
}

/// A connection of a cluster.
#[derive(Clone, Debug)]
pub struct Session {
    /// Its own id.
    pub id: Uuid,
    /// Where the agent connects from.
    pub address: SocketAddr,
    /// Since when.
    pub since: Timestamp,
    pub(super) end: watch::Sender<Option<End>>,
}

/// What a new session works with.
#[derive(Debug)]
pub struct Begun {
    /// Its id.
    pub id: Uuid,
    /// Why it has to end.
    pub end: watch::Receiver<Option<End>>,
    /// Something of the cluster has changed.
    pub changed: watch::Receiver<()>,
}

impl Cluster {
    pub(super) fn of(row: ClusterRow) -> Self {
        let parsed = |value: Option<Value>| value.and_then(|value| serde_json::from_value(value).ok());
        let agent = row.hello.and_then(|hello| serde_json::from_value(hello).ok());
        let applied = row.applied;
        let state = State {
            name: row.name,
            labels: row.labels,
            added: row.added,
            revoked: row.revoked,
            revision: row.revision,
            confirmed: row.confirmed,
            placed: row.placed,
            agent,
            applied: parsed(applied),
            seen: row.seen,
            session: None,
            flaps: 0,
        };
        Self { id: row.id, state: Mutex::new(state), changed: watch::Sender::new(()) }
    }

    /// All that is known of it now.
    #[must_use]
    pub fn state(&self) -> State {
        lock(&self.state).clone()
    }

    /// What people call it.
    #[must_use]
    pub fn name(&self) -> String {
        lock(&self.state).name.clone()
    }

    /// Its next revision, if these policies are not what is placed on it.
    pub(super) fn next(&self, set: &PolicySet) -> Option<Placement> {
        let state = lock(&self.state);
        let placed = place::next(&state.placed, set.of_cluster(&state.labels))?;
        Some(Placement { cluster: self.id, revision: state.revision + 1, placed })
    }

    /// Has a revision, which is written, and tells its session.
    pub(super) fn place(&self, placement: Placement) {
        let Placement { revision, placed, cluster: _ } = placement;
        {
            let mut state = lock(&self.state);
            (state.revision, state.placed) = (revision, placed);
        }
        self.changed.send_replace(());
    }

    /// What its agent, which knows this, is sent next.
    #[must_use]
    pub fn offer(&self, known: &Known) -> Option<Desired> {
        let state = lock(&self.state);
        place::offer(&state.placed, known, state.revision, state.confirmed)
    }

    /// Whether it is known what its agent has made of a revision.
    #[must_use]
    pub fn has_answer_to(&self, revision: u64) -> bool {
        lock(&self.state).applied.as_ref().is_some_and(|applied| applied.revision == revision)
    }

    pub(super) fn is_session(&self, id: Uuid) -> bool {
        lock(&self.state).session.as_ref().is_some_and(|session| session.id == id)
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
