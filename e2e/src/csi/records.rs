//! What the driver remembers of each volume and snapshot: one small JSON file each, replaced
//! atomically, so that a crash at any line leaves the old record or the new one. Knows no btrfs and
//! decides nothing; whether the content exists is a question to the pool. All functions block.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use thiserror::Error;

use super::faults::ReadyDelay;

const HASH_CHARS: usize = 40;

fn hashed(prefix: &str, name: &str) -> String {
    let mut id = hex::encode(Sha256::digest(name.as_bytes()));
    id.truncate(HASH_CHARS);
    format!("{prefix}{id}")
}

/// Ids become file names: nothing but our own form passes.
fn well_formed(prefix: &str, id: &str) -> bool {
    id.strip_prefix(prefix).is_some_and(|hash| {
        hash.len() == HASH_CHARS && hash.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// The id of a volume, derived from its CSI name, hence the same for every repeated call.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct VolumeId(String);

impl VolumeId {
    /// The id of the volume with this CSI name.
    #[must_use]
    pub(super) fn of_name(name: &str) -> Self {
        Self(hashed("vol-", name))
    }

    /// Reads an id that came back from a caller; `None` if this driver never gave it out.
    #[must_use]
    pub(super) fn parse(id: &str) -> Option<Self> {
        well_formed("vol-", id).then(|| Self(id.to_owned()))
    }
}

impl AsRef<str> for VolumeId {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The id of a snapshot, derived from its CSI name, hence the same for every repeated call.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct SnapshotId(String);

impl SnapshotId {
    /// The id of the snapshot with this CSI name.
    #[must_use]
    pub(super) fn of_name(name: &str) -> Self {
        Self(hashed("snap-", name))
    }

    /// Reads an id that came back from a caller; `None` if this driver never gave it out.
    #[must_use]
    pub(super) fn parse(id: &str) -> Option<Self> {
        well_formed("snap-", id).then(|| Self(id.to_owned()))
    }
}

impl AsRef<str> for SnapshotId {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A requested volume; it exists once its subvolume does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct VolumeRecord {
    /// Its id.
    pub(super) id: VolumeId,
    /// The CSI name it was requested by.
    pub(super) name: String,
    /// Nominal size in bytes; nothing enforces it.
    pub(super) capacity_bytes: i64,
    /// The snapshot it starts from; `None`: empty.
    pub(super) source: Option<SnapshotId>,
    /// When it is to be made: the class's `provisionDelay` after it was first asked for.
    pub(super) due_at: Timestamp,
}

/// A requested snapshot; it exists once `cut_at` is known and its subvolume exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SnapshotRecord {
    /// Its id.
    pub(super) id: SnapshotId,
    /// The CSI name it was requested by.
    pub(super) name: String,
    /// The volume it is of; that volume may be gone by now.
    pub(super) source: VolumeId,
    /// The nominal size in bytes of that volume.
    pub(super) size_bytes: i64,
    /// When it is to be cut: the class's `cutDelay` after it was first asked for.
    pub(super) due_at: Timestamp,
    /// When it is ready, counted from the cut.
    pub(super) ready_delay: ReadyDelay,
    /// A lower bound of the cut, taken just before it: what was written by then is in the snapshot.
    /// Recorded after the cut: a subvolume without it is a leftover of a crash that nobody has been told of.
    pub(super) cut_at: Option<Timestamp>,
}

impl SnapshotRecord {
    /// Whether volumes can be made from it at `now`.
    #[must_use]
    pub(super) fn is_ready(&self, now: Timestamp) -> bool {
        self.cut_at.is_some_and(|cut_at| self.ready_delay.is_over(cut_at, now))
    }
}

/// A record could not be read or changed.
#[derive(Debug, Error)]
pub(super) enum RecordError {
    /// The file could not be read.
    #[error("read record {path}")]
    Read {
        /// The record's file, or the folder for a list.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is not a record of ours.
    #[error("parse record {path}")]
    Parse {
        /// The record's file.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// The file could not be replaced.
    #[error("write record {path}")]
    Write {
        /// The record's file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file could not be removed.
    #[error("remove record {path}")]
    Remove {
        /// The record's file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// A folder of records of one kind. Writers of the same id must take turns.
#[derive(Debug)]
pub(super) struct Folder<R> {
    dir: PathBuf,
    kind: PhantomData<fn() -> R>,
}

impl<R: Serialize + DeserializeOwned> Folder<R> {
    /// Opens the folder; makes it if absent.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub(super) fn open(dir: PathBuf) -> Result<Self, RecordError> {
        fs::create_dir_all(&dir).map_err(|source| RecordError::Write { path: dir.clone(), source })?;
        Ok(Self { dir, kind: PhantomData })
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }

    /// The record of this id, if there is one.
    ///
    /// # Errors
    /// The file exists but cannot be read as a record.
    pub(super) fn read(&self, id: &impl AsRef<str>) -> Result<Option<R>, RecordError> {
        Self::read_file(&self.path(id.as_ref()))
    }

    fn read_file(path: &Path) -> Result<Option<R>, RecordError> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(RecordError::Read { path: path.to_owned(), source }),
        };
        let record = serde_json::from_slice(&text)
            .map_err(|source| RecordError::Parse { path: path.to_owned(), source })?;
        Ok(Some(record))
    }

    /// Stores the record durably in place of an older one.
    ///
    /// # Errors
    /// The file cannot be written; the older record is then still there.
    pub(super) fn write(&self, id: &impl AsRef<str>, record: &R) -> Result<(), RecordError> {
        let path = self.path(id.as_ref());
        let replace = || -> io::Result<()> {
            let new = self.dir.join(format!("{}.new", id.as_ref()));
            let mut file = File::create(&new)?;
            file.write_all(&serde_json::to_vec_pretty(record)?)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&self.dir)?.sync_all()
        };
        replace().map_err(|source| RecordError::Write { path: path.clone(), source })
    }

    /// Removes the record durably; an absent one is success.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub(super) fn remove(&self, id: &impl AsRef<str>) -> Result<(), RecordError> {
        let path = self.path(id.as_ref());
        let removed = match fs::remove_file(&path) {
            Ok(()) => File::open(&self.dir).and_then(|dir| dir.sync_all()),
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(source),
        };
        removed.map_err(|source| RecordError::Remove { path, source })
    }

    /// All records, in no order. One that is removed meanwhile is left out.
    ///
    /// # Errors
    /// The folder or one of its records cannot be read.
    pub(super) fn list(&self) -> Result<Vec<R>, RecordError> {
        let unreadable = |source| RecordError::Read { path: self.dir.clone(), source };
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                records.extend(Self::read_file(&path)?);
            }
        }
        Ok(records)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn record(name: &str) -> SnapshotRecord {
        let due_at: Timestamp = "2026-01-01T00:00:00.123456789Z".parse().unwrap();
        SnapshotRecord {
            id: SnapshotId::of_name(name),
            name: name.to_owned(),
            source: VolumeId::of_name("v"),
            size_bytes: 1,
            due_at,
            ready_delay: ReadyDelay::After(Duration::from_millis(1)),
            cut_at: Some(due_at),
        }
    }

    #[test]
    fn a_record_is_read_back_to_the_nanosecond_and_gone_once_removed() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path().join("snapshots")).unwrap();
        let record = record("s");
        folder.write(&record.id, &record).unwrap();
        folder.write(&record.id, &record).unwrap();
        assert_eq!(folder.read(&record.id).unwrap().as_ref(), Some(&record));
        assert_eq!(folder.list().unwrap(), vec![record.clone()]);
        folder.remove(&record.id).unwrap();
        folder.remove(&record.id).unwrap();
        assert_eq!(folder.read(&record.id).unwrap(), None);
    }

    #[test]
    fn a_half_written_file_of_a_crash_is_no_record() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::<SnapshotRecord>::open(dir.path().to_owned()).unwrap();
        let id = SnapshotId::of_name("s");
        fs::write(dir.path().join(format!("{id}.new")), "{\"id\":").unwrap();
        assert_eq!(folder.read(&id).unwrap(), None);
        assert_eq!(folder.list().unwrap(), vec![]);
        folder.write(&id, &record("s")).unwrap();
        assert_eq!(folder.list().unwrap(), vec![record("s")]);
    }

    #[test]
    fn any_name_gives_a_short_safe_id_that_is_the_same_each_time() {
        let long = "n".repeat(4096);
        for name in ["pvc-1", "../../etc/passwd", "a b\0c", long.as_str()] {
            let id = VolumeId::of_name(name);
            assert_eq!(id, VolumeId::of_name(name));
            assert_eq!(VolumeId::parse(id.as_ref()), Some(id.clone()));
            assert!(id.as_ref().len() <= 128);
        }
    }

    #[test]
    fn an_id_of_another_form_is_not_ours() {
        let snapshot = SnapshotId::of_name("s");
        for id in ["", "vol-", "vol-../../x", snapshot.as_ref(), &format!("vol-{}", "A".repeat(40))] {
            assert_eq!(VolumeId::parse(id), None, "{id:?}");
        }
    }
}
