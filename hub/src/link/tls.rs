//! TLS of the link: what the hub shows, and whose certificates it takes.
//!
//! It decides who may connect at all: who has a certificate of the fleet's authority, for clients, in its time. Which cluster
//! that is, [`peer`](super::peer) says.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::server::{NoServerSessionStorage, ServerConfig, VerifierBuilderError, WebPkiClientVerifier};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// Certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("read {}: put tls.crt, tls.key and ca.crt there, as `pki issue` or cert-manager writes them", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    /// A file holds no certificate.
    #[error("{} holds no certificate: put it there as PEM", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The authority's certificate cannot be used.
    #[error("{} holds no authority's certificate", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: rustls::Error,
    },
    /// No client could be judged.
    #[error("the authority's certificates cannot be used")]
    Verifier(#[from] VerifierBuilderError),
    /// Key and certificate do not belong together, or are of a kind that is not supported.
    #[error("tls.crt and tls.key of {} cannot be used together", path.display())]
    Identity {
        /// The directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: rustls::Error,
    },
}

/// How the link is served with the certificates of a directory.
///
/// # Errors
/// If they cannot be read or used.
///
/// # Panics
/// Never: the provider speaks TLS 1.3.
pub fn link_config(directory: &Path) -> Result<ServerConfig, TlsError> {
    let path = directory.join("ca.crt");
    let mut roots = RootCertStore::empty();
    for authority in certificates(&path)? {
        let added = roots.add(authority);
        added.map_err(|source| TlsError::Authority { path: path.clone(), source })?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build()?;
    let builder = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider speaks TLS 1.3")
        .with_client_cert_verifier(verifier);
    let (chain, key) = identity(directory)?;
    let config = builder.with_single_cert(chain, key);
    let mut config = config.map_err(|source| TlsError::Identity { path: directory.to_owned(), source })?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A session that is resumed would not be judged again.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

/// How the API is served with the certificates of a directory.
///
/// # Errors
/// If they cannot be read or used.
///
/// # Panics
/// Never: the provider speaks TLS 1.3.
pub fn api_config(directory: &Path) -> Result<ServerConfig, TlsError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let (chain, key) = identity(directory)?;
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider speaks TLS 1.3")
        .with_no_client_auth()
        .with_single_cert(chain, key);
    config.map_err(|source| TlsError::Identity { path: directory.to_owned(), source })
}

fn identity(directory: &Path) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
    let path = directory.join("tls.key");
    let key = PrivateKeyDer::from_pem_file(&path).map_err(|source| TlsError::Read { path, source })?;
    Ok((certificates(&directory.join("tls.crt"))?, key))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let read: Vec<_> = read.map_err(|source| TlsError::Read { path: path.to_owned(), source })?;
    if read.is_empty() { Err(TlsError::Empty { path: path.to_owned() }) } else { Ok(read) }
}
