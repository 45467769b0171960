//! The btrfs pool: volumes and snapshots as subvolumes of one file system in one sparse file, mounted
//! through a loop device. The only place that runs `mkfs.btrfs`, `btrfs` and `mount`. It decides
//! nothing: callers know from the records what shall exist and take turns per object.
//!
//! Layout of the file system: `volumes/<id>`, `snapshots/<id>` and `records/`.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use thiserror::Error;
use tokio::process::Command;
use tokio::task::JoinError;
use tracing::info;

use super::mounts::{self, Mount};
use super::records::{SnapshotId, VolumeId};

const LOOP_MAJOR: u32 = 7;
const MISC_MAJOR: u32 = 10;
const LOOP_CONTROL_MINOR: u32 = 237;
const MOUNT_ATTEMPTS: u32 = 5;

/// The pool could not do what was asked.
#[derive(Debug, Error)]
pub(super) enum PoolError {
    /// A program is missing or not executable.
    #[error("start {program}: is it in PATH?")]
    Start {
        /// The program's name.
        program: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// A program refused.
    #[error("{program} ended with {status}: {stderr}")]
    Program {
        /// The program's name.
        program: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// What it said, on one line.
        stderr: String,
    },
    /// A file of the pool could not be used.
    #[error("{operation} {path}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The pool's mount point is in use by something else.
    #[error("{path} is a mount of {fs_type}, not of the pool: unmount it")]
    ForeignMount {
        /// The mount point.
        path: PathBuf,
        /// What is mounted.
        fs_type: String,
    },
    /// A background task ended early.
    #[error("a background task ended early")]
    Task(#[from] JoinError),
}

/// The sparse file's name: no other program's, so that a loop device on it is known to be ours.
pub const POOL_FILE: &str = "sts-backup-csi-pool.img";

/// The mounted pool.
#[derive(Debug, Clone)]
pub(super) struct Pool {
    mount_point: PathBuf,
}

impl Pool {
    /// Makes the pool's file system in `dir` if there is none yet and mounts it if it is not mounted,
    /// for instance by this driver's previous pod. `size_bytes` counts only when it is made.
    ///
    /// # Errors
    /// A program is missing, the file system cannot be made or mounted.
    pub(super) async fn open(dir: &Path, size_bytes: u64) -> Result<Self, PoolError> {
        let mount_point = dir.join("mnt");
        create_dir(&mount_point)?;
        // The kernel shows real paths.
        let mount_point = fs::canonicalize(&mount_point).map_err(file_error("resolve", &mount_point))?;
        let image = dir.join(POOL_FILE);
        match mount_at(&mount_point)? {
            Some(mount) if mount.fs_type == "btrfs" => {
                info!(path = %mount_point.display(), "pool is mounted already");
            }
            Some(Mount { fs_type, .. }) => {
                return Err(PoolError::ForeignMount { path: mount_point, fs_type });
            }
            None => {
                if !image.try_exists().map_err(file_error("look for", &image))? {
                    make_file_system(&image, size_bytes).await?;
                    info!(path = %image.display(), size_bytes, "pool made");
                }
                mount_image(&image, &mount_point).await?;
                info!(path = %mount_point.display(), "pool mounted");
            }
        }
        let pool = Self { mount_point };
        create_dir(&pool.mount_point.join("volumes"))?;
        create_dir(&pool.mount_point.join("snapshots"))?;
        Ok(pool)
    }

    /// Where the driver keeps its records, inside the pool so that they share its fate.
    #[must_use]
    pub(super) fn records_dir(&self) -> PathBuf {
        self.mount_point.join("records")
    }

    /// The root directory of a volume, whether it exists or not.
    #[must_use]
    pub(super) fn volume_path(&self, id: &VolumeId) -> PathBuf {
        self.mount_point.join("volumes").join(id.as_ref())
    }

    fn snapshot_path(&self, id: &SnapshotId) -> PathBuf {
        self.mount_point.join("snapshots").join(id.as_ref())
    }

    /// Whether the volume exists. Blocks briefly.
    #[must_use]
    pub(super) fn has_volume(&self, id: &VolumeId) -> bool {
        self.volume_path(id).is_dir()
    }

    /// Whether the snapshot exists. Blocks briefly.
    #[must_use]
    pub(super) fn has_snapshot(&self, id: &SnapshotId) -> bool {
        self.snapshot_path(id).is_dir()
    }

    /// The places where this volume is mounted, as far as this mount namespace shows. Blocks briefly.
    ///
    /// # Errors
    /// The mounts cannot be read.
    pub(super) fn mounts_of(&self, id: &VolumeId) -> Result<Vec<Mount>, PoolError> {
        let all = read_mounts()?;
        let device = mounts::at(&all, &self.mount_point).map(|pool| pool.device.clone());
        let root = Path::new("/volumes").join(id.as_ref());
        Ok(all
            .into_iter()
            .filter(|mount| Some(&mount.device) == device.as_ref() && mount.root == root)
            .collect())
    }

    /// Makes an empty volume, whose root directory belongs to root with mode 0755.
    ///
    /// # Errors
    /// btrfs refuses, for instance because it exists or the pool is full.
    pub(super) async fn make_volume(&self, id: &VolumeId) -> Result<(), PoolError> {
        run("btrfs", ["subvolume".as_ref(), "create".as_ref(), self.volume_path(id).as_os_str()]).await
    }

    /// Makes a volume with the content of a snapshot.
    ///
    /// # Errors
    /// btrfs refuses, for instance because the snapshot is gone or the pool is full.
    pub(super) async fn make_volume_from(&self, id: &VolumeId, source: &SnapshotId) -> Result<(), PoolError> {
        snapshot(&self.snapshot_path(source), &self.volume_path(id), &[]).await
    }

    /// Cuts a read-only snapshot of a volume in one instant. Every write that was completed before the
    /// call is in it: btrfs flushes the volume's dirty pages first.
    ///
    /// # Errors
    /// btrfs refuses, for instance because the volume is gone.
    pub(super) async fn cut_snapshot(&self, id: &SnapshotId, source: &VolumeId) -> Result<(), PoolError> {
        snapshot(&self.volume_path(source), &self.snapshot_path(id), &["-r"]).await
    }

    /// Deletes a volume; an absent one is success. Its snapshots stay.
    ///
    /// # Errors
    /// btrfs refuses.
    pub(super) async fn delete_volume(&self, id: &VolumeId) -> Result<(), PoolError> {
        delete_subvolume(&self.volume_path(id)).await
    }

    /// Deletes a snapshot; an absent one is success. Volumes made from it stay.
    ///
    /// # Errors
    /// btrfs refuses.
    pub(super) async fn delete_snapshot(&self, id: &SnapshotId) -> Result<(), PoolError> {
        delete_subvolume(&self.snapshot_path(id)).await
    }
}

async fn snapshot(from: &Path, to: &Path, options: &[&str]) -> Result<(), PoolError> {
    let words = ["subvolume", "snapshot"].iter().chain(options).map(AsRef::as_ref);
    run("btrfs", words.chain([from.as_os_str(), to.as_os_str()])).await
}

async fn delete_subvolume(path: &Path) -> Result<(), PoolError> {
    if path.is_dir() {
        run("btrfs", ["subvolume".as_ref(), "delete".as_ref(), path.as_os_str()]).await?;
    }
    Ok(())
}

fn file_error<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> PoolError + 'a {
    move |source| PoolError::File { operation, path: path.to_owned(), source }
}

fn create_dir(path: &Path) -> Result<(), PoolError> {
    fs::create_dir_all(path).map_err(file_error("create directory", path))
}

fn read_mounts() -> Result<Vec<Mount>, PoolError> {
    mounts::read().map_err(file_error("read", Path::new("/proc/self/mountinfo")))
}

fn mount_at(path: &Path) -> Result<Option<Mount>, PoolError> {
    Ok(mounts::at(&read_mounts()?, path).cloned())
}

/// Made under another name first: after a crash there is a whole file system or none.
async fn make_file_system(image: &Path, size_bytes: u64) -> Result<(), PoolError> {
    let new = image.with_extension("img.new");
    File::create(&new)
        .and_then(|file| file.set_len(size_bytes))
        .map_err(file_error("create sparse file", &new))?;
    let options = ["--quiet", "--force", "--data", "single", "--metadata", "single"];
    run("mkfs.btrfs", options.iter().map(OsStr::new).chain([new.as_os_str()])).await?;
    let (from, to) = (new.clone(), image.to_owned());
    tokio::task::spawn_blocking(move || File::open(&from)?.sync_all().and_then(|()| fs::rename(&from, &to)))
        .await?
        .map_err(file_error("store", image))
}

/// Mounts through a loop device that goes away with the mount. A container's `/dev` has only the nodes
/// of the loop devices that existed when the container was made, so missing ones are made here, and a
/// refused mount is tried again while asking for a free device has brought new ones to light.
async fn mount_image(image: &Path, mount_point: &Path) -> Result<(), PoolError> {
    make_loop_nodes()?;
    let mut attempt = 1;
    loop {
        let options = ["-t", "btrfs", "-o", "loop,noatime"];
        let words = options.iter().map(OsStr::new).chain([image.as_os_str(), mount_point.as_os_str()]);
        let mounted = run("mount", words).await;
        if mounted.is_ok() || attempt == MOUNT_ATTEMPTS || make_loop_nodes()? == 0 {
            return mounted;
        }
        attempt += 1;
    }
}

/// Makes the device nodes of loop devices that the kernel has and `/dev` lacks; returns how many.
fn make_loop_nodes() -> Result<usize, PoolError> {
    let mut count = 0;
    let mut make_node =
        |path: &Path, file_type, device| match mknodat(CWD, path, file_type, Mode::from(0o660), device) {
            Ok(()) => {
                info!(path = %path.display(), "missing device node made");
                count += 1;
                Ok(())
            }
            Err(rustix::io::Errno::EXIST) => Ok(()),
            Err(errno) => Err(file_error("make device node", path)(errno.into())),
        };
    make_node(
        Path::new("/dev/loop-control"),
        FileType::CharacterDevice,
        makedev(MISC_MAJOR, LOOP_CONTROL_MINOR),
    )?;
    let sys_block = Path::new("/sys/block");
    for entry in fs::read_dir(sys_block).map_err(file_error("list", sys_block))? {
        let name = entry.map_err(file_error("list", sys_block))?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("loop")).map(str::parse);
        if let Some(Ok(number)) = number {
            make_node(&Path::new("/dev").join(&name), FileType::BlockDevice, makedev(LOOP_MAJOR, number))?;
        }
    }
    Ok(count)
}

async fn run<'a>(
    program: &'static str,
    arguments: impl IntoIterator<Item = &'a OsStr>,
) -> Result<(), PoolError> {
    let output = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .await
        .map_err(|source| PoolError::Start { program, source })?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr).split_whitespace().collect::<Vec<_>>().join(" ");
    Err(PoolError::Program { program, status: output.status, stderr })
}
