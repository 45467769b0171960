//! Reads the files of a directory. It knows nothing of what is in them.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The most that a file may hold, bytes: as much as a `ConfigMap`.
const MOST: u64 = 1 << 20;

/// A file: its path, and what it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct File {
    pub(super) name: String,
    pub(super) text: String,
}

/// Files cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// The directory cannot be listed.
    #[error("list the directory {}: correct the path, or let this user read it", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A file cannot be read, or is no text.
    #[error("read the file {}: let this user read it, and save it as UTF-8", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A file is too large.
    #[error("the file {} is larger than 1 MiB: split it", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
}

/// The YAML files of a directory, by name. Hidden ones are none of the user's: Kubernetes mounts a `ConfigMap` as links
/// into a hidden directory, and editors leave such files behind.
pub(super) fn read(directory: &Path) -> Result<Vec<File>, FilesError> {
    let not_listed = |source| FilesError::Directory { path: directory.to_owned(), source };
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).map_err(not_listed)? {
        let path = entry.map_err(not_listed)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let is_yaml = path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
        if is_yaml && !name.starts_with('.') && path.is_file() {
            files.push(File { name: path.display().to_string(), text: text_of(&path)? });
        }
    }
    files.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(files)
}

fn text_of(path: &Path) -> Result<String, FilesError> {
    let not_read = |source| FilesError::File { path: path.to_owned(), source };
    let mut text = String::new();
    let read = fs::File::open(path).map_err(not_read)?.take(MOST + 1).read_to_string(&mut text);
    if u64::try_from(read.map_err(not_read)?).is_ok_and(|read| read <= MOST) {
        Ok(text)
    } else {
        Err(FilesError::TooLarge { path: path.to_owned() })
    }
}
