//! What hooks wrote down in a pod: when freezes and thaws began and were in force, by the node's clock.

use anyhow::{Context, Result, bail, ensure};
use jiff::Timestamp;

/// One line of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// A pre hook began.
    Freeze,
    /// A pre hook has succeeded.
    Frozen,
    /// A post hook began.
    Thaw,
    /// A post hook has succeeded.
    Thawed,
}

/// What the [traced hooks](super::hooks::Hooks::traced) of one pod did, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace(Vec<(Mark, Timestamp)>);

impl Trace {
    /// Reads the file.
    ///
    /// # Errors
    /// When a line is none of a trace.
    pub fn parse(text: &str) -> Result<Self> {
        let line = |line: &str| {
            let (word, time) = line.split_once(' ').context("no time")?;
            let mark = match word {
                "freeze" => Mark::Freeze,
                "frozen" => Mark::Frozen,
                "thaw" => Mark::Thaw,
                "thawed" => Mark::Thawed,
                other => bail!("{other:?} is no mark"),
            };
            Ok((mark, Timestamp::strptime("%Y-%m-%d %H:%M:%S%.f %z", time)?))
        };
        let marks = text.lines().map(|text| line(text).with_context(|| format!("read the trace {text:?}")));
        Ok(Self(marks.collect::<Result<_>>()?))
    }

    /// When something happened.
    pub fn times(&self, wanted: Mark) -> impl Iterator<Item = Timestamp> + '_ {
        self.0.iter().filter(move |(mark, _)| *mark == wanted).map(|(_, time)| *time)
    }

    /// Every freeze that began was thawed, with success, before the next one began, and before the end.
    ///
    /// # Errors
    /// When one was not.
    pub fn ensure_thawed(&self) -> Result<()> {
        let mut frozen_at = None;
        for (mark, time) in &self.0 {
            match mark {
                Mark::Freeze => {
                    ensure!(frozen_at.is_none(), "no thaw between two freezes: {self:?}");
                    frozen_at = Some(*time);
                }
                Mark::Thawed => frozen_at = None,
                Mark::Frozen | Mark::Thaw => {}
            }
        }
        ensure!(frozen_at.is_none(), "no thaw after the last freeze: {self:?}");
        Ok(())
    }

    /// From when to when the freeze that began in a span of time was in force: from the success of the pre hook to
    /// the begin of the next post hook.
    ///
    /// # Errors
    /// When there is not exactly one such freeze.
    pub fn freeze_within(&self, from: Timestamp, to: Timestamp) -> Result<(Timestamp, Timestamp)> {
        let frozen: Vec<_> = self.times(Mark::Frozen).filter(|time| (from..=to).contains(time)).collect();
        let [frozen] = frozen[..] else { bail!("no single freeze from {from} to {to}: {self:?}") };
        let thaw = self.times(Mark::Thaw).find(|time| *time > frozen);
        Ok((frozen, thaw.with_context(|| format!("no thaw after {frozen}: {self:?}"))?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freeze_without_a_thaw_of_its_own_is_found() {
        let thawed = |marks: &[&str]| {
            let line =
                |(at, mark): (usize, &&str)| format!("{mark} 2026-01-02 03:04:05.00000000{} +0000\n", at + 1);
            let trace = Trace::parse(&marks.iter().enumerate().map(line).collect::<String>()).unwrap();
            trace.ensure_thawed().is_ok()
        };
        assert!(thawed(&[]));
        assert!(thawed(&["freeze", "frozen", "thaw", "thawed", "thaw", "thawed"]));
        assert!(!thawed(&["freeze", "frozen", "thaw"]));
        assert!(!thawed(&["freeze", "freeze", "thaw", "thawed"]));
        assert!(Trace::parse("frozen\n").is_err());
    }
}
