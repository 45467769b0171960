//! The protocol between the hub and the agents, generated from `proto/link.proto`, where it is described; and what both
//! sides compute in the same way.

use std::fmt::Write as _;

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

/// A hash for people, shortened.
#[must_use]
pub fn short(hash: &[u8]) -> String {
    hash.iter().take(6).fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
