//! How a process is asked to end: the first signal asks it, the second one ends it.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// From now on SIGTERM or SIGINT cancels `shutdown`; a second one ends the process at once, which leaves `undone`.
///
/// # Errors
/// If the signals cannot be listened to.
pub fn obey(shutdown: CancellationToken, undone: &'static str) -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        let kind = next(&mut terminate, &mut interrupt).await;
        info!(signal = kind.as_raw_value(), "told to end; a second signal ends this process at once");
        shutdown.cancel();
        let kind = next(&mut terminate, &mut interrupt).await;
        warn!(signal = kind.as_raw_value(), "told to end at once: {undone}");
        std::process::exit(128 + kind.as_raw_value());
    });
    Ok(())
}

async fn next(terminate: &mut Signal, interrupt: &mut Signal) -> SignalKind {
    tokio::select! {
        _ = terminate.recv() => SignalKind::terminate(),
        _ = interrupt.recv() => SignalKind::interrupt(),
    }
}
