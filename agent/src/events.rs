//! Kubernetes Events about our objects.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::PostParams;
use kube::runtime::events::Reporter;
use kube::{Api, Client};
use sts_backup_service::{clock, telemetry};
use tracing::{debug, warn};

/// The longest note that the API server admits in an Event, bytes.
const MAX_NOTE: usize = 1024;

/// How long an Event may take, also at the end of the process: it is not worth more.
const EVENT_TIMEOUT: Duration = Duration::from_secs(3);

/// Where Events about objects without a namespace are.
const CLUSTER_NAMESPACE: &str = "default";

/// What an Event says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Note {
    /// `Normal` or `Warning`.
    pub(crate) kind: &'static str,
    pub(crate) reason: &'static str,
    pub(crate) action: &'static str,
    pub(crate) message: String,
}

impl Note {
    pub(crate) fn normal(reason: &'static str, action: &'static str, message: String) -> Self {
        Self { kind: "Normal", reason, action, message }
    }

    pub(crate) fn warning(reason: &'static str, action: &'static str, message: String) -> Self {
        Self { kind: "Warning", reason, action, message }
    }
}

/// Publishes an Event. Each is an object of its own: kube's recorder would count the next one of the same reason as a
/// repetition, and keep the first one's words.
pub(crate) async fn publish(client: Client, reporter: &Reporter, about: ObjectReference, note: Note) {
    let Note { kind, reason, action, mut message } = note;
    message.truncate(message.floor_char_boundary(MAX_NOTE));
    let namespace = about.namespace.clone().unwrap_or_else(|| CLUSTER_NAMESPACE.to_owned());
    let event = Event {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", about.name.as_deref().unwrap_or_default())),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(clock::now())),
        type_: Some(kind.to_owned()),
        reason: Some(reason.to_owned()),
        action: Some(action.to_owned()),
        note: Some(message),
        regarding: Some(about),
        reporting_controller: Some(reporter.controller.clone()),
        reporting_instance: reporter.instance.clone(),
        ..Event::default()
    };
    let events: Api<Event> = Api::namespaced(client, &namespace);
    let created = tokio::time::timeout(EVENT_TIMEOUT, events.create(&PostParams::default(), &event)).await;
    match created {
        Ok(Ok(_)) | Err(_) => {}
        // As in a namespace that is being deleted.
        Ok(Err(kube::Error::Api(status))) if status.code == 403 || status.code == 404 => {
            debug!(reason, "event not published");
        }
        Ok(Err(err)) => warn!(error = %telemetry::chain(&err), reason, "event not published"),
    }
}
