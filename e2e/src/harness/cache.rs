//! Expensive things, kept by content: an entry's key is a hash over all that went into it, so an entry that
//! exists is right, and one that is not named any more is garbage.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use super::paths::Paths;

/// A hash over everything that an entry is made of.
#[derive(Clone, Debug, Default)]
pub struct Key(Sha256);

impl Key {
    /// An empty key.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one part; parts cannot run into each other.
    #[must_use]
    pub fn with(mut self, part: impl AsRef<[u8]>) -> Self {
        let part = part.as_ref();
        self.0.update(part.len().to_le_bytes());
        self.0.update(part);
        self
    }

    /// Adds the names, contents and executable bits of all files below `dir`, in order of name.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn with_files(mut self, dir: &Path) -> Result<Self> {
        let mut names: Vec<PathBuf> = Vec::new();
        collect_files(dir, &mut names)?;
        names.sort();
        for name in names {
            let content = std::fs::read(&name).with_context(|| format!("read {}", name.display()))?;
            let relative = name.strip_prefix(dir).unwrap_or(&name).to_string_lossy().into_owned();
            let executable = name.metadata()?.permissions().mode() & 0o111 != 0;
            self = self.with(relative).with([u8::from(executable)]).with(content);
        }
        Ok(self)
    }

    /// The first 16 hex digits: 64 bits, plenty for the handful of entries a user has.
    #[must_use]
    pub fn finish(self) -> String {
        let mut hex = hex::encode(self.0.finalize());
        hex.truncate(16);
        hex
    }
}

fn collect_files(dir: &Path, into: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect_files(&entry.path(), into)?;
        } else {
            into.push(entry.path());
        }
    }
    Ok(())
}

/// Returns the entry `name` with this key, made by `make` in an empty folder if it is not there yet. Older
/// entries of the same name are removed once the new one is whole.
///
/// The caller holds the harness's lock and has cleared what a killed run left of its making
/// ([`super::traces::clear_making`]).
///
/// # Errors
/// Those of `make`, and of the file system.
pub async fn entry(
    paths: &Paths,
    name: &str,
    key: &str,
    make: impl AsyncFnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let whole = paths.cache().join(format!("{name}-{key}"));
    if whole.exists() {
        return Ok(whole);
    }
    let making = paths.making(name);
    std::fs::create_dir_all(&making).with_context(|| format!("create {}", making.display()))?;
    make(&making).await?;
    for old in std::fs::read_dir(paths.cache())? {
        let old = old?.path();
        let is_older = old
            .file_name()
            .and_then(|file| file.to_str())
            .and_then(|file| file.strip_prefix(name)?.strip_prefix('-'))
            .is_some_and(|rest| rest.len() == 16 && rest.bytes().all(|b| b.is_ascii_hexdigit()));
        if is_older {
            remove_dir(&old)?;
        }
    }
    std::fs::rename(&making, &whole).with_context(|| format!("rename to {}", whole.display()))?;
    Ok(whole)
}

/// Removes a folder and all below it; one that does not exist is success.
///
/// # Errors
/// When something in it cannot be removed.
pub fn remove_dir(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", dir.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_key_do_not_run_into_each_other() {
        assert_ne!(Key::new().with("ab").with("c").finish(), Key::new().with("a").with("bc").finish());
    }
}
