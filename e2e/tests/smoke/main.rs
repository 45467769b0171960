//! Tests of the ground that all other end-to-end tests stand on: the clusters, the storage and the kit.
//!
//! They are fast, and `cargo e2e test` makes the clusters and runs them. Of the agent they only ask that it runs.

mod admission;
mod agent;
mod backup_api;
mod backups;
mod backups_faults;
mod backups_hooks;
mod backups_preflight;
mod backups_runs;
mod chart;
mod clusters;
mod conformance;
mod crashes;
mod faults;
mod hooks;
mod plugin;
mod policies;
mod proxy;
mod snapshots;
mod topology;
