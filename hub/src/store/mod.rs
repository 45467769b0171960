//! What the hub remembers: a `SQLite` file. All SQL is here and in [`statements`].
//!
//! Reads run side by side; writes go through one [`writer`] that commits many at once, and says so when they are safe on
//! the disk. It decides nothing of what is written.

mod rows;
mod statements;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use serde_json::Value;
use sqlx::Row;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
};
use sts_backup_api::identity::ClusterId;
use sts_backup_api::link::state_hash;
use uuid::Uuid;

pub use self::rows::{
    AgentRow, Body, ClusterRow, HistoryRow, ObjectKey, ObjectRow, Placed, Placement, Report,
};
pub use self::writer::WriteError;
use self::writer::Writer;

/// How many reads run side by side.
const READERS: u32 = 4;

/// The store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be opened.
    #[error("open the database {}: set `database` to a file in a directory that this process may write to", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: sqlx::Error,
    },
    /// It was written by a newer hub, or is none of ours.
    #[error("bring the database {} up to date: run the hub's newest version that has used it", path.display())]
    Migrate {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: sqlx::migrate::MigrateError,
    },
    /// A read failed.
    #[error("read the database")]
    Read(#[from] sqlx::Error),
    /// A write failed: nothing of it is remembered.
    #[error("write the database")]
    Write(#[from] WriteError),
    /// Something in it is not what the hub writes.
    #[error(
        "the database holds {what}: put a copy of it in its place, or move it away to begin with an empty one"
    )]
    Corrupt {
        /// What.
        what: String,
    },
}

/// The result of what the store does.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// The store. A handle: clones share the file.
#[derive(Clone, Debug)]
pub struct Store {
    pool: SqlitePool,
    writer: Writer,
    id: Uuid,
}

impl Store {
    /// Opens the file, and makes it where there is none.
    ///
    /// # Errors
    /// If it cannot be opened, or is of a newer hub.
    pub async fn open(path: &Path) -> Result<Self> {
        let opened = |source| StoreError::Open { path: path.to_owned(), source };
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .foreign_keys(true)
            .journal_mode(SqliteJournalMode::Wal)
            // What is acknowledged survives a loss of power, too.
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(Duration::from_secs(10))
            // What is written at once lies side by side: few large pages instead of many small ones. A file that exists keeps
            // its own.
            .page_size(16 << 10)
            // A commit of many reports has tens of megabytes: each page is copied once for several commits, not for each.
            .pragma("wal_autocheckpoint", "8000")
            // What undoes a part of a transaction: it needs no file, which a read-only root would not take either.
            .pragma("temp_store", "MEMORY");
        let one = SqlitePoolOptions::new().min_connections(1).max_connections(1);
        let one = one.idle_timeout(None).max_lifetime(None);
        let writing = one.connect_with(options.clone().pragma("cache_size", "-16384"));
        let writing = writing.await.map_err(opened)?;
        let migrated = sqlx::migrate!("./migrations").run(&writing).await;
        migrated.map_err(|source| StoreError::Migrate { path: path.to_owned(), source })?;
        let insert = "INSERT INTO meta (key, value) VALUES ('store_id', ?) ON CONFLICT DO NOTHING";
        sqlx::query(insert).bind(Uuid::new_v4().to_string()).execute(&writing).await.map_err(opened)?;
        let id: String = sqlx::query_scalar("SELECT value FROM meta WHERE key = 'store_id'")
            .fetch_one(&writing)
            .await
            .map_err(opened)?;
        let id = id.parse().map_err(|_| corrupt("a store id that is none", &id))?;
        let readers = SqlitePoolOptions::new().max_connections(READERS).connect_with(options.read_only(true));
        Ok(Self { pool: readers.await.map_err(opened)?, writer: Writer::start(writing), id })
    }

    /// Which store it is: another one knows nothing of what this one has handed out.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// Writes all that was asked for, and closes the file.
    pub async fn close(&self) {
        self.writer.close().await;
        self.pool.close().await;
    }

    /// All clusters, each with what is placed on it.
    ///
    /// # Errors
    /// If they cannot be read.
    pub async fn clusters(&self) -> Result<Vec<ClusterRow>> {
        let rows = sqlx::query("SELECT * FROM clusters").fetch_all(&self.pool).await?;
        let mut clusters = rows.iter().map(cluster).collect::<Result<Vec<_>>>()?;
        let at: BTreeMap<_, _> =
            clusters.iter().enumerate().map(|(at, row)| (row.id.to_string(), at)).collect();
        let mut bodies = BTreeMap::new();
        for row in sqlx::query("SELECT hash, body FROM bodies").fetch_all(&self.pool).await? {
            let hash: Vec<u8> = row.try_get("hash")?;
            let json = row.try_get::<&[u8], _>("body")?.into();
            bodies.insert(hash.clone(), Body { hash, json });
        }
        for row in sqlx::query("SELECT cluster, name, hash FROM placed").fetch_all(&self.pool).await? {
            let name: String = row.try_get("name")?;
            // One without its body is no tombstone: that would remove the policy from the cluster.
            let missing = || corrupt("a policy without its body", &name);
            let hash: Option<&[u8]> = row.try_get("hash")?;
            let body = hash.map(|hash| bodies.get(hash).cloned().ok_or_else(missing)).transpose()?;
            if let Some(at) = at.get(row.try_get::<&str, _>("cluster")?) {
                clusters[*at].placed.insert(name, body);
            }
        }
        Ok(clusters)
    }

    /// Adds a cluster.
    ///
    /// # Errors
    /// If one has its id or name, or it cannot be written.
    pub async fn add_cluster(
        &self,
        id: ClusterId,
        name: &str,
        labels: &BTreeMap<String, String>,
        now: Timestamp,
    ) -> Result<()> {
        let (name, labels) = (name.to_owned(), text(labels));
        self.write(move |connection| {
            Box::pin(async move {
                sqlx::query("INSERT INTO clusters (id, name, labels, added_ms) VALUES (?, ?, ?, ?)")
                    .bind(id.to_string())
                    .bind(&name)
                    .bind(labels)
                    .bind(now.as_millisecond())
                    .execute(&mut *connection)
                    .await?;
                statements::audit(connection, now, "ClusterAdded", &name, &id.to_string()).await
            })
        })
        .await
    }

    /// Gives a cluster other labels.
    ///
    /// # Errors
    /// If they cannot be written.
    pub async fn label_cluster(
        &self,
        id: ClusterId,
        name: &str,
        labels: &BTreeMap<String, String>,
        now: Timestamp,
    ) -> Result<()> {
        let (name, labels) = (name.to_owned(), text(labels));
        self.write(move |connection| {
            Box::pin(async move {
                sqlx::query("UPDATE clusters SET labels = ? WHERE id = ?")
                    .bind(&labels)
                    .bind(id.to_string())
                    .execute(&mut *connection)
                    .await?;
                statements::audit(connection, now, "ClusterLabelled", &name, &labels).await
            })
        })
        .await
    }

    /// Refuses a cluster from now on.
    ///
    /// # Errors
    /// If it cannot be written.
    pub async fn revoke_cluster(&self, id: ClusterId, name: &str, now: Timestamp) -> Result<()> {
        let name = name.to_owned();
        self.write(move |connection| {
            Box::pin(async move {
                sqlx::query("UPDATE clusters SET revoked_ms = ? WHERE id = ?")
                    .bind(now.as_millisecond())
                    .bind(id.to_string())
                    .execute(&mut *connection)
                    .await?;
                statements::audit(connection, now, "ClusterRevoked", &name, &id.to_string()).await
            })
        })
        .await
    }

    /// Forgets a cluster and all that it reported.
    ///
    /// # Errors
    /// If it cannot be written.
    pub async fn remove_cluster(&self, id: ClusterId, name: &str, now: Timestamp) -> Result<()> {
        let name = name.to_owned();
        self.write(move |connection| {
            Box::pin(async move {
                sqlx::query("DELETE FROM clusters WHERE id = ?")
                    .bind(id.to_string())
                    .execute(&mut *connection)
                    .await?;
                statements::audit(connection, now, "ClusterRemoved", &name, &id.to_string()).await
            })
        })
        .await
    }

    /// Confirms what the agent of a cluster holds back, up to a revision.
    ///
    /// # Errors
    /// If it cannot be written.
    pub async fn confirm(&self, id: ClusterId, name: &str, revision: u64, now: Timestamp) -> Result<()> {
        let name = name.to_owned();
        self.write(move |connection| {
            Box::pin(async move {
                sqlx::query("UPDATE clusters SET confirmed = ? WHERE id = ?")
                    .bind(statements::number(revision))
                    .bind(id.to_string())
                    .execute(&mut *connection)
                    .await?;
                statements::audit(connection, now, "RevisionConfirmed", &name, &revision.to_string()).await
            })
        })
        .await
    }

    /// Gives clusters new revisions of what is placed on them.
    ///
    /// # Errors
    /// If they cannot be written: then all of them have what they had.
    pub async fn place(&self, placements: Vec<Placement>) -> Result<()> {
        self.write(move |connection| Box::pin(statements::placements(connection, placements))).await
    }

    /// Notes what agents said of themselves and of what they applied, and when they were last heard of.
    ///
    /// # Errors
    /// If it cannot be written: then nothing of it is.
    pub async fn note_agents(&self, agents: Vec<AgentRow>) -> Result<()> {
        self.write(move |connection| Box::pin(statements::agents(connection, agents))).await
    }

    /// Notes what a cluster reports: each object's newest state, and once each what has ended.
    ///
    /// # Errors
    /// If it cannot be written: then nothing of it is.
    pub async fn report(&self, id: ClusterId, report: Report) -> Result<()> {
        self.write(move |connection| Box::pin(statements::report(connection, id, report))).await
    }

    /// The hash of all that a cluster has told of its objects.
    ///
    /// # Errors
    /// If they cannot be read.
    pub async fn state_hash(&self, id: ClusterId) -> Result<Vec<u8>> {
        let select = "SELECT kind, namespace, name, hash FROM objects WHERE cluster = ? ORDER BY kind, namespace, name";
        let rows = sqlx::query(select).bind(id.to_string()).fetch_all(&self.pool).await?;
        let object = |row| -> Result<(_, _), sqlx::Error> {
            let row: &SqliteRow = row;
            let key = [row.try_get("kind")?, row.try_get("namespace")?, row.try_get("name")?];
            Ok((key, row.try_get("hash")?))
        };
        let objects = rows.iter().map(object).collect::<Result<Vec<([&str; 3], &[u8])>, _>>()?;
        Ok(state_hash(objects))
    }

    /// Forgets the objects of a cluster that are not among these.
    ///
    /// # Errors
    /// If it cannot be written.
    pub async fn keep_only(&self, id: ClusterId, kept: std::collections::BTreeSet<ObjectKey>) -> Result<()> {
        self.write(move |connection| {
            Box::pin(async move {
                let cluster = id.to_string();
                let rows = sqlx::query("SELECT kind, namespace, name FROM objects WHERE cluster = ?")
                    .bind(&cluster)
                    .fetch_all(&mut *connection)
                    .await?;
                for row in &rows {
                    let key = object_key(row)?;
                    if !kept.contains(&key) {
                        statements::delete_object(connection, &cluster, &key).await?;
                    }
                }
                Ok(())
            })
        })
        .await
    }

    /// Forgets what ended, and who did what, before that time.
    ///
    /// # Errors
    /// If it cannot be written.
    pub async fn forget_before(&self, time: Timestamp) -> Result<()> {
        self.write(move |connection| {
            Box::pin(async move {
                for table in [
                    "DELETE FROM history WHERE started_ms < ?",
                    "DELETE FROM audit WHERE at_ms < ?",
                    // Takes no time, and belongs with what is forgotten.
                    "DELETE FROM bodies WHERE ? AND NOT EXISTS (SELECT 1 FROM placed WHERE placed.hash = bodies.hash)",
                ] {
                    sqlx::query(table).bind(time.as_millisecond()).execute(&mut *connection).await?;
                }
                Ok(())
            })
        })
        .await
    }

    /// The objects of a kind, each with the id of its cluster: of one cluster, or of all.
    ///
    /// # Errors
    /// If they cannot be read.
    pub async fn objects(&self, kind: &str, cluster: Option<ClusterId>) -> Result<Vec<(String, ObjectRow)>> {
        // Two statements, for the key begins with the cluster: one that is said to be any is looked for in all rows.
        let of_one = "SELECT cluster, kind, namespace, name, body, hash FROM objects WHERE cluster = ?2 AND kind = ?1 \
                      ORDER BY namespace, name";
        let of_all = "SELECT cluster, kind, namespace, name, body, hash FROM objects WHERE kind = ?1 \
                      ORDER BY cluster, namespace, name";
        let select = match cluster {
            Some(cluster) => sqlx::query(of_one).bind(kind).bind(cluster.to_string()),
            None => sqlx::query(of_all).bind(kind),
        };
        let rows = select.fetch_all(&self.pool).await?;
        let object = |row: &SqliteRow| {
            let (body, hash) = (row.try_get("body")?, row.try_get("hash")?);
            Ok((row.try_get("cluster")?, ObjectRow { key: object_key(row)?, body, hash }))
        };
        rows.iter().map(object).collect()
    }

    /// The newest of what has ended, each with the id of its cluster: of one cluster, or of all.
    ///
    /// # Errors
    /// If it cannot be read.
    pub async fn history(
        &self,
        kind: &str,
        cluster: Option<ClusterId>,
        limit: u32,
    ) -> Result<Vec<(String, HistoryRow)>> {
        let select = "SELECT * FROM history WHERE kind = ?1 AND (?2 IS NULL OR cluster = ?2) \
                      ORDER BY started_ms DESC LIMIT ?3";
        let rows = sqlx::query(select)
            .bind(kind)
            .bind(cluster.map(|cluster| cluster.to_string()))
            .bind(limit)
            .fetch_all(&self.pool)
            .await?;
        let ended = |row: &SqliteRow| {
            let ended = HistoryRow {
                key: object_key(row)?,
                uid: row.try_get("uid")?,
                run: row.try_get("run")?,
                started: time(row.try_get("started_ms")?)?,
                result: row.try_get("result")?,
                body: row.try_get("body")?,
            };
            Ok((row.try_get("cluster")?, ended))
        };
        rows.iter().map(ended).collect()
    }

    /// Who did what, newest first: time, action, object and detail.
    ///
    /// # Errors
    /// If it cannot be read.
    pub async fn audit(&self, limit: u32) -> Result<Vec<(Timestamp, String, String, String)>> {
        let select = "SELECT at_ms, action, object, detail FROM audit ORDER BY at_ms DESC LIMIT ?";
        let rows = sqlx::query(select).bind(limit).fetch_all(&self.pool).await?;
        rows.iter()
            .map(|row| {
                let at = time(row.try_get("at_ms")?)?;
                Ok((at, row.try_get("action")?, row.try_get("object")?, row.try_get("detail")?))
            })
            .collect()
    }

    /// Notes what somebody did.
    ///
    /// # Errors
    /// If it cannot be written.
    pub async fn note(&self, action: &'static str, object: &str, detail: &str, now: Timestamp) -> Result<()> {
        let (object, detail) = (object.to_owned(), detail.to_owned());
        self.write(move |connection| {
            Box::pin(async move { statements::audit(connection, now, action, &object, &detail).await })
        })
        .await
    }

    async fn write(&self, job: impl writer::Job) -> Result<()> {
        Ok(self.writer.write(job).await?)
    }
}

fn object_key(row: &SqliteRow) -> Result<ObjectKey, sqlx::Error> {
    Ok(ObjectKey {
        kind: row.try_get("kind")?,
        namespace: row.try_get("namespace")?,
        name: row.try_get("name")?,
    })
}

fn cluster(row: &SqliteRow) -> Result<ClusterRow> {
    let json = |column: &str| -> Result<Option<Value>> {
        let text: Option<&str> = row.try_get(column)?;
        text.map(|text| serde_json::from_str(text).map_err(|_| corrupt("no JSON", text))).transpose()
    };
    let moment = |column: &str| row.try_get::<Option<i64>, _>(column)?.map(time).transpose();
    let (id, labels): (&str, &str) = (row.try_get("id")?, row.try_get("labels")?);
    let count = |column: &str| -> Result<u64> {
        let number: i64 = row.try_get(column)?;
        u64::try_from(number).map_err(|_| corrupt("a negative revision", &number.to_string()))
    };
    Ok(ClusterRow {
        id: id.parse().map_err(|_| corrupt("a cluster's id that is none", id))?,
        name: row.try_get("name")?,
        labels: serde_json::from_str(labels).map_err(|_| corrupt("labels that are none", labels))?,
        added: time(row.try_get("added_ms")?)?,
        revoked: moment("revoked_ms")?,
        revision: count("revision")?,
        confirmed: count("confirmed")?,
        hello: json("hello")?,
        applied: json("applied")?,
        seen: moment("seen_ms")?,
        placed: BTreeMap::new(),
    })
}

fn corrupt(what: &str, found: &str) -> StoreError {
    StoreError::Corrupt { what: format!("{what}: {found:?}") }
}

fn time(milliseconds: i64) -> Result<Timestamp> {
    Timestamp::from_millisecond(milliseconds)
        .map_err(|_| corrupt("a time that is none", &milliseconds.to_string()))
}

fn text(labels: &BTreeMap<String, String>) -> String {
    serde_json::to_string(labels).expect("strings are JSON")
}
