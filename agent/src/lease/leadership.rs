//! What the rest of the agent knows of the lease: whether this replica leads, and for how long that is sure.
//!
//! It judges by the monotonic clock at the moment it is asked, not by what the elector last said: a process that was
//! stopped for a while finds out with its first question.

use std::future::pending;
use std::time::Duration;

use sts_backup_service::clock;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// Where a replica stands. Each state only gives way to one below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tenure {
    /// It never led.
    Candidate,
    /// It leads; the last successful renewal was sent at `renewed`.
    Held { renewed: Instant },
    /// It led; `None`: another one does.
    Lost { renewed: Option<Instant> },
    /// It gave the lease back, or stopped being a candidate.
    Released,
}

impl Tenure {
    /// When the lease was last renewed, while it is held.
    pub(super) fn renewed(self) -> Option<Instant> {
        match self {
            Self::Held { renewed } => Some(renewed),
            Self::Candidate | Self::Lost { .. } | Self::Released => None,
        }
    }
}

/// Whether this replica leads. A handle: clones know the same.
#[derive(Clone, Debug)]
pub struct Leadership {
    tenure: watch::Receiver<Tenure>,
    duration: Duration,
    renew_deadline: Duration,
}

impl Leadership {
    pub(super) fn new(tenure: watch::Receiver<Tenure>, duration: Duration, renew_deadline: Duration) -> Self {
        Self { tenure, duration, renew_deadline }
    }

    /// Whether this replica may act as the leader right now.
    #[must_use]
    pub fn is_held(&self) -> bool {
        let renewed = self.tenure.borrow().renewed();
        renewed.is_some_and(|renewed| clock::monotonic() < renewed + self.renew_deadline)
    }

    /// The time until another replica may take over: what was begun as the leader must have ended by then. Zero if
    /// one may have done so already.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        let renewed = match *self.tenure.borrow() {
            Tenure::Held { renewed } | Tenure::Lost { renewed: Some(renewed) } => renewed,
            Tenure::Candidate | Tenure::Lost { renewed: None } | Tenure::Released => return Duration::ZERO,
        };
        (renewed + self.duration).saturating_duration_since(clock::monotonic())
    }

    /// Returns when this replica leads; never, if it never will.
    pub async fn acquired(&self) {
        let mut tenure = self.tenure.clone();
        if tenure.wait_for(|tenure| tenure.renewed().is_some()).await.is_err() {
            pending::<()>().await;
        }
    }

    /// Returns when this replica, after it led, does not any more; also when the elector is gone.
    pub async fn lost(&self) {
        let mut tenure = self.tenure.clone();
        loop {
            let deadline = match *tenure.borrow_and_update() {
                Tenure::Candidate => None,
                Tenure::Held { renewed } => Some(renewed + self.renew_deadline),
                Tenure::Lost { .. } | Tenure::Released => return,
            };
            let gone = match deadline {
                Some(deadline) => tokio::select! {
                    biased; // A renewal in time counts, also where this task is late to see it.
                    changed = tenure.changed() => changed.is_err(),
                    () = sleep_until(deadline) => return,
                },
                None => tenure.changed().await.is_err(),
            };
            if gone {
                return;
            }
        }
    }
}

#[cfg(test)]
impl Leadership {
    /// Leadership that a test holds for an hour, without an API server.
    pub(crate) fn held_for_tests() -> Self {
        let hour = Duration::from_hours(1);
        let (sender, receiver) = watch::channel(Tenure::Held { renewed: clock::monotonic() });
        // A sender that is gone means an elector that is gone, and so no leadership.
        std::mem::forget(sender);
        Self::new(receiver, hour, hour)
    }
}
