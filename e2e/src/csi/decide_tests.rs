//! Tests of the driver's decisions; no btrfs needed.

use std::time::Duration;

use tonic::Code;

use super::super::faults::ReadyDelay;
use super::super::proto::csi::Topology;
use super::super::proto::csi::volume_capability::{AccessMode, BlockVolume, MountVolume};
use super::*;

const GIB: i64 = 1 << 30;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + seconds).unwrap()
}

fn volume_wish() -> VolumeWish {
    let faults = VolumeFaults { provision_delay: Duration::from_secs(30), fail_on_call: None };
    VolumeWish { name: "pvc-1".to_owned(), range: CapacityRange::default(), source: None, faults }
}

fn required(bytes: i64) -> CapacityRange {
    CapacityRange { required_bytes: bytes, limit_bytes: 0 }
}

fn volume_record(wish: &VolumeWish) -> VolumeRecord {
    VolumeRecord {
        id: VolumeId::of_name(&wish.name),
        name: wish.name.clone(),
        capacity_bytes: GIB,
        source: wish.source.clone(),
        due_at: at(30),
    }
}

fn snapshot_wish() -> SnapshotWish {
    let ready_delay = ReadyDelay::After(Duration::from_mins(1));
    let faults = SnapshotFaults { cut_delay: Duration::from_secs(10), ready_delay, fail_on_call: None };
    SnapshotWish { name: "snapshot-1".to_owned(), source: Some(VolumeId::of_name("pvc-1")), faults }
}

fn snapshot_record(cut_at: Option<Timestamp>) -> SnapshotRecord {
    SnapshotRecord {
        id: SnapshotId::of_name("snapshot-1"),
        name: "snapshot-1".to_owned(),
        source: VolumeId::of_name("pvc-1"),
        size_bytes: GIB,
        due_at: at(10),
        ready_delay: ReadyDelay::After(Duration::from_mins(1)),
        cut_at,
    }
}

#[test]
fn the_first_call_records_its_time_and_the_delay_counts_from_it() {
    let wish = volume_wish();
    let step = next_volume_step(&wish, VolumeFacts::default(), at(0)).unwrap();
    let record = volume_record(&wish);
    assert_eq!(step, VolumeStep::Record(record.clone()));
    let facts = || VolumeFacts { record: Some(record.clone()), ..VolumeFacts::default() };
    assert_eq!(next_volume_step(&wish, facts(), at(29)).unwrap(), VolumeStep::Wait { until: at(30) });
    assert_eq!(next_volume_step(&wish, facts(), at(30)).unwrap(), VolumeStep::Make(record.clone()));
}

#[test]
fn a_repeated_call_for_a_made_volume_is_answered_even_if_its_source_is_gone() {
    let wish = VolumeWish { source: Some(SnapshotId::of_name("s")), ..volume_wish() };
    let record = volume_record(&wish);
    let facts = VolumeFacts { record: Some(record.clone()), made: true, ..VolumeFacts::default() };
    assert_eq!(next_volume_step(&wish, facts, at(0)).unwrap(), VolumeStep::Answer(record));
}

#[test]
fn the_same_name_with_another_size_or_source_is_refused() {
    let with_source = VolumeWish { source: Some(SnapshotId::of_name("s")), ..volume_wish() };
    let too_big = VolumeWish { range: required(GIB + 1), ..volume_wish() };
    let limit = CapacityRange { required_bytes: 0, limit_bytes: GIB - 1 };
    let too_small = VolumeWish { range: limit, ..volume_wish() };
    for wish in [with_source, too_big, too_small] {
        let record = Some(volume_record(&volume_wish()));
        let facts = VolumeFacts { record, made: true, ..VolumeFacts::default() };
        assert_eq!(next_volume_step(&wish, facts, at(0)).unwrap_err().code(), Code::AlreadyExists);
    }
}

#[test]
fn an_object_deleted_while_a_call_waits_for_it_is_not_made_again() {
    let facts = VolumeFacts { waited: true, ..VolumeFacts::default() };
    assert_eq!(next_volume_step(&volume_wish(), facts, at(0)).unwrap_err().code(), Code::Aborted);
    let facts = SnapshotFacts { waited: true, source_bytes: Some(GIB), ..SnapshotFacts::default() };
    assert_eq!(next_snapshot_step(&snapshot_wish(), facts, at(0)).unwrap_err().code(), Code::Aborted);
}

#[test]
fn a_volume_needs_a_source_that_exists_and_is_ready() {
    let wish = VolumeWish { source: Some(SnapshotId::of_name("snapshot-1")), ..volume_wish() };
    let step = |source, now| {
        next_volume_step(&wish, VolumeFacts { source, ..VolumeFacts::default() }, now)
            .map(|step| matches!(step, VolumeStep::Record(_)))
            .map_err(|refusal| refusal.code())
    };
    assert_eq!(step(None, at(100)), Err(Code::NotFound));
    assert_eq!(step(Some(snapshot_record(Some(at(10)))), at(69)), Err(Code::Unavailable));
    assert_eq!(step(Some(snapshot_record(Some(at(10)))), at(70)), Ok(true));
}

#[test]
fn the_size_of_a_volume_follows_request_limit_and_source() {
    let range = |required_bytes, limit_bytes| CapacityRange { required_bytes, limit_bytes };
    let table = [
        (range(0, 0), None, Ok(DEFAULT_CAPACITY_BYTES)),
        (range(5, 0), None, Ok(5)),
        (range(0, 7), None, Ok(7)),
        (range(0, 2 * GIB), None, Ok(DEFAULT_CAPACITY_BYTES)),
        (range(5, 7), None, Ok(5)),
        (range(8, 7), None, Err(Code::InvalidArgument)),
        (range(-1, 0), None, Err(Code::InvalidArgument)),
        (range(0, -1), None, Err(Code::InvalidArgument)),
        (range(0, 0), Some(2 * GIB), Ok(2 * GIB)),
        (range(3 * GIB, 0), Some(2 * GIB), Ok(3 * GIB)),
        (range(GIB, 0), Some(2 * GIB), Err(Code::OutOfRange)),
        (range(0, GIB), Some(2 * GIB), Err(Code::OutOfRange)),
    ];
    for (range, least, expected) in table {
        let got = capacity(&range, least).map_err(|refusal| refusal.code());
        assert_eq!(got, expected, "{range:?} from {least:?}");
    }
}

#[test]
fn a_snapshot_is_recorded_then_cut_when_due_and_then_answered() {
    let wish = snapshot_wish();
    let facts = |record, on_disk| SnapshotFacts { record, on_disk, waited: false, source_bytes: Some(GIB) };
    let step = |record, on_disk, now| next_snapshot_step(&wish, facts(record, on_disk), now).unwrap();
    let uncut = snapshot_record(None);
    assert_eq!(step(None, false, at(0)), SnapshotStep::Record(uncut.clone()));
    assert_eq!(step(Some(uncut.clone()), false, at(9)), SnapshotStep::Wait { until: at(10) });
    let cut = SnapshotStep::Cut { record: uncut.clone(), discard: false };
    assert_eq!(step(Some(uncut), false, at(10)), cut);
    let cut = snapshot_record(Some(at(10)));
    assert_eq!(step(Some(cut.clone()), true, at(11)), SnapshotStep::Answer(cut));
}

#[test]
fn a_subvolume_whose_time_of_cut_a_crash_lost_is_cut_anew() {
    let facts = SnapshotFacts {
        record: Some(snapshot_record(None)),
        on_disk: true,
        waited: false,
        source_bytes: Some(GIB),
    };
    assert!(!facts.is_cut());
    let step = next_snapshot_step(&snapshot_wish(), facts, at(20)).unwrap();
    assert_eq!(step, SnapshotStep::Cut { record: snapshot_record(None), discard: true });
}

#[test]
fn a_cut_snapshot_is_answered_even_if_its_volume_is_gone() {
    let record = snapshot_record(Some(at(10)));
    let facts = SnapshotFacts { record: Some(record.clone()), on_disk: true, ..SnapshotFacts::default() };
    assert!(facts.is_cut());
    assert_eq!(next_snapshot_step(&snapshot_wish(), facts, at(20)).unwrap(), SnapshotStep::Answer(record));
}

#[test]
fn a_snapshot_needs_a_volume_and_its_name_means_one_volume() {
    let code = |wish: &SnapshotWish, facts| next_snapshot_step(wish, facts, at(20)).unwrap_err().code();
    assert_eq!(code(&snapshot_wish(), SnapshotFacts::default()), Code::NotFound);
    let uncut = SnapshotFacts { record: Some(snapshot_record(None)), ..SnapshotFacts::default() };
    assert_eq!(code(&snapshot_wish(), uncut.clone()), Code::NotFound);
    for source in [None, Some(VolumeId::of_name("pvc-2"))] {
        let other = SnapshotWish { source, ..snapshot_wish() };
        assert_eq!(code(&other, uncut.clone()), Code::AlreadyExists);
    }
}

#[test]
fn only_file_systems_on_one_node_are_offered() {
    let mount = |mode: Mode| VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume::default())),
        access_mode: Some(AccessMode { mode: mode.into() }),
    };
    let writer = mount(Mode::SingleNodeWriter);
    assert!(refuse_unsupported(std::slice::from_ref(&writer)).is_ok());
    assert!(refuse_unsupported(&[writer.clone(), mount(Mode::SingleNodeReaderOnly)]).is_ok());
    let ext4 = MountVolume { fs_type: "ext4".to_owned(), mount_flags: vec![] };
    let sync = MountVolume { fs_type: String::new(), mount_flags: vec!["sync".to_owned()] };
    let table = [
        vec![],
        vec![writer.clone(), mount(Mode::MultiNodeMultiWriter)],
        vec![VolumeCapability { access_mode: None, ..writer.clone() }],
        vec![VolumeCapability { access_type: None, ..writer.clone() }],
        vec![VolumeCapability { access_type: Some(AccessType::Block(BlockVolume {})), ..writer.clone() }],
        vec![VolumeCapability { access_type: Some(AccessType::Mount(ext4)), ..writer.clone() }],
        vec![VolumeCapability { access_type: Some(AccessType::Mount(sync)), ..writer }],
    ];
    for capabilities in table {
        let refusal = refuse_unsupported(&capabilities).unwrap_err();
        assert_eq!(refusal.code(), Code::InvalidArgument, "{capabilities:?}");
    }
}

#[test]
fn a_volume_for_other_nodes_only_is_refused() {
    let topology =
        |key: &str, value: &str| Topology { segments: [(key.to_owned(), value.to_owned())].into() };
    let here = || topology(TOPOLOGY_KEY, "n1");
    let other = || topology(TOPOLOGY_KEY, "n2");
    let table = [
        (vec![], vec![], true),
        (vec![here()], vec![other()], true),
        (vec![other(), here()], vec![], true),
        (vec![], vec![other()], false),
        (vec![other()], vec![], false),
        (vec![topology("zone", "n1")], vec![], false),
    ];
    for (requisite, preferred, accepted) in table {
        let requirement = TopologyRequirement { requisite, preferred };
        let answer = refuse_other_nodes(Some(&requirement), "n1").map_err(|refusal| refusal.code());
        let expected = if accepted { Ok(()) } else { Err(Code::ResourceExhausted) };
        assert_eq!(answer, expected, "{requirement:?}");
    }
    assert!(refuse_other_nodes(None, "n1").is_ok());
}

#[test]
fn pages_show_every_snapshot_once_even_if_one_is_deleted_in_between() {
    let snapshot = |name: &str| SnapshotRecord { id: SnapshotId::of_name(name), ..snapshot_record(None) };
    let mut all = ["a", "b", "c", "d"].map(snapshot).to_vec();
    let (first, token) = page_of_snapshots(all.clone(), "", 2).unwrap();
    assert_eq!(first.len(), 2);
    // The last one of the first page, which the token names.
    all.retain(|snapshot| snapshot.id != first[1].id);
    let (second, end) = page_of_snapshots(all, &token, 2).unwrap();
    assert_eq!((second.len(), end.as_str()), (2, ""));
    assert!(second.iter().all(|snapshot| snapshot.id > first[1].id));
}

#[test]
fn a_foreign_page_token_and_a_negative_page_size_are_refused() {
    let code = |token, most| page_of_snapshots(vec![], token, most).unwrap_err().code();
    assert_eq!(code("5", 0), Code::Aborted);
    assert_eq!(code("", -1), Code::InvalidArgument);
}
