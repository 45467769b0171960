//! Reads what a plan needs.

use kube::Client;
use sts_backup_api::restore::StatefulSetRestore;

use crate::backup::error::Result;

/// What a plan needs to know.
pub(super) struct Survey {}

/// Reads it.
pub(super) async fn survey(_client: &Client, _restore: &StatefulSetRestore) -> Result<Survey> {
    Ok(Survey {})
}
