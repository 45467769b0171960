//! The statements that write, each on a connection that is in a transaction: many rows at once where there are many.

use std::collections::BTreeMap;

use jiff::Timestamp;
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
    let mut bodies = BTreeMap::new();
    for placements in placements.chunks(ROWS) {
        let ids: Vec<_> = placements.iter().map(|placement| placement.cluster.to_string()).collect();
        let mut update = QueryBuilder::new("UPDATE clusters SET revision = new.column2 FROM (");
        update.push_values(ids.iter().zip(placements), |mut row, (id, placement)| {
            row.push_bind(id).push_bind(number(placement.revision));
        });
        update.push(") AS new WHERE clusters.id = new.column1");
        execute(update, placements.len(), connection).await?;
        let mut delete = QueryBuilder::new("DELETE FROM placed WHERE cluster IN (");
        let mut separated = delete.separated(", ");
        for id in &ids {
            separated.push_bind(id);
        }
        delete.push(")");
        execute(delete, placements.len(), connection).await?;
        let mut placed = Vec::new();
        for (id, placement) in ids.iter().zip(placements) {
            for (name, body) in &placement.bodies {
                placed.push((id, name, body.as_ref().map(|(hash, _)| hash)));
                if let Some((hash, body)) = body
                    && bodies.insert(hash, body).is_none()
                {
                    sqlx::query("INSERT INTO bodies (hash, body) VALUES (?, ?) ON CONFLICT DO NOTHING")
                        .bind(hash)
                        .bind(&**body)
                        .execute(&mut *connection)
                        .await?;
                }
            }
        }
        for rows in placed.chunks(ROWS) {
            let mut insert = QueryBuilder::new("INSERT INTO placed (cluster, name, hash) ");
            insert.push_values(rows, |mut row, (id, name, hash)| {
                row.push_bind(*id).push_bind(*name).push_bind(*hash);
            });
            execute(insert, rows.len(), connection).await?;
        }
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
