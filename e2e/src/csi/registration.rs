//! The kubelet's plugin registration: tells it the driver's name and CSI socket, in place of the
//! node-driver-registrar sidecar. The kubelet itself repeats a registration that failed.
//!
//! The kubelet sends the registration socket's path, percent-encoded, as HTTP/2 `:authority`. The `http`
//! crate below tonic refuses a percent sign in a host but not in a user name,
//! so the socket's file name has an `@`: all before it is then the user name.

use std::path::Path;

use tonic::{Request, Response, Status, async_trait};
use tracing::{info, warn};

use super::DRIVER_NAME;
use super::proto::registration::registration_server::Registration;
use super::proto::registration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};

/// The plugin type of CSI drivers (`CSIPlugin` in k8s.io/kubelet pluginregistration/v1).
const PLUGIN_TYPE: &str = "CSIPlugin";
/// The kubelet wants a CSI version with major number 1, whatever the minor.
const CSI_VERSION: &str = "1.0.0";

/// The registration service.
#[derive(Debug, Clone)]
pub(super) struct RegistrationService {
    endpoint: String,
}

impl RegistrationService {
    /// Registers the CSI socket at this path, as the kubelet sees it.
    #[must_use]
    pub(super) fn new(endpoint: &Path) -> Self {
        Self { endpoint: endpoint.display().to_string() }
    }
}

#[async_trait]
impl Registration for RegistrationService {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: PLUGIN_TYPE.to_owned(),
            name: DRIVER_NAME.to_owned(),
            endpoint: self.endpoint.clone(),
            supported_versions: vec![CSI_VERSION.to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let RegistrationStatus { plugin_registered, error } = request.into_inner();
        if plugin_registered {
            info!("registered with the kubelet");
        } else {
            warn!(error, "the kubelet refused the registration");
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
