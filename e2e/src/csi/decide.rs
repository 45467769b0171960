//! The driver's decisions: facts and a request in, the next step or the refusal out. Pure: no file, no
//! clock, no btrfs. Refusals are gRPC statuses with the codes that the CSI specification names.

use jiff::Timestamp;
use tonic::Status;

use super::TOPOLOGY_KEY;
use super::faults::{SnapshotFaults, VolumeFaults, due};
use super::proto::csi::volume_capability::AccessType;
use super::proto::csi::volume_capability::access_mode::Mode;
use super::proto::csi::{CapacityRange, TopologyRequirement, VolumeCapability};
use super::records::{SnapshotId, SnapshotRecord, VolumeId, VolumeRecord};

/// Nominal size in bytes of a volume whose request names none.
pub(super) const DEFAULT_CAPACITY_BYTES: i64 = 1 << 30;

/// A volume as a caller wants it.
#[derive(Debug, Clone)]
pub(super) struct VolumeWish {
    /// CSI name.
    pub(super) name: String,
    /// Bytes.
    pub(super) range: CapacityRange,
    /// The snapshot it starts from; `None`: empty.
    pub(super) source: Option<SnapshotId>,
    /// The class's faults.
    pub(super) faults: VolumeFaults,
}

/// What is known about a requested volume.
#[derive(Debug, Clone, Default)]
pub(super) struct VolumeFacts {
    /// Its record, if it was requested before.
    pub(super) record: Option<VolumeRecord>,
    /// Whether its subvolume exists.
    pub(super) made: bool,
    /// Whether this very call has already seen a record of it.
    pub(super) waited: bool,
    /// The record of the wanted source, if that snapshot exists.
    pub(super) source: Option<SnapshotRecord>,
}

/// What to do next about a requested volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum VolumeStep {
    /// Remember the request.
    Record(VolumeRecord),
    /// Its time has not come.
    Wait {
        /// When it comes.
        until: Timestamp,
    },
    /// Make it.
    Make(VolumeRecord),
    /// It exists: answer the caller.
    Answer(VolumeRecord),
}

/// The next step towards the wished volume.
///
/// # Errors
/// `ALREADY_EXISTS` for another volume of that name, `NOT_FOUND` or `UNAVAILABLE` for its source,
/// `OUT_OF_RANGE` or `INVALID_ARGUMENT` for its size, `ABORTED` if it was deleted while waiting.
pub(super) fn next_volume_step(
    wish: &VolumeWish,
    facts: VolumeFacts,
    now: Timestamp,
) -> Result<VolumeStep, Status> {
    let VolumeFacts { record, made, waited, source } = facts;
    let Some(record) = record else {
        if waited {
            return Err(Status::aborted(format!("volume {} was deleted while it was waited for", wish.name)));
        }
        let least = usable_source(wish, source.as_ref(), now)?;
        return Ok(VolumeStep::Record(VolumeRecord {
            id: VolumeId::of_name(&wish.name),
            name: wish.name.clone(),
            capacity_bytes: capacity(&wish.range, least)?,
            source: wish.source.clone(),
            due_at: due(now, wish.faults.provision_delay),
        }));
    };
    refuse_other_volume(wish, &record)?;
    if made {
        return Ok(VolumeStep::Answer(record));
    }
    if now < record.due_at {
        return Ok(VolumeStep::Wait { until: record.due_at });
    }
    usable_source(wish, source.as_ref(), now)?;
    Ok(VolumeStep::Make(record))
}

fn refuse_other_volume(wish: &VolumeWish, record: &VolumeRecord) -> Result<(), Status> {
    let CapacityRange { required_bytes, limit_bytes } = wish.range;
    let exists = |what: String| {
        Err(Status::already_exists(format!("volume {} exists {what}: use another name", wish.name)))
    };
    if record.source != wish.source {
        return exists("with other content".to_owned());
    }
    let has = record.capacity_bytes;
    if has < required_bytes || (limit_bytes > 0 && has > limit_bytes) {
        return exists(format!("with {has} bytes, outside of the requested range"));
    }
    Ok(())
}

/// The least size in bytes of a volume from the wished source, which must be ready.
fn usable_source(
    wish: &VolumeWish,
    source: Option<&SnapshotRecord>,
    now: Timestamp,
) -> Result<Option<i64>, Status> {
    let Some(id) = &wish.source else { return Ok(None) };
    match source {
        None => Err(Status::not_found(format!("snapshot {id} does not exist"))),
        Some(source) if !source.is_ready(now) => {
            Err(Status::unavailable(format!("snapshot {id} is not ready to use: try again later")))
        }
        Some(source) => Ok(Some(source.size_bytes)),
    }
}

/// The nominal size in bytes of a new volume: what is required, or else the least or the default size
/// within the limit.
fn capacity(range: &CapacityRange, least: Option<i64>) -> Result<i64, Status> {
    let CapacityRange { required_bytes, limit_bytes } = *range;
    if required_bytes < 0 || limit_bytes < 0 {
        return Err(Status::invalid_argument("capacity_range is negative"));
    }
    if limit_bytes > 0 && required_bytes > limit_bytes {
        return Err(Status::invalid_argument(format!(
            "capacity_range requires {required_bytes} bytes and limits them to {limit_bytes}"
        )));
    }
    let wanted = match (required_bytes, least) {
        (0, Some(least)) => least,
        (0, None) if limit_bytes > 0 => DEFAULT_CAPACITY_BYTES.min(limit_bytes),
        (0, None) => DEFAULT_CAPACITY_BYTES,
        (required_bytes, _) => required_bytes,
    };
    match least {
        Some(least) if wanted < least || (limit_bytes > 0 && limit_bytes < least) => {
            Err(Status::out_of_range(format!("a volume from this snapshot needs at least {least} bytes")))
        }
        Some(_) | None => Ok(wanted),
    }
}

/// A snapshot as a caller wants it.
#[derive(Debug, Clone)]
pub(super) struct SnapshotWish {
    /// CSI name.
    pub(super) name: String,
    /// The volume it is of; `None` if the caller's id is not of our form, so that no such volume exists.
    pub(super) source: Option<VolumeId>,
    /// The class's faults.
    pub(super) faults: SnapshotFaults,
}

/// What is known about a requested snapshot.
#[derive(Debug, Clone, Default)]
pub(super) struct SnapshotFacts {
    /// Its record, if it was requested before.
    pub(super) record: Option<SnapshotRecord>,
    /// Whether its subvolume exists.
    pub(super) on_disk: bool,
    /// Whether this very call has already seen a record of it.
    pub(super) waited: bool,
    /// The nominal size in bytes of the source volume, if that exists.
    pub(super) source_bytes: Option<i64>,
}

impl SnapshotFacts {
    /// Whether the snapshot exists: a subvolume without a time of cut is the leftover of a crash.
    pub(super) fn is_cut(&self) -> bool {
        self.on_disk && self.record.as_ref().is_some_and(|record| record.cut_at.is_some())
    }
}

/// What to do next about a requested snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum SnapshotStep {
    /// Remember the request.
    Record(SnapshotRecord),
    /// Its time has not come.
    Wait {
        /// When it comes.
        until: Timestamp,
    },
    /// Cut it.
    Cut {
        /// What is to be cut.
        record: SnapshotRecord,
        /// Whether a crash left a subvolume behind whose time of cut is unknown: delete it first.
        discard: bool,
    },
    /// It is cut: answer the caller.
    Answer(SnapshotRecord),
}

/// The next step towards the wished snapshot.
///
/// # Errors
/// `ALREADY_EXISTS` for a snapshot of that name of another volume, `NOT_FOUND` for the volume,
/// `ABORTED` if it was deleted while waiting.
pub(super) fn next_snapshot_step(
    wish: &SnapshotWish,
    facts: SnapshotFacts,
    now: Timestamp,
) -> Result<SnapshotStep, Status> {
    let is_cut = facts.is_cut();
    let SnapshotFacts { record, on_disk, waited, source_bytes } = facts;
    let source = wish.source.as_ref().zip(source_bytes);
    let no_source = || Status::not_found("the source volume does not exist");
    let Some(record) = record else {
        if waited {
            return Err(Status::aborted(format!(
                "snapshot {} was deleted while it was waited for",
                wish.name
            )));
        }
        let (source, size_bytes) = source.ok_or_else(no_source)?;
        return Ok(SnapshotStep::Record(SnapshotRecord {
            id: SnapshotId::of_name(&wish.name),
            name: wish.name.clone(),
            source: source.clone(),
            size_bytes,
            due_at: due(now, wish.faults.cut_delay),
            ready_delay: wish.faults.ready_delay,
            cut_at: None,
        }));
    };
    if wish.source.as_ref() != Some(&record.source) {
        return Err(Status::already_exists(format!(
            "snapshot {} exists of volume {}: use another name",
            wish.name, record.source
        )));
    }
    if is_cut {
        return Ok(SnapshotStep::Answer(record));
    }
    if now < record.due_at {
        return Ok(SnapshotStep::Wait { until: record.due_at });
    }
    source.ok_or_else(no_source)?;
    Ok(SnapshotStep::Cut { record, discard: on_disk })
}

/// Refuses what the driver cannot offer for a volume.
///
/// # Errors
/// `INVALID_ARGUMENT`, saying which capability and why.
pub(super) fn refuse_unsupported(capabilities: &[VolumeCapability]) -> Result<(), Status> {
    if capabilities.is_empty() {
        return Err(Status::invalid_argument("volume capabilities are missing"));
    }
    capabilities.iter().try_for_each(|capability| {
        match &capability.access_type {
            Some(AccessType::Block(_)) => {
                return Err(Status::invalid_argument(
                    "block volumes are not supported: use volumeMode Filesystem",
                ));
            }
            Some(AccessType::Mount(mount)) if !matches!(mount.fs_type.as_str(), "" | "btrfs") => {
                return Err(Status::invalid_argument(format!(
                    "file system {} is not supported: leave csi.storage.k8s.io/fstype out",
                    mount.fs_type
                )));
            }
            Some(AccessType::Mount(mount)) if !mount.mount_flags.is_empty() => {
                return Err(Status::invalid_argument("mount options are not supported"));
            }
            Some(AccessType::Mount(_)) => {}
            None => return Err(Status::invalid_argument("the access type of a capability is missing")),
        }
        match access_mode(capability) {
            Mode::SingleNodeWriter
            | Mode::SingleNodeReaderOnly
            | Mode::SingleNodeSingleWriter
            | Mode::SingleNodeMultiWriter => Ok(()),
            Mode::MultiNodeReaderOnly | Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter => {
                Err(Status::invalid_argument(
                    "a volume lives on one node: access modes of several nodes are not supported",
                ))
            }
            Mode::Unknown => Err(Status::invalid_argument("the access mode of a capability is missing")),
        }
    })
}

/// The capability's access mode; unknown numbers are `Unknown`.
#[must_use]
pub(super) fn access_mode(capability: &VolumeCapability) -> Mode {
    capability.access_mode.map_or(Mode::Unknown, |mode| mode.mode())
}

/// Refuses a volume that shall be usable from other nodes only.
///
/// # Errors
/// `RESOURCE_EXHAUSTED`, naming this driver's node.
pub(super) fn refuse_other_nodes(
    requirement: Option<&TopologyRequirement>,
    node: &str,
) -> Result<(), Status> {
    let Some(TopologyRequirement { requisite, preferred }) = requirement else { return Ok(()) };
    let named = if requisite.is_empty() { preferred } else { requisite };
    let here = |segments: &std::collections::HashMap<String, String>| {
        segments.iter().all(|(key, value)| key == TOPOLOGY_KEY && value == node)
    };
    if named.is_empty() || named.iter().any(|topology| here(&topology.segments)) {
        return Ok(());
    }
    Err(Status::resource_exhausted(format!(
        "this driver makes volumes on node {node} only, and the request names only other nodes"
    )))
}

/// One page of the snapshots, which it sorts by id: those after `token`, at most `most` unless 0. Also
/// the token of the next page, empty after the last: a deletion in between makes no page skip anything.
///
/// # Errors
/// `ABORTED` for a token that this driver never gave out, `INVALID_ARGUMENT` for a negative `most`.
pub(super) fn page_of_snapshots(
    mut snapshots: Vec<SnapshotRecord>,
    token: &str,
    most: i32,
) -> Result<(Vec<SnapshotRecord>, String), Status> {
    let most = usize::try_from(most).map_err(|_| Status::invalid_argument("max_entries is negative"))?;
    snapshots.sort_by(|a, b| a.id.cmp(&b.id));
    if !token.is_empty() {
        let after = SnapshotId::parse(token)
            .ok_or_else(|| Status::aborted("starting_token is not one of this driver: list anew"))?;
        snapshots.retain(|snapshot| snapshot.id > after);
    }
    if most == 0 || snapshots.len() <= most {
        return Ok((snapshots, String::new()));
    }
    snapshots.truncate(most);
    let next = snapshots.last().map(|snapshot| snapshot.id.to_string()).unwrap_or_default();
    Ok((snapshots, next))
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
