//! Simulated agents, thousands in one process: each speaks the link's protocol over a connection of its own, with a
//! certificate of its own, and comes back by the agent's rule. Behind them is no cluster: what the hub wants counts as applied
//! at once, and what they report is made up. For benches and tests of a hub that has more clusters than one machine can run.
//!
//! [`agent`] is one of them, [`crowd`] all of a process; a test holds that process by [`SimulatedAgents`].

mod agent;
pub mod crowd;
mod process;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sts_backup_api::identity::ClusterId;
use uuid::Uuid;

pub use self::process::SimulatedAgents;

/// The cluster that the agent of this number speaks for.
#[must_use]
pub fn cluster_id(number: usize) -> ClusterId {
    ClusterId::new(Uuid::from_u128(1 + number as u128))
}

/// What the process is asked, one line of JSON each; it answers with a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Answer once so many are connected.
    AwaitConnected(usize),
    /// From now on count who gets policies.
    CountApplied,
    /// Answer once all have got some since then.
    AwaitApplied,
    /// Let each report so many backups, all of them changed; answer once the hub has acknowledged all.
    Report(usize),
}

/// The answer to an order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// When what was asked for had come about: for half of the agents, for 99 of 100, for all. Where only the end counts,
    /// all three are that.
    pub half: Timestamp,
    /// See above.
    pub nearly_all: Timestamp,
    /// See above.
    pub all: Timestamp,
}
