//! The test CSI driver as a program: arguments, logs and signals. What it does is in
//! [`sts_backup_e2e::csi`].

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use sts_backup_e2e::csi::{self, Options, Registration};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// CSI driver for tests: volumes and atomic snapshots on btrfs in a sparse file, with faults on demand.
///
/// Needs root, a loop device and the programs mkfs.btrfs, btrfs and mount. Serves one node, without
/// quotas; not for production. Logs at info unless the variable `RUST_LOG` says otherwise.
#[derive(Debug, Parser)]
#[command(name = "csi-driver", version)]
struct Arguments {
    /// Directory of the pool; it outlives the driver.
    #[arg(long, default_value = "/var/lib/sts-backup-csi")]
    pool_dir: PathBuf,

    /// Size of a new pool's sparse file: bytes, or a number with MiB or GiB.
    #[arg(long, default_value = "8GiB", value_parser = parse_size)]
    pool_size: u64,

    /// Unix socket on which to serve CSI.
    #[arg(long)]
    csi_socket: PathBuf,

    /// Unix socket on which to serve the kubelet's plugin registration; without it there is none.
    #[arg(long)]
    registration_socket: Option<PathBuf>,

    /// The CSI socket's path as the kubelet sees it [default: the same as --csi-socket].
    #[arg(long, requires = "registration_socket")]
    socket: Option<PathBuf>,

    /// The Kubernetes node that the driver serves.
    #[arg(long, env = "NODE_NAME")]
    node_name: String,
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (number, unit) = match (text.strip_suffix("GiB"), text.strip_suffix("MiB")) {
        (Some(number), _) => (number, 1 << 30),
        (None, Some(number)) => (number, 1 << 20),
        (None, None) => (text, 1),
    };
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    bytes.ok_or_else(|| "expected a number of bytes, or a number with MiB or GiB like 8GiB".to_owned())
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let Arguments { pool_dir, pool_size, csi_socket, registration_socket, socket, node_name } =
        Arguments::parse();
    let endpoint = socket.unwrap_or_else(|| csi_socket.clone());
    let registration = registration_socket.map(|socket| Registration { socket, endpoint });
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let options = Options { pool_dir, pool_size_bytes: pool_size, csi_socket, registration, node_name };
    Box::pin(csi::run(options, stop)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_bytes_or_have_a_binary_unit() {
        let table = [
            ("1024", Some(1024)),
            ("512MiB", Some(512 << 20)),
            ("8GiB", Some(8 << 30)),
            ("8GB", None),
            ("-1", None),
            ("99999999999GiB", None),
            ("", None),
        ];
        for (text, expected) in table {
            assert_eq!(parse_size(text).ok(), expected, "{text:?}");
        }
    }

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }
}
