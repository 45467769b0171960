//! What the smoke tier has no time for: agents that die, hang, lose their lease or their API server, in every way and
//! again and again. `cargo e2e test --tier full` runs them one after the other, in the cluster without a shared agent.

mod alerts;
mod api_faults;
mod crashes;
mod kills;
mod leases;
mod policies;
mod storage;

use anyhow::Result;
use sts_backup_e2e::kit::agent::alone;
use sts_backup_e2e::kit::{Cluster, Namespace, with_temp_namespace};

/// Snapshots of a run that are still to be cut when it is interrupted, and can be deleted at once: their calls fail,
/// and are repeated after 1, 2, 4 and 8 s. A deletion while a call is outstanding, as `cutDelay` makes it, is one that
/// csi-snapshotter comes back to only with its next resync. The next attempt's are cut, after some more failures.
const UNCUT_FOR_A_WHILE: [(&str, &str); 1] = [("failOnCall", "1-12")];

/// Runs a test alone in the cluster that has no shared agent.
async fn alone_in_namespace(prefix: &str, test: impl AsyncFnOnce(&Namespace) -> Result<()>) -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-2").await?;
    let _alone = alone(&cluster).await?;
    with_temp_namespace(&cluster, prefix, test).await
}
