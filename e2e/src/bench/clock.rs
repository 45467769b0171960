//! The clock that the benches compare times of the agent and of the storage with: all are of this machine.

use jiff::Timestamp;

/// What time it is.
#[expect(clippy::disallowed_methods, reason = "this is the clock module of the benches")]
pub(super) fn now() -> Timestamp {
    Timestamp::now()
}
