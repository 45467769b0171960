//! The hub: reads fleet policies from config files, hands them to the agents of all clusters and shows the
//! state of the fleet.
//!
//! It may depend on `sts-backup-api`, never on the agent: the two meet only in the link protocol.

pub mod clock;
pub mod pki;
pub mod policies;
