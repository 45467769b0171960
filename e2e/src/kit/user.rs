//! A user who may do what a test grants, and nothing else: its administrator impersonates them.

use anyhow::{Context, Result};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use kube::api::PostParams;
use kube::{Api, Client};
use serde_json::json;

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
        let name = format!("{}-{}", self.name, resource.replace('/', "-"));
        let role: Role = serde_json::from_value(json!({
            "metadata": { "name": name },
            "rules": [{ "apiGroups": [group], "resources": [resource], "verbs": verbs }],
        }))?;
        let binding: RoleBinding = serde_json::from_value(json!({
            "metadata": { "name": name },
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name },
            "subjects": [{ "apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": self.name }],
        }))?;
        let how = PostParams::default();
        ns.api().create(&how, &role).await.with_context(|| format!("create the Role {name}"))?;
        ns.api().create(&how, &binding).await.with_context(|| format!("create the RoleBinding {name}"))?;
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
    async fn may(&self, ns: &Namespace, group: &str, resource: &str, verb: &str) -> Result<bool> {
        let (resource, subresource) =
            resource.split_once('/').map_or((resource, None), |(of, sub)| (of, Some(sub.to_owned())));
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(ResourceAttributes {
                    namespace: Some(ns.name().to_owned()),
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
