//! Whether the agent may do what it does: a right that was taken from it shows only in the middle of a run. Pure.

use std::collections::BTreeSet;
use std::fmt::{self, Display, Formatter};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::ResourceExt;

use super::observe::LEASE;
use super::{Finding, Read};

/// What the agent does in all namespaces, as its chart grants it: group, resource, verbs. Hooks are apart, as the chart can
/// leave them out.
const NEEDED: [(&str, &str, &[&str]); 21] = [
    ("backup.sts-backup.io", "statefulsetbackups", &["get", "list", "watch", "create", "patch", "delete"]),
    ("backup.sts-backup.io", "statefulsetbackups/status", &["patch"]),
    ("backup.sts-backup.io", "statefulsetrestores", &["get", "list", "watch", "patch"]),
    ("backup.sts-backup.io", "statefulsetrestores/status", &["patch"]),
    ("backup.sts-backup.io", "statefulsetbackuppolicies", &["list", "watch"]),
    ("backup.sts-backup.io", "statefulsetbackuppolicies/status", &["patch"]),
    ("apps", "statefulsets", &["get", "list", "watch"]),
    ("apps", "statefulsets/scale", &["patch"]),
    ("", "pods", &["get", "list", "watch", "delete"]),
    ("", "persistentvolumeclaims", &["get", "list", "watch", "create", "delete"]),
    ("", "persistentvolumes", &["get", "list", "watch", "patch"]),
    ("", "resourcequotas", &["list"]),
    ("", "nodes", &["list"]),
    ("storage.k8s.io", "storageclasses", &["list"]),
    ("autoscaling", "horizontalpodautoscalers", &["list"]),
    ("", "namespaces", &["get", "list", "watch"]),
    ("snapshot.storage.k8s.io", "volumesnapshots", &["get", "list", "watch", "create", "delete"]),
    ("snapshot.storage.k8s.io", "volumesnapshotcontents", &["get", "list", "watch"]),
    ("snapshot.storage.k8s.io", "volumesnapshotclasses", &["list"]),
    ("events.k8s.io", "events", &["create"]),
    HOOKS,
];

const HOOKS: (&str, &str, &[&str]) = ("", "pods/exec", &["get", "create"]);

/// A `ServiceAccount`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Account {
    namespace: String,
    name: String,
}

/// What an account may do in all namespaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Right {
    group: &'static str,
    /// With its subresource: `pods/exec`.
    resource: &'static str,
    verb: &'static str,
}

impl Display for Right {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Self { group, resource, verb } = self;
        let dot = if group.is_empty() { "" } else { "." };
        write!(formatter, "{verb} {resource}{dot}{group}")
    }
}

/// The accounts that agents run as.
pub(super) fn accounts(deployments: &[Deployment]) -> BTreeSet<Account> {
    let is_agent = |deployment: &&Deployment| {
        deployment.labels().get("app.kubernetes.io/name").is_some_and(|name| name == LEASE)
    };
    let account = |deployment: &Deployment| {
        let pods = deployment.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
        let name = pods.and_then(|pods| pods.service_account_name.clone());
        Account {
            namespace: deployment.namespace().unwrap_or_default(),
            name: name.unwrap_or_else(|| "default".to_owned()),
        }
    };
    deployments.iter().filter(is_agent).map(account).collect()
}

/// What an agent needs; with hooks, if any backup has one.
pub(super) fn needed(hooks: bool) -> Vec<Right> {
    let needed = NEEDED.into_iter().filter(|needed| hooks || *needed != HOOKS);
    let each = |(group, resource, verbs): (&'static str, &'static str, &'static [&'static str])| {
        verbs.iter().map(move |verb| Right { group, resource, verb })
    };
    needed.flat_map(each).collect()
}

/// The question whether an account has a right.
pub(super) fn review(account: &Account, right: &Right) -> SubjectAccessReview {
    let Account { namespace, name } = account;
    let (resource, subresource) = match right.resource.split_once('/') {
        Some((resource, subresource)) => (resource, Some(subresource.to_owned())),
        None => (right.resource, None),
    };
    SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(format!("system:serviceaccount:{namespace}:{name}")),
            groups: Some(vec![
                "system:serviceaccounts".to_owned(),
                format!("system:serviceaccounts:{namespace}"),
                "system:authenticated".to_owned(),
            ]),
            resource_attributes: Some(ResourceAttributes {
                group: Some(right.group.to_owned()),
                resource: Some(resource.to_owned()),
                subresource,
                verb: Some(right.verb.to_owned()),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    }
}

/// What the answers mean.
pub(super) fn check_rights(account: &Account, missing: &Read<Vec<Right>>) -> Finding {
    let object = format!("ServiceAccount {}/{}", account.namespace, account.name);
    match missing {
        Err(why) => Finding::unread(format!("Rights of {object}"), why),
        Ok(missing) if missing.is_empty() => Finding::ok(object, "may do all that the agent does"),
        Ok(missing) => Finding::fail(
            object,
            format!(
                "may not, in all namespaces: {}",
                missing.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
            ),
            "install the chart sts-backup-agent in the version of the agent, with hooks.enabled where hooks are used: it grants them",
        ),
    }
}

#[cfg(test)]
#[path = "rights_checks_tests.rs"]
mod tests;
