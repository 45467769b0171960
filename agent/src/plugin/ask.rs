//! Asks the person at the terminal before something is done that cannot simply be undone.

use std::io::{self, BufRead, IsTerminal};

use super::error::Error;
use super::{Exit, output};

/// Whether the person says yes. Where there is no terminal nobody can, and `undone` (`nothing was deleted`) is the error.
pub(super) fn confirmed(question: &str, undone: &str) -> Result<bool, Error> {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return Err(Error::Ended {
            exit: Exit::Usage,
            message: format!("{undone}: there is no terminal to ask at"),
            remedy: Some("--yes does not ask".to_owned()),
        });
    }
    output::complain(&format!("{question} [y/N]"));
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer).map_err(|source| Error::Ask { source })?;
    Ok(is_yes(&answer))
}

fn is_yes(answer: &str) -> bool {
    ["y", "yes"].contains(&answer.trim().to_ascii_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_yes_is_a_yes() {
        for (answer, yes) in [
            ("y\n", true),
            ("Yes\r\n", true),
            (" y ", true),
            ("\n", false),
            ("", false),
            ("no\n", false),
            ("yo", false),
        ] {
            assert_eq!(is_yes(answer), yes, "{answer:?}");
        }
    }
}
