//! The program's only look at a clock; everything else gets the time as an argument, or asks here.
//!
//! Two clocks answer two questions and never mix: [`now`] names moments for people and for objects, and may
//! jump; [`monotonic`] measures spans, and only goes forward.

#[cfg(feature = "failpoints")]
use std::sync::LazyLock;

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

/// The present moment, by the machine's wall clock.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the one clock")]
pub fn now() -> Timestamp {
    Timestamp::now() + ahead()
}

/// With the feature `failpoints`, how far the clock is set ahead by the environment's `CLOCK_AHEAD_SECONDS`: for tests in
/// which days must pass.
fn ahead() -> SignedDuration {
    #[cfg(feature = "failpoints")]
    {
        static AHEAD: LazyLock<i64> = LazyLock::new(|| {
            std::env::var("CLOCK_AHEAD_SECONDS").ok().and_then(|ahead| ahead.parse().ok()).unwrap_or(0)
        });
        SignedDuration::from_secs(*AHEAD)
    }
    #[cfg(not(feature = "failpoints"))]
    SignedDuration::ZERO
}

/// A point on the monotonic clock, which tests can stop.
///
/// It goes on while the process is stopped, but not while the whole machine sleeps: who resumes after that finds
/// out by the resource version of what it writes.
#[must_use]
pub fn monotonic() -> Instant {
    Instant::now()
}
