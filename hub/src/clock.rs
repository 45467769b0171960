//! The hub's only look at a clock; everything else gets the time as an argument.

use jiff::Timestamp;

/// The present moment, by the machine's wall clock.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the hub's one clock")]
pub fn now() -> Timestamp {
    Timestamp::now()
}
