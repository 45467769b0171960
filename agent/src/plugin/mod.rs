//! The kubectl plugin: shows backups and their recovery points, asks for runs, keeps or deletes points, and finds out
//! what keeps backups from succeeding.
//!
//! It talks to the Kubernetes API alone, with the rights of whoever calls it: no hub and no agent needs to be
//! reachable. It writes only what it is called for: the annotation that asks for a run, `spec.suspend`, the label that
//! holds a snapshot, and restores with the annotations that approve them and roll them back; and it deletes snapshots. What
//! is shown is made by pure functions of what was read and the present time; each command's own file holds both.

mod args;
mod ask;
mod cluster;
mod coverage;
mod delete_points;
mod describe;
mod describe_run;
mod doctor;
mod error;
mod follow;
mod history;
mod hold;
mod list;
mod output;
mod owned;
mod points;
mod remedy;
mod restore;
mod retention;
mod run;
mod suspend;
mod timing;
mod watch;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use self::args::{Args, Command};
use self::cluster::Cluster;
use self::error::Error;

/// How a command ended, as scripts see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exit {
    /// All is well.
    Success,
    /// It failed, or something that was checked is broken.
    Failure,
    /// It was called wrongly, or what it was called for does not exist. Clap uses the same code.
    Usage,
    /// A run left claims out.
    Partial,
    /// A wait took too long.
    Timeout,
}

impl Exit {
    /// The number; documented, so never changed.
    fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Failure => 1,
            Self::Usage => 2,
            Self::Partial => 3,
            Self::Timeout => 4,
        }
    }
}

/// Does what the command line says, and gives the exit code.
#[must_use]
pub fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ended = match runtime {
        Ok(runtime) => runtime.block_on(Box::pin(obey(&args))),
        Err(source) => Err(Error::Runtime { source }),
    };
    let exit = ended.unwrap_or_else(|err| {
        output::complain(&err.to_text());
        err.exit()
    });
    ExitCode::from(exit.code())
}

async fn obey(args: &Args) -> Result<Exit, Error> {
    if let Command::Completion { shell } = &args.command {
        return completion(*shell);
    }
    let cluster = Cluster::connect(&args.connection).await?;
    match &args.command {
        Command::List(how) => list::list(&cluster, how).await,
        Command::Describe { name } => describe::describe(&cluster, name).await,
        Command::Run(how) => run::run(&cluster, how).await,
        Command::Points(how) => points::points(&cluster, how).await,
        Command::Coverage(how) => coverage::coverage(&cluster, how).await,
        Command::Retention(how) => retention::retention(&cluster, how).await,
        Command::Hold(which) => hold::hold(&cluster, which).await,
        Command::Release(which) => hold::release(&cluster, which).await,
        Command::DeletePoints(which) => delete_points::delete_points(&cluster, which).await,
        Command::Restore(how) => restore::restore(&cluster, how).await,
        Command::Suspend { name } => suspend::suspend(&cluster, name).await,
        Command::Resume { name } => suspend::resume(&cluster, name).await,
        Command::History(how) => history::history(&cluster, how).await,
        Command::Doctor(how) => doctor::doctor(&cluster, how).await,
        Command::Completion { shell } => completion(*shell),
    }
}

/// Scripts complete the binary's own name: kubectl does not hand the words after a plugin's name to it.
fn completion(shell: clap_complete::Shell) -> Result<Exit, Error> {
    let mut script = Vec::new();
    let mut command = Args::command();
    command.set_bin_name(args::BINARY);
    clap_complete::generate(shell, &mut command, args::BINARY, &mut script);
    output::print(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Success)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_the_documented_ones() {
        let all = [Exit::Success, Exit::Failure, Exit::Usage, Exit::Partial, Exit::Timeout];
        assert_eq!(all.map(Exit::code), [0, 1, 2, 3, 4]);
    }
}
