//! The agent's only look at a clock; everything else gets the time as an argument, or asks here.
//!
//! Two clocks answer two questions and never mix: [`now`] names moments for people and for objects, and may
//! jump; [`monotonic`] measures spans, and only goes forward.

use jiff::Timestamp;
use tokio::time::Instant;

/// The present moment, by the machine's wall clock.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the agent's one clock")]
pub fn now() -> Timestamp {
    Timestamp::now()
}

/// A point on the monotonic clock, which tests can stop.
///
/// It goes on while the process is stopped, but not while the whole machine sleeps: who resumes after that finds
/// out by the resource version of what it writes.
#[must_use]
pub fn monotonic() -> Instant {
    Instant::now()
}
