//! Who a cluster is: an id in a trust domain, and the SPIFFE id that its certificate carries.
//!
//! A SPIFFE id is compared whole. Whoever took a prefix for it would let one cluster speak for another.

use std::fmt::{self, Display, Formatter};
use std::str::FromStr;

use thiserror::Error;
use uuid::Uuid;

/// The longest name of a trust domain (SPIFFE-ID, section 2.1).
const LONGEST: usize = 255;

/// What is no identity.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum IdentityError {
    /// A trust domain cannot have this name.
    #[error(
        "{0:?} names no trust domain: write lower-case letters, digits, ., - and _, such as fleet.example.com"
    )]
    TrustDomain(String),
    /// It is no id of a cluster.
    #[error(
        "{0:?} is no cluster's id: write a UUID in lower case, such as 67e55044-10b1-426f-9247-bb680e5fe0c8"
    )]
    ClusterId(String),
}

/// The name of what all certificates of a fleet belong to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustDomain(String);

impl TrustDomain {
    /// Its own SPIFFE id, which its authority's certificate carries.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("spiffe://{self}")
    }

    /// The SPIFFE id of one of its clusters.
    #[must_use]
    pub fn cluster_uri(&self, cluster: ClusterId) -> String {
        format!("spiffe://{self}/cluster/{cluster}")
    }
}

impl Display for TrustDomain {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl FromStr for TrustDomain {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_".contains(&byte);
        if (1..=LONGEST).contains(&text.len()) && text.bytes().all(allowed) {
            Ok(Self(text.to_owned()))
        } else {
            Err(IdentityError::TrustDomain(text.to_owned()))
        }
    }
}

/// What a cluster is known by, whatever people call it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId(Uuid);

impl ClusterId {
    /// A cluster's id.
    #[must_use]
    pub fn new(id: Uuid) -> Self {
        Self(id)
    }
}

impl Display for ClusterId {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        Display::fmt(&self.0.hyphenated(), formatter)
    }
}

impl FromStr for ClusterId {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        // One id has one form: in others it would look like another one.
        let id = Uuid::try_parse(text).ok().map(Self).filter(|id| id.to_string() == text);
        id.ok_or_else(|| IdentityError::ClusterId(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "67e55044-10b1-426f-9247-bb680e5fe0c8";

    #[test]
    fn a_cluster_has_one_spiffe_id() {
        let domain: TrustDomain = "fleet.example.com".parse().unwrap();
        assert_eq!(domain.uri(), "spiffe://fleet.example.com");
        let cluster: ClusterId = ID.parse().unwrap();
        assert_eq!(domain.cluster_uri(cluster), format!("spiffe://fleet.example.com/cluster/{ID}"));
    }

    #[test]
    fn an_id_in_another_form_is_none() {
        for text in [
            "",
            "prod",
            "67E55044-10B1-426F-9247-BB680E5FE0C8",
            "67e5504410b1426f9247bb680e5fe0c8",
            "{67e55044-10b1-426f-9247-bb680e5fe0c8}",
            "urn:uuid:67e55044-10b1-426f-9247-bb680e5fe0c8",
            " 67e55044-10b1-426f-9247-bb680e5fe0c8",
        ] {
            assert_eq!(ClusterId::from_str(text), Err(IdentityError::ClusterId(text.to_owned())));
        }
    }

    #[test]
    fn a_trust_domain_is_a_name_and_nothing_more() {
        for text in
            ["", "Fleet", "fleet/cluster", "spiffe://fleet", "fleet:443", "a@b", "é", &"a".repeat(256)]
        {
            assert_eq!(TrustDomain::from_str(text), Err(IdentityError::TrustDomain(text.to_owned())));
        }
    }
}
