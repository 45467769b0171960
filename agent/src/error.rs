//! What can go wrong between us and the API server, and what to do about it.

use std::time::Duration;

/// A request failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The API server did not do what it was asked.
    #[error("{operation}")]
    Request {
        /// What was asked, such as `list the Pods`.
        operation: &'static str,
        /// Its answer, or why there is none.
        #[source]
        source: kube::Error,
    },
    /// It took too long to answer.
    #[error("{operation}: the API server did not answer in time")]
    NoAnswer {
        /// What was asked.
        operation: &'static str,
    },
}

/// A result with our error.
pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Turns kube's error into ours.
    pub(crate) fn request(operation: &'static str) -> impl FnOnce(kube::Error) -> Self {
        move |source| Self::Request { operation, source }
    }

    /// The status code that the API server answered with.
    fn code(&self) -> Option<u16> {
        match self {
            Self::Request { source: kube::Error::Api(status), .. } => Some(status.code),
            Self::Request { .. } | Self::NoAnswer { .. } => None,
        }
    }

    /// Somebody else wrote meanwhile: look again.
    pub(crate) fn is_conflict(&self) -> bool {
        self.code() == Some(409)
    }

    /// The object is gone.
    pub(crate) fn is_not_found(&self) -> bool {
        self.code() == Some(404)
    }

    /// Whether the same request may succeed later without anybody changing anything: no answer, an overloaded or
    /// a failing server. What is refused for its content or for want of permission needs somebody.
    pub(crate) fn is_transient(&self) -> bool {
        self.code().is_none_or(|code| code >= 500 || code == 408 || code == 429)
    }

    /// The wait before the next try, after this many failed ones in a row.
    pub(crate) fn backoff(&self, failures: u32) -> Duration {
        if self.is_conflict() {
            return Duration::from_millis(50);
        }
        let longest = if self.is_transient() { Duration::from_secs(30) } else { Duration::from_mins(5) };
        (Duration::from_millis(250) * 2_u32.saturating_pow(failures.min(16))).min(longest)
    }
}
