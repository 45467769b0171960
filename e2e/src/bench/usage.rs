//! What the agent has used, as it tells at `/metrics`, and the numbers of which figures are made.

use anyhow::{Context, Result};

use crate::kit::agent::Agent;

/// What the agent has used.
pub(super) struct Usage {
    pub(super) rss_bytes: f64,
    pub(super) cpu_seconds: f64,
}

impl Usage {
    pub(super) async fn of(agent: &Agent, pod: &str) -> Result<Self> {
        let metrics = agent.get(pod, "/metrics").await?;
        let value = |name: &str| -> Result<f64> {
            let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            Ok(line.with_context(|| format!("the agent's metrics have no {name}"))?.parse()?)
        };
        Ok(Self {
            rss_bytes: value("process_resident_memory_bytes")?,
            cpu_seconds: value("process_cpu_seconds_total")?,
        })
    }
}

/// The machine's load average over the last minute.
pub(super) fn load_average() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").context("read /proc/loadavg")?;
    Ok(text.split(' ').next().context("/proc/loadavg is empty")?.parse()?)
}

/// Bytes as mebibytes.
pub(super) fn mebibytes(bytes: f64) -> f64 {
    rounded(bytes / f64::from(1 << 20))
}

/// Two digits after the point: no bench is more exact.
pub(super) fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}
