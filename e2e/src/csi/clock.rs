//! The driver's only look at the wall clock; everything else gets the time as an argument.

use jiff::Timestamp;

/// The present moment.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the driver's one clock")]
pub(super) fn now() -> Timestamp {
    Timestamp::now()
}
