//! How a program logs: to stderr, as text or JSON, filtered by directives.
//!
//! It decides the form and the filter, never what is logged: an error is logged where it is handled, once.

use std::error::Error;
use std::panic;

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

/// Silences kube's client, whatever else is logged. It logs every failed request as ERROR, also those that are
/// retried, while who handles the failure logs it; its span has the URL, which for a hook holds the command; and what
/// it cannot read it logs whole, specs with their hooks included. A command may hold a secret.
const QUIET: &str = "kube_client::client=off";

/// The form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One line for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// The log could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The directives are none.
    #[error("parse the log directives")]
    Directives(#[source] ParseError),
    /// Something in this process logs already.
    #[error("install the log of this process")]
    Install(#[source] Box<dyn Error + Send + Sync>),
}

/// What the directives let through, such as `info` or `warn,sts_backup_agent=debug`.
///
/// # Errors
/// If the directives do not parse.
pub fn filter(directives: &str) -> Result<EnvFilter, ParseError> {
    EnvFilter::try_new(format!("{directives},{QUIET}"))
}

/// Sends what is traced from now on to stderr.
///
/// # Errors
/// If the directives do not parse, or if this process has a log already.
pub fn init(format: LogFormat, directives: &str) -> Result<(), TelemetryError> {
    let filter = filter(directives).map_err(TelemetryError::Directives)?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let installed = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    installed.map_err(TelemetryError::Install)
}

/// From now on a panic of any task is logged and cancels `panicked`: a process that lost a part of itself must end,
/// and whoever waits for the token ends it in order.
pub fn report_panics(panicked: CancellationToken) {
    panic::set_hook(Box::new(move |info| {
        let location = info.location().map(ToString::to_string).unwrap_or_default();
        let message = info.payload_as_str().unwrap_or_default();
        tracing::error!(location, panic = message, "a task panicked: this process ends");
        panicked.cancel();
    }));
}

/// An error with all its causes, in one line; a cause that the text before it ends with is not said twice.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        source: Option<Box<Layer>>,
    }

    fn layers(texts: &[&'static str]) -> Layer {
        let (text, rest) = texts.split_first().expect("at least one layer");
        Layer { text, source: (!rest.is_empty()).then(|| Box::new(layers(rest))) }
    }

    #[test]
    fn a_chain_names_every_cause_once() {
        assert_eq!(chain(&layers(&["renew lease"])), "renew lease");
        assert_eq!(chain(&layers(&["renew lease", "connect", "refused"])), "renew lease: connect: refused");
        assert_eq!(chain(&layers(&["renew: refused", "refused", "errno 111"])), "renew: refused: errno 111");
    }

    #[test]
    fn directives_are_checked_before_they_are_used() {
        for good in ["info", "warn,sts_backup_agent=debug", "off"] {
            assert!(filter(good).is_ok(), "{good}");
        }
        for bad in ["info,=x=", "sts_backup_agent=loud"] {
            assert!(filter(bad).is_err(), "{bad}");
        }
    }
}
