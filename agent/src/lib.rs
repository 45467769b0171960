//! The agent: turns `StatefulSetBackup` and `StatefulSetRestore` objects of its own cluster into CSI
//! snapshots and back.
//!
//! It may depend on `sts-backup-api`, never on the hub: the two meet only in the link protocol.
//!
//! [`app`] puts the parts together: [`config`] is what the agent is told, [`telemetry`] how it logs, [`metrics`]
//! what it shows over HTTP, [`lease`] which replica acts, and [`clock`] the only place that asks for the time.

pub mod app;
pub mod clock;
pub mod config;
pub mod lease;
pub mod metrics;
pub mod telemetry;
