//! The statements that write, each on a connection that is in a transaction: many rows at once where there are many.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde_json::json;
use sqlx::{QueryBuilder, Sqlite, SqliteConnection};
use sts_backup_api::identity::ClusterId;

use super::{AgentRow, HistoryRow, ObjectKey, ObjectRow, Placement, Report};

/// How many rows one statement writes: to execute one costs as much as many rows do, and `SQLite` binds no more than 32,766
/// values.
const ROWS: usize = 1000;

/// Statements on so many rows are kept ready: most reports are that short.
const KEPT: usize = 32;

pub(super) async fn placements(
    connection: &mut SqliteConnection,
    placements: Vec<Placement>,
) -> Result<(), sqlx::Error> {
    let (mut clusters, mut revisions) = (Vec::new(), Vec::new());
    let mut bodies = BTreeMap::new();
    let mut placed: BTreeMap<_, Vec<String>> = BTreeMap::new();
    for Placement { cluster, revision, placed: of_cluster } in &placements {
        let cluster = cluster.to_string();
        for (name, body) in of_cluster {
            bodies.extend(body.as_ref().map(|body| (&body.hash, &body.json)));
            let hash = body.as_ref().map(|body| &body.hash);
            placed.entry((name, hash)).or_default().push(cluster.clone());
        }
        revisions.push((cluster.clone(), number(*revision)));
        clusters.push(cluster);
    }
    let update = "UPDATE clusters SET revision = new.value ->> 1 FROM json_each(?) AS new \
                  WHERE clusters.id = new.value ->> 0";
    sqlx::query(update).bind(json!(revisions).to_string()).execute(&mut *connection).await?;
    let delete = "DELETE FROM placed WHERE cluster IN (SELECT value FROM json_each(?))";
    sqlx::query(delete).bind(json!(clusters).to_string()).execute(&mut *connection).await?;
    for (hash, json) in bodies {
        let insert = "INSERT INTO bodies (hash, body) VALUES (?, ?) ON CONFLICT DO NOTHING";
        sqlx::query(insert).bind(hash).bind(&**json).execute(&mut *connection).await?;
    }
    for ((name, hash), clusters) in placed {
        let insert = "INSERT INTO placed (name, hash, cluster) SELECT ?, ?, value FROM json_each(?)";
        let insert = sqlx::query(insert).bind(name).bind(hash).bind(json!(clusters).to_string());
        insert.execute(&mut *connection).await?;
    }
    Ok(())
}

pub(super) async fn agents(
    connection: &mut SqliteConnection,
    agents: Vec<AgentRow>,
) -> Result<(), sqlx::Error> {
    for agents in agents.chunks(ROWS) {
        let mut update = QueryBuilder::new(
            "UPDATE clusters SET hello = new.column2, applied = new.column3, seen_ms = new.column4 FROM (",
        );
        update.push_values(agents, |mut row, AgentRow { cluster, hello, applied, seen }| {
            row.push_bind(cluster.to_string()).push_bind(hello).push_bind(applied);
            row.push_bind(seen.map(Timestamp::as_millisecond));
        });
        update.push(") AS new WHERE clusters.id = new.column1");
        execute(update, agents.len(), connection).await?;
    }
    Ok(())
}

pub(super) async fn report(
    connection: &mut SqliteConnection,
    id: ClusterId,
    report: Report,
) -> Result<(), sqlx::Error> {
    let cluster = id.to_string();
    for rows in report.objects.chunks(ROWS) {
        let mut insert =
            QueryBuilder::new("INSERT INTO objects (cluster, kind, namespace, name, body, hash) ");
        insert.push_values(rows, |mut row, ObjectRow { key, body, hash }| {
            row.push_bind(&cluster).push_bind(&key.kind).push_bind(&key.namespace).push_bind(&key.name);
            row.push_bind(body).push_bind(hash);
        });
        insert.push(" ON CONFLICT DO UPDATE SET body = excluded.body, hash = excluded.hash WHERE hash != excluded.hash");
        execute(insert, rows.len(), connection).await?;
    }
    for rows in report.history.chunks(ROWS) {
        let columns = "cluster, uid, run, kind, namespace, name, started_ms, result, body";
        let mut insert = QueryBuilder::new(format!("INSERT INTO history ({columns}) "));
        insert.push_values(rows, |mut row, HistoryRow { key, uid, run, started, result, body }| {
            row.push_bind(&cluster).push_bind(uid).push_bind(run);
            row.push_bind(&key.kind).push_bind(&key.namespace).push_bind(&key.name);
            row.push_bind(started.as_millisecond()).push_bind(result).push_bind(body);
        });
        insert.push(
            " ON CONFLICT DO UPDATE SET result = excluded.result, body = excluded.body WHERE body != excluded.body",
        );
        execute(insert, rows.len(), connection).await?;
    }
    for key in &report.gone {
        delete_object(connection, &cluster, key).await?;
    }
    Ok(())
}

/// Executes a statement on so many rows. A long one takes memory, and is seldom the same: it is not kept.
async fn execute(
    mut statement: QueryBuilder<Sqlite>,
    rows: usize,
    connection: &mut SqliteConnection,
) -> Result<(), sqlx::Error> {
    statement.build().persistent(rows <= KEPT).execute(connection).await?;
    Ok(())
}

pub(super) async fn delete_object(
    connection: &mut SqliteConnection,
    cluster: &str,
    key: &ObjectKey,
) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM objects WHERE cluster = ? AND kind = ? AND namespace = ? AND name = ?")
        .bind(cluster)
        .bind(&key.kind)
        .bind(&key.namespace)
        .bind(&key.name)
        .execute(connection)
        .await?;
    Ok(())
}

pub(super) async fn audit(
    connection: &mut SqliteConnection,
    now: Timestamp,
    action: &str,
    object: &str,
    detail: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO audit (at_ms, action, object, detail) VALUES (?, ?, ?, ?)")
        .bind(now.as_millisecond())
        .bind(action)
        .bind(object)
        .bind(detail)
        .execute(connection)
        .await?;
    Ok(())
}

/// `SQLite` has no unsigned numbers.
pub(super) fn number(revision: u64) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}
