//! `StatefulSetBackupPolicy`: which `StatefulSets` are to be backed up, how, and what has come of it.
//!
//! The schema and the CEL rules of the CRD are made from these types (`crdgen`). A field is here only when the
//! agent honours it.

#![allow(clippy::doc_markdown, reason = "kubectl explain shows these texts, and backticks as they are")]
#![allow(unreachable_pub, reason = "KubeSchema repeats the struct inside a function")]

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backup::{SPAN, Span, StatefulSetBackupSpec, StatefulSetRef};

/// How many names a list of the status has, the first ones by namespace and name.
pub const MAX_LISTED_NAMES: usize = 20;

/// How many other policies the status names.
pub const MAX_LISTED_CONFLICTS: usize = 20;

/// Backs up all StatefulSets that it selects: each by a StatefulSetBackup in its namespace, made from a template.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "backup.sts-backup.io",
    version = "v1alpha1",
    kind = "StatefulSetBackupPolicy",
    plural = "statefulsetbackuppolicies",
    status = "StatefulSetBackupPolicyStatus",
    shortname = "stsbp",
    category = "backup",
    doc = "Backs up all StatefulSets that it selects: each by a StatefulSetBackup in its namespace, made from a template.",
    printcolumn(name = "Matched", type_ = "integer", json_path = ".status.matched"),
    printcolumn(name = "Protected", type_ = "integer", json_path = ".status.protected"),
    printcolumn(name = "Overdue", type_ = "integer", json_path = ".status.overdue"),
    printcolumn(name = "RPO", type_ = "string", json_path = ".spec.rpo"),
    printcolumn(name = "Schedule", type_ = "string", json_path = ".spec.template.spec.schedule"),
    printcolumn(name = "Ready", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].status"#),
    printcolumn(name = "Priority", type_ = "integer", json_path = ".spec.priority", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("self.metadata.name.size() <= 63")
        .message("the name is a label value of every backup: use at most 63 characters"),
)]
#[cfg_attr(test, kube(cel))]
#[serde(rename_all = "camelCase")]
pub struct StatefulSetBackupPolicySpec {
    /// The namespaces, by their labels; absent or empty: all of them. Each has the label kubernetes.io/metadata.name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace_selector: Option<LabelSelector>,

    /// The StatefulSets in these namespaces, by their labels; absent or empty: all of them. Those without
    /// volumeClaimTemplates are never selected, nor are those that carry the annotation
    /// backup.sts-backup.io/exclude: "true", or whose namespace does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stateful_set_selector: Option<LabelSelector>,

    /// StatefulSets that are left out: NAME in every namespace, or NAMESPACE/NAME.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 256),
        inner(length(min = 1, max = 317), regex(pattern = r"^([-a-z0-9]{1,63}/)?[-.a-z0-9]{1,253}$")),
        extend("x-kubernetes-list-type" = "set")
    )]
    pub exclude: Vec<String>,

    /// The oldest that the newest complete recovery point of a StatefulSet may be, such as 26h; older ones are overdue.
    /// Absent: none is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = SPAN, "maxLength" = 20))]
    pub rpo: Option<Span>,

    /// Of several policies that select a StatefulSet the one with the highest priority backs it up, and of those with
    /// the same the first by name.
    #[serde(default)]
    #[schemars(range(min = -1_000_000, max = 1_000_000))]
    pub priority: i32,

    /// What the StatefulSetBackups are made from.
    pub template: BackupTemplate,
}

/// What a policy makes its StatefulSetBackups from.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[x_kube(
    validation = Rule::new(
        "!has(self.hookProfile) || (!has(self.spec.preBackupHook) && !has(self.spec.postBackupHook))"
    )
    .message("hookProfile stands for both hooks: write hookProfile, or spec.preBackupHook and spec.postBackupHook")
)]
#[serde(rename_all = "camelCase")]
pub struct BackupTemplate {
    /// Labels of the StatefulSetBackups.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub labels: BTreeMap<String, String>,

    /// The hooks that the agent's configuration has under this name, as they are when the StatefulSetBackups are
    /// written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub hook_profile: Option<String>,

    /// The spec of a StatefulSetBackup without its statefulSetRef. Without a spread, that of a schedule is a tenth of the
    /// shortest time between two runs, and at most 10m.
    #[serde(with = "without_ref")]
    #[schemars(schema_with = "without_ref::schema")]
    spec: StatefulSetBackupSpec,
}

impl BackupTemplate {
    /// A template with the spec of some backup; of which StatefulSet that is does not matter.
    #[must_use]
    pub fn new(mut spec: StatefulSetBackupSpec) -> Self {
        spec.stateful_set_ref = StatefulSetRef::default();
        Self { labels: BTreeMap::new(), hook_profile: None, spec }
    }

    /// The spec of the backup of a StatefulSet in the backup's own namespace, with the hooks as they are written here.
    #[must_use]
    pub fn spec_for(&self, stateful_set: &str) -> StatefulSetBackupSpec {
        let mut spec = self.spec.clone();
        stateful_set.clone_into(&mut spec.stateful_set_ref.name);
        spec
    }
}

/// A `StatefulSetBackupSpec` without its `statefulSetRef`: its other fields and rules are written down once, there.
mod without_ref {
    use schemars::{JsonSchema, Schema, SchemaGenerator};
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use serde_json::{Map, Value, json};

    use crate::backup::{StatefulSetBackupSpec, StatefulSetRef};

    const FIELD: &str = "statefulSetRef";

    pub(super) fn serialize<S: Serializer>(
        spec: &StatefulSetBackupSpec,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let mut fields = serde_json::to_value(spec).map_err(serde::ser::Error::custom)?;
        if let Value::Object(fields) = &mut fields {
            fields.remove(FIELD);
        }
        fields.serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<StatefulSetBackupSpec, D::Error> {
        let mut fields = Map::deserialize(deserializer)?;
        fields.insert(FIELD.to_owned(), json!(StatefulSetRef::default()));
        StatefulSetBackupSpec::deserialize(Value::Object(fields)).map_err(D::Error::custom)
    }

    pub(super) fn schema(generator: &mut SchemaGenerator) -> Schema {
        let mut schema = StatefulSetBackupSpec::json_schema(generator);
        schema.remove("description");
        if let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) {
            properties.remove(FIELD);
        }
        if let Some(required) = schema.get_mut("required").and_then(Value::as_array_mut) {
            required.retain(|name| name != FIELD);
            // An empty list is none of OpenAPI's.
            if required.is_empty() {
                schema.remove("required");
            }
        }
        schema
    }
}

/// What has come of a policy, written by the agent alone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StatefulSetBackupPolicyStatus {
    /// The generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready: the spec can be used. Applied: every StatefulSet that is this policy's has its backup.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// How many StatefulSets the policy selects, those included that another policy or a backup written by hand backs
    /// up.
    #[serde(default)]
    pub matched: i64,
    /// How many of these have a backup that is not suspended: the policy's own with a schedule, or one whose newest complete
    /// recovery point meets the rpo.
    #[serde(default)]
    pub protected: i64,
    /// The first of those that have none, as NAMESPACE/NAME.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub first_unprotected: Vec<String>,
    /// How many of the selected StatefulSets exist for longer than the rpo, and have no complete recovery point that is
    /// younger.
    #[serde(default)]
    pub overdue: i64,
    /// The first of these, as NAMESPACE/NAME.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub first_overdue: Vec<String>,
    /// Other policies that select some of the same StatefulSets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["policy"]))]
    pub conflicts: Vec<PolicyConflict>,
}

/// Another policy that selects some of the same StatefulSets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyConflict {
    /// Its name.
    pub policy: String,
    /// It backs them up, and this policy does not.
    pub prevails: bool,
    /// How many StatefulSets both select.
    pub stateful_sets: i64,
    /// One of them, as NAMESPACE/NAME.
    pub example: String,
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::backup::StatefulSetBackup;

    fn policy(template: &Value) -> StatefulSetBackupPolicy {
        let spec = json!({ "template": template });
        StatefulSetBackupPolicy::new("gold", serde_json::from_value(spec).unwrap())
    }

    fn refusal(policy: &StatefulSetBackupPolicy) -> String {
        policy.validate_cel().map_or_else(|refused| refused.to_string(), |()| "admitted".to_owned())
    }

    #[test]
    fn a_template_is_a_backup_s_spec_without_the_reference() {
        let template = json!({ "schedule": "@daily", "allowPartial": true });
        let policy = policy(&json!({ "spec": template }));
        let spec = policy.spec.template.spec_for("db");
        let mut expected = StatefulSetBackupSpec::new("db");
        expected.schedule = Some("@daily".to_owned());
        expected.allow_partial = true;
        assert_eq!(spec, expected);
        assert_eq!(BackupTemplate::new(spec), policy.spec.template);

        let written = serde_json::to_value(&policy.spec.template).unwrap();
        assert!(written["spec"].get("statefulSetRef").is_none(), "{written}");
        assert_eq!(serde_json::from_value::<BackupTemplate>(written).unwrap(), policy.spec.template);
    }

    #[test]
    fn the_template_s_schema_is_the_backup_s_but_for_the_reference() {
        use kube::CustomResourceExt;

        let spec = |crd: Value, path: &str| {
            let schema = "/spec/versions/0/schema/openAPIV3Schema/properties/spec";
            crd.pointer(&format!("{schema}{path}")).unwrap().clone()
        };
        let mut of_backup = spec(serde_json::to_value(StatefulSetBackup::crd()).unwrap(), "");
        let mut of_template = spec(
            serde_json::to_value(StatefulSetBackupPolicy::crd()).unwrap(),
            "/properties/template/properties/spec",
        );
        let removed = of_backup["properties"].as_object_mut().unwrap().remove("statefulSetRef");
        assert!(removed.is_some());
        assert_eq!(of_backup["required"], json!(["statefulSetRef"]));
        assert!(!of_template["x-kubernetes-validations"].as_array().unwrap().is_empty());
        for schema in [&mut of_backup, &mut of_template] {
            let schema = schema.as_object_mut().unwrap();
            schema.remove("required");
            schema.remove("description");
        }
        assert_eq!(of_backup, of_template);
    }

    #[test]
    fn hooks_and_a_hook_profile_are_refused() {
        let hook = json!({ "command": ["true"] });
        for spec in [json!({ "preBackupHook": hook }), json!({ "postBackupHook": hook })] {
            let both = policy(&json!({ "hookProfile": "postgres", "spec": spec }));
            assert!(refusal(&both).contains("hookProfile stands for both hooks"), "{}", refusal(&both));
            assert_eq!(refusal(&policy(&json!({ "spec": spec }))), "admitted");
        }
        assert_eq!(refusal(&policy(&json!({ "hookProfile": "postgres", "spec": {} }))), "admitted");
    }

    #[test]
    fn the_rules_of_a_backup_hold_in_the_template() {
        let spec = json!({ "volumeSnapshotClass": "a", "volumeSnapshotClassName": "b" });
        let refused = refusal(&policy(&json!({ "spec": spec })));
        assert!(refused.contains("older spelling"), "{refused}");
        let refused = refusal(&policy(&json!({ "spec": { "schedule": "@every 5m" } })));
        assert!(refused.contains("@every has no fixed times"), "{refused}");
    }

    #[test]
    fn a_name_that_is_no_label_value_is_refused() {
        let mut long = policy(&json!({ "spec": {} }));
        long.metadata.name = Some("x".repeat(64));
        assert!(refusal(&long).contains("use at most 63 characters"), "{}", refusal(&long));
    }
}
