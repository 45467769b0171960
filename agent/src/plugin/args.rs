//! The command line.

#![allow(clippy::doc_markdown, reason = "--help shows these texts, and backticks as they are")]

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use jiff::{SignedDuration, Timestamp};

/// The name by which kubectl finds the plugin.
pub(super) const BINARY: &str = "kubectl-stsbackup";

const AFTER_HELP: &str = "\
Examples:
  kubectl stsbackup list -A                    every backup of the cluster
  kubectl stsbackup run nightly --wait         back up now, and say how it went
  kubectl stsbackup points                     what can be restored in this namespace
  kubectl stsbackup coverage -A --rpo 24h      what nothing protects, and what is overdue
  kubectl stsbackup retention nightly --dry-run   what would be pruned now, and why
  kubectl stsbackup restore db --to latest --wait   show the plan, ask, and give db its newest data back
  kubectl stsbackup restore list -A            every restore, and what it keeps for a rollback
  kubectl stsbackup doctor                     why backups fail, or will

Exit codes:
  0  success
  1  the command failed, a run or restore failed or was refused, doctor found something broken, or coverage --fail
     found a gap
  2  wrong usage, or no such object
  3  a run ended as PartiallyFailed
  4  a wait took longer than --timeout";

/// Backups of StatefulSets: see them, take them, restore them, find out why they fail.
///
/// Works through the Kubernetes API alone, with the rights of your kubeconfig.
#[derive(Debug, Parser)]
#[command(
    name = BINARY,
    bin_name = "kubectl stsbackup",
    display_name = "kubectl stsbackup",
    version,
    after_help = AFTER_HELP,
    propagate_version = true,
    disable_help_subcommand = true,
    arg_required_else_help = true
)]
pub(super) struct Args {
    #[command(flatten)]
    pub(super) connection: Connection,
    #[command(subcommand)]
    pub(super) command: Command,
}

/// Which cluster, as whom, and where in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Connection")]
pub(super) struct Connection {
    /// The kubeconfig file [default: $KUBECONFIG, then ~/.kube/config]
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig [default: its current context]
    #[arg(long, global = true, value_name = "NAME")]
    pub(super) context: Option<String>,
    /// The namespace [default: the context's]
    #[arg(short, long, global = true, value_name = "NAME")]
    pub(super) namespace: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List the StatefulSetBackups
    #[command(visible_alias = "ls")]
    List(List),
    /// Show one StatefulSetBackup: spec, conditions, run, recovery points, history, events, and what to do
    Describe {
        /// The StatefulSetBackup
        name: String,
    },
    /// Ask for a run now
    ///
    /// Sets the annotation backup.sts-backup.io/requested-at of the StatefulSetBackup to the present time; the
    /// agent does the rest. A run under way is finished first.
    Run(Run),
    /// List the recovery points: what can be restored
    ///
    /// They are read from the VolumeSnapshots themselves, so those of deleted StatefulSetBackups are listed too.
    Points(Points),
    /// List the StatefulSets: which of them nothing protects, and which are overdue
    ///
    /// Those without volumeClaimTemplates are left out: they have nothing to back up.
    Coverage(Coverage),
    /// Show what the retentionPolicy would prune now, and why
    ///
    /// Changes nothing. The agent prunes by itself, after each run and as time goes by.
    Retention(Retention),
    /// Hold a recovery point: it is not pruned before it is released
    ///
    /// Sets the label backup.sts-backup.io/hold=true on all of its VolumeSnapshots.
    Hold(Point),
    /// Release a recovery point that is held
    ///
    /// Removes the label backup.sts-backup.io/hold from all of its VolumeSnapshots.
    Release(Point),
    /// Delete recovery points, each as a whole
    ///
    /// Shows what goes and asks first. A point that is held, that a volume is being made from, or that belongs to the
    /// run under way is not deleted.
    DeletePoints(DeletePoints),
    /// Give a StatefulSet the data of a recovery point back
    ///
    /// Makes a StatefulSetRestore that only plans, shows its plan and asks; approved, the agent carries out exactly this
    /// plan. What is refused, or not approved, touches nothing and leaves no object. The old volumes stay for a day, and
    /// restore rollback brings them back. A StatefulSet that is called list or rollback comes last, after --.
    Restore(Restore),
    /// Begin no further runs
    ///
    /// Sets spec.suspend. A run under way is finished.
    Suspend {
        /// The StatefulSetBackup
        name: String,
    },
    /// Begin runs again
    ///
    /// Clears spec.suspend. What was due meanwhile is not caught up with.
    Resume {
        /// The StatefulSetBackup
        name: String,
    },
    /// List the finished runs of a StatefulSetBackup, newest first
    History(History),
    /// Check everything that backups need, in the cluster and for each StatefulSetBackup
    ///
    /// Changes nothing. What you may not read is a warning, not a failure. Exits with 1 when something is
    /// broken.
    Doctor(Doctor),
    /// Print a completion script
    ///
    /// For bash: source <(kubectl stsbackup completion bash). It completes the binary's own name,
    /// kubectl-stsbackup.
    Completion {
        /// The shell
        shell: Shell,
    },
}

/// What `list` shows.
#[derive(Debug, clap::Args)]
pub(super) struct List {
    /// In all namespaces
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    pub(super) all_namespaces: bool,
    /// How to print it [default: a table]
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub(super) output: Option<ListFormat>,
}

/// How `list` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ListFormat {
    /// A table with more columns
    Wide,
    /// The objects, as JSON
    Json,
    /// The objects, as YAML
    Yaml,
    /// Only the names, as kubectl takes them
    Name,
}

/// What `run` does.
#[derive(Debug, clap::Args)]
pub(super) struct Run {
    /// The StatefulSetBackup
    pub(super) name: String,
    /// Follow the run to its end; the exit code tells how it went
    #[arg(long)]
    pub(super) wait: bool,
    /// How long to wait, such as 90s, 30m or 1h30m; the run goes on after it
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = parse_duration, requires = "wait")]
    pub(super) timeout: Duration,
    /// Print the record of the finished run; progress goes to standard error
    #[arg(short, long, value_enum, value_name = "FORMAT", requires = "wait")]
    pub(super) output: Option<JsonFormat>,
}

/// What `points` shows.
#[derive(Debug, clap::Args)]
pub(super) struct Points {
    /// Only those of this StatefulSetBackup, which may be gone
    pub(super) name: Option<String>,
    /// In all namespaces
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    pub(super) all_namespaces: bool,
    /// How to print them [default: a table]
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub(super) output: Option<DataFormat>,
}

/// What `coverage` shows.
#[derive(Debug, clap::Args)]
pub(super) struct Coverage {
    /// In all namespaces
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    pub(super) all_namespaces: bool,
    /// The oldest that a newest complete recovery point may be, such as 24h or 1h30m [default: the rpo of the policy that
    /// protects the StatefulSet]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub(super) rpo: Option<Duration>,
    /// Exit with 1 when a StatefulSet is unprotected, overdue, or has only suspended backups
    #[arg(long)]
    pub(super) fail: bool,
    /// How to print it [default: a table]
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub(super) output: Option<DataFormat>,
}

/// What `retention` shows.
#[derive(Debug, clap::Args)]
pub(super) struct Retention {
    /// The StatefulSetBackup
    pub(super) name: String,
    /// Only show it; there is no other way
    #[arg(long)]
    pub(super) dry_run: bool,
    /// How to print it [default: a table]
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub(super) output: Option<DataFormat>,
}

/// One recovery point.
#[derive(Debug, clap::Args)]
pub(super) struct Point {
    /// The StatefulSetBackup, which may be gone
    pub(super) name: String,
    /// The recovery point, as kubectl stsbackup points shows it
    pub(super) point: String,
}

/// What `delete-points` deletes.
#[derive(Debug, clap::Args)]
pub(super) struct DeletePoints {
    /// The StatefulSetBackup, which may be gone
    pub(super) name: String,
    /// The recovery points, as kubectl stsbackup points shows them
    #[arg(required = true, value_name = "POINT")]
    pub(super) points: Vec<String>,
    /// Do not ask
    #[arg(short, long)]
    pub(super) yes: bool,
    /// Delete even the last complete one
    #[arg(long)]
    pub(super) force: bool,
}

/// What `restore` does.
#[derive(Debug, clap::Args)]
// Clap's own conflict of arguments with subcommands would take `restore -n shop list` for the StatefulSet list.
#[command(subcommand_negates_reqs = true)]
pub(super) struct Restore {
    #[command(subcommand)]
    pub(super) command: Option<RestoreCommand>,
    #[command(flatten)]
    pub(super) order: Option<Order>,
}

/// What is to be restored.
#[derive(Debug, clap::Args)]
pub(super) struct Order {
    /// The StatefulSet
    #[arg(required = true)]
    pub(super) stateful_set: String,
    /// Which data: latest (the newest complete recovery point), a recovery point as kubectl stsbackup points shows it, or a
    /// time such as 2026-11-24T14:00:00Z (the newest complete point that is not later)
    #[arg(long, required = true, value_name = "latest|POINT|TIME", value_parser = parse_to)]
    pub(super) to: To,
    /// Only these ordinals, such as 2,3 [default: all of the recovery point]
    #[arg(long, value_name = "ORDINALS", value_delimiter = ',', value_parser = clap::value_parser!(i32).range(0..))]
    pub(super) replicas: Vec<i32>,
    /// How long the old volumes stay to be brought back, such as 72h [default: 24h]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub(super) rollback_window: Option<Duration>,
    /// What follows when the pods do not become ready in time
    #[arg(long, value_enum, value_name = "WHAT", default_value = "hold")]
    pub(super) on_failure: OnUnready,
    /// Only show the plan
    #[arg(long, conflicts_with_all = ["wait", "yes"])]
    pub(super) dry_run: bool,
    /// Follow the restore to its end; the exit code tells how it went
    #[arg(long)]
    pub(super) wait: bool,
    /// Do not ask
    #[arg(short, long)]
    pub(super) yes: bool,
    /// How long to wait for the plan, and with --wait for the end, such as 90s, 30m or 1h30m; an approved restore goes on
    /// after it
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = parse_duration)]
    pub(super) timeout: Duration,
    /// How to print the plan; all else goes to standard error [default: a table]
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub(super) output: Option<DataFormat>,
}

/// What follows when pods do not become ready after a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum OnUnready {
    /// Everything stays, and it completes once they are ready
    Hold,
    /// The old volumes come back
    Rollback,
}

/// Which data a `StatefulSet` gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum To {
    /// That of the newest complete recovery point of all its backups.
    Latest,
    /// That of the recovery point of this run.
    Point(String),
    /// That of the newest complete recovery point that is not later.
    Time(Timestamp),
}

/// What else is done with restores.
#[derive(Debug, Subcommand)]
pub(super) enum RestoreCommand {
    /// List the restores: how far they are, and what they keep for a rollback
    #[command(visible_alias = "ls")]
    List(Restores),
    /// Bring the volumes back that a StatefulSet had before a restore
    ///
    /// Shows what comes back and asks. Sets the annotation backup.sts-backup.io/rollback-requested-at of the
    /// StatefulSetRestore to the present time; the agent does the rest.
    Rollback(Rollback),
}

/// What `restore list` shows.
#[derive(Debug, clap::Args)]
pub(super) struct Restores {
    /// In all namespaces
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    pub(super) all_namespaces: bool,
    /// How to print them [default: a table]
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub(super) output: Option<DataFormat>,
}

/// What `restore rollback` does.
#[derive(Debug, clap::Args)]
pub(super) struct Rollback {
    /// The StatefulSetRestore
    pub(super) name: String,
    /// Follow the rollback to its end; the exit code tells how it went
    #[arg(long)]
    pub(super) wait: bool,
    /// Do not ask
    #[arg(short, long)]
    pub(super) yes: bool,
    /// How long to wait, such as 90s, 30m or 1h30m; the rollback goes on after it
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = parse_duration, requires = "wait")]
    pub(super) timeout: Duration,
}

/// What `history` shows.
#[derive(Debug, clap::Args)]
pub(super) struct History {
    /// The StatefulSetBackup
    pub(super) name: String,
    /// How to print it [default: a table]
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub(super) output: Option<DataFormat>,
}

/// What `doctor` checks.
#[derive(Debug, clap::Args)]
pub(super) struct Doctor {
    /// Only this StatefulSetBackup, and the cluster [default: all of the namespace]
    pub(super) name: Option<String>,
    /// The StatefulSetBackups of all namespaces
    #[arg(short = 'A', long, conflicts_with_all = ["namespace", "name"])]
    pub(super) all_namespaces: bool,
    /// How to print the findings [default: text]
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub(super) output: Option<JsonFormat>,
}

/// For commands that have one format for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum JsonFormat {
    /// JSON
    Json,
}

/// Formats for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum DataFormat {
    /// JSON
    Json,
    /// YAML
    Yaml,
}

/// A positive duration as people write it: `90s`, `1h30m`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let advice = "write a duration such as 90s, 30m or 1h30m";
    let duration: SignedDuration = text.parse().map_err(|_| advice.to_owned())?;
    Duration::try_from(duration).ok().filter(|duration| !duration.is_zero()).ok_or_else(|| advice.to_owned())
}

/// What `--to` says. A recovery point has no colon in its name, and a time has.
fn parse_to(text: &str) -> Result<To, String> {
    if text == "latest" {
        return Ok(To::Latest);
    }
    if let Ok(time) = text.parse() {
        return Ok(To::Time(time));
    }
    if text.contains(':') {
        return Err("write a time with its date and zone, such as 2026-11-24T14:00:00Z".to_owned());
    }
    Ok(To::Point(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn help_speaks_of_kubectl_stsbackup() {
        let help = Args::command().render_help().to_string();
        assert!(help.contains("Usage: kubectl stsbackup "), "{help}");
        let refused = Args::try_parse_from([BINARY, "describe"]).unwrap_err().to_string();
        assert!(refused.contains("Usage: kubectl stsbackup describe "), "{refused}");
    }

    #[test]
    fn connection_flags_stand_before_or_after_the_command() {
        for line in [
            ["-n", "shop", "--context", "east", "list"],
            ["list", "-n", "shop", "--context", "east"],
            ["list", "--namespace=shop", "--context=east", "-o", "json"],
        ] {
            let args = Args::try_parse_from(std::iter::once(BINARY).chain(line)).unwrap();
            assert_eq!(args.connection.namespace.as_deref(), Some("shop"));
            assert_eq!(args.connection.context.as_deref(), Some("east"));
        }
    }

    #[test]
    fn contradictions_are_refused() {
        for line in [
            &["list", "-A", "-n", "shop"][..],
            &["coverage", "-A", "-n", "shop"],
            &["coverage", "--rpo", "0s"],
            &["coverage", "--rpo", "a day"],
            &["doctor", "nightly", "-A"],
            &["run", "nightly", "--timeout", "1m"],
            &["run", "nightly", "-o", "json"],
            &["run", "nightly", "--wait", "--timeout", "0s"],
            &["run", "nightly", "--wait", "--timeout", "soon"],
            &["hold", "nightly"],
            &["delete-points", "nightly", "--yes"],
            &["restore"],
            &["restore", "db"],
            &["restore", "--to", "latest"],
            &["restore", "db", "--to", "2026-11-24 14:00"],
            &["restore", "db", "--to", "latest", "--replicas", "-1"],
            &["restore", "db", "--to", "latest", "--dry-run", "--wait"],
            &["restore", "db", "--to", "latest", "--dry-run", "--yes"],
            &["restore", "list", "--to", "latest"],
            &["restore", "list", "-A", "-n", "shop"],
            &["restore", "rollback"],
            &["restore", "rollback", "r", "--timeout", "1m"],
        ] {
            let refused = Args::try_parse_from([BINARY].iter().chain(line)).unwrap_err();
            assert_eq!(refused.exit_code(), 2, "{line:?}");
        }
    }

    #[test]
    fn a_run_waits_for_an_hour_unless_told_otherwise() {
        let timeout = |line: &[&str]| match Args::try_parse_from([BINARY].iter().chain(line)).unwrap().command
        {
            Command::Run(run) => Some(run.timeout),
            Command::List(_)
            | Command::Describe { .. }
            | Command::Points(_)
            | Command::Coverage(_)
            | Command::Retention(_)
            | Command::Hold(_)
            | Command::Release(_)
            | Command::DeletePoints(_)
            | Command::Restore(_)
            | Command::Suspend { .. }
            | Command::Resume { .. }
            | Command::History(_)
            | Command::Doctor(_)
            | Command::Completion { .. } => None,
        };
        assert_eq!(timeout(&["run", "nightly", "--wait"]), Some(Duration::from_hours(1)));
        assert_eq!(
            timeout(&["run", "nightly", "--wait", "--timeout", "1h30m"]),
            Some(Duration::from_mins(90))
        );
    }

    fn restore(line: &[&str]) -> Restore {
        let parsed = Args::try_parse_from([BINARY, "restore"].iter().chain(line)).unwrap();
        match parsed.command {
            Command::Restore(restore) => Some(restore),
            Command::List(_)
            | Command::Describe { .. }
            | Command::Run(_)
            | Command::Points(_)
            | Command::Coverage(_)
            | Command::Retention(_)
            | Command::Hold(_)
            | Command::Release(_)
            | Command::DeletePoints(_)
            | Command::Suspend { .. }
            | Command::Resume { .. }
            | Command::History(_)
            | Command::Doctor(_)
            | Command::Completion { .. } => None,
        }
        .unwrap()
    }

    #[test]
    fn a_restore_says_which_data() {
        for (to, meant) in [
            ("latest", To::Latest),
            ("20261124-111104-896efa55", To::Point("20261124-111104-896efa55".to_owned())),
            ("2026-11-24T14:00:00Z", To::Time("2026-11-24T14:00:00Z".parse().unwrap())),
            ("2026-11-24T15:00:00+01:00", To::Time("2026-11-24T14:00:00Z".parse().unwrap())),
        ] {
            let order = restore(&["-n", "shop", "db", "--to", to, "--replicas", "2,3"]).order.unwrap();
            assert_eq!((order.to, order.replicas), (meant, vec![2, 3]));
        }
    }

    #[test]
    fn restores_are_listed_and_rolled_back_whatever_flags_stand_before() {
        for line in [&["list"][..], &["ls", "-A"], &["-n", "shop", "list"], &["--context", "east", "list"]] {
            let Restore { command, order } = restore(line);
            assert!(matches!(command, Some(RestoreCommand::List(_))) && order.is_none(), "{line:?}");
        }
        let Restore { command, order } = restore(&["rollback", "db-20261124-150000", "--wait", "-n", "shop"]);
        assert!(matches!(command, Some(RestoreCommand::Rollback(Rollback { wait: true, .. }))));
        assert!(order.is_none());
        let Restore { command, order } = restore(&["--to", "latest", "--", "list"]);
        assert_eq!((command.is_none(), order.unwrap().stateful_set), (true, "list".to_owned()));
    }
}
