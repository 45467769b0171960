//! A `StatefulSet` of independent PostgreSQL servers, the stateful workload of the tests.
//!
//! Its claims are called `data-<name>-<ordinal>`, as every `StatefulSet`'s with the template `data`.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Service};
use kube::Api;
use kube::api::PostParams;
use serde_json::json;

use super::Namespace;
use super::claim::restored_claim;
use super::exec::exec;
use super::hooks::Hooks;
use super::poll::until;
use crate::condition::{await_condition, statefulset_ready};

/// The container in each pod.
pub(super) const CONTAINER: &str = "postgres";

/// Where the volume is mounted; the data directory is below it, as a mount point can hold `lost+found`.
const VOLUME_PATH: &str = "/var/lib/postgresql";
const DATA_PATH: &str = "/var/lib/postgresql/data";
const SOCKET_PATH: &str = "/run/postgresql";

/// User and group of PostgreSQL in the image.
const POSTGRES_ID: i64 = 999;

/// A start from nothing takes 4 s, crash recovery less; the rest is for a busy machine.
const READY_TIMEOUT: Duration = Duration::from_mins(2);

/// The names of the sessions are those of `docs/hooks.md`.
const IS_FROZEN: &str = "SELECT EXISTS (SELECT FROM pg_stat_activity JOIN pg_locks USING (pid) \
    WHERE application_name = 'sts-backup-frozen' \
    AND relation = 'pg_class'::regclass AND mode = 'ShareLock' AND granted)";

const WRITER_WAITS: &str = "SELECT EXISTS (SELECT FROM pg_stat_activity writer JOIN pg_stat_activity holder \
    ON holder.pid = ANY (pg_blocking_pids(writer.pid)) \
    WHERE holder.application_name = 'sts-backup-frozen' \
    AND writer.wait_event_type = 'Lock' AND writer.query LIKE 'INSERT INTO load %')";

const START_SCRIPT: &str = include_str!("postgres.sh");

/// `replicas` servers that know nothing of each other, each with a volume of its own.
#[derive(Clone)]
pub struct Postgres {
    ns: Namespace,
    name: String,
    replicas: i32,
    storage_class: String,
    size: String,
}

impl Postgres {
    /// One server, with a volume of 256 MiB of the class `stsb-e2e`.
    #[must_use]
    pub fn new(ns: &Namespace, name: &str) -> Self {
        Self {
            ns: ns.clone(),
            name: name.to_owned(),
            replicas: 1,
            storage_class: "stsb-e2e".to_owned(),
            size: "256Mi".to_owned(),
        }
    }

    /// How many servers.
    #[must_use]
    pub fn replicas(self, replicas: i32) -> Self {
        Self { replicas, ..self }
    }

    /// The `StorageClass` of the volumes.
    #[must_use]
    pub fn storage_class(self, class: &str) -> Self {
        Self { storage_class: class.to_owned(), ..self }
    }

    /// The size of each volume, a Kubernetes quantity.
    #[must_use]
    pub fn size(self, size: &str) -> Self {
        Self { size: size.to_owned(), ..self }
    }

    /// Creates the `StatefulSet` and its headless `Service` and waits until every server answers.
    ///
    /// A server whose claim exists already starts on that claim's data: to start on restored data, make the
    /// claims first, see [`Self::restored_claim`].
    ///
    /// # Errors
    /// When an object cannot be created (one of that name exists), or a server is not ready in time.
    pub async fn deploy(&self) -> Result<()> {
        let name = &self.name;
        let create = PostParams::default();
        let services: Api<Service> = self.ns.api();
        services
            .create(&create, &self.service()?)
            .await
            .with_context(|| format!("create the Service {name}"))?;
        let sets: Api<StatefulSet> = self.ns.api();
        let image = &self.ns.cluster().images().postgres;
        sets.create(&create, &self.stateful_set(image)?)
            .await
            .with_context(|| format!("create the StatefulSet {name}"))?;
        await_condition(&sets, name, "ready", READY_TIMEOUT, statefulset_ready(self.replicas)).await?;
        Ok(())
    }

    /// The namespace it runs in.
    pub(super) fn namespace(&self) -> &Namespace {
        &self.ns
    }

    /// The pod of one server.
    #[must_use]
    pub fn pod_name(&self, ordinal: u32) -> String {
        format!("{}-{ordinal}", self.name)
    }

    /// The claim of one server.
    #[must_use]
    pub fn claim_name(&self, ordinal: u32) -> String {
        format!("data-{}-{ordinal}", self.name)
    }

    /// A claim that gives one server the data of a snapshot, when it is created before [`Self::deploy`]. It has
    /// the class and the size of the other volumes.
    #[must_use]
    pub fn restored_claim(&self, ordinal: u32, snapshot: &str) -> PersistentVolumeClaim {
        restored_claim(&self.claim_name(ordinal), snapshot, &self.storage_class, &self.size)
    }

    /// Runs SQL on one server; rows come back one per line, columns separated by `|`.
    ///
    /// # Errors
    /// When psql cannot be run or any statement fails.
    pub async fn psql(&self, ordinal: u32, sql: &str) -> Result<String> {
        let command = ["psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", sql];
        let (cluster, pod) = (self.ns.cluster(), self.pod_name(ordinal));
        let output = exec(cluster, self.ns.name(), &pod, CONTAINER, &command).await?;
        Ok(output.success()?.trim_end().to_owned())
    }

    /// Counts the rows that [`WriteLoad`](super::WriteLoad) left on one server.
    ///
    /// # Errors
    /// When psql fails, for instance because there never was a load.
    pub async fn rows(&self, ordinal: u32) -> Result<Rows> {
        let sql = "SELECT count(*), coalesce(min(n), 0), coalesce(max(n), 0) FROM load";
        Rows::parse(&self.psql(ordinal, sql).await?)
    }

    /// The documented hooks, with a freeze that ends by itself after so many seconds.
    ///
    /// # Errors
    /// When the page does not have them.
    pub fn freeze_hooks(expires_seconds: u32) -> Result<Hooks> {
        Hooks::documented("PostgreSQL")?.expiring_after(expires_seconds)
    }

    /// Whether the documented freeze is in force on one server: its session holds the lock against new tables,
    /// which it takes with all others or not at all.
    ///
    /// # Errors
    /// When psql fails. It needs no lock that a freeze holds.
    pub async fn is_frozen(&self, ordinal: u32) -> Result<bool> {
        self.is_true(ordinal, IS_FROZEN).await
    }

    /// Waits until a row of a [`WriteLoad`](super::WriteLoad) waits for a lock of the documented freeze: from
    /// then to the thaw no row is committed.
    ///
    /// # Errors
    /// When none does within half a minute, or psql fails.
    pub async fn await_blocked_writer(&self, ordinal: u32) -> Result<()> {
        self.await_true(ordinal, "a row waits for the freeze", WRITER_WAITS).await
    }

    /// Waits until a query answers `true`.
    ///
    /// # Errors
    /// When it does not within half a minute, or psql fails.
    pub async fn await_true(&self, ordinal: u32, what: &str, sql: &str) -> Result<()> {
        until(what, async || self.is_true(ordinal, sql).await).await
    }

    async fn is_true(&self, ordinal: u32, sql: &str) -> Result<bool> {
        Ok(self.psql(ordinal, sql).await? == "t")
    }

    fn service(&self) -> Result<Service> {
        Ok(serde_json::from_value(json!({
            "metadata": { "name": self.name },
            "spec": {
                "clusterIP": "None",
                "selector": { "app": self.name },
                "ports": [{ "name": "postgres", "port": 5432 }],
            },
        }))?)
    }

    fn stateful_set(&self, image: &str) -> Result<StatefulSet> {
        let Self { ns: _, name, replicas, storage_class, size } = self;
        Ok(serde_json::from_value(stateful_set(name, *replicas, image, storage_class, size))?)
    }
}

fn stateful_set(
    name: &str,
    replicas: i32,
    image: &str,
    storage_class: &str,
    size: &str,
) -> serde_json::Value {
    json!({
        "metadata": { "name": name },
        "spec": {
            "replicas": replicas,
            "serviceName": name,
            "podManagementPolicy": "Parallel",
            "selector": { "matchLabels": { "app": name } },
            "template": {
                "metadata": { "labels": { "app": name } },
                "spec": pod_spec(image),
            },
            "volumeClaimTemplates": [{
                "metadata": { "name": "data" },
                "spec": {
                    "accessModes": ["ReadWriteOnce"],
                    "storageClassName": storage_class,
                    "resources": { "requests": { "storage": size } },
                },
            }],
        },
    })
}

fn pod_spec(image: &str) -> serde_json::Value {
    json!({
        "automountServiceAccountToken": false,
        "terminationGracePeriodSeconds": 10,
        "securityContext": {
            "runAsNonRoot": true,
            "runAsUser": POSTGRES_ID,
            "runAsGroup": POSTGRES_ID,
            "fsGroup": POSTGRES_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "containers": [{
            "name": CONTAINER,
            "image": image,
            "imagePullPolicy": "Never",
            "command": ["/bin/sh", "-c", START_SCRIPT],
            "env": [
                { "name": "PGDATA", "value": DATA_PATH },
                { "name": "PGHOST", "value": SOCKET_PATH },
                { "name": "PGUSER", "value": "postgres" },
            ],
            "readinessProbe": {
                "exec": { "command": ["pg_isready", "-q"] },
                "periodSeconds": 1,
                "timeoutSeconds": 5,
            },
            "resources": { "requests": { "cpu": "20m", "memory": "48Mi" } },
            "securityContext": {
                "allowPrivilegeEscalation": false,
                "readOnlyRootFilesystem": true,
                "capabilities": { "drop": ["ALL"] },
            },
            "volumeMounts": [
                { "name": "data", "mountPath": VOLUME_PATH },
                { "name": "socket", "mountPath": SOCKET_PATH },
            ],
        }],
        "volumes": [{ "name": "socket", "emptyDir": {} }],
    })
}

/// The rows of a [`WriteLoad`](super::WriteLoad), which numbers them from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// How many there are; no two have the same number.
    pub count: u64,
    /// The lowest number; 0 when there is no row.
    pub min: u64,
    /// The highest number; 0 when there is no row.
    pub max: u64,
}

impl Rows {
    /// Whether every row from 1 to [`max`](Self::max) is there.
    #[must_use]
    pub fn is_unbroken(self) -> bool {
        // The numbers are a primary key, so `count` different ones up to `max` are all of them.
        self.count == self.max && self.min == self.max.min(1)
    }

    fn parse(line: &str) -> Result<Self> {
        let numbers: Vec<u64> = line
            .split('|')
            .map(str::parse)
            .collect::<Result<_, _>>()
            .with_context(|| format!("read {line:?}"))?;
        let [count, min, max] = numbers[..] else { bail!("three numbers expected, not {line:?}") };
        Ok(Self { count, min, max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stateful_set_is_one_and_keeps_its_claim_template() {
        let set = stateful_set("db", 3, "postgres:e2e", "fast", "1Gi");
        let typed: StatefulSet = serde_json::from_value(set).unwrap();

        let spec = typed.spec.unwrap();
        assert_eq!(spec.replicas, Some(3));
        let templates = spec.volume_claim_templates.unwrap();
        assert_eq!(templates[0].spec.as_ref().unwrap().storage_class_name.as_deref(), Some("fast"));
        assert_eq!(spec.template.spec.unwrap().containers[0].args, None);
    }

    #[test]
    fn rows_are_unbroken_when_every_number_from_one_is_there() {
        let rows = |line| Rows::parse(line).unwrap();
        assert_eq!(rows("3|1|3"), Rows { count: 3, min: 1, max: 3 });
        for (line, unbroken) in [("3|1|3", true), ("0|0|0", true), ("2|1|3", false), ("2|2|3", false)] {
            assert_eq!(rows(line).is_unbroken(), unbroken, "{line}");
        }
        assert!(Rows::parse("3|1").is_err());
        assert!(Rows::parse("").is_err());
    }
}
