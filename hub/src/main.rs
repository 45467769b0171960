//! The hub's binary: commands and exit codes. Everything else is the library's.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};
use sts_backup_api::identity::{ClusterId, TrustDomain};
use sts_backup_hub::clock;
use sts_backup_hub::pki::{self, Holder};
use sts_backup_hub::policies::PolicySet;
use uuid::Uuid;

const FAILED: u8 = 1;
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
    /// Check the fleet policies of a directory, and name all that is wrong with file, line and remedy
    Check {
        /// Directory with the policies, in files that end in .yaml or .yml
        #[arg(long, value_name = "DIRECTORY")]
        policies: PathBuf,
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
        Command::Check { policies } => (check(&policies), BAD_INPUT),
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

fn check(directory: &Path) -> anyhow::Result<()> {
    let policies = PolicySet::load(directory)?;
    println!("all fleet policies can be used: {}", policies.len());
    Ok(())
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
