//! Coverage: which `StatefulSets` nothing protects, and which are overdue.

use std::collections::HashMap;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::backup::{StatefulSetBackup, StatefulSetBackupStatus};

/// A `StatefulSet` by namespace and name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SetName<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
}

/// A `StatefulSet` that is to be protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protectee<'a> {
    /// Which one.
    pub set: SetName<'a>,
    /// When it was created: until then there was nothing to lose.
    pub created: Timestamp,
    /// It, or its namespace, carries [`EXCLUDE_ANNOTATION`](crate::names::EXCLUDE_ANNOTATION), or it has no claims.
    pub excluded: bool,
}

/// A backup, as far as it protects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protection<'a> {
    /// The `StatefulSet` that it is of.
    pub set: SetName<'a>,
    /// It begins no runs.
    pub suspended: bool,
    /// It has a schedule.
    pub scheduled: bool,
    /// The time of its newest complete recovery point.
    pub newest: Option<Timestamp>,
}

impl<'a> Protection<'a> {
    /// What a backup in `namespace` amounts to.
    #[must_use]
    pub fn of(backup: &'a StatefulSetBackup, namespace: &'a str) -> Self {
        let target = &backup.spec.stateful_set_ref;
        Self {
            set: SetName { namespace: target.namespace_or(namespace), name: &target.name },
            suspended: backup.spec.suspend,
            scheduled: backup.spec.timing().is_some(),
            newest: backup.status.as_ref().and_then(newest_complete),
        }
    }

    /// Whether it begins no runs by itself.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.suspended || !self.scheduled
    }

    /// Whether it protects. One without a schedule does only as long as it meets an RPO: nobody knows whether another run
    /// ever comes.
    #[must_use]
    pub fn protects(&self, rpo: Option<Duration>, now: Timestamp) -> bool {
        !self.suspended && (self.scheduled || rpo.is_some_and(|rpo| self.meets(rpo, now)))
    }

    /// Whether its newest complete recovery point is no older than an RPO.
    #[must_use]
    pub fn meets(&self, rpo: Duration, now: Timestamp) -> bool {
        self.newest.is_some_and(|newest| overdue_at(newest, rpo).is_none_or(|due| now < due))
    }
}

/// The time of the newest complete recovery point that the status lists.
#[must_use]
pub fn newest_complete(status: &StatefulSetBackupStatus) -> Option<Timestamp> {
    status.recovery_points.iter().filter(|point| point.complete).map(|point| point.time.0).max()
}

/// What is protected, and what is not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage<'a> {
    /// How many `StatefulSets` are to be protected.
    pub sets: usize,
    /// Those that no backup names, or only ones that are suspended, or have no schedule and do not meet the RPO.
    pub unprotected: Vec<SetName<'a>>,
    /// Those that exist for longer than the RPO and have no complete recovery point that is younger.
    pub overdue: Vec<SetName<'a>>,
    /// When the next one becomes overdue, if nothing comes of its backups until then.
    pub next_overdue: Option<Timestamp>,
}

/// Which of the `StatefulSets` nothing protects, and which are overdue against an RPO. Lists are in order of namespace
/// and name.
#[must_use]
pub fn coverage<'a>(
    sets: impl IntoIterator<Item = Protectee<'a>>,
    backups: impl IntoIterator<Item = Protection<'a>>,
    rpo: Option<Duration>,
    now: Timestamp,
) -> Coverage<'a> {
    let mut known: HashMap<SetName<'a>, (bool, Option<Timestamp>)> = HashMap::new();
    for backup in backups {
        let (active, newest) = known.entry(backup.set).or_default();
        *active |= backup.protects(rpo, now);
        // Points of a suspended backup are as good as others.
        *newest = (*newest).max(backup.newest);
    }
    let mut coverage = Coverage::default();
    for Protectee { set, created, excluded: _ } in sets.into_iter().filter(|set| !set.excluded) {
        coverage.sets += 1;
        let (active, newest) = known.get(&set).copied().unwrap_or_default();
        if !active {
            coverage.unprotected.push(set);
        }
        let Some(rpo) = rpo else { continue };
        match overdue_at(newest.unwrap_or(created).max(created), rpo) {
            Some(due) if due <= now => coverage.overdue.push(set),
            Some(due) => {
                coverage.next_overdue = Some(coverage.next_overdue.map_or(due, |next| next.min(due)));
            }
            None => {}
        }
    }
    coverage.unprotected.sort_unstable();
    coverage.overdue.sort_unstable();
    coverage
}

/// When a point of that time becomes too old; none: after the end of time.
#[must_use]
pub fn overdue_at(point: Timestamp, rpo: Duration) -> Option<Timestamp> {
    point.checked_add(SignedDuration::try_from(rpo).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RPO: Duration = Duration::from_hours(24);

    fn hour(hour: i64) -> Timestamp {
        Timestamp::from_second(hour * 3600).unwrap()
    }

    fn named(name: &str) -> SetName<'_> {
        SetName { namespace: "shop", name }
    }

    fn set(name: &str, created: i64) -> Protectee<'_> {
        Protectee { set: named(name), created: hour(created), excluded: false }
    }

    fn backup(name: &str, newest: Option<i64>) -> Protection<'_> {
        Protection { set: named(name), suspended: false, scheduled: true, newest: newest.map(hour) }
    }

    fn overdue(sets: &[Protectee<'_>], backups: &[Protection<'_>]) -> (usize, usize, Option<Timestamp>) {
        let found = coverage(sets.iter().copied(), backups.iter().copied(), Some(RPO), hour(100));
        (found.unprotected.len(), found.overdue.len(), found.next_overdue)
    }

    #[test]
    fn what_no_backup_names_is_unprotected_and_overdue_once_it_is_older_than_the_rpo() {
        assert_eq!(overdue(&[set("db", 90)], &[]), (1, 0, Some(hour(114))));
        assert_eq!(overdue(&[set("db", 76)], &[]), (1, 1, None));
        assert_eq!(overdue(&[set("db", 76)], &[backup("other", Some(99))]), (1, 1, None));
    }

    #[test]
    fn the_newest_complete_point_of_all_backups_counts() {
        assert_eq!(overdue(&[set("db", 0)], &[backup("db", Some(77))]), (0, 0, Some(hour(101))));
        assert_eq!(overdue(&[set("db", 0)], &[backup("db", Some(76))]), (0, 1, None));
        let two = [backup("db", Some(50)), backup("db", Some(90)), backup("db", None)];
        assert_eq!(overdue(&[set("db", 0)], &two), (0, 0, Some(hour(114))));
    }

    #[test]
    fn a_suspended_backup_protects_nothing_and_its_points_count() {
        let suspended = Protection { suspended: true, ..backup("db", Some(90)) };
        assert_eq!(overdue(&[set("db", 0)], &[suspended]), (1, 0, Some(hour(114))));
        assert_eq!(overdue(&[set("db", 0)], &[suspended, backup("db", None)]), (0, 0, Some(hour(114))));
    }

    #[test]
    fn a_backup_without_a_schedule_protects_only_while_it_meets_the_rpo() {
        let unscheduled = |newest| Protection { scheduled: false, ..backup("db", newest) };
        assert_eq!(overdue(&[set("db", 0)], &[unscheduled(Some(77))]), (0, 0, Some(hour(101))));
        assert_eq!(overdue(&[set("db", 0)], &[unscheduled(Some(76))]), (1, 1, None));
        assert_eq!(overdue(&[set("db", 90)], &[unscheduled(None)]), (1, 0, Some(hour(114))));
        let suspended = Protection { suspended: true, ..unscheduled(Some(99)) };
        assert_eq!(overdue(&[set("db", 0)], &[suspended]).0, 1);
        let found = coverage([set("db", 0)], [unscheduled(Some(99))], None, hour(100));
        assert_eq!(found.unprotected, [named("db")], "without an RPO nothing tells whether it is old");
        assert_eq!(overdue(&[set("db", 0)], &[unscheduled(Some(76)), backup("db", None)]).0, 0);
    }

    #[test]
    fn what_was_created_anew_has_nothing_to_lose_yet() {
        assert_eq!(overdue(&[set("db", 99)], &[backup("db", Some(1))]), (0, 0, Some(hour(123))));
    }

    #[test]
    fn the_excluded_are_left_out_and_without_an_rpo_nothing_is_overdue() {
        let excluded = Protectee { excluded: true, ..set("db", 0) };
        assert_eq!(overdue(&[excluded], &[]), (0, 0, None));
        let found = coverage([set("db", 0), excluded], [], None, hour(100));
        assert_eq!(found, Coverage { sets: 1, unprotected: vec![named("db")], ..Coverage::default() });
    }

    #[test]
    fn lists_are_in_order() {
        let sets = ["c", "a", "b"].map(|name| set(name, 0));
        let found = coverage(sets, [], Some(RPO), hour(100));
        assert_eq!(found.unprotected, ["a", "b", "c"].map(named));
        assert_eq!(found.overdue, ["a", "b", "c"].map(named));
    }

    #[test]
    fn an_rpo_beyond_the_end_of_time_is_never_missed() {
        let found = coverage([set("db", 0)], [], Some(Duration::MAX), hour(100));
        assert_eq!((found.overdue.len(), found.next_overdue), (0, None));
    }
}
