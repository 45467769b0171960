//! The agent's binary: commands, signals and exit codes. Everything else is the library's.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use sts_backup_service::config::environment;
use sts_backup_service::signals;
use sts_backup_service::telemetry::{self, chain};
use tracing::{error, info};

use sts_backup_agent::app::{self, Ends};
use sts_backup_agent::config::{self, Config, ConfigError, Flags};

/// What the configuration or the command line makes impossible; clap ends with the same.
const BAD_CONFIGURATION: u8 = 2;
const FAILED: u8 = 1;

/// Backs up the StatefulSets of the cluster that it runs in, as StatefulSetBackup objects say.
#[derive(Debug, Parser)]
#[command(version, about, long_about = None)]
#[expect(clippy::doc_markdown, reason = "the comment is a help text, which is plain")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent until SIGTERM
    ///
    /// Several replicas may run: one leads, the others follow. The cluster is the pod's own, or the one that
    /// KUBECONFIG names.
    ///
    /// Every key of the configuration file is also a flag, and a variable such as STSB_LISTEN or STSB_LEASE__NAME.
    /// Flags win over variables, variables over the file.
    #[expect(clippy::doc_markdown, reason = "the comment is a help text, which is plain")]
    Run(Sources),
    /// Check the configuration and print it as TOML, complete with all defaults
    Check(Sources),
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

impl Sources {
    /// The only look at the process's environment, apart from kube's for the cluster.
    fn load(&self) -> Result<Config, ConfigError> {
        config::load(self.config.as_deref(), &environment(), &self.flags)
    }
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run(sources) => with_config(&sources, run),
        Command::Check(sources) => with_config(&sources, |config| {
            print!("{}", config.to_toml());
            ExitCode::SUCCESS
        }),
        Command::Completion { shell } => {
            let mut command = Cli::command();
            clap_complete::generate(shell, &mut command, env!("CARGO_BIN_NAME"), &mut io::stdout());
            ExitCode::SUCCESS
        }
    }
}

fn with_config(sources: &Sources, act: impl FnOnce(Config) -> ExitCode) -> ExitCode {
    match sources.load() {
        Ok(config) => act(config),
        Err(refused) => {
            eprintln!("error: {}", chain(&refused));
            ExitCode::from(BAD_CONFIGURATION)
        }
    }
}

fn run(config: Config) -> ExitCode {
    #[cfg(feature = "failpoints")]
    let _armed = fail::FailScenario::setup();
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
    let ends = Ends::default();
    telemetry::report_panics(ends.panicked.clone());
    let ended = runtime.block_on(async {
        signals::obey(ends.shutdown.clone(), "databases may still be frozen")?;
        anyhow::Ok(Box::pin(app::run(config, ends)).await)
    });
    // What still runs was told to end, and had its time.
    runtime.shutdown_background();
    match ended {
        Ok(Ok(())) => {
            info!("the agent ended");
            ExitCode::SUCCESS
        }
        Ok(Err(error)) => {
            error!(error = %chain(&error), "the agent ended");
            ExitCode::from(error.exit_code())
        }
        Err(error) => {
            error!(error = format!("{error:#}"), "the agent cannot start");
            ExitCode::from(FAILED)
        }
    }
}
