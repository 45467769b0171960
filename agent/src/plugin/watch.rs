//! Watches one object, and says how far it is whenever that has changed.

use std::time::Duration;

use futures::{Stream, StreamExt};
use kube::api::DynamicObject;
use kube::runtime::watcher;

use super::error::{Error, forbidden, not_found};
use super::output;

/// An agent that is alive has begun by then, unless it waits for something else to end.
const SILENCE: Duration = Duration::from_secs(15);

const SILENCE_HINT: &str =
    "nothing has happened yet: kubectl stsbackup doctor tells whether the agent is alive; still waiting";

/// Said as long as the agent has not begun.
pub(super) const WAITING: &str = "waiting for the agent to begin";

/// What a look at the object says.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Look<End> {
    /// Not at its end; a line that says how far.
    Goes(String),
    /// There is nothing more to wait for.
    Ends(End),
}

/// Says how far the object is whenever that has changed, until it goes no further. Nothing is looked at when it is gone.
pub(super) async fn follow<End>(
    mut states: impl Stream<Item = watcher::Result<Option<DynamicObject>>> + Unpin,
    kind: &str,
    look: impl Fn(Option<&DynamicObject>) -> Result<Look<End>, Error>,
    say: impl Fn(&str) -> Result<(), Error>,
) -> Result<End, Error> {
    let mut said = String::new();
    let mut last_trouble = None;
    let mut silence = Box::pin(tokio::time::sleep(SILENCE));
    let mut hinted = false;
    loop {
        let state = tokio::select! {
            state = states.next() => state,
            () = &mut silence, if !hinted => {
                hinted = true;
                output::complain(SILENCE_HINT);
                continue;
            }
        };
        let object = match state {
            Some(Ok(object)) => object,
            Some(Err(err)) => {
                // The watch goes on by itself, and catches up: only what will not change ends it.
                if let Some(end) = lasting(&err) {
                    return Err(Error::of(&format!("watch the {kind}"), None, kube::Error::Api(end)));
                }
                let trouble = err.to_string();
                if last_trouble.as_ref() != Some(&trouble) {
                    output::complain(&format!("the watch was interrupted and is tried again: {trouble}"));
                    last_trouble = Some(trouble);
                }
                continue;
            }
            None => None,
        };
        match look(object.as_ref())? {
            Look::Goes(line) => {
                hinted |= line != WAITING;
                if line != said {
                    say(&line)?;
                    said = line;
                }
            }
            Look::Ends(end) => return Ok(end),
        }
    }
}

/// The answer of the API server that a watch will get again and again.
fn lasting(err: &watcher::Error) -> Option<Box<kube::core::Status>> {
    let status = match err {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => status,
        watcher::Error::InitialListFailed(_)
        | watcher::Error::WatchStartFailed(_)
        | watcher::Error::WatchFailed(_)
        | watcher::Error::NoResourceVersion => return None,
    };
    (forbidden(status) || not_found(status)).then(|| status.clone())
}
