//! Waits for states that cannot be watched, as only a command in a pod tells them.

use std::time::Duration;

use anyhow::{Result, bail};

/// All that is waited for here takes a second or two.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Between two questions.
const PAUSE: Duration = Duration::from_millis(200);

/// Asks until the answer is yes.
///
/// # Errors
/// The question's own error, at once, or that the answer was no for half a minute.
pub async fn until(what: &str, question: impl AsyncFn() -> Result<bool>) -> Result<()> {
    until_within(TIMEOUT, what, question).await
}

/// Asks until the answer is yes, for what takes longer.
///
/// # Errors
/// The question's own error, at once, or that the answer was no for so long.
pub async fn until_within(
    limit: Duration,
    what: &str,
    question: impl AsyncFn() -> Result<bool>,
) -> Result<()> {
    let answered = async {
        while !question().await? {
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    };
    match tokio::time::timeout(limit, answered).await {
        Ok(result) => result,
        Err(_elapsed) => bail!("{what}: not within {limit:?}"),
    }
}
