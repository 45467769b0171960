//! The protocol between the hub and the agents, generated from `proto/link.proto`, where it is described; and what both
//! sides compute in the same way.

use std::fmt::Write as _;
use std::time::Duration;

use sha2::{Digest, Sha256};

#[allow(
    missing_docs,
    unreachable_pub,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]
mod generated {
    tonic::include_proto!("stsbackup.link.v1");
}

pub use self::generated::*;

/// The version of the protocol that this program speaks.
pub const PROTOCOL: u32 = 1;

/// The largest message, bytes.
pub const MAX_MESSAGE: usize = 1 << 20;

/// The longest pause between two tries of an agent to connect.
const LONGEST_PAUSE: Duration = Duration::from_mins(2);

/// How long an agent waits after so many failures to connect in a row: anything up to a second, doubled with each failure up
/// to two minutes, by `luck` (0 to 1). The agents of a fleet do not come back all at once.
#[must_use]
pub fn reconnect_pause(failures: u32, luck: f64) -> Duration {
    Duration::from_secs(1 << failures.min(7)).min(LONGEST_PAUSE).mul_f64(luck)
}

/// The hash of a policy's body.
#[must_use]
pub fn body_hash(body: &[u8]) -> Vec<u8> {
    Sha256::digest(body).to_vec()
}

/// The hash of a set of policies, by names and hashes that are sorted by name.
#[must_use]
pub fn set_hash<'a>(items: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Vec<u8> {
    let mut hasher = Sha256::new();
    for (name, hash) in items {
        // No name has a line break.
        hasher.update(name);
        hasher.update(b"\n");
        hasher.update(hash);
    }
    hasher.finalize().to_vec()
}

/// The hash of what is told of a cluster's objects: of each its kind, namespace and name, and the hash of its body, sorted by
/// these.
#[must_use]
pub fn state_hash<'a>(objects: impl IntoIterator<Item = ([&'a str; 3], &'a [u8])>) -> Vec<u8> {
    let mut hasher = Sha256::new();
    for (key, hash) in objects {
        for part in key {
            // None of them has a line break.
            hasher.update(part);
            hasher.update(b"\n");
        }
        hasher.update(hash);
    }
    hasher.finalize().to_vec()
}

/// A hash for people, shortened.
#[must_use]
pub fn short(hash: &[u8]) -> String {
    hash.iter().take(6).fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_spread() {
        assert_eq!(reconnect_pause(0, 1.0), Duration::from_secs(1));
        assert_eq!(reconnect_pause(3, 0.5), Duration::from_secs(4));
        assert_eq!(reconnect_pause(100, 1.0), LONGEST_PAUSE);
        assert_eq!(reconnect_pause(100, 0.0), Duration::ZERO);
    }
}
