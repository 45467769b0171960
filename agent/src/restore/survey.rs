//! Reads what the plan of a restore needs to know, as plain objects.
//!
//! It judges nothing and changes nothing. What takes room and is not looked at is dropped as it is read.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::ops::Range;

use futures::{Stream, StreamExt, TryStreamExt, stream};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{
    Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod, PodSpec, PodStatus, ResourceQuota,
};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::ListParams;
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::names::{
    ALLOW_RESTORE_FROM_ANNOTATION, BACKUP_LABEL, BACKUP_NAMESPACE_LABEL, CLAIM_MANIFEST_ANNOTATION,
    RUN_LABEL, STATEFUL_SET_LABEL,
};
use sts_backup_api::restore::StatefulSetRestore;
use sts_backup_api::run::{RunRecord, RunResult};
use sts_backup_api::snapshot::{VolumeSnapshot, VolumeSnapshotContent};

use super::choose::choose;
use crate::backup::observe::{lets_in, ordinal_of};
use crate::error::{Error, Result};

/// How many objects are read at once.
const PARALLEL_READS: usize = 16;

/// How many objects are listed at once: what is dropped of them is not held for all.
const PAGE: u32 = 500;

/// All that the plan of a restore depends on, at one moment.
#[derive(Clone, Debug, Default)]
pub(super) struct Survey {
    /// The namespace of the `StatefulSet` lets the restore's in, or is the same. If not, nothing else was read.
    pub(super) granted: bool,
    /// The `StatefulSet`. If it does not exist, nothing else was read.
    pub(super) set: Option<StatefulSet>,
    /// All pods of the namespace, with no more than their owners, claims and node.
    pub(super) pods: Vec<Pod>,
    /// All claims of the namespace, by name.
    pub(super) claims: BTreeMap<String, PersistentVolumeClaim>,
    /// The volumes of the set's claims, by name.
    pub(super) volumes: BTreeMap<String, PersistentVolume>,
    /// All snapshots of the namespace; manifests of claims only where the claim is gone.
    pub(super) snapshots: Vec<VolumeSnapshot>,
    /// The contents of the snapshots that the spec chooses, by name.
    pub(super) contents: BTreeMap<String, VolumeSnapshotContent>,
    /// The failed runs of the backups that took snapshots of the set.
    pub(super) failed_runs: Vec<RunRecord>,
    pub(super) quotas: Vec<ResourceQuota>,
    /// All storage classes, by name.
    pub(super) classes: BTreeMap<String, StorageClass>,
    pub(super) nodes: Vec<Node>,
    pub(super) autoscalers: Vec<HorizontalPodAutoscaler>,
}

/// A claim of a `StatefulSet`, as its name says.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ClaimId {
    pub(super) ordinal: i32,
    pub(super) template: String,
    pub(super) name: String,
}

/// The replicas of a `StatefulSet` and their claims, by its spec.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape<'a> {
    /// The `StatefulSet`'s name.
    pub(super) set: &'a str,
    /// The ordinal of the first replica.
    pub(super) start: i32,
    pub(super) replicas: i32,
    pub(super) templates: &'a [PersistentVolumeClaim],
}

impl<'a> Shape<'a> {
    pub(super) fn of(set: &'a StatefulSet) -> Self {
        let spec = set.spec.as_ref();
        Self {
            set: set.metadata.name.as_deref().unwrap_or_default(),
            start: spec.and_then(|spec| spec.ordinals.as_ref()?.start).unwrap_or(0),
            replicas: spec.and_then(|spec| spec.replicas).unwrap_or(1),
            templates: spec.and_then(|spec| spec.volume_claim_templates.as_deref()).unwrap_or_default(),
        }
    }

    /// The ordinals that run.
    pub(super) fn ordinals(&self) -> Range<i32> {
        self.start..self.start.saturating_add(self.replicas)
    }

    /// The claim of that name, if it is one of this `StatefulSet`.
    pub(super) fn claim(&self, name: &str) -> Option<ClaimId> {
        self.templates.iter().find_map(|template| {
            let template = template.name_any();
            let ordinal = ordinal_of(name, &format!("{template}-{}", self.set))?;
            Some(ClaimId { ordinal, template, name: name.to_owned() })
        })
    }

    /// The claims of a replica.
    pub(super) fn claims_of(&self, ordinal: i32) -> impl Iterator<Item = ClaimId> + use<'a> {
        let set = self.set;
        self.templates.iter().map(move |template| {
            let template = template.name_any();
            ClaimId { ordinal, name: format!("{template}-{set}-{ordinal}"), template }
        })
    }

    /// The template of that name.
    pub(super) fn template(&self, name: &str) -> Option<&'a PersistentVolumeClaim> {
        self.templates.iter().find(|template| template.metadata.name.as_deref() == Some(name))
    }
}

/// Reads what the plan of `restore` depends on.
pub(super) async fn survey(client: &Client, restore: &StatefulSetRestore) -> Result<Survey> {
    let own = restore.namespace().expect("a StatefulSetRestore is namespaced");
    let home = restore.spec.stateful_set_ref.namespace_or(&own);
    if home != own && !is_granted(client, home, &own).await? {
        return Ok(Survey::default());
    }
    let sets: Api<StatefulSet> = Api::namespaced(client.clone(), home);
    let set = sets.get_opt(&restore.spec.stateful_set_ref.name).await;
    let Some(set) = set.map_err(Error::request("get the StatefulSet"))? else {
        return Ok(Survey { granted: true, ..Survey::default() });
    };

    let (pods, claims, quotas, classes, autoscalers) = tokio::try_join!(
        list::<Pod>(Api::namespaced(client.clone(), home), "list the Pods", strip_pod),
        list::<PersistentVolumeClaim>(
            Api::namespaced(client.clone(), home),
            "list the PersistentVolumeClaims",
            whole
        ),
        list::<ResourceQuota>(Api::namespaced(client.clone(), home), "list the ResourceQuotas", whole),
        list::<StorageClass>(Api::all(client.clone()), "list the StorageClasses", whole),
        list::<HorizontalPodAutoscaler>(
            Api::namespaced(client.clone(), home),
            "list the HorizontalPodAutoscalers",
            whole
        ),
    )?;
    let claims = by_name(claims);
    let snapshots = list(Api::namespaced(client.clone(), home), "list the VolumeSnapshots", |snapshot| {
        // They are most of it, and only tell what the claim itself does not.
        if claim_named_by(snapshot).is_some_and(|claim| claims.contains_key(claim)) {
            snapshot.annotations_mut().remove(CLAIM_MANIFEST_ANNOTATION);
        }
    });
    let survey = Survey {
        granted: true,
        set: Some(set),
        pods,
        snapshots: snapshots.await?,
        claims,
        quotas,
        classes: by_name(classes),
        autoscalers,
        ..Survey::default()
    };
    let survey = Survey { failed_runs: failed_runs(client, restore, &survey).await?, ..survey };
    let (volumes, contents, nodes) = tokio::try_join!(
        volumes(client, &survey),
        contents(client, restore, &survey),
        list::<Node>(Api::all(client.clone()), "list the Nodes", strip_node),
    )?;
    Ok(Survey { volumes, contents, nodes, ..survey })
}

/// Whether a namespace lets the restores of another one in.
pub(super) async fn is_granted(client: &Client, namespace: &str, to: &str) -> Result<bool> {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let found = namespaces.get_metadata_opt(namespace).await.map_err(Error::request("get the Namespace"))?;
    Ok(found.is_some_and(|found| lets_in(&found, ALLOW_RESTORE_FROM_ANNOTATION, to)))
}

/// The claim that a snapshot was asked for of.
pub(super) fn claim_named_by(snapshot: &VolumeSnapshot) -> Option<&str> {
    snapshot.spec.source.persistent_volume_claim_name.as_deref()
}

/// Lists all objects there are, page by page, and drops what nobody looks at.
async fn list<K>(api: Api<K>, operation: &'static str, strip: impl Fn(&mut K)) -> Result<Vec<K>>
where
    K: Clone + DeserializeOwned + Debug + Resource,
{
    let mut listed = Vec::new();
    let mut params = ListParams::default().limit(PAGE);
    loop {
        // Several are under way at once, and each is large.
        let page = Box::pin(api.list(&params)).await.map_err(Error::request(operation))?;
        listed.extend(page.items.into_iter().map(|mut object| {
            object.meta_mut().managed_fields = None;
            strip(&mut object);
            object
        }));
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(listed),
        }
    }
}

/// Takes what `objects` reads, a few at once; what does not exist is left out.
async fn read<K: ResourceExt>(
    objects: impl Stream<Item = impl Future<Output = Result<Option<K>>>>,
) -> Result<BTreeMap<String, K>> {
    let read: Vec<_> = objects.buffer_unordered(PARALLEL_READS).try_collect().await?;
    Ok(by_name(read.into_iter().flatten()))
}

fn by_name<K: ResourceExt>(objects: impl IntoIterator<Item = K>) -> BTreeMap<String, K> {
    objects.into_iter().map(|object| (object.name_any(), object)).collect()
}

async fn volumes(client: &Client, survey: &Survey) -> Result<BTreeMap<String, PersistentVolume>> {
    let Some(shape) = survey.set.as_ref().map(Shape::of) else { return Ok(BTreeMap::new()) };
    let api: Api<PersistentVolume> = Api::all(client.clone());
    let of_set = survey.claims.iter().filter(|(name, _)| shape.claim(name).is_some());
    let names: Vec<_> = of_set.filter_map(|(_, claim)| claim.spec.as_ref()?.volume_name.clone()).collect();
    read(stream::iter(names).map(|name| {
        let api = api.clone();
        async move {
            let volume = api.get_opt(&name).await.map_err(Error::request("get the PersistentVolume"))?;
            Ok(volume.map(without_managed_fields))
        }
    }))
    .await
}

async fn contents(
    client: &Client,
    restore: &StatefulSetRestore,
    survey: &Survey,
) -> Result<BTreeMap<String, VolumeSnapshotContent>> {
    // Where nothing can be chosen the plan says so, and looks at no content.
    let Ok(choice) = choose(restore, survey) else { return Ok(BTreeMap::new()) };
    let api: Api<VolumeSnapshotContent> = Api::all(client.clone());
    let name = |snapshot: &VolumeSnapshot| {
        snapshot.status.as_ref()?.bound_volume_snapshot_content_name.clone().filter(|name| !name.is_empty())
    };
    let names: Vec<_> = choice.snapshots.values().filter_map(|snapshot| name(snapshot)).collect();
    read(stream::iter(names).map(|name| {
        let api = api.clone();
        async move {
            let content =
                api.get_opt(&name).await.map_err(Error::request("get the VolumeSnapshotContent"))?;
            Ok(content.map(without_managed_fields))
        }
    }))
    .await
}

fn without_managed_fields<K: Resource>(mut object: K) -> K {
    object.meta_mut().managed_fields = None;
    object
}

/// The failed runs that the history of the snapshots' backups knows; a backup that is gone has none.
async fn failed_runs(
    client: &Client,
    restore: &StatefulSetRestore,
    survey: &Survey,
) -> Result<Vec<RunRecord>> {
    let set = &restore.spec.stateful_set_ref.name;
    let backups: BTreeSet<(String, String)> = survey
        .snapshots
        .iter()
        .filter_map(|snapshot| {
            let labels = snapshot.metadata.labels.as_ref()?;
            let label = |name| labels.get(name).map(String::as_str).filter(|value| !value.is_empty());
            label(RUN_LABEL)?;
            (label(STATEFUL_SET_LABEL)? == set).then_some(())?;
            Some((label(BACKUP_NAMESPACE_LABEL)?.to_owned(), label(BACKUP_LABEL)?.to_owned()))
        })
        .collect();
    let histories: Vec<_> = stream::iter(backups)
        .map(|(namespace, name)| async move {
            let api: Api<StatefulSetBackup> = Api::namespaced(client.clone(), &namespace);
            let backup = api.get_opt(&name).await.map_err(Error::request("get the StatefulSetBackup"))?;
            Ok::<_, Error>(backup.and_then(|backup| backup.status).map(|status| status.history))
        })
        .buffer_unordered(PARALLEL_READS)
        .try_collect()
        .await?;
    let runs = histories.into_iter().flatten().flatten();
    Ok(runs.filter(|run| run.result == RunResult::Failed).collect())
}

/// Keeps all.
fn whole<K>(_: &mut K) {}

/// Keeps whose the pod is, its state, its node and its claims.
fn strip_pod(pod: &mut Pod) {
    pod.metadata.annotations = None;
    if let Some(spec) = pod.spec.take() {
        let volumes = spec.volumes.unwrap_or_default().into_iter();
        let volumes = volumes.filter(|volume| volume.persistent_volume_claim.is_some()).collect();
        pod.spec = Some(PodSpec { node_name: spec.node_name, volumes: Some(volumes), ..PodSpec::default() });
    }
    if let Some(status) = pod.status.take() {
        pod.status = Some(PodStatus { phase: status.phase, ..PodStatus::default() });
    }
}

/// Keeps the labels, by which volumes say where they can be reached, and whether pods may come to the node.
fn strip_node(node: &mut Node) {
    node.metadata.annotations = None;
    node.status = None;
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use axum::Router;
    use axum::body::Body;
    use axum::extract::Request;
    use axum::http::StatusCode;
    use serde::Serialize;
    use serde_json::{Value, json};

    use super::super::scene;
    use super::*;

    /// An API server that has these objects, by path, and pages of two; and what it was asked.
    fn server(objects: BTreeMap<String, Value>) -> (Client, Arc<Mutex<Vec<String>>>) {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (seen, objects) = (Arc::clone(&asked), Arc::new(objects));
        let answer = move |request: Request| {
            let (seen, objects) = (Arc::clone(&seen), Arc::clone(&objects));
            async move {
                let path = request.uri().path().to_owned();
                seen.lock().unwrap().push(format!("{} {path}", request.method()));
                let found = objects.get(&path).cloned();
                let (status, body) = match found {
                    Some(Value::Array(items)) => {
                        let query = request.uri().query().unwrap_or_default();
                        let from = query.split('&').find_map(|pair| pair.strip_prefix("continue="));
                        let from: usize = from.map_or(0, |from| from.parse().unwrap());
                        let next =
                            if from + 2 < items.len() { (from + 2).to_string() } else { String::new() };
                        let page: Vec<_> = items.into_iter().skip(from).take(2).collect();
                        (200, json!({ "metadata": { "continue": next }, "items": page }))
                    }
                    Some(object) => (200, object),
                    None => (
                        404,
                        json!({
                            "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404,
                            "reason": "NotFound", "message": "no",
                        }),
                    ),
                };
                (StatusCode::from_u16(status).unwrap(), Body::from(body.to_string()))
            }
        };
        (Client::new(Router::new().fallback(answer), "default"), asked)
    }

    /// What the API server has of a scene, by path.
    fn objects_of(survey: &Survey) -> BTreeMap<String, Value> {
        fn all<'a, K: Serialize + 'a>(objects: impl IntoIterator<Item = &'a K>) -> Value {
            objects.into_iter().map(one).collect()
        }
        fn one<K: Serialize>(object: &K) -> Value {
            serde_json::to_value(object).unwrap()
        }
        let snapshots = "/apis/snapshot.storage.k8s.io/v1";
        let mut objects = BTreeMap::from(
            [
                ("/apis/apps/v1/namespaces/shop/statefulsets/db", one(&survey.set)),
                ("/api/v1/namespaces/shop/pods", all(&survey.pods)),
                ("/api/v1/namespaces/shop/persistentvolumeclaims", all(survey.claims.values())),
                ("/api/v1/namespaces/shop/resourcequotas", all(&survey.quotas)),
                ("/apis/storage.k8s.io/v1/storageclasses", all(survey.classes.values())),
                ("/api/v1/nodes", all(&survey.nodes)),
                ("/apis/autoscaling/v2/namespaces/shop/horizontalpodautoscalers", all(&survey.autoscalers)),
            ]
            .map(|(path, value)| (path.to_owned(), value)),
        );
        objects.insert(format!("{snapshots}/namespaces/shop/volumesnapshots"), all(&survey.snapshots));
        for (name, volume) in &survey.volumes {
            objects.insert(format!("/api/v1/persistentvolumes/{name}"), one(volume));
        }
        for (name, content) in &survey.contents {
            objects.insert(format!("{snapshots}/volumesnapshotcontents/{name}"), one(content));
        }
        objects
    }

    fn latest() -> StatefulSetRestore {
        scene::restore(&json!({ "useLatestBackup": true }))
    }

    #[tokio::test]
    async fn everything_is_read_page_by_page_and_only_the_chosen_snapshots_contents() {
        let mut there = scene::survey(3);
        scene::take(&mut there, "old", "2026-01-01T00:00:00Z");
        scene::take(&mut there, "new", "2026-01-02T00:00:00Z");
        let (client, asked) = server(objects_of(&there));
        // As the controller does, on any thread.
        let reading = tokio::spawn(async move { survey(&client, &latest()).await });
        let read = reading.await.unwrap().unwrap();

        let names = |of: &BTreeMap<String, VolumeSnapshotContent>| of.keys().cloned().collect::<Vec<_>>();
        assert!(read.granted);
        assert_eq!(read.set, there.set);
        assert_eq!((read.claims, read.volumes, read.classes), (there.claims, there.volumes, there.classes));
        assert_eq!((read.snapshots.len(), read.nodes), (6, there.nodes));
        assert_eq!(read.pods.len(), 3);
        there.contents.retain(|name, _| name.ends_with("new"));
        assert_eq!(names(&read.contents), names(&there.contents));
        let asked = asked.lock().unwrap();
        assert!(asked.iter().all(|asked| asked.starts_with("GET ")), "{asked:?}");
        assert_eq!(asked.iter().filter(|asked| asked.ends_with("/pods")).count(), 2);
    }

    #[tokio::test]
    async fn what_nobody_looks_at_is_not_held() {
        let mut there = scene::survey(2);
        scene::take(&mut there, "r", "2026-01-02T00:00:00Z");
        for snapshot in &mut there.snapshots {
            let manifest = (CLAIM_MANIFEST_ANNOTATION.to_owned(), "{}".to_owned());
            snapshot.annotations_mut().extend([manifest]);
        }
        there.claims.remove("data-db-1");
        let mut objects = objects_of(&there);
        let managed = json!([{ "manager": "m" }]);
        for object in objects.values_mut() {
            let single = object.get("metadata").is_some();
            let several = object.as_array_mut().into_iter().flatten();
            several.for_each(|object| object["metadata"]["managedFields"] = managed.clone());
            if single {
                object["metadata"]["managedFields"] = managed.clone();
            }
        }
        let pod = &mut objects.get_mut("/api/v1/namespaces/shop/pods").unwrap()[0];
        pod["spec"]["containers"] = json!([{ "name": "main", "image": "x" }]);
        pod["spec"]["volumes"].as_array_mut().unwrap().push(json!({ "name": "tmp", "emptyDir": {} }));
        let (client, _) = server(objects);
        let read = survey(&client, &latest()).await.unwrap();

        let has_manifest = |snapshot: &VolumeSnapshot| {
            (snapshot.name_any(), snapshot.annotations().contains_key(CLAIM_MANIFEST_ANNOTATION))
        };
        let manifests: Vec<_> = read.snapshots.iter().map(has_manifest).collect();
        assert_eq!(manifests, [("data-db-0-r".to_owned(), false), ("data-db-1-r".to_owned(), true)]);
        assert!(read.snapshots.iter().all(|one| one.metadata.managed_fields.is_none()));
        assert!(read.claims.values().all(|one| one.metadata.managed_fields.is_none()));
        assert!(read.volumes.values().all(|one| one.metadata.managed_fields.is_none()));
        assert!(read.contents.values().all(|one| one.metadata.managed_fields.is_none()));
        let (pod, spec) = (&read.pods[0], read.pods[0].spec.as_ref().unwrap());
        assert_eq!((&pod.metadata.managed_fields, spec.containers.len()), (&None, 0));
        assert_eq!(spec.volumes.as_ref().unwrap().len(), 1);
        assert_eq!(pod.status.as_ref().unwrap().phase.as_deref(), Some("Running"));
    }

    #[tokio::test]
    async fn the_failed_runs_of_the_snapshots_backups_are_known() {
        let mut there = scene::survey(1);
        scene::take(&mut there, "old", "2026-01-01T00:00:00Z");
        scene::take(&mut there, "new", "2026-01-02T00:00:00Z");
        let run = |id: &str, result: &str| {
            json!({
                "id": id, "slot": { "due": "Creation", "value": "x", "attempt": 1 }, "durationMs": 1, "reason": "X",
                "started": "2026-01-02T00:00:00.000000Z", "result": result, "message": "",
            })
        };
        let mut objects = objects_of(&there);
        objects.insert(
            "/apis/backup.sts-backup.io/v1alpha1/namespaces/shop/statefulsetbackups/nightly".to_owned(),
            json!({
                "apiVersion": "backup.sts-backup.io/v1alpha1", "kind": "StatefulSetBackup",
                "metadata": { "name": "nightly", "namespace": "shop" },
                "spec": { "statefulSetRef": { "name": "db" } },
                "status": { "history": [run("new", "Failed"), run("old", "Completed")] },
            }),
        );
        let (client, _) = server(objects);
        let read = survey(&client, &latest()).await.unwrap();
        assert_eq!(read.failed_runs.iter().map(|run| run.id.as_str()).collect::<Vec<_>>(), ["new"]);
        assert_eq!(read.contents.keys().collect::<Vec<_>>(), ["content-data-db-0-old"]);
    }

    #[tokio::test]
    async fn a_namespace_that_does_not_let_the_restore_in_is_not_looked_into() {
        let mut elsewhere = latest();
        elsewhere.spec.stateful_set_ref.namespace = Some("shop".to_owned());
        elsewhere.metadata.namespace = Some("ops".to_owned());
        for (annotation, granted) in
            [(Some("ops"), true), (Some("web, ops"), true), (Some("web"), false), (None, false)]
        {
            let mut objects = objects_of(&scene::survey(1));
            let annotations = annotation.map(|to| json!({ ALLOW_RESTORE_FROM_ANNOTATION: to }));
            objects.insert(
                "/api/v1/namespaces/shop".to_owned(),
                json!({
                    "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata",
                    "metadata": { "name": "shop", "annotations": annotations },
                }),
            );
            let (client, asked) = server(objects);
            let read = survey(&client, &elsewhere).await.unwrap();
            assert_eq!((read.granted, read.set.is_some()), (granted, granted), "{annotation:?}");
            assert_eq!(asked.lock().unwrap().len() == 1, !granted);
        }
    }

    #[tokio::test]
    async fn without_the_stateful_set_nothing_else_is_read() {
        let (client, asked) = server(BTreeMap::new());
        let read = survey(&client, &latest()).await.unwrap();
        assert!(read.granted && read.set.is_none());
        assert_eq!(asked.lock().unwrap().len(), 1);
    }
}
