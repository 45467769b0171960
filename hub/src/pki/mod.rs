//! The fleet's own certificates: an authority, and what it issues to the hub and to clusters.
//!
//! Who a certificate is for says one URI name in it, and nothing else. cert-manager can do the same; then nothing of this is
//! used. It decides what is in a certificate; [`files`] keeps them.

mod files;
#[cfg(test)]
mod tests;

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls_pki_types::ServerName;
use sts_backup_api::identity::{ClusterId, TrustDomain};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

pub use self::files::{FilesError, create, issue};

/// How long an authority can be used.
const AUTHORITY_DAYS: u32 = 3650;

/// Certificates begin this long before they are made: clocks differ.
const BACKDATED: SignedDuration = SignedDuration::from_mins(5);

/// Certificates cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The hub cannot have this name.
    #[error("{name:?} is no host name or address: write what agents connect to, such as hub.example.com")]
    Name {
        /// The name.
        name: String,
    },
    /// The hub has no name.
    #[error("the hub has no name: write what agents connect to, such as hub.example.com")]
    Nameless,
    /// The certificate is none of an authority that was made here.
    #[error("{reason}: use what `pki init` made")]
    Authority {
        /// Why not.
        reason: &'static str,
    },
    /// The authority has expired.
    #[error("the authority's certificate ended at {ended}: make a new one with `pki init`")]
    Expired {
        /// When.
        ended: Timestamp,
    },
    /// The library refuses.
    #[error("make a certificate")]
    Make(#[from] rcgen::Error),
}

/// A certificate with its key, both as PEM.
#[derive(Clone)]
pub struct Issued {
    /// The certificate.
    pub certificate: String,
    /// Its private key, PKCS #8.
    pub key: String,
}

/// Who a certificate is for.
#[derive(Clone, Debug)]
pub enum Holder {
    /// A cluster's agent: it shows the certificate to the hub.
    Cluster(ClusterId),
    /// The hub, by the names that agents connect to.
    Hub(Vec<String>),
}

/// Makes certificates of a trust domain.
pub struct Authority {
    certificate: String,
    trust_domain: TrustDomain,
    until: Timestamp,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Makes a new authority: its certificate and key.
    ///
    /// # Errors
    /// If the certificate cannot be made.
    pub fn create(trust_domain: &TrustDomain, now: Timestamp) -> Result<Issued, PkiError> {
        let mut params = params(now, Duration::from_hours(24) * AUTHORITY_DAYS);
        params.distinguished_name.push(DnType::CommonName, format!("{trust_domain} fleet authority"));
        params.subject_alt_names = vec![SanType::URI(trust_domain.uri().as_str().try_into()?)];
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = params.self_signed(&key)?;
        Ok(Issued { certificate: certificate.pem(), key: key.serialize_pem() })
    }

    /// An authority that was made before.
    ///
    /// # Errors
    /// If it is none, or its key is another one's.
    pub fn of(issued: &Issued) -> Result<Self, PkiError> {
        let refused = |reason| PkiError::Authority { reason };
        let key = KeyPair::from_pem(&issued.key)?;
        let (_, pem) = x509_parser::pem::parse_x509_pem(issued.certificate.as_bytes())
            .map_err(|_| refused("the authority's certificate is no PEM"))?;
        let (_, certificate) = X509Certificate::from_der(&pem.contents)
            .map_err(|_| refused("the authority's certificate cannot be read"))?;
        if certificate.public_key().raw != rcgen::PublicKeyData::subject_public_key_info(&key) {
            return Err(refused("the authority's key does not belong to its certificate"));
        }
        let names = certificate.subject_alternative_name().ok().flatten();
        let uris = names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| {
            let GeneralName::URI(uri) = name else { return None };
            uri.strip_prefix("spiffe://")?.parse().ok()
        });
        let [trust_domain]: [TrustDomain; 1] = uris
            .collect::<Vec<_>>()
            .try_into()
            .map_err(|_| refused("the authority's certificate names no trust domain"))?;
        let until = Timestamp::from_second(certificate.validity().not_after.timestamp())
            .map_err(|_| refused("the authority's certificate has no end"))?;
        Ok(Self {
            certificate: issued.certificate.clone(),
            trust_domain,
            until,
            issuer: Issuer::from_ca_cert_pem(&issued.certificate, key)?,
        })
    }

    /// Its own certificate, as PEM.
    #[must_use]
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// What it issues for.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Issues a certificate with a new key; it ends with the authority's at the latest.
    ///
    /// # Errors
    /// If the authority has expired, or the hub's names are none.
    pub fn issue(&self, holder: &Holder, lifetime: Duration, now: Timestamp) -> Result<Issued, PkiError> {
        let left = Duration::try_from(self.until.duration_since(now)).unwrap_or_default();
        if left.is_zero() {
            return Err(PkiError::Expired { ended: self.until });
        }
        let mut params = params(now, lifetime.min(left));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        match holder {
            Holder::Cluster(cluster) => {
                let uri = self.trust_domain.cluster_uri(*cluster);
                params.subject_alt_names = vec![SanType::URI(uri.as_str().try_into()?)];
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            }
            Holder::Hub(names) => {
                if names.is_empty() {
                    return Err(PkiError::Nameless);
                }
                params.subject_alt_names =
                    names.iter().map(|name| server_name(name)).collect::<Result<_, _>>()?;
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            }
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Issued { certificate: certificate.pem(), key: key.serialize_pem() })
    }
}

/// A certificate's beginning and end; its serial number is random.
fn params(now: Timestamp, lifetime: Duration) -> CertificateParams {
    let time = |time: Timestamp| OffsetDateTime::from_unix_timestamp(time.as_second());
    let mut params = CertificateParams::default();
    params.not_before = time(now - BACKDATED).expect("the present moment has a date");
    let end = now.saturating_add(lifetime).unwrap_or(now);
    params.not_after = time(end).expect("some years from now have a date");
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
}

fn server_name(name: &str) -> Result<SanType, PkiError> {
    let refused = || PkiError::Name { name: name.to_owned() };
    match ServerName::try_from(name).map_err(|_| refused())? {
        ServerName::IpAddress(address) => Ok(SanType::IpAddress(std::net::IpAddr::from(address))),
        ServerName::DnsName(name) => Ok(SanType::DnsName(name.as_ref().try_into()?)),
        _ => Err(refused()),
    }
}
