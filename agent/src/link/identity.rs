//! What this cluster shows the hub, and whom it takes for the hub: files, as `sts-backup-hub pki issue` and cert-manager
//! write them. Read for each connection, so that new ones are used without a restart.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use tonic::transport::{Certificate, ClientTlsConfig, Identity as TlsIdentity};
use x509_parser::prelude::{FromDer, X509Certificate};

/// Certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum IdentityError {
    #[error("read {}: put tls.crt, tls.key and ca.crt there, as `sts-backup-hub pki issue` writes them", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{} holds no certificate: put it there as PEM", path.display())]
    Unreadable { path: PathBuf },
    #[error("the certificate {} ended at {until}: put a new one there", path.display())]
    Expired { path: PathBuf, until: Timestamp },
}

/// The files of a directory, at one moment.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Identity {
    certificate: String,
    key: String,
    authority: String,
    /// When the certificate ends.
    pub(super) until: Timestamp,
}

impl Identity {
    /// Reads the files.
    pub(super) fn read(directory: &Path) -> Result<Self, IdentityError> {
        let read = |name: &str| {
            let path = directory.join(name);
            std::fs::read_to_string(&path).map_err(|source| IdentityError::Read { path, source })
        };
        let (certificate, key, authority) = (read("tls.crt")?, read("tls.key")?, read("ca.crt")?);
        let until = end_of(&certificate)
            .ok_or_else(|| IdentityError::Unreadable { path: directory.join("tls.crt") })?;
        Ok(Self { certificate, key, authority, until })
    }

    /// Whether it can still be used; who refuses it tells a client only that.
    pub(super) fn check(&self, directory: &Path, now: Timestamp) -> Result<(), IdentityError> {
        if self.until <= now {
            return Err(IdentityError::Expired { path: directory.join("tls.crt"), until: self.until });
        }
        Ok(())
    }

    /// As TLS has it, for a hub of this name.
    pub(super) fn tls(&self, name: &str) -> ClientTlsConfig {
        ClientTlsConfig::new()
            .domain_name(name)
            .ca_certificate(Certificate::from_pem(&self.authority))
            .identity(TlsIdentity::from_pem(&self.certificate, &self.key))
    }
}

fn end_of(certificate: &str) -> Option<Timestamp> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(certificate.as_bytes()).ok()?;
    let (_, certificate) = X509Certificate::from_der(&pem.contents).ok()?;
    Timestamp::from_second(certificate.validity().not_after.timestamp()).ok()
}
