//! The agent: turns the `StatefulSetBackup` objects of its own cluster into CSI snapshots.
//!
//! It may depend on `sts-backup-api`, never on the hub: the two meet only in the link protocol.
//!
//! [`app`] puts the parts together: [`config`] is what the agent is told, [`lease`] which replica acts.
//! `backup` is the controller of backups, [`hooks`] runs commands in pods for it. `policy` is the controller of
//! policies, which makes backups.
//! `link` is the link to a hub, where there is one.
//! [`plugin`] is another program: the commands of kubectl-stsbackup.

/// Names a boundary between two steps. With the feature `failpoints` the process ends there, as by SIGKILL, when
/// the environment says `FAILPOINTS=<name>=return`; without it this is nothing.
macro_rules! crash_point {
    ($name:literal) => {
        fail::fail_point!($name, |_| std::process::abort())
    };
}

pub mod app;
mod backup;
pub mod config;
mod error;
mod events;
pub mod hooks;
pub mod lease;
mod link;
mod occupancy;
pub mod plugin;
mod policy;
mod reconciler;
mod restore;
