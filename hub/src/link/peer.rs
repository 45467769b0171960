//! Which cluster a certificate speaks for. Pure: the one name in it, compared whole.

use sts_backup_api::identity::{ClusterId, TrustDomain};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Why a certificate speaks for no cluster.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// It cannot be read.
    #[error("the certificate cannot be read")]
    Unreadable,
    /// It has none or several names.
    #[error("the certificate has {0} names: it must have exactly one, {1}")]
    Names(usize, String),
    /// Its name is no URI, or not that of a cluster of this fleet.
    #[error("the certificate's name is {0}: it must be {1}")]
    Name(String, String),
}

/// The cluster that a certificate is for. Common names count for nothing.
///
/// # Errors
/// If it is for none, or for several.
pub fn cluster_of(certificate: &[u8], domain: &TrustDomain) -> Result<ClusterId, PeerError> {
    let (_, certificate) = X509Certificate::from_der(certificate).map_err(|_| PeerError::Unreadable)?;
    let names = certificate.subject_alternative_name().map_err(|_| PeerError::Unreadable)?;
    let names = names.map(|names| &*names.value.general_names).unwrap_or_default();
    let wanted = || format!("{}/cluster/ and the cluster's id", domain.uri());
    let [name] = names else { return Err(PeerError::Names(names.len(), wanted())) };
    let GeneralName::URI(uri) = name else { return Err(PeerError::Name(name.to_string(), wanted())) };
    // What follows the last slash is an id, or it is none; and the rest must be ours to the last letter.
    let id = uri.rsplit_once('/').and_then(|(_, id)| id.parse().ok());
    id.filter(|id| domain.cluster_uri(*id) == *uri)
        .ok_or_else(|| PeerError::Name((*uri).to_owned(), wanted()))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;

    const ID: &str = "67e55044-10b1-426f-9247-bb680e5fe0c8";

    fn cluster(names: &[SanType]) -> Result<ClusterId, PeerError> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names.to_vec();
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        cluster_of(certificate.der(), &"fleet.example.com".parse().unwrap())
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    #[test]
    fn a_certificate_speaks_for_the_cluster_that_it_names() {
        let id = ID.parse().unwrap();
        assert_eq!(cluster(&[uri(&format!("spiffe://fleet.example.com/cluster/{ID}"))]), Ok(id));
    }

    #[test]
    fn a_name_that_is_not_ours_to_the_last_letter_is_refused() {
        for name in [
            format!("spiffe://fleet.example.com/cluster/{ID}-2"),
            format!("spiffe://fleet.example.com/cluster/{ID}/"),
            format!("spiffe://fleet.example.com/cluster/x/{ID}"),
            format!("spiffe://fleet.example.com/clusters/{ID}"),
            format!("spiffe://fleet.example.com.evil.example/cluster/{ID}"),
            format!("spiffe://other.example.com/cluster/{ID}"),
            format!("SPIFFE://fleet.example.com/cluster/{ID}"),
            format!("spiffe://fleet.example.com/cluster/{}", ID.to_uppercase()),
            "spiffe://fleet.example.com/cluster/prod".to_owned(),
            "spiffe://fleet.example.com".to_owned(),
        ] {
            assert!(
                matches!(cluster(&[uri(&name)]), Err(PeerError::Name(found, _)) if found == name),
                "{name}"
            );
        }
        let host = SanType::DnsName(ID.try_into().unwrap());
        assert!(matches!(cluster(&[host]), Err(PeerError::Name(..))));
    }

    #[test]
    fn a_certificate_with_none_or_two_names_speaks_for_nobody() {
        let one = uri(&format!("spiffe://fleet.example.com/cluster/{ID}"));
        let two = uri("spiffe://fleet.example.com/cluster/85afb0ce-3308-4763-b58e-d8ed07c87ae8");
        let host = SanType::DnsName("agent.example.com".try_into().unwrap());
        assert!(matches!(cluster(&[]), Err(PeerError::Names(0, _))));
        assert!(matches!(cluster(&[one.clone(), two]), Err(PeerError::Names(2, _))));
        assert!(matches!(cluster(&[one, host]), Err(PeerError::Names(2, _))));
    }
}
