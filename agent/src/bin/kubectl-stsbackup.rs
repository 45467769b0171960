//! `kubectl stsbackup`: see [`sts_backup_agent::plugin`].

use std::process::ExitCode;

fn main() -> ExitCode {
    sts_backup_agent::plugin::main()
}
