//! The hub: reads fleet policies from config files, hands them to the agents of all clusters and shows the
//! state of the fleet.
//!
//! It may depend on `sts-backup-api`, never on the agent: the two meet only in the link protocol.
//!
//! [`app`] puts the parts together. [`policies`] reads files, [`fleet`] knows which cluster is to have what and how it is,
//! [`link`] speaks with agents, [`store`] remembers, [`api`] answers people and programs, and
//! [`client`] is the commands that ask it. [`pki`] makes certificates.

pub mod api;
pub mod app;
pub mod client;
pub mod config;
pub mod fleet;
pub mod link;
pub mod metrics;
pub mod pki;
pub mod policies;
pub mod store;
