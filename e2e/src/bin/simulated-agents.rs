//! Simulated agents as a program: what it does is in [`sts_backup_e2e::simulated`].

use clap::Parser;
use sts_backup_e2e::simulated::crowd::{self, Options};
use tracing_subscriber::EnvFilter;

/// Many agents without clusters, for benches and tests of a hub.
#[derive(Debug, Parser)]
#[command(name = "simulated-agents", version)]
struct Arguments {
    #[command(flatten)]
    options: Options,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    crowd::run(Arguments::parse().options).await
}
