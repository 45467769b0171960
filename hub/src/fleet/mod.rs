//! The fleet: its clusters, what is placed on each, and which of them are connected. In memory as a whole, and in the store.
//!
//! It decides who is let in, and which revision a cluster has ([`place`] says of what); how that gets there is the
//! [`link`](crate::link)'s.

mod cluster;
pub mod place;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dashmap::{DashMap, DashSet};
use jiff::Timestamp;
use serde_json::json;
use sts_backup_api::identity::ClusterId;
use sts_backup_api::link::{Applied, Hello, applied::Outcome, short};
use sts_backup_service::telemetry::chain;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use uuid::Uuid;

use self::cluster::lock;
pub use self::cluster::{AgentInfo, AppliedInfo, Begun, Cluster, End, RejectedInfo, Session, State};
use crate::policies::PolicySet;
use crate::store::{AgentRow, ClusterRow, Store, StoreError};

/// So many agents a second come back to a hub that was lost: one core stands about 600, as `cargo e2e bench fleet` measures
/// them (`agents` by `connect_s`).
const ADMITTED: u32 = 500;

/// How many reports of agents are taken apart and written at once: what the memory for them is bounded by.
const REPORTS: usize = 512;

/// So many clusters get their new revisions at once: they are told while those of the next ones are written.
const PLACED: usize = 1000;

/// For how long it is collected what agents say of themselves: thousands may come back at once.
const NOTES: Duration = Duration::from_secs(1);

/// After which time it is tried again to write that.
const NOTES_RETRY: Duration = Duration::from_secs(10);

/// Why something is refused.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// There is no such cluster.
    #[error("there is no cluster {0}: see clusters list")]
    Unknown(String),
    /// The name is one already.
    #[error("a cluster has the name {0} already: write another one, or remove that cluster")]
    NameTaken(String),
    /// The id is one already.
    #[error("a cluster has the id {0} already: leave it out to have a new one")]
    IdTaken(ClusterId),
    /// Nobody can have this name or label.
    #[error(
        "{what} {text:?} cannot be used: write at most 63 letters, digits, -, _ and ., such as {example}"
    )]
    Text {
        /// What it is.
        what: &'static str,
        /// What was written.
        text: String,
        /// What can be.
        example: &'static str,
    },
    /// Its agent holds nothing back.
    #[error("the agent of {0} holds nothing back: there is nothing to confirm")]
    NothingHeld(String),
    /// The store does not take it.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a cluster is not let in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It is not known.
    #[error("the cluster {0} is not known here: add it with `clusters add NAME --id {0}`")]
    Unknown(ClusterId),
    /// It is revoked.
    #[error(
        "the cluster {0} was revoked at {1}: remove it and add it again with a new certificate to let it in"
    )]
    Revoked(String, Timestamp),
}

/// The policies in use, and what became of the newest files.
#[derive(Clone, Debug, Default)]
pub struct PoliciesState {
    /// The last good set; none: the files have never been good since the hub began.
    pub set: Option<Arc<PolicySet>>,
    /// When it was read.
    pub read: Option<Timestamp>,
    /// Why what is there now is not used.
    pub error: Option<String>,
}

/// All clusters.
#[derive(Debug)]
pub struct Fleet {
    /// What is remembered.
    pub store: Store,
    clusters: DashMap<ClusterId, Arc<Cluster>>,
    policies: Mutex<PoliciesState>,
    /// One placement at a time: a revision belongs to one set.
    placing: tokio::sync::Mutex<()>,
    /// Clusters whose agents have said something of themselves that is not written yet.
    noted: DashSet<ClusterId>,
    has_noted: Notify,
    /// Whose turn it is to have a report written.
    pub reporting: Semaphore,
    /// The hub ends.
    pub draining: CancellationToken,
}

impl Fleet {
    /// The fleet as the store remembers it.
    ///
    /// # Errors
    /// If it cannot be read.
    pub async fn open(store: Store) -> Result<Self, StoreError> {
        let rows = store.clusters().await?.into_iter();
        let clusters = rows.map(|row| (row.id, Arc::new(Cluster::of(row)))).collect();
        Ok(Self {
            store,
            clusters,
            policies: Mutex::default(),
            placing: tokio::sync::Mutex::default(),
            noted: DashSet::new(),
            has_noted: Notify::new(),
            reporting: Semaphore::new(REPORTS),
            draining: CancellationToken::new(),
        })
    }

    /// All clusters, by name.
    #[must_use]
    pub fn clusters(&self) -> BTreeMap<String, Arc<Cluster>> {
        self.clusters.iter().map(|entry| (entry.name(), Arc::clone(entry.value()))).collect()
    }

    /// The cluster of this name.
    ///
    /// # Errors
    /// If there is none.
    pub fn named(&self, name: &str) -> Result<Arc<Cluster>, FleetError> {
        let found = self
            .clusters
            .iter()
            .find(|entry| lock(&entry.state).name == name)
            .map(|entry| Arc::clone(entry.value()));
        found.ok_or_else(|| FleetError::Unknown(name.to_owned()))
    }

    /// Over how long its agents are to come back after the hub was lost.
    #[must_use]
    pub fn spread(&self) -> Duration {
        let clusters = u32::try_from(self.clusters.len()).unwrap_or(u32::MAX);
        Duration::from_secs(clusters.into()) / ADMITTED
    }

    /// The policies in use.
    #[must_use]
    pub fn policies(&self) -> PoliciesState {
        lock(&self.policies).clone()
    }

    /// The newest files cannot be used: what was in use stays.
    pub fn policies_are_bad(&self, error: String) {
        lock(&self.policies).error = Some(error);
    }

    /// Places these policies on the clusters that they select.
    ///
    /// # Errors
    /// If new revisions cannot be written: then each cluster of which that is so has what it had.
    pub async fn use_policies(&self, set: PolicySet, now: Timestamp) -> Result<(), StoreError> {
        let _one_at_a_time = self.placing.lock().await;
        let set = Arc::new(set);
        *lock(&self.policies) = PoliciesState { set: Some(Arc::clone(&set)), read: Some(now), error: None };
        let clusters: Vec<_> = self.clusters.iter().map(|entry| Arc::clone(entry.value())).collect();
        self.place(&clusters, &set).await
    }

    /// Gives those of these clusters a new revision for which there is one.
    async fn place(&self, clusters: &[Arc<Cluster>], set: &PolicySet) -> Result<(), StoreError> {
        for clusters in clusters.chunks(PLACED) {
            let next = clusters.iter().filter_map(|cluster| Some((cluster, cluster.next(set)?)));
            let (changed, placements): (Vec<_>, Vec<_>) = next.unzip();
            if changed.is_empty() {
                continue;
            }
            self.store.place(placements.clone()).await?;
            for (cluster, placement) in changed.into_iter().zip(placements) {
                cluster.place(placement);
            }
        }
        Ok(())
    }

    async fn place_again(&self, cluster: Arc<Cluster>) -> Result<(), StoreError> {
        let _one_at_a_time = self.placing.lock().await;
        let Some(set) = self.policies().set else { return Ok(()) };
        self.place(&[cluster], &set).await
    }

    /// Adds a cluster.
    ///
    /// # Errors
    /// If its name or id is another one's or cannot be used, or it cannot be written.
    pub async fn add(
        &self,
        id: ClusterId,
        name: &str,
        labels: BTreeMap<String, String>,
        now: Timestamp,
    ) -> Result<(), FleetError> {
        check_name(name)?;
        check_labels(&labels)?;
        if self.named(name).is_ok() {
            return Err(FleetError::NameTaken(name.to_owned()));
        }
        if self.clusters.contains_key(&id) {
            return Err(FleetError::IdTaken(id));
        }
        self.store.add_cluster(id, name, &labels, now).await?;
        let row = ClusterRow {
            id,
            name: name.to_owned(),
            labels,
            added: now,
            revoked: None,
            revision: 0,
            confirmed: 0,
            hello: None,
            applied: None,
            seen: None,
            placed: BTreeMap::new(),
        };
        let cluster = Arc::new(Cluster::of(row));
        self.clusters.insert(id, Arc::clone(&cluster));
        info!(cluster = name, %id, "cluster added");
        Ok(self.place_again(cluster).await?)
    }

    /// Changes labels of a cluster: sets some, takes others away.
    ///
    /// # Errors
    /// If there is no such cluster, or they cannot be used or written.
    pub async fn label(
        &self,
        name: &str,
        changes: &BTreeMap<String, Option<String>>,
        now: Timestamp,
    ) -> Result<BTreeMap<String, String>, FleetError> {
        let cluster = self.named(name)?;
        let mut labels = cluster.state().labels;
        for (key, value) in changes {
            match value {
                Some(value) => labels.insert(key.clone(), value.clone()),
                None => labels.remove(key),
            };
        }
        check_labels(&labels)?;
        self.store.label_cluster(cluster.id, name, &labels, now).await?;
        lock(&cluster.state).labels.clone_from(&labels);
        info!(cluster = name, ?labels, "cluster labelled");
        self.place_again(cluster).await?;
        Ok(labels)
    }

    /// Lets a cluster in no more, and ends its session.
    ///
    /// # Errors
    /// If there is no such cluster, or it cannot be written.
    pub async fn revoke(&self, name: &str, now: Timestamp) -> Result<(), FleetError> {
        let cluster = self.named(name)?;
        self.store.revoke_cluster(cluster.id, name, now).await?;
        let session = {
            let mut state = lock(&cluster.state);
            state.revoked = Some(now);
            state.session.take()
        };
        if let Some(session) = session {
            session.end.send_replace(Some(End::Revoked));
        }
        warn!(cluster = name, id = %cluster.id, "cluster revoked");
        Ok(())
    }

    /// Forgets a cluster and all that it reported. What it has, stays there.
    ///
    /// # Errors
    /// If there is no such cluster, or it cannot be written.
    pub async fn remove(&self, name: &str, now: Timestamp) -> Result<(), FleetError> {
        let cluster = self.named(name)?;
        self.store.remove_cluster(cluster.id, name, now).await?;
        self.clusters.remove(&cluster.id);
        let session = {
            let mut state = lock(&cluster.state);
            // Whoever is about to begin a session finds that.
            state.revoked = Some(now);
            state.session.take()
        };
        if let Some(session) = session {
            session.end.send_replace(Some(End::Revoked));
        }
        warn!(cluster = name, id = %cluster.id, "cluster removed");
        Ok(())
    }

    /// Confirms what the agent of a cluster holds back: the revision that it holds, and no later one.
    ///
    /// # Errors
    /// If there is no such cluster, it holds nothing back, or it cannot be written.
    pub async fn confirm(&self, name: &str, now: Timestamp) -> Result<u64, FleetError> {
        let cluster = self.named(name)?;
        let state = cluster.state();
        let held =
            state.applied.filter(|applied| applied.outcome == HELD && applied.revision == state.revision);
        let Some(held) = held else { return Err(FleetError::NothingHeld(name.to_owned())) };
        self.store.confirm(cluster.id, name, held.revision, now).await?;
        lock(&cluster.state).confirmed = held.revision;
        cluster.changed.send_replace(());
        warn!(cluster = name, revision = held.revision, "what the agent holds back is confirmed");
        Ok(held.revision)
    }

    /// The cluster, if it is let in.
    ///
    /// # Errors
    /// If it is not.
    pub fn admit(&self, id: ClusterId) -> Result<Arc<Cluster>, Refusal> {
        let cluster = self.clusters.get(&id).map(|entry| Arc::clone(entry.value()));
        let cluster = cluster.ok_or(Refusal::Unknown(id))?;
        let state = lock(&cluster.state);
        if let Some(revoked) = state.revoked {
            return Err(Refusal::Revoked(state.name.clone(), revoked));
        }
        drop(state);
        Ok(cluster)
    }

    /// Begins a session, which takes the place of an older one. Of a cluster that is let in no more it ends at once.
    pub fn begin(&self, cluster: &Cluster, hello: &Hello, address: SocketAddr, now: Timestamp) -> Begun {
        let agent = AgentInfo {
            agent_version: hello.agent_version.clone(),
            kubernetes_version: hello.kubernetes_version.clone(),
            instance_id: hello.instance_id.clone(),
            clock_offset_ms: hello.wall_clock_ms.saturating_sub(now.as_millisecond()),
        };
        let (end, ends) = watch::channel(None);
        let id = Uuid::new_v4();
        let session = Session { id, address, since: now, end };
        let (older, flapping) = {
            let mut state = lock(&cluster.state);
            (state.begin(session, agent, now), state.is_flapping())
        };
        self.note(cluster);
        let name = cluster.name();
        if let Some(older) = older {
            info!(cluster = name, old = %older.address, new = %address, "a newer connection takes the place of an older one");
            older.end.send_replace(Some(End::Replaced));
        }
        if flapping {
            warn!(
                cluster = name, %address,
                "two agents connect as one cluster: one of them has the other's certificate; revoke it, and issue new ones"
            );
        }
        Begun { id, end: ends, changed: cluster.changed.subscribe() }
    }

    /// Ends a session, if no other has taken its place.
    pub fn end(&self, cluster: &Cluster, id: Uuid) {
        let ended = lock(&cluster.state).session.take_if(|session| session.id == id);
        if ended.is_some() {
            self.note(cluster);
        }
    }

    /// Something came from a cluster; false: not from its present session.
    #[must_use]
    pub fn is_heard(&self, cluster: &Cluster, session: Uuid, now: Timestamp) -> bool {
        let is_it = cluster.is_session(session);
        if is_it {
            lock(&cluster.state).seen = Some(now);
        }
        is_it
    }

    /// Notes what an agent has made of what it was sent.
    pub fn applied(&self, cluster: &Cluster, applied: &Applied, now: Timestamp) {
        let outcome = match applied.outcome() {
            Outcome::Active => ACTIVE,
            Outcome::Held => HELD,
            Outcome::Retrying | Outcome::Unspecified => RETRYING,
        };
        let rejected = applied.items.iter().map(|item| {
            (item.name.clone(), RejectedInfo { code: item.code.clone(), detail: item.detail.clone() })
        });
        let info = AppliedInfo {
            revision: applied.revision,
            outcome: outcome.to_owned(),
            detail: applied.detail.clone(),
            rejected: rejected.collect(),
            at: now,
        };
        let name = cluster.name();
        let hash = short(&applied.set_hash);
        if outcome == HELD {
            warn!(
                cluster = name,
                revision = info.revision,
                set = hash,
                why = info.detail,
                "the agent holds back what it was sent"
            );
        } else {
            // Of a change for all there are as many as clusters.
            debug!(
                cluster = name,
                revision = info.revision,
                set = hash,
                outcome,
                "what the agent has applied"
            );
        }
        for (policy, RejectedInfo { code, detail }) in &info.rejected {
            warn!(cluster = name, policy, code, detail, "the agent does not take a policy");
        }
        lock(&cluster.state).applied = Some(info);
        self.note(cluster);
    }

    /// What its agent said is to be written. That may be lost: it says so again.
    fn note(&self, cluster: &Cluster) {
        self.noted.insert(cluster.id);
        self.has_noted.notify_one();
    }

    /// Writes what agents say of themselves, all of a second at once, for as long as it is polled.
    pub async fn write_notes_as_they_come(&self) {
        loop {
            self.has_noted.notified().await;
            sleep(NOTES).await;
            if let Err(error) = self.write_notes().await {
                warn!(error = %chain(&error), "what agents say of themselves cannot be written: it is tried again");
                sleep(NOTES_RETRY).await;
            }
        }
    }

    /// Writes what agents have said of themselves and is not written yet.
    ///
    /// # Errors
    /// If it cannot be written: then it still has to be.
    pub async fn write_notes(&self) -> Result<(), StoreError> {
        let noted: Vec<_> = self.noted.iter().map(|id| *id).collect();
        let noted = noted.into_iter().filter_map(|id| self.noted.remove(&id));
        let noted: Vec<_> =
            noted.filter_map(|id| Some(Arc::clone(self.clusters.get(&id)?.value()))).collect();
        if noted.is_empty() {
            return Ok(());
        }
        let rows = noted.iter().map(|cluster| {
            let state = lock(&cluster.state);
            AgentRow {
                cluster: cluster.id,
                hello: state.agent.as_ref().map(|agent| json!(agent).to_string()),
                applied: state.applied.as_ref().map(|applied| json!(applied).to_string()),
                seen: state.seen,
            }
        });
        let written = self.store.note_agents(rows.collect()).await;
        if written.is_err() {
            for cluster in &noted {
                self.note(cluster);
            }
        }
        written
    }
}

/// All of it is active, but for what is rejected.
pub const ACTIVE: &str = "Active";
/// None of it is, until somebody confirms it.
pub const HELD: &str = "Held";
/// The agent tries again.
pub const RETRYING: &str = "Retrying";

fn is_word(text: &str) -> bool {
    let inside = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    text.len() <= 63 && text.bytes().all(inside) && edge(bytes.first()) && edge(bytes.last())
}

fn check_name(name: &str) -> Result<(), FleetError> {
    let refused = || FleetError::Text { what: "the name", text: name.to_owned(), example: "prod-eu-1" };
    is_word(name).then_some(()).ok_or_else(refused)
}

/// As Kubernetes has labels, for policies select clusters as they select all else.
fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), FleetError> {
    for (key, value) in labels {
        let (prefix, name) =
            key.rsplit_once('/').map_or((None, &**key), |(prefix, name)| (Some(prefix), name));
        let is_prefix = |prefix: &str| prefix.len() <= 253 && prefix.split('.').all(is_word);
        if !is_word(name) || !prefix.is_none_or(is_prefix) {
            return Err(FleetError::Text { what: "the label", text: key.clone(), example: "env=production" });
        }
        if !value.is_empty() && !is_word(value) {
            return Err(FleetError::Text {
                what: "the label's value",
                text: value.clone(),
                example: "production",
            });
        }
    }
    Ok(())
}
