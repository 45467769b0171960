//! The agent: turns `StatefulSetBackup` and `StatefulSetRestore` objects of its own cluster into CSI
//! snapshots and back.
//!
//! It may depend on `sts-backup-api`, never on the hub: the two meet only in the link protocol.

pub mod hooks;
