//! CSI's Controller service: creates, deletes and lists volumes and snapshots. It gathers facts, lets
//! [`decide`](super::decide) choose, and does the steps; it must not decide itself.
//!
//! A call holds an object's lock only while it looks and acts, not while it waits for a delay, so the
//! driver never holds up a deletion; csi-snapshotter itself asks for none while its creation is outstanding.
//! An action that has begun goes on if the caller gives up.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;
use tonic::{Request, Response, Status, async_trait};

use super::decide::{
    SnapshotStep, SnapshotWish, VolumeStep, VolumeWish, next_snapshot_step, next_volume_step,
    page_of_snapshots, refuse_other_nodes, refuse_unsupported,
};
use super::faults::{CallCounters, CallKind, CallRange, SnapshotFaults, VolumeFaults};
use super::proto::csi::controller_server::Controller;
use super::proto::csi::controller_service_capability::{self, Rpc, rpc};
use super::proto::csi::list_snapshots_response::Entry;
use super::proto::csi::validate_volume_capabilities_response::Confirmed;
use super::proto::csi::volume_content_source::{SnapshotSource, Type as SourceType};
use super::proto::csi::{
    ControllerGetCapabilitiesRequest, ControllerGetCapabilitiesResponse, ControllerServiceCapability,
    CreateSnapshotRequest, CreateSnapshotResponse, CreateVolumeRequest, CreateVolumeResponse,
    DeleteSnapshotRequest, DeleteSnapshotResponse, DeleteVolumeRequest, DeleteVolumeResponse,
    ListSnapshotsRequest, ListSnapshotsResponse, Snapshot, ValidateVolumeCapabilitiesRequest,
    ValidateVolumeCapabilitiesResponse, Volume, VolumeContentSource,
};
use super::records::{SnapshotId, SnapshotRecord, VolumeId, VolumeRecord};
use super::steps::{
    cut_snapshot, delete_snapshot, delete_volume, make_volume, record_snapshot, record_volume,
    snapshot_facts, to_the_end, volume_facts,
};
use super::{Driver, blocking, clock, finish, node};

/// The Controller service.
#[derive(Debug)]
pub(super) struct ControllerService {
    driver: Arc<Driver>,
    calls: CallCounters,
}

impl ControllerService {
    /// Serves the driver's volumes and snapshots.
    #[must_use]
    pub(super) fn new(driver: Arc<Driver>) -> Self {
        Self { driver, calls: CallCounters::default() }
    }

    fn fail_on_demand(
        &self,
        kind: CallKind,
        parameters: &HashMap<String, String>,
        failing: Option<CallRange>,
    ) -> Result<(), Status> {
        let number = self.calls.count(kind, parameters);
        if failing.is_some_and(|failing| failing.contains(number)) {
            return Err(Status::internal(format!("call {number} fails on demand: parameter failOnCall")));
        }
        Ok(())
    }

    async fn create_volume(&self, request: CreateVolumeRequest) -> Result<CreateVolumeResponse, Status> {
        let CreateVolumeRequest {
            name,
            capacity_range,
            volume_capabilities,
            parameters,
            volume_content_source,
            accessibility_requirements,
        } = request;
        required("name", &name)?;
        refuse_unsupported(&volume_capabilities)?;
        let faults = VolumeFaults::parse(&parameters)?;
        let source = wanted_source(volume_content_source)?;
        refuse_other_nodes(accessibility_requirements.as_ref(), &self.driver.node_name)?;
        let id = VolumeId::of_name(&name);
        let wish = VolumeWish { name, range: capacity_range.unwrap_or_default(), source, faults };

        let mut waited = false;
        loop {
            let driver = Arc::clone(&self.driver);
            let turn = driver.locks.lock(&id).await;
            let facts = volume_facts(&driver, &id, wish.source.clone(), waited).await?;
            if !waited && !facts.made {
                self.fail_on_demand(CallKind::Volume, &parameters, wish.faults.fail_on_call)?;
            }
            match next_volume_step(&wish, facts, clock::now())? {
                VolumeStep::Record(record) => to_the_end(turn, record_volume(driver, record)).await?,
                VolumeStep::Wait { until } => {
                    drop(turn);
                    sleep_until(until).await;
                }
                VolumeStep::Make(record) => to_the_end(turn, make_volume(driver, record)).await?,
                VolumeStep::Answer(record) => {
                    return Ok(CreateVolumeResponse { volume: Some(volume(&driver, record)) });
                }
            }
            waited = true;
        }
    }

    async fn delete_volume(&self, request: DeleteVolumeRequest) -> Result<DeleteVolumeResponse, Status> {
        let DeleteVolumeRequest { volume_id } = request;
        required("volume id", &volume_id)?;
        if let Some(id) = VolumeId::parse(&volume_id) {
            let turn = self.driver.locks.lock(&id).await;
            to_the_end(turn, delete_volume(Arc::clone(&self.driver), id)).await?;
        }
        Ok(DeleteVolumeResponse {})
    }

    async fn create_snapshot(
        &self,
        request: CreateSnapshotRequest,
    ) -> Result<CreateSnapshotResponse, Status> {
        let CreateSnapshotRequest { source_volume_id, name, parameters } = request;
        required("name", &name)?;
        required("source volume id", &source_volume_id)?;
        let faults = SnapshotFaults::parse(&parameters)?;
        let id = SnapshotId::of_name(&name);
        let wish = SnapshotWish { name, source: VolumeId::parse(&source_volume_id), faults };

        let mut waited = false;
        loop {
            let driver = Arc::clone(&self.driver);
            let turn = driver.locks.lock(&id).await;
            let facts = snapshot_facts(&driver, &id, wish.source.clone(), waited).await?;
            if !waited && !facts.is_cut() {
                self.fail_on_demand(CallKind::Snapshot, &parameters, wish.faults.fail_on_call)?;
            }
            let now = clock::now();
            match next_snapshot_step(&wish, facts, now)? {
                SnapshotStep::Record(record) => to_the_end(turn, record_snapshot(driver, record)).await?,
                SnapshotStep::Wait { until } => {
                    drop(turn);
                    sleep_until(until).await;
                }
                SnapshotStep::Cut { record, discard } => {
                    to_the_end(turn, cut_snapshot(driver, record, discard)).await?;
                }
                SnapshotStep::Answer(record) => {
                    return Ok(CreateSnapshotResponse { snapshot: Some(snapshot(record, now)) });
                }
            }
            waited = true;
        }
    }

    async fn delete_snapshot(
        &self,
        request: DeleteSnapshotRequest,
    ) -> Result<DeleteSnapshotResponse, Status> {
        let DeleteSnapshotRequest { snapshot_id } = request;
        required("snapshot id", &snapshot_id)?;
        if let Some(id) = SnapshotId::parse(&snapshot_id) {
            let turn = self.driver.locks.lock(&id).await;
            to_the_end(turn, delete_snapshot(Arc::clone(&self.driver), id)).await?;
        }
        Ok(DeleteSnapshotResponse {})
    }

    async fn list_snapshots(&self, request: ListSnapshotsRequest) -> Result<ListSnapshotsResponse, Status> {
        let ListSnapshotsRequest { max_entries, starting_token, source_volume_id, snapshot_id } = request;
        let mut records = blocking(&self.driver, |driver| {
            let mut records = driver.snapshots.list()?;
            records.retain(|record| record.cut_at.is_some() && driver.pool.has_snapshot(&record.id));
            Ok(records)
        })
        .await?;
        records.retain(|record| {
            (source_volume_id.is_empty() || record.source.as_ref() == source_volume_id)
                && (snapshot_id.is_empty() || record.id.as_ref() == snapshot_id)
        });
        let (records, next_token) = page_of_snapshots(records, &starting_token, max_entries)?;
        let now = clock::now();
        let entries =
            records.into_iter().map(|record| Entry { snapshot: Some(snapshot(record, now)) }).collect();
        Ok(ListSnapshotsResponse { entries, next_token })
    }

    async fn validate(
        &self,
        request: ValidateVolumeCapabilitiesRequest,
    ) -> Result<ValidateVolumeCapabilitiesResponse, Status> {
        let ValidateVolumeCapabilitiesRequest { volume_id, volume_context, volume_capabilities, parameters } =
            request;
        required("volume id", &volume_id)?;
        if volume_capabilities.is_empty() {
            return Err(Status::invalid_argument("volume capabilities are missing"));
        }
        let id = VolumeId::parse(&volume_id);
        let exists =
            blocking(&self.driver, move |driver| Ok(id.is_some_and(|id| driver.pool.has_volume(&id))))
                .await?;
        if !exists {
            return Err(Status::not_found(format!("volume {volume_id} does not exist")));
        }
        let (confirmed, message) = match refuse_unsupported(&volume_capabilities) {
            Ok(()) => (Some(Confirmed { volume_context, volume_capabilities, parameters }), String::new()),
            Err(refusal) => (None, refusal.message().to_owned()),
        };
        Ok(ValidateVolumeCapabilitiesResponse { confirmed, message })
    }
}

fn required(what: &str, value: &str) -> Result<(), Status> {
    if value.is_empty() { Err(Status::invalid_argument(format!("{what} is missing"))) } else { Ok(()) }
}

fn wanted_source(source: Option<VolumeContentSource>) -> Result<Option<SnapshotId>, Status> {
    let Some(source) = source else { return Ok(None) };
    match source.r#type {
        Some(SourceType::Snapshot(SnapshotSource { snapshot_id })) => {
            let not_found = || Status::not_found(format!("snapshot {snapshot_id} does not exist"));
            required("snapshot id", &snapshot_id)?;
            SnapshotId::parse(&snapshot_id).ok_or_else(not_found).map(Some)
        }
        Some(SourceType::Volume(_)) => {
            Err(Status::invalid_argument("cloning volumes is not supported: use a snapshot of the volume"))
        }
        None => Err(Status::invalid_argument("the type of the volume's content source is missing")),
    }
}

async fn sleep_until(until: Timestamp) {
    let left = clock::now().duration_until(until);
    // Already past: no wait.
    tokio::time::sleep(left.try_into().unwrap_or_default()).await;
}

fn volume(driver: &Driver, record: VolumeRecord) -> Volume {
    let VolumeRecord { id, name: _, capacity_bytes, source, due_at: _ } = record;
    let content_source = source.map(|id| VolumeContentSource {
        r#type: Some(SourceType::Snapshot(SnapshotSource { snapshot_id: id.to_string() })),
    });
    Volume {
        capacity_bytes,
        volume_id: id.to_string(),
        content_source,
        accessible_topology: vec![node::this_node(driver)],
    }
}

fn snapshot(record: SnapshotRecord, now: Timestamp) -> Snapshot {
    let ready_to_use = record.is_ready(now);
    let SnapshotRecord { id, name: _, source, size_bytes, due_at: _, ready_delay: _, cut_at } = record;
    Snapshot {
        size_bytes,
        snapshot_id: id.to_string(),
        source_volume_id: source.to_string(),
        creation_time: cut_at.map(|time| prost_types::Timestamp {
            seconds: time.as_second(),
            nanos: time.subsec_nanosecond(),
        }),
        ready_to_use,
    }
}

#[async_trait]
impl Controller for ControllerService {
    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<CreateVolumeResponse>, Status> {
        finish("CreateVolume", ControllerService::create_volume(self, request.into_inner()).await)
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        finish("DeleteVolume", ControllerService::delete_volume(self, request.into_inner()).await)
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<ValidateVolumeCapabilitiesResponse>, Status> {
        finish("ValidateVolumeCapabilities", ControllerService::validate(self, request.into_inner()).await)
    }

    async fn create_snapshot(
        &self,
        request: Request<CreateSnapshotRequest>,
    ) -> Result<Response<CreateSnapshotResponse>, Status> {
        finish("CreateSnapshot", ControllerService::create_snapshot(self, request.into_inner()).await)
    }

    async fn delete_snapshot(
        &self,
        request: Request<DeleteSnapshotRequest>,
    ) -> Result<Response<DeleteSnapshotResponse>, Status> {
        finish("DeleteSnapshot", ControllerService::delete_snapshot(self, request.into_inner()).await)
    }

    async fn list_snapshots(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Result<Response<ListSnapshotsResponse>, Status> {
        finish("ListSnapshots", ControllerService::list_snapshots(self, request.into_inner()).await)
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<ControllerGetCapabilitiesResponse>, Status> {
        let capabilities =
            [rpc::Type::CreateDeleteVolume, rpc::Type::CreateDeleteSnapshot, rpc::Type::ListSnapshots]
                .into_iter()
                .map(|call| ControllerServiceCapability {
                    r#type: Some(controller_service_capability::Type::Rpc(Rpc { r#type: call.into() })),
                })
                .collect();
        Ok(Response::new(ControllerGetCapabilitiesResponse { capabilities }))
    }
}
