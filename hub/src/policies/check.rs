//! Judges one fleet policy as the API servers of its clusters and their agents would: by the schema, without fields that it
//! does not have, by the CEL rules, and by what schedules and selectors mean. Pure.
//!
//! What only a cluster knows, its hook profiles and what it lets the hub do, its agent judges.

use std::sync::LazyLock;

use jsonschema::error::ValidationErrorKind;
use jsonschema::{ValidationError, Validator};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::CustomResourceExt;
use kube::core::Selector;
use serde_json::{Value, json};
use sts_backup_api::fleet::FleetPolicy;
use sts_backup_api::schedule::{ScheduleError, Timetable};

use super::document::{Document, Flaw};

/// A fleet policy that can be used.
#[derive(Debug)]
pub(super) struct Checked {
    pub(super) name: String,
    pub(super) clusters: Selector,
    /// The spec of the `StatefulSetBackupPolicy`, as it is written: whatever else were in it would be the hub's.
    pub(super) policy: Value,
}

/// What a document may say, in two forms of one schema.
struct Schema {
    /// With the CEL rules.
    open: Value,
    closed: Value,
    validator: Validator,
}

static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
    let crd = FleetPolicy::crd();
    let schema = crd.spec.versions.into_iter().next().and_then(|version| version.schema);
    let schema = schema.and_then(|schema| schema.open_api_v3_schema).expect("a CRD has a schema");
    let mut open = serde_json::to_value(schema).expect("a schema is JSON");
    let own = [
        ("apiVersion", json!({ "const": "hub.sts-backup.io/v1alpha1" })),
        ("kind", json!({ "const": "FleetPolicy" })),
        (
            "metadata",
            json!({
                "type": "object",
                "required": ["name"],
                "properties": { "name": {
                    "type": "string",
                    // A label value in the clusters, and an object's name.
                    "maxLength": 63,
                    "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
                } },
            }),
        ),
    ];
    for (field, schema) in own {
        open["properties"][field] = schema;
    }
    open["required"] = json!(["apiVersion", "kind", "metadata", "spec"]);
    let mut closed = open.clone();
    close(&mut closed);
    let validator = jsonschema::draft7::new(&closed).expect("the schema is one");
    Schema { open, closed, validator }
});

/// Lets an object have no fields but those that are known, and a set no element twice.
fn close(schema: &mut Value) {
    let Value::Object(fields) = schema else { return };
    if fields.get("x-kubernetes-list-type").is_some_and(|kind| kind == "set") {
        fields.insert("uniqueItems".to_owned(), Value::Bool(true));
    }
    if fields.contains_key("properties") && !fields.contains_key("x-kubernetes-preserve-unknown-fields") {
        fields.entry("additionalProperties").or_insert(Value::Bool(false));
    }
    for (keyword, schema) in fields.iter_mut() {
        match (keyword.as_str(), schema) {
            ("properties", Value::Object(properties)) => properties.values_mut().for_each(close),
            ("items" | "additionalProperties", schema) => close(schema),
            _ => {}
        }
    }
}

/// The policy of a document, if everything in it can be used; or all that cannot.
pub(super) fn check(document: &Document) -> Result<Checked, Vec<Flaw>> {
    let flaw = |pointer: &str, message: String| Flaw { place: document.place(pointer), message };
    let at = |pointer: &str, message: &str| flaw(pointer, format!("{}{message}", named(pointer)));

    let schema = &*SCHEMA;
    let misfits: Vec<_> =
        schema.validator.iter_errors(&document.value).flat_map(|error| misfits(&error)).collect();
    if !misfits.is_empty() {
        return Err(misfits.iter().map(|(pointer, message)| at(pointer, message)).collect());
    }
    if let Err(broken) = kube_cel::Validator::new().validate(&schema.open, &document.value, None) {
        let flaws = broken.into_vec().into_iter().map(|broken| {
            let pointer = format!("/{}", broken.field_path.replace(['.', '['], "/").replace(']', ""));
            at(&pointer, &broken.message)
        });
        return Err(flaws.collect());
    }
    let policy: FleetPolicy =
        serde_json::from_value(document.value.clone()).map_err(|err| vec![at("", &err.to_string())])?;

    let mut flaws = Vec::new();
    let mut selector = |pointer: &str, selector: Option<&LabelSelector>| {
        let read = Selector::try_from(selector.cloned().unwrap_or_default());
        read.map_err(|err| flaws.push(at(pointer, &format!("it cannot be used: {err}; correct it")))).ok()
    };
    let (name, spec) = (policy.metadata.name.unwrap_or_default(), policy.spec);
    let clusters = selector("/spec/clusterSelector", spec.cluster_selector.as_ref());
    selector("/spec/policy/namespaceSelector", spec.policy.namespace_selector.as_ref());
    selector("/spec/policy/statefulSetSelector", spec.policy.stateful_set_selector.as_ref());
    if let Err(err) = Timetable::of(&spec.policy.template.spec_for(""), "") {
        let field = match &err {
            ScheduleError::Schedule { .. } => "schedule",
            ScheduleError::TimeZone { .. } => "timeZone",
            ScheduleError::Spread { .. } => "spread",
        };
        // The text begins with the field's name.
        flaws.push(flaw(
            &format!("/spec/policy/template/spec/{field}"),
            format!("spec.policy.template.spec.{err}"),
        ));
    }
    match clusters {
        Some(clusters) if flaws.is_empty() => {
            Ok(Checked { name, clusters, policy: document.value["spec"]["policy"].clone() })
        }
        Some(_) | None => Err(flaws),
    }
}

/// What does not fit the schema: where, and what to do.
fn misfits(error: &ValidationError<'_>) -> Vec<(String, String)> {
    let pointer = error.instance_path().as_str().to_owned();
    #[expect(clippy::wildcard_enum_match_arm, reason = "the library has a text for every kind")]
    match error.kind() {
        ValidationErrorKind::AdditionalProperties { unexpected } => {
            let known = known_fields(error.evaluation_path().as_str());
            let unknown = unexpected.iter().map(|field| {
                let field = format!("{pointer}/{}", field.replace('~', "~0").replace('/', "~1"));
                (field, format!("there is no such field, only {known}"))
            });
            unknown.collect()
        }
        ValidationErrorKind::Required { property } => {
            let property = property.as_str().unwrap_or_default();
            vec![(format!("{pointer}/{property}"), "it is required; write it".to_owned())]
        }
        _ => vec![(pointer, format!("{error}; correct it"))],
    }
}

/// The fields that the schema has where a rule of it is.
fn known_fields(rule: &str) -> String {
    let schema = rule.rsplit_once('/').and_then(|(parent, _)| SCHEMA.closed.pointer(parent));
    let fields = schema.and_then(|schema| schema["properties"].as_object());
    let fields: Vec<_> = fields.into_iter().flat_map(|fields| fields.keys().map(String::as_str)).collect();
    fields.join(", ")
}

/// A field as people write it.
fn named(pointer: &str) -> String {
    let names = pointer.trim_start_matches('/').replace('/', ".").replace("~1", "/").replace("~0", "~");
    if names.is_empty() { names } else { format!("{names}: ") }
}
