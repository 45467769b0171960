//! Tests of the ground that all other end-to-end tests stand on: the clusters, the storage and the kit.
//!
//! They are fast and need no agent and no hub. `cargo e2e test` makes the clusters and runs them.

mod clusters;
mod conformance;
mod faults;
mod hooks;
mod snapshots;
mod topology;
