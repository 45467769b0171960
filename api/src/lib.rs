//! What all parts of sts-backup share: the types of its API and their pure meaning.
//!
//! No IO happens here, and no clock is asked: time is always an argument.

pub mod backup;
pub mod conditions;
pub mod coverage;
pub mod fleet;
pub mod identity;
pub mod link;
pub mod names;
pub mod points;
pub mod policy;
pub mod report;
pub mod restore;
pub mod run;
pub mod schedule;
pub mod snapshot;
pub mod swap;
