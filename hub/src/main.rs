//! The hub's binary: commands and exit codes. Everything else is the library's.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sts_backup_api::identity::{ClusterId, TrustDomain};
use sts_backup_hub::app::{self, Ends};
use sts_backup_hub::client::{self, ClientError, Clusters, Connection, FleetView, Policies};
use sts_backup_hub::config::{self, Config, Flags};
use sts_backup_hub::pki::{self, Holder};
use sts_backup_hub::policies::PolicySet;
use sts_backup_service::config::environment;
use sts_backup_service::telemetry::{self, chain};
use sts_backup_service::{clock, signals};
use tracing::{error, info, warn};
use uuid::Uuid;

const FAILED: u8 = 1;
const PANICKED: u8 = 101;
/// What the policies or the command line make impossible; clap ends with the same.
const BAD_INPUT: u8 = 2;

/// Hands backup policies to a fleet of clusters and shows its state.
#[derive(Debug, Parser)]
#[command(version, about, long_about = None)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the hub until SIGTERM
    ///
    /// Every key of the configuration file is also a flag, and a variable such as STSB_HUB_LISTEN or STSB_HUB_API__LISTEN.
    /// Flags win over variables, variables over the file.
    #[expect(clippy::doc_markdown, reason = "the comment is a help text, which is plain")]
    Serve(Sources),
    /// Check the fleet policies of a directory, and with --config the hub's configuration and its policies
    ///
    /// It names all that is wrong with file, line and remedy. With --config it prints the configuration as TOML, complete
    /// with all defaults.
    Check(Sources),
    /// Add, label, revoke and remove clusters
    Clusters {
        #[command(flatten)]
        connection: Connection,
        #[command(subcommand)]
        command: Clusters,
    },
    /// Show the state of the fleet
    Fleet {
        #[command(flatten)]
        connection: Connection,
        #[command(subcommand)]
        command: FleetView,
    },
    /// Show fleet policies and which clusters have them
    Policies {
        #[command(flatten)]
        connection: Connection,
        #[command(subcommand)]
        command: Policies,
    },
    /// Make certificates for the hub and its clusters, where no certificate manager does
    #[command(subcommand)]
    Pki(Pki),
    /// Print the completion script for a shell
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, clap::Args)]
struct Sources {
    /// Configuration file, in TOML
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    flags: Flags,
}

#[derive(Debug, Subcommand)]
enum Pki {
    /// Make the authority of a fleet: a directory with tls.crt and tls.key
    ///
    /// Who has tls.key can speak for every cluster: keep it away from the hub, which needs tls.crt only.
    Init {
        /// Directory to make
        #[arg(long, value_name = "DIRECTORY")]
        dir: PathBuf,
        /// Name of what all certificates of the fleet belong to, such as fleet.example.com
        #[arg(long, value_name = "NAME")]
        trust_domain: TrustDomain,
    },
    /// Issue a certificate: a directory with tls.crt, tls.key and ca.crt
    Issue {
        /// Directory of the authority
        #[arg(long, value_name = "DIRECTORY")]
        authority: PathBuf,
        /// Directory to make
        #[arg(long, value_name = "DIRECTORY")]
        dir: PathBuf,
        /// Cluster that it is for, by its id [default: a new one]
        #[arg(long, value_name = "UUID")]
        cluster: Option<ClusterId>,
        /// It is for the hub: a host name or address that agents connect to; may be repeated
        #[arg(long, value_name = "NAME", conflicts_with = "cluster")]
        hub: Vec<String>,
        /// Days until it ends
        #[arg(long, value_name = "DAYS", default_value_t = 90, value_parser = clap::value_parser!(u32).range(1..=825))]
        days: u32,
    },
}

fn main() -> ExitCode {
    let (done, code) = match Cli::parse().command {
        Command::Serve(sources) => match load(&sources) {
            Ok(config) => return serve(config),
            Err(refused) => (Err(refused), BAD_INPUT),
        },
        Command::Check(sources) => (check(&sources), BAD_INPUT),
        Command::Clusters { connection, command } => (ask(client::clusters(&connection, command)), FAILED),
        Command::Fleet { connection, command } => (ask(client::fleet(&connection, command)), FAILED),
        Command::Policies { connection, command } => (ask(client::policies(&connection, command)), FAILED),
        Command::Pki(command) => (certify(command), FAILED),
        Command::Completion { shell } => {
            let mut command = Cli::command();
            clap_complete::generate(shell, &mut command, env!("CARGO_BIN_NAME"), &mut io::stdout());
            (Ok(()), FAILED)
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(refused) => {
            eprintln!("error: {refused:#}");
            ExitCode::from(code)
        }
    }
}

/// The only look at the process's environment, apart from clap's.
fn load(sources: &Sources) -> anyhow::Result<Config> {
    Ok(config::load(sources.config.as_deref(), &environment(), &sources.flags)?)
}

fn check(sources: &Sources) -> anyhow::Result<()> {
    // A pipeline has the policies, and seldom the hub's configuration.
    let directory = if let (None, Some(policies)) = (&sources.config, sources.flags.policies()) {
        PathBuf::from(policies)
    } else {
        let config = load(sources)?;
        print!("{}", config.to_toml());
        config.policies
    };
    let policies = PolicySet::load(&directory)?;
    eprintln!("all fleet policies can be used: {}", policies.len());
    Ok(())
}

fn ask(answer: impl Future<Output = Result<String, ClientError>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    print!("{}", runtime.block_on(answer)?);
    Ok(())
}

fn serve(config: Config) -> ExitCode {
    let started = telemetry::init(config.log_format, &config.log).map_err(anyhow::Error::from);
    let runtime =
        started.and_then(|()| Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?));
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: {error:#}");
            return ExitCode::from(FAILED);
        }
    };
    allow_files();
    let ends = Ends::default();
    telemetry::report_panics(ends.panicked.clone());
    let ended = runtime.block_on(async {
        signals::obey(ends.shutdown.clone(), "agents are not told")?;
        Ok::<_, io::Error>(Box::pin(app::run(config, ends.clone())).await)
    });
    runtime.shutdown_background();
    match ended {
        Ok(Ok(())) => {
            info!("the hub ended");
            ExitCode::SUCCESS
        }
        Ok(Err(error)) => {
            error!(error = %chain(&error), "the hub ended");
            ExitCode::from(if ends.panicked.is_cancelled() { PANICKED } else { FAILED })
        }
        Err(error) => {
            error!(%error, "the hub cannot start");
            ExitCode::from(FAILED)
        }
    }
}

/// Each agent is an open file, and container runtimes allow 1,024 of them until somebody asks for more.
fn allow_files() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        warn!(%error, limit = ?limit.current, "no more files can be open, and agents connected, than by default");
    }
}

fn certify(command: Pki) -> anyhow::Result<()> {
    match command {
        Pki::Init { dir, trust_domain } => {
            pki::create(&dir, &trust_domain, clock::now())?;
            println!("{trust_domain}: the authority is in {}", dir.display());
        }
        Pki::Issue { authority, dir, cluster, hub, days } => {
            let lifetime = Duration::from_hours(24) * days;
            if hub.is_empty() {
                let id = cluster.unwrap_or_else(|| ClusterId::new(Uuid::new_v4()));
                let domain = pki::issue(&authority, &dir, &Holder::Cluster(id), lifetime, clock::now())?;
                println!("{}: the certificate is in {}", domain.cluster_uri(id), dir.display());
            } else {
                pki::issue(&authority, &dir, &Holder::Hub(hub.clone()), lifetime, clock::now())?;
                println!("{}: the certificate is in {}", hub.join(", "), dir.display());
            }
        }
    }
    Ok(())
}
