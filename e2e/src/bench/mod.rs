//! Measurements on a real cluster, each against a control in the same run. A bench prints one line of JSON.
//!
//! Nothing here is a test: what is slow on a busy machine is slow, not wrong.

pub mod agent;
mod clock;
pub mod fleet;
pub mod freeze;
mod full_cluster;
pub mod restore;
mod usage;
