//! `cargo e2e`: makes real clusters, runs the end-to-end tests on them and takes them away.

use std::io::Write;
use std::process::{ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use sts_backup_e2e::harness::{Harness, clusters, images, machine};
use sts_backup_e2e::kit::agent;
use sts_backup_e2e::{bench, demo, dev};

/// Makes real Kubernetes clusters and tests sts-backup on them.
#[derive(Parser)]
#[command(name = "cargo e2e", bin_name = "cargo e2e", version, disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make clusters, or those that are missing
    Up {
        /// How many must run; more that run already are kept
        #[arg(long, default_value_t = 1)]
        clusters: usize,
    },
    /// Show what runs
    Status {
        /// How to print it
        #[arg(long, short, value_enum, default_value_t = Format::Table)]
        output: Format,
    },
    /// Print the path of a cluster's kubeconfig
    Kubeconfig {
        /// The cluster's name, or its number
        #[arg(default_value = "1")]
        cluster: String,
    },
    /// Make the clusters that tests need and run the end-to-end tests
    Test {
        /// smoke: what CI runs. full: everything
        #[arg(long, value_enum, default_value_t = Tier::Smoke)]
        tier: Tier,
        /// Run only tests whose name contains this
        filter: Option<String>,
    },
    /// Make two clusters and a hub whose policy protects PostgreSQL under load in both, and show what comes of it
    Demo,
    /// Measure, and print the figures as one line of JSON
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
    /// Delete the clusters and everything they left on the machine but the cache
    Down {
        /// Also delete the cache: what was downloaded and built
        #[arg(long)]
        purge: bool,
    },
    /// Find, pull or build the node image, and print its name
    NodeImage,
    /// Build the agent for release, and print the name and the file of an image of it, for docker load
    AgentImage,
    /// Run a part of the product from the working tree
    Dev {
        #[command(subcommand)]
        part: Part,
    },
}

#[derive(Subcommand)]
enum Bench {
    /// How long a backup of 10 claims freezes, against the same snapshots made by hand
    Freeze,
    /// What the agent uses with 1,000 backups and 5,000 snapshots, and how it begins 200 runs in one minute
    Agent,
    /// How long a restore takes an application down, against scaling it down and up by hand
    Restore,
    /// What a hub uses for its agents, and how fast it is with all of them: needs no cluster, but two processors
    Fleet {
        /// How many agents are simulated
        #[arg(long, default_value_t = 10_000)]
        agents: usize,
    },
}

#[derive(Subcommand)]
enum Part {
    /// The agent, in place of the one in a cluster
    Agent {
        /// The cluster's name, or its number
        #[arg(long, default_value = "1")]
        cluster: String,
        /// What `sts-backup-agent run` gets
        #[arg(last = true)]
        arguments: Vec<String>,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Tier {
    Smoke,
    Full,
}

/// How many clusters the tests need.
const TEST_CLUSTERS: usize = 2;

#[tokio::main]
async fn main() -> ExitCode {
    match Box::pin(run(Arguments::parse().command)).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Up { clusters: count } => {
            let harness = Harness::open()?;
            let _lock = harness.lock()?;
            for name in up(&harness, count).await? {
                println!("{name}\t{}", harness.paths.kubeconfig(&name).display());
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Status { output } => {
            print_status(&clusters::status(&Harness::open()?).await?, output)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Kubeconfig { cluster } => {
            let name = cluster_name(cluster);
            let path = Harness::open()?.paths.kubeconfig(&name);
            if !path.exists() {
                bail!("there is no cluster {name}: run cargo e2e up, and see cargo e2e status");
            }
            println!("{}", path.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Test { tier, filter } => {
            let harness = Harness::open()?;
            {
                let _lock = harness.lock()?;
                up(&harness, TEST_CLUSTERS).await?;
                agent::ensure_none(&harness, 2).await?;
            }
            test(tier, filter.as_deref()).await
        }
        Command::Demo => {
            let harness = Harness::open()?;
            {
                let _lock = harness.lock()?;
                clusters::up(&harness, demo::CLUSTERS).await?;
            }
            Box::pin(demo::run(&harness)).await?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Bench { what } => {
            let harness = Harness { release: true, ..Harness::open()? };
            let _lock = harness.lock()?;
            if !matches!(what, Bench::Fleet { .. }) {
                up(&harness, 1).await?;
            }
            let figures = match what {
                Bench::Freeze => serde_json::to_string(&bench::freeze::run().await?)?,
                Bench::Agent => serde_json::to_string(&bench::agent::run().await?)?,
                Bench::Restore => serde_json::to_string(&bench::restore::run().await?)?,
                Bench::Fleet { agents } => {
                    let (hub, simulated) = images::make_fleet(&harness).await?;
                    serde_json::to_string(&Box::pin(bench::fleet::run(&hub, &simulated, agents)).await?)?
                }
            };
            println!("{figures}");
            Ok(ExitCode::SUCCESS)
        }
        Command::Down { purge } => {
            let harness = Harness::open()?;
            let _lock = harness.lock()?;
            clusters::down(&harness, purge).await?;
            Ok(ExitCode::SUCCESS)
        }
        Command::NodeImage => {
            let harness = Harness::open()?;
            let _lock = harness.lock()?;
            println!("{}", clusters::make_node_image(&harness).await?);
            Ok(ExitCode::SUCCESS)
        }
        Command::AgentImage => {
            let harness = Harness { release: true, ..Harness::open()? };
            let _lock = harness.lock()?;
            let archive = images::make_agent(&harness).await?;
            println!("{} {}", archive.name, archive.path.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Dev { part: Part::Agent { cluster, arguments } } => {
            let status = dev::run_agent(&cluster_name(cluster), &arguments).await?;
            Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

/// A cluster as a person names it: by its name, or its number.
fn cluster_name(cluster: String) -> String {
    cluster.parse().map_or(cluster, clusters::cluster_name)
}

/// The clusters, with the agent that tests share.
async fn up(harness: &Harness, count: usize) -> Result<Vec<String>> {
    let names = clusters::up(harness, count).await?;
    agent::ensure_shared(harness).await?;
    Ok(names)
}

/// Runs the tests by cargo. A tier is a set of this crate's test targets, whose tests a plain `cargo test`
/// leaves out as ignored; the filter is cargo's own.
async fn test(tier: Tier, filter: Option<&str>) -> Result<ExitCode> {
    // They wait for the clusters most of the time, not for this machine's processors.
    let mut passed = cargo_test("smoke", &["--test-threads=4"], filter).await?;
    if tier == Tier::Full {
        // They have one cluster to themselves, one after the other.
        passed &= cargo_test("full", &["--test-threads=1", "--nocapture"], filter).await?;
        // The last ones remake the clusters, and so run alone.
        passed &= cargo_test("harness", &["--test-threads=1"], filter).await?;
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn cargo_test(target: &str, options: &[&str], filter: Option<&str>) -> Result<bool> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut tests = tokio::process::Command::new(cargo);
    tests.args(["test", "--package", "sts-backup-e2e", "--test", target, "--", "--ignored"]);
    tests.args(options).args(filter);
    // An error's own words say what went wrong; a backtrace through the test's futures does not.
    let status = tests.env("RUST_LIB_BACKTRACE", "0").stdin(Stdio::null()).status().await;
    Ok(status.context("start cargo test")?.success())
}

fn print_status(status: &clusters::Status, output: Format) -> Result<()> {
    let mut out = std::io::stdout().lock();
    if output == Format::Json {
        writeln!(out, "{}", serde_json::to_string_pretty(status)?)?;
        return Ok(());
    }
    writeln!(out, "Docker engine  {}", status.engine.unwrap_or("none"))?;
    writeln!(out, "Cache          {}", machine::gib(status.cache_bytes))?;
    if status.clusters.is_empty() {
        writeln!(out, "No clusters: cargo e2e up makes one")?;
        return Ok(());
    }
    writeln!(out, "\n{:<14}{:<16}{:<10}{:<12}KUBECONFIG", "CLUSTER", "STATE", "VERSION", "MEMORY")?;
    for cluster in &status.clusters {
        writeln!(
            out,
            "{:<14}{:<16}{:<10}{:<12}{}",
            cluster.name,
            cluster.state,
            cluster.version.as_deref().unwrap_or("-"),
            cluster.memory.as_deref().unwrap_or("-"),
            cluster.kubeconfig.display()
        )?;
    }
    Ok(())
}
