//! The test kit: what a test on a real cluster needs to say what it means and nothing else.
//!
//! A test connects to a [`Cluster`], works inside [`with_temp_namespace`] and waits for states of the API,
//! never for time to pass: [`condition`] watches. [`Postgres`] and [`WriteLoad`] give it a database whose
//! committed rows are known, so that "nothing was lost" is a number to compare.
//!
//! The kit only uses a cluster: it neither makes nor changes one (the harness does), and it knows nothing of
//! the agent or the hub.

pub mod claim;
pub mod class;
pub mod cluster;
pub mod condition;
pub mod exec;
pub mod load;
pub mod namespace;
pub mod postgres;
mod report;
pub mod shell;
pub mod snapshot;

pub use cluster::Cluster;
pub use load::WriteLoad;
pub use namespace::{Namespace, with_temp_namespace};
pub use postgres::Postgres;
