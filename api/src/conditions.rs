//! The conditions of our objects: their types, and how one is set.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// The spec can be used.
pub const READY: &str = "Ready";
/// A run is under way.
pub const PROGRESSING: &str = "Progressing";
/// The last finished run left a complete recovery point. Absent until a run has finished.
pub const LAST_BACKUP_SUCCEEDED: &str = "LastBackupSucceeded";
/// No pod is known to be frozen. Absent until a run has frozen any.
pub const THAWED: &str = "Thawed";

/// Every `StatefulSet` that a policy is to back up has its backup as the template says.
pub const APPLIED: &str = "Applied";

/// A reason: the `StatefulSet` is in a namespace that does not let this one in.
pub const NAMESPACE_NOT_GRANTED: &str = "NamespaceNotGranted";
/// A reason: the `StatefulSet` does not exist.
pub const STATEFUL_SET_NOT_FOUND: &str = "StatefulSetNotFound";
/// A reason: the schedule, its time zone or its spread cannot be used.
pub const INVALID_SCHEDULE: &str = "InvalidSchedule";
/// A reason: the agent's configuration has no hooks under the name that the policy gives.
pub const HOOK_PROFILE_NOT_FOUND: &str = "HookProfileNotFound";
/// A reason: a label selector cannot be used.
pub const INVALID_SELECTOR: &str = "InvalidSelector";
/// A reason: an object that is not the policy's has the name of one of its backups.
pub const NAME_TAKEN: &str = "NameTaken";
/// A reason: an earlier backup is still to go.
pub const WAITING: &str = "Waiting";
/// A reason: the agent that ran the hooks was stopped, or died.
pub const INTERRUPTED: &str = "Interrupted";
/// A reason: the object was deleted.
pub const DELETED: &str = "Deleted";

/// The longest message that the API server admits in a condition.
const MAX_MESSAGE: usize = 32_768;

/// Sets the condition of that type, or adds it. The time of the last transition changes only with the status,
/// as <https://github.com/kubernetes/community/blob/master/contributors/devel/sig-architecture/api-conventions.md>
/// asks.
pub fn set(
    conditions: &mut Vec<Condition>,
    type_: &str,
    (status, reason, message): (bool, &str, &str),
    generation: Option<i64>,
    now: Timestamp,
) {
    let status = if status { "True" } else { "False" };
    let old = conditions.iter().position(|condition| condition.type_ == type_);
    let last_transition_time = old
        .map(|at| &conditions[at])
        .filter(|old| old.status == status)
        .map_or(Time(now), |old| old.last_transition_time.clone());
    let condition = Condition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: message[..message.floor_char_boundary(MAX_MESSAGE)].to_owned(),
        observed_generation: generation,
        last_transition_time,
    };
    match old {
        Some(at) => conditions[at] = condition,
        None => conditions.push(condition),
    }
}

/// The condition of that type.
#[must_use]
pub fn find<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == type_)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_transition_time_changes_only_with_the_status() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let mut conditions = Vec::new();
        set(&mut conditions, READY, (true, "Usable", "one"), Some(1), at(1));
        set(&mut conditions, READY, (true, "Usable", "two"), Some(2), at(2));
        let ready = find(&conditions, READY).unwrap();
        assert_eq!((ready.message.as_str(), &ready.last_transition_time), ("two", &Time(at(1))));

        set(&mut conditions, READY, (false, "StatefulSetNotFound", "three"), Some(2), at(3));
        let ready = find(&conditions, READY).unwrap();
        assert_eq!((ready.status.as_str(), &ready.last_transition_time), ("False", &Time(at(3))));
        assert_eq!(conditions.len(), 1);
    }
}
