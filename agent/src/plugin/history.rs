//! `history`: the finished runs of one `StatefulSetBackup`.

use serde_json::json;
use sts_backup_service::clock;

use super::args::History;
use super::cluster::Cluster;
use super::describe_run;
use super::error::Error;
use super::{Exit, output};

/// Lists them.
pub(super) async fn history(cluster: &Cluster, how: &History) -> Result<Exit, Error> {
    let backup = cluster.backup(&how.name).await?;
    let runs = backup.status.map(|status| status.history).unwrap_or_default();
    match how.output {
        Some(format) => output::print(&output::data(&json!({ "runs": runs }), format)?)?,
        None if runs.is_empty() => output::complain(&format!(
            "No run of StatefulSetBackup {}/{} has ended yet.\n  kubectl stsbackup run {1} -n {0} --wait makes one",
            cluster.namespace(),
            how.name
        )),
        None => output::print(&describe_run::history(&runs, clock::now()))?,
    }
    Ok(Exit::Success)
}
