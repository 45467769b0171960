//! One task writes, and commits what has come in meanwhile at once: a commit waits for the disk, whatever is in it.

use std::fmt;
use std::sync::Arc;

use futures::future::BoxFuture;
use sqlx::SqliteConnection;
use sqlx::sqlite::SqlitePool;
use tokio::sync::{mpsc, oneshot};

/// The most writes of one commit.
const MOST: usize = 500;

/// How many writes may wait; more wait to be accepted.
const QUEUE: usize = 2 * MOST;

/// Why nothing of a write is remembered.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WriteError {
    /// The database refuses.
    #[error(transparent)]
    Refused(Arc<sqlx::Error>),
    /// The store is closed.
    #[error("the database is closed")]
    Closed,
}

/// What is to be written: it is done as a whole or not at all.
pub(super) trait Job:
    for<'a> FnOnce(&'a mut SqliteConnection) -> BoxFuture<'a, Result<(), sqlx::Error>> + Send + 'static
{
}

impl<F> Job for F where
    F: for<'a> FnOnce(&'a mut SqliteConnection) -> BoxFuture<'a, Result<(), sqlx::Error>> + Send + 'static
{
}

type Done = Result<(), WriteError>;
type AnyJob =
    Box<dyn for<'a> FnOnce(&'a mut SqliteConnection) -> BoxFuture<'a, Result<(), sqlx::Error>> + Send>;

struct Waiting {
    job: AnyJob,
    done: oneshot::Sender<Done>,
}

enum Order {
    Write(Waiting),
    Close(oneshot::Sender<()>),
}

/// Whoever wants something written.
#[derive(Clone)]
pub(super) struct Writer(mpsc::Sender<Order>);

impl fmt::Debug for Writer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Writer")
    }
}

impl Writer {
    /// Writes with the one connection of this pool.
    pub(super) fn start(pool: SqlitePool) -> Self {
        let (orders, received) = mpsc::channel(QUEUE);
        tokio::spawn(run(pool, received));
        Self(orders)
    }

    /// Returns when it is safe on the disk.
    pub(super) async fn write(&self, job: impl Job) -> Done {
        let (done, answer) = oneshot::channel();
        let sent = self.0.send(Order::Write(Waiting { job: Box::new(job), done })).await;
        sent.map_err(|_| WriteError::Closed)?;
        answer.await.unwrap_or(Err(WriteError::Closed))
    }

    /// Returns when all that was asked for before is written; what is asked for later is refused.
    pub(super) async fn close(&self) {
        let (done, answer) = oneshot::channel();
        if self.0.send(Order::Close(done)).await.is_ok() {
            let _ = answer.await;
        }
    }
}

async fn run(pool: SqlitePool, mut orders: mpsc::Receiver<Order>) {
    let mut received = Vec::new();
    while orders.recv_many(&mut received, MOST).await > 0 {
        let (mut jobs, mut closing) = (Vec::new(), None);
        for order in received.drain(..) {
            match order {
                Order::Write(waiting) if closing.is_none() => jobs.push(waiting),
                // It is refused as it is dropped.
                Order::Write(_) => {}
                Order::Close(done) => closing = Some(done),
            }
        }
        commit(&pool, jobs).await;
        if let Some(done) = closing {
            pool.close().await;
            let _ = done.send(());
            return;
        }
    }
}

/// Does all in one transaction; what fails alone is undone alone.
async fn commit(pool: &SqlitePool, jobs: Vec<Waiting>) {
    if jobs.is_empty() {
        return;
    }
    let mut waiting = Vec::new();
    let written = async {
        let mut transaction = pool.begin().await?;
        for Waiting { job, done } in jobs {
            sqlx::query("SAVEPOINT job").execute(&mut *transaction).await?;
            let written = job(&mut transaction).await;
            let undone = match &written {
                Ok(()) => Ok(()),
                Err(_) => sqlx::query("ROLLBACK TO job").execute(&mut *transaction).await.map(drop),
            };
            match written {
                Ok(()) => waiting.push(done),
                Err(error) => drop(done.send(Err(WriteError::Refused(Arc::new(error))))),
            }
            undone?;
            sqlx::query("RELEASE job").execute(&mut *transaction).await?;
        }
        transaction.commit().await
    };
    let written = written.await.map_err(|error| WriteError::Refused(Arc::new(error)));
    for done in waiting {
        let _ = done.send(written.clone());
    }
}
