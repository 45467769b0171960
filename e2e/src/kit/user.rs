//! A user who may do what a test grants, and nothing else: its administrator impersonates them.

use anyhow::{Context, Result};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use kube::api::PostParams;
use kube::{Api, Client};
use serde_json::{Value, json};

use super::poll::until;
use super::{Cluster, Namespace};

/// Somebody.
#[derive(Clone)]
pub struct User {
    name: String,
    client: Client,
}

impl User {
    /// A user of a cluster by that name.
    ///
    /// # Errors
    /// When the client cannot be made.
    pub async fn new(cluster: &Cluster, name: &str) -> Result<Self> {
        Ok(Self { name: name.to_owned(), client: cluster.client_as(name).await? })
    }

    /// Their name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Acts as they do.
    #[must_use]
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Grants them verbs on a resource, such as `pods/exec`, in a namespace, and waits until the API server knows.
    ///
    /// # Errors
    /// When it cannot be granted.
    pub async fn grant(&self, ns: &Namespace, group: &str, resource: &str, verbs: &[&str]) -> Result<()> {
        let how = PostParams::default();
        let (role, binding) = self.role("Role", json!({}), group, resource, verbs);
        let role: Role = serde_json::from_value(role)?;
        let binding: RoleBinding = serde_json::from_value(binding)?;
        ns.api().create(&how, &role).await.context("create the Role")?;
        ns.api().create(&how, &binding).await.context("create the RoleBinding")?;
        self.await_granted(Some(ns), group, resource, verbs).await
    }

    /// As [`grant`](Self::grant), in all namespaces and for what is in none, until `ns` is removed.
    ///
    /// # Errors
    /// When it cannot be granted.
    pub async fn grant_everywhere(
        &self,
        ns: &Namespace,
        group: &str,
        resource: &str,
        verbs: &[&str],
    ) -> Result<()> {
        let (client, how) = (ns.cluster().client(), PostParams::default());
        let owned = json!({ "ownerReferences": [ns.owner_reference()?] });
        let (role, binding) = self.role("ClusterRole", owned, group, resource, verbs);
        let role: ClusterRole = serde_json::from_value(role)?;
        let binding: ClusterRoleBinding = serde_json::from_value(binding)?;
        Api::all(client.clone()).create(&how, &role).await.context("create the ClusterRole")?;
        Api::all(client).create(&how, &binding).await.context("create the ClusterRoleBinding")?;
        self.await_granted(None, group, resource, verbs).await
    }

    /// A role of that kind, and its binding to this user.
    fn role(
        &self,
        kind: &str,
        mut metadata: Value,
        group: &str,
        resource: &str,
        verbs: &[&str],
    ) -> (Value, Value) {
        let name = format!("{}-{}", self.name, resource.replace('/', "-"));
        let rbac = "rbac.authorization.k8s.io";
        metadata["name"] = json!(name);
        let role = json!({
            "metadata": metadata,
            "rules": [{ "apiGroups": [group], "resources": [resource], "verbs": verbs }],
        });
        let binding = json!({
            "metadata": metadata,
            "roleRef": { "apiGroup": rbac, "kind": kind, "name": name },
            "subjects": [{ "apiGroup": rbac, "kind": "User", "name": self.name }],
        });
        (role, binding)
    }

    async fn await_granted(
        &self,
        ns: Option<&Namespace>,
        group: &str,
        resource: &str,
        verbs: &[&str],
    ) -> Result<()> {
        until(&format!("{} may {verbs:?} {resource}", self.name), async || {
            for verb in verbs {
                if !self.may(ns, group, resource, verb).await? {
                    return Ok(false);
                }
            }
            Ok(true)
        })
        .await
    }

    /// Whether they may, as the API server answers themselves.
    async fn may(&self, ns: Option<&Namespace>, group: &str, resource: &str, verb: &str) -> Result<bool> {
        let (resource, subresource) =
            resource.split_once('/').map_or((resource, None), |(of, sub)| (of, Some(sub.to_owned())));
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(ResourceAttributes {
                    namespace: ns.map(|ns| ns.name().to_owned()),
                    group: Some(group.to_owned()),
                    resource: Some(resource.to_owned()),
                    subresource,
                    verb: Some(verb.to_owned()),
                    ..ResourceAttributes::default()
                }),
                non_resource_attributes: None,
            },
            ..SelfSubjectAccessReview::default()
        };
        let reviews: Api<SelfSubjectAccessReview> = Api::all(self.client());
        let answer = reviews.create(&PostParams::default(), &review).await?;
        Ok(answer.status.is_some_and(|status| status.allowed))
    }
}
