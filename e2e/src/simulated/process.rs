//! A process of simulated agents, as a test holds it.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

use super::{Answer, Order};
use crate::kit::local_hub::LocalHub;

/// All that is ever asked is done by then.
const LIMIT: Duration = Duration::from_mins(5);

/// Agents that run; they end when it is dropped.
pub struct SimulatedAgents {
    /// Killed when it is dropped.
    _process: Child,
    orders: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl SimulatedAgents {
    /// Starts the program with so many agents of this hub, which reach it at an address and speak for its clusters from the
    /// first number on; pinned to a processor where one is named.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(
        program: &Path,
        hub: &LocalHub,
        at: &str,
        first: usize,
        agents: usize,
        processor: Option<usize>,
    ) -> Result<Self> {
        let mut command = Command::new("setpriv");
        command.arg("--pdeathsig=KILL");
        if let Some(processor) = processor {
            command.args(["taskset", "--cpu-list", &processor.to_string()]);
        }
        command.arg(program).args([
            "--hub",
            at,
            "--first",
            &first.to_string(),
            "--agents",
            &agents.to_string(),
        ]);
        command.arg("--authority").arg(hub.authority()).args(["--trust-domain", LocalHub::TRUST_DOMAIN]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut process = command.spawn().context("start the simulated agents")?;
        let orders = process.stdin.take().context("it has an input")?;
        let answers = process.stdout.take().context("it has an output")?;
        Ok(Self { _process: process, orders, answers: BufReader::new(answers).lines() })
    }

    /// Gives an order, and returns its answer.
    ///
    /// # Errors
    /// If what it asks for does not come about within five minutes, or the process ends.
    pub async fn ask(&mut self, order: Order) -> Result<Answer> {
        let answer = async {
            let mut line = serde_json::to_string(&order)?;
            line.push('\n');
            self.orders.write_all(line.as_bytes()).await?;
            let answer = self.answers.next_line().await?.context("the simulated agents have ended")?;
            anyhow::Ok(serde_json::from_str(&answer)?)
        };
        let answer = timeout(LIMIT, answer).await;
        answer.with_context(|| format!("{order:?} has not come about within {LIMIT:?}"))?
    }
}
