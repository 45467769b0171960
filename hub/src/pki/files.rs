//! Certificates in directories, with the names of a `kubernetes.io/tls` secret. A directory is there as a whole or not at
//! all, and nothing is ever written over.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use sts_backup_api::identity::TrustDomain;

use super::{Authority, Holder, Issued, PkiError};

const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
const AUTHORITY: &str = "ca.crt";

/// A directory of certificates cannot be read or made.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// It exists.
    #[error("{} exists, and nothing is written over: name another directory", path.display())]
    Exists {
        /// The directory.
        path: PathBuf,
    },
    /// It cannot be made.
    #[error("make {}: name a directory whose parent exists and may be written to", path.display())]
    Write {
        /// The directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file of the authority cannot be read.
    #[error("read {}: name the directory that `pki init` made", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The certificates cannot be made.
    #[error(transparent)]
    Pki(#[from] PkiError),
}

/// Makes a directory with a new authority: tls.crt and tls.key.
///
/// # Errors
/// If it exists, or cannot be made.
pub fn create(directory: &Path, trust_domain: &TrustDomain, now: Timestamp) -> Result<(), FilesError> {
    let Issued { certificate, key } = Authority::create(trust_domain, now)?;
    write(directory, &[(CERTIFICATE, &certificate, 0o644), (KEY, &key, 0o600)])
}

/// Makes a directory with a certificate of an authority's directory: tls.crt, tls.key and the authority's ca.crt. The
/// trust domain that it belongs to.
///
/// # Errors
/// If it exists or cannot be made, or the authority cannot be read or used.
pub fn issue(
    authority: &Path,
    directory: &Path,
    holder: &Holder,
    lifetime: Duration,
    now: Timestamp,
) -> Result<TrustDomain, FilesError> {
    let read = |name| {
        let path = authority.join(name);
        fs::read_to_string(&path).map_err(|source| FilesError::Read { path, source })
    };
    let authority = Authority::of(&Issued { certificate: read(CERTIFICATE)?, key: read(KEY)? })?;
    let Issued { certificate, key } = authority.issue(holder, lifetime, now)?;
    let files = [
        (CERTIFICATE, &*certificate, 0o644),
        (KEY, &key, 0o600),
        (AUTHORITY, authority.certificate(), 0o644),
    ];
    write(directory, &files)?;
    Ok(authority.trust_domain().clone())
}

/// Makes a directory with some files: name, text and mode. Beside it first, so that a crash leaves no half of it.
fn write(directory: &Path, files: &[(&str, &str, u32)]) -> Result<(), FilesError> {
    let refused = |source| FilesError::Write { path: directory.to_owned(), source };
    if directory.symlink_metadata().is_ok() {
        return Err(FilesError::Exists { path: directory.to_owned() });
    }
    let parent = directory.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    let draft = tempfile::Builder::new().prefix(".pki").tempdir_in(parent).map_err(refused)?;
    for (name, text, mode) in files {
        let path = draft.path().join(name);
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(*mode).open(path).map_err(refused)?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(refused)?;
    }
    // A directory that somebody has made meanwhile is not replaced unless it is empty.
    fs::rename(draft.path(), directory).map_err(refused)?;
    // It has another name now.
    let _ = draft.keep();
    fs::File::open(parent).and_then(|parent| parent.sync_all()).map_err(refused)
}
