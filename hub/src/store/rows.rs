//! What the store takes and gives.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use serde_json::Value;
use sts_backup_api::identity::ClusterId;

/// A policy's spec as it is handed out, and its hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Body {
    /// SHA-256 of the JSON.
    pub hash: Vec<u8>,
    /// The spec of a `StatefulSetBackupPolicy`.
    pub json: Arc<[u8]>,
}

/// The policies of a cluster by name; none: a tombstone.
pub type Placed = BTreeMap<String, Option<Body>>;

/// A new revision of what is placed on a cluster.
#[derive(Clone, Debug)]
pub struct Placement {
    /// The cluster.
    pub cluster: ClusterId,
    /// The revision.
    pub revision: u64,
    /// What is placed on it.
    pub placed: Placed,
}

/// A cluster, as it is remembered.
#[derive(Clone, Debug)]
pub struct ClusterRow {
    /// Its id.
    pub id: ClusterId,
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
    /// Up to which revision somebody has confirmed what agents hold back.
    pub confirmed: u64,
    /// What its agent said of itself, as JSON.
    pub hello: Option<Value>,
    /// What its agent has applied, as JSON.
    pub applied: Option<Value>,
    /// When it was last heard of.
    pub seen: Option<Timestamp>,
    /// What is placed on it.
    pub placed: Placed,
}

/// What a cluster's agent said last.
#[derive(Clone, Debug)]
pub struct AgentRow {
    /// The cluster.
    pub cluster: ClusterId,
    /// Of itself, as JSON.
    pub hello: Option<String>,
    /// Of what it has applied, as JSON.
    pub applied: Option<String>,
    /// When.
    pub seen: Option<Timestamp>,
}

/// A report of a cluster on some objects.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// What they are like now.
    pub objects: Vec<ObjectRow>,
    /// Those that are gone.
    pub gone: Vec<ObjectKey>,
    /// What has ended of them.
    pub history: Vec<HistoryRow>,
}

/// Which object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Its kind.
    pub kind: String,
    /// Its namespace; empty: none.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// An object.
#[derive(Clone, Debug)]
pub struct ObjectRow {
    /// Which.
    pub key: ObjectKey,
    /// Its summary, as JSON.
    pub body: String,
    /// The hash of what its cluster told of it, which is more than the summary.
    pub hash: Vec<u8>,
}

/// What has ended: a run of a backup, or a restore.
#[derive(Clone, Debug)]
pub struct HistoryRow {
    /// The object that it belongs to.
    pub key: ObjectKey,
    /// That object's uid.
    pub uid: String,
    /// The run's id; of a restore its uid.
    pub run: String,
    /// When it began.
    pub started: Timestamp,
    /// How it ended.
    pub result: String,
    /// All of it, as JSON.
    pub body: String,
}
