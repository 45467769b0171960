//! What is mounted where in the driver's own mount namespace: reads `/proc/self/mountinfo` (see
//! proc(5)). Changes no mount.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    /// `major:minor` of the file system.
    pub(super) device: String,
    /// The directory of the file system that is visible at the mount point.
    pub(super) root: PathBuf,
    /// Where it is mounted.
    pub(super) target: PathBuf,
    /// Whether this mount, not necessarily its file system, is read-only.
    pub(super) read_only: bool,
    /// Such as `btrfs`.
    pub(super) fs_type: String,
}

/// All mounts, in the order of the kernel.
///
/// # Errors
/// `/proc/self/mountinfo` cannot be read.
pub(super) fn read() -> io::Result<Vec<Mount>> {
    Ok(parse(&fs::read_to_string("/proc/self/mountinfo")?))
}

/// The topmost mount at exactly this path.
#[must_use]
pub(super) fn at<'a>(mounts: &'a [Mount], target: &Path) -> Option<&'a Mount> {
    mounts.iter().rev().find(|mount| mount.target == target)
}

fn parse(mountinfo: &str) -> Vec<Mount> {
    mountinfo.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Mount> {
    // id parent major:minor root mount_point options [optional fields] - fs_type source options
    let (before, after) = line.split_once(" - ")?;
    let mut fields = before.split(' ').skip(2);
    Some(Mount {
        device: fields.next()?.to_owned(),
        root: unescape(fields.next()?),
        target: unescape(fields.next()?),
        read_only: fields.next()?.split(',').any(|option| option == "ro"),
        fs_type: after.split(' ').next()?.to_owned(),
    })
}

/// The kernel writes space, tab, newline and backslash as `\` and three octal digits.
fn unescape(field: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(escaped) if byte == b'\\' => {
                bytes.push(escaped);
                rest = &tail[3..];
            }
            Some(_) | None => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "\
22 1 0:20 / /proc rw,nosuid - proc proc rw
30 22 0:40 / /pool/mnt rw,noatime shared:7 master:1 - btrfs /dev/loop0 rw,space_cache=v2
31 22 0:40 /volumes/vol-1 /target\\040dir ro,noatime shared:7 - btrfs /dev/loop0 rw
32 22 0:41 / /target\\040dir rw - tmpfs tmpfs rw
";

    #[test]
    fn a_mount_point_with_a_space_and_its_own_read_only_flag_are_read() {
        let mounts = parse(MOUNTINFO);
        assert_eq!(mounts.len(), 4);
        assert_eq!(
            mounts[2],
            Mount {
                device: "0:40".to_owned(),
                root: "/volumes/vol-1".into(),
                target: "/target dir".into(),
                read_only: true,
                fs_type: "btrfs".to_owned(),
            }
        );
        assert!(!mounts[1].read_only);
    }

    #[test]
    fn of_stacked_mounts_the_topmost_counts() {
        let mounts = parse(MOUNTINFO);
        assert_eq!(at(&mounts, Path::new("/target dir")).map(|mount| mount.fs_type.as_str()), Some("tmpfs"));
        assert_eq!(at(&mounts, Path::new("/target")), None);
    }
}
