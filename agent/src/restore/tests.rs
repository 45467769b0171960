//! The decisions of a restore in a model of a cluster: from every write boundary onward and back, and under every
//! interleaving of crashes, controllers, other people and time.

use std::time::Duration;

use super::model::{Cluster, Setting};
use sts_backup_api::restore::RestorePhase;

fn phase(cluster: &Cluster) -> Option<RestorePhase> {
    cluster.restore.as_ref()?.status.as_ref()?.phase
}

fn settings() -> Vec<Setting> {
    let plain = Setting::default;
    vec![
        plain(),
        Setting { parallel: true, ..plain() },
        Setting { from: 1, ..plain() },
        Setting { deletes_claims: true, keeps_logs: true, ..plain() },
        Setting { deletes_claims: true, from: 1, parallel: true, keeps_logs: true, ..plain() },
        Setting { retain: true, ..plain() },
        Setting { lacks_last: true, ..plain() },
    ]
}

#[test]
fn a_restore_completes_and_its_old_volumes_go_in_the_end() {
    for setting in settings() {
        let mut cluster = Cluster::new(&setting);
        cluster.rest();
        assert_eq!(phase(&cluster), Some(RestorePhase::Completed), "{setting:?}\n{}", cluster.log.join("\n"));
        cluster.check_end(true);
    }
    let _ = Duration::ZERO;
}
