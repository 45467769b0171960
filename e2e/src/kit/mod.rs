//! The test kit: what a test on a real cluster needs to say what it means and nothing else.
//!
//! A test connects to a [`Cluster`], works inside [`with_temp_namespace`] and waits for states of the API,
//! never for time to pass: [`condition`](crate::condition) watches. [`Postgres`] and [`WriteLoad`] give it a
//! database whose committed rows are known, so that "nothing was lost" is a number to compare.
//!
//! An [`Agent`](agent::Agent) runs in a cluster, installed by [`helm`]; a
//! [`LocalAgent`](local_agent::LocalAgent) is a process of the test, which can crash or pause it, and make its API
//! server fail by an [`ApiProxy`](proxy::ApiProxy).
//!
//! The kit only uses a cluster: it neither makes nor changes one (the harness does).

pub mod agent;
mod app;
pub mod backend;
mod backup;
pub mod claim;
pub mod class;
mod cluster;
mod columns;
pub mod crds;
pub mod drill;
pub mod exec;
pub mod helm;
pub mod hooks;
pub mod hub;
mod load;
pub mod local_agent;
pub mod local_hub;
pub mod manifest;
mod namespace;
pub mod partition;
pub mod pod;
pub mod policy;
pub mod poll;
mod postgres;
pub mod proxy;
mod redis;
mod report;
pub mod restore;
pub mod restore_drill;
pub mod shell;
pub mod snapshot;
pub mod snapshot_controller;
pub mod tcp_proxy;
pub mod trace;
mod user;
mod volumes;

pub use app::App;
pub use backup::Backup;
pub use cluster::Cluster;
pub use load::WriteLoad;
pub use namespace::{Namespace, with_temp_namespace, with_temp_namespaces};
pub use policy::Policy;
pub use postgres::{Postgres, Rows};
pub use redis::Redis;
pub use restore::Restore;
pub use restore_drill::RestoreDrill;
pub use user::User;
pub use volumes::Volumes;
