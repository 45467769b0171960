//! A panic anywhere ends the agent. The hook is the whole process's, so this test has one of its own.

use sts_backup_service::telemetry::report_panics;
use tokio_util::sync::CancellationToken;

#[tokio::test]
#[expect(clippy::panic, reason = "the panic is what is tested")]
async fn a_panic_of_a_task_that_nobody_waits_for_is_noticed() {
    let panicked = CancellationToken::new();
    report_panics(panicked.clone());
    drop(tokio::spawn(async { panic!("as the test wants it to") }));
    panicked.cancelled().await;
}
