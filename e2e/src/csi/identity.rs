//! CSI's Identity service: what the driver is and which services it has. Keeps no state.

use tonic::{Request, Response, Status, async_trait};

use super::DRIVER_NAME;
use super::proto::csi::identity_server::Identity;
use super::proto::csi::plugin_capability::{Service, Type, service};
use super::proto::csi::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    PluginCapability, ProbeRequest, ProbeResponse,
};

/// The Identity service.
#[derive(Debug, Clone, Copy)]
pub(super) struct IdentityService;

#[async_trait]
impl Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: DRIVER_NAME.to_owned(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let capabilities = [service::Type::ControllerService, service::Type::VolumeAccessibilityConstraints]
            .into_iter()
            .map(|service| PluginCapability {
                r#type: Some(Type::Service(Service { r#type: service.into() })),
            })
            .collect();
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    /// Always ready: the driver serves only once its pool is mounted.
    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        Ok(Response::new(ProbeResponse { ready: Some(true) }))
    }
}
