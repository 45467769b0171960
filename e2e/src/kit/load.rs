//! A write load whose committed rows are known, to prove that a backup has all of them.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use kube::api::AttachedProcess;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::{oneshot, watch};

use super::Postgres;
use super::exec::{attach, read_all};
use super::postgres::CONTAINER;

/// psql ends at once when its stdin does. A row has no such limit: a freeze may hold it up for minutes.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// The rows that tests wait for take seconds.
const WAIT_TIMEOUT: Duration = Duration::from_mins(2);

/// Inserts the rows 1, 2, 3, … into the table `load` of one server, one at a time, as fast as the server
/// commits them; after a restart it goes on at the highest number.
///
/// **An acknowledged row is committed.** psql runs each `INSERT … RETURNING` as a transaction of its own, and
/// prints the row only after the server's `CommandComplete`, which the server sends after the commit record is
/// on its disk (`synchronous_commit` is on). The next row is sent only after that, so a crash or a snapshot at
/// any moment must leave every row that was acknowledged by then, and no gaps.
///
/// At most one row is in flight: sent, not acknowledged. It may or may not be committed.
///
/// A load that is dropped ends by itself.
pub struct WriteLoad {
    progress: watch::Receiver<Progress>,
    /// Dropped, it stops the load.
    running: Option<oneshot::Sender<()>>,
}

/// What the task tells: how far it is, and how it ended.
#[derive(Clone, Debug, Default)]
struct Progress {
    committed: u64,
    ended: Option<Result<(), String>>,
}

impl Progress {
    fn failure(&self) -> Option<anyhow::Error> {
        let failure = self.ended.clone()?.err()?;
        Some(anyhow!(failure).context(format!("the write load failed after row {}", self.committed)))
    }
}

impl WriteLoad {
    /// Makes the table if need be and starts to insert.
    ///
    /// # Errors
    /// When the server does not answer or psql cannot be started in its pod.
    pub async fn start(postgres: &Postgres, ordinal: u32) -> Result<Self> {
        let table = "CREATE TABLE IF NOT EXISTS load \
                     (n bigint PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp())";
        postgres.psql(ordinal, table).await?;
        let committed = postgres.rows(ordinal).await?.max;
        let psql = ["psql", "-XAtq", "-v", "ON_ERROR_STOP=1"];
        let pod = postgres.pod_name(ordinal);
        let ns = postgres.namespace();
        let process = attach(ns.cluster(), ns.name(), &pod, CONTAINER, &psql, true)
            .await
            .with_context(|| format!("start the write load in {pod}"))?;

        let (report, progress) = watch::channel(Progress { committed, ended: None });
        let (running, stopped) = oneshot::channel();
        tokio::spawn(async move {
            let end = insert_rows(process, &report, stopped).await.map_err(|err| format!("{err:#}"));
            report.send_modify(|progress| progress.ended = Some(end));
        });
        Ok(Self { progress, running: Some(running) })
    }

    /// The last acknowledged row: all rows up to this number are committed.
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.progress.borrow().committed
    }

    /// Waits until the row `n` is acknowledged.
    ///
    /// # Errors
    /// When the load failed before, or row `n` takes longer than two minutes.
    pub async fn wait_until(&mut self, n: u64) -> Result<()> {
        let reached = self.progress.wait_for(|progress| progress.committed >= n || progress.ended.is_some());
        let progress = match tokio::time::timeout(WAIT_TIMEOUT, reached).await {
            Ok(progress) => progress.context("the write load panicked")?.clone(),
            Err(_elapsed) => bail!("row {n} of the write load was not committed within {WAIT_TIMEOUT:?}"),
        };
        if progress.committed >= n {
            return Ok(());
        }
        Err(progress.failure().unwrap_or_else(|| anyhow!("the write load was stopped before row {n}")))
    }

    /// Lets the row in flight finish, ends psql, and returns the last committed row: there is none after it.
    ///
    /// # Errors
    /// When the load failed at any time. [`Self::committed`] still is the last acknowledged row.
    pub async fn stop(&mut self) -> Result<u64> {
        self.running = None;
        let ended = self.progress.wait_for(|progress| progress.ended.is_some()).await;
        let progress = ended.context("the write load panicked")?.clone();
        progress.failure().map_or(Ok(progress.committed), Err)
    }
}

/// Runs one psql from its first row to its end.
async fn insert_rows(
    mut process: AttachedProcess,
    report: &watch::Sender<Progress>,
    stopped: oneshot::Receiver<()>,
) -> Result<()> {
    let mut stdin = process.stdin().context("the process has a stdin")?;
    let stdout = BufReader::new(process.stdout().context("the process has a stdout")?);
    // Read on its own, so that complaints cannot fill the pipe and stop the rows.
    let complaints = tokio::spawn(read_all(process.stderr().context("the process has a stderr")?));

    let rows = converse(&mut stdin, stdout, report, stopped).await;
    // The end of its stdin ends psql; it cannot be told when the connection is dead.
    let _ = stdin.shutdown().await;
    let complaints = match tokio::time::timeout(END_TIMEOUT, complaints).await {
        Ok(complaints) => complaints.context("the reader of stderr panicked")??,
        Err(_elapsed) => "psql did not end".to_owned(),
    };
    match rows {
        Ok(()) if complaints.is_empty() => Ok(()),
        Ok(()) => Err(anyhow!("psql: {}", complaints.trim_end())),
        Err(err) if complaints.is_empty() => Err(err),
        Err(err) => Err(err.context(format!("psql: {}", complaints.trim_end()))),
    }
}

/// The closed loop: one row, its acknowledgement, the next row.
async fn converse(
    mut stdin: impl AsyncWrite + Unpin,
    stdout: impl AsyncBufRead + Unpin,
    report: &watch::Sender<Progress>,
    mut stopped: oneshot::Receiver<()>,
) -> Result<()> {
    let mut acknowledged = stdout.lines();
    let mut n = report.borrow().committed;
    while stopped.try_recv() == Err(oneshot::error::TryRecvError::Empty) {
        n += 1;
        let insert = format!("INSERT INTO load (n) VALUES ({n}) RETURNING n;\n");
        stdin.write_all(insert.as_bytes()).await.with_context(|| format!("send row {n}"))?;
        let line = acknowledged
            .next_line()
            .await
            .with_context(|| format!("read the acknowledgement of row {n}"))?
            .with_context(|| format!("psql ended before it acknowledged row {n}"))?;
        if line != n.to_string() {
            bail!("row {n} was acknowledged as {line:?}");
        }
        report.send_modify(|progress| progress.committed = n);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn channels() -> (watch::Sender<Progress>, oneshot::Sender<()>, oneshot::Receiver<()>) {
        let (stop, stopped) = oneshot::channel();
        (watch::Sender::new(Progress::default()), stop, stopped)
    }

    #[tokio::test]
    async fn a_row_that_was_sent_but_not_acknowledged_does_not_count() {
        let (report, _stop, stopped) = channels();
        let mut sent = Vec::new();

        let end = converse(&mut sent, &b"1\n2\n"[..], &report, stopped).await;

        assert_eq!(end.as_ref().unwrap_err().to_string(), "psql ended before it acknowledged row 3");
        report.send_modify(|progress| progress.ended = Some(end.map_err(|err| err.to_string())));
        let failure = report.borrow().failure().unwrap();
        assert_eq!(failure.to_string(), "the write load failed after row 2");
        assert!(String::from_utf8(sent).unwrap().contains("VALUES (3)"));
    }

    #[tokio::test]
    async fn a_wrong_acknowledgement_ends_the_load() {
        let (report, _stop, stopped) = channels();

        let end = converse(&mut Vec::new(), &b"1\n5\n"[..], &report, stopped).await;

        assert_eq!(end.unwrap_err().to_string(), "row 2 was acknowledged as \"5\"");
        assert_eq!(report.borrow().committed, 1);
    }

    #[tokio::test]
    async fn a_dropped_load_sends_nothing_more() {
        let (report, stop, stopped) = channels();
        drop(stop);
        let mut sent = Vec::new();

        converse(&mut sent, &b""[..], &report, stopped).await.unwrap();

        assert!(sent.is_empty());
    }
}
