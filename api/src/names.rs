//! Names, labels and annotations that this project writes, and who writes them.

use sha2::{Digest, Sha256};

use crate::run::RunId;

/// The field manager of the agent's writes.
pub const FIELD_MANAGER: &str = "sts-backup-agent";

/// On a `StatefulSetBackup`: any new value asks for a run; a time is usual.
pub const REQUESTED_AT_ANNOTATION: &str = "backup.sts-backup.io/requested-at";

/// On a `StatefulSetBackup` while it has a run: its deletion waits for the thaw and the clean-up.
pub const RUN_FINALIZER: &str = "backup.sts-backup.io/run";

/// On a snapshot: the name of the `StatefulSetBackup`.
pub const BACKUP_LABEL: &str = "backup.sts-backup.io/policy";

/// On a snapshot: the namespace of the `StatefulSetBackup`.
pub const BACKUP_NAMESPACE_LABEL: &str = "backup.sts-backup.io/backup-namespace";

/// On a snapshot: the name of the `StatefulSet`.
pub const STATEFUL_SET_LABEL: &str = "backup.sts-backup.io/statefulset";

/// On a snapshot: the run that took it. The snapshots of one run are a recovery point.
pub const RUN_LABEL: &str = "backup.sts-backup.io/run";

/// On a snapshot: `true` keeps its whole recovery point from being pruned.
pub const HOLD_LABEL: &str = "backup.sts-backup.io/hold";

/// On a namespace: the other namespaces, separated by commas, whose backups may be of its `StatefulSets`.
pub const ALLOW_BACKUP_FROM_ANNOTATION: &str = "backup.sts-backup.io/allow-backup-from";

/// On a `StatefulSet` or a namespace: `true` keeps policies away.
pub const EXCLUDE_ANNOTATION: &str = "backup.sts-backup.io/exclude";

/// On a `StatefulSetBackup`: the policy that it was made by.
pub const FROM_POLICY_LABEL: &str = "backup.sts-backup.io/from-policy";

/// On a `StatefulSetBackup` that a policy made: a hash of the template that it was last written from.
pub const TEMPLATE_HASH_ANNOTATION: &str = "backup.sts-backup.io/template-hash";

/// On a snapshot: the claim that it is of.
pub const CLAIM_ANNOTATION: &str = "backup.sts-backup.io/pvc";

/// On a snapshot: the claim as JSON, for when the claim is gone.
pub const CLAIM_MANIFEST_ANNOTATION: &str = "backup.sts-backup.io/pvc-manifest";

/// On a snapshot: the claim's template in the `StatefulSet`.
pub const TEMPLATE_ANNOTATION: &str = "backup.sts-backup.io/template";

/// On a snapshot: the ordinal of the claim's replica.
pub const ORDINAL_ANNOTATION: &str = "backup.sts-backup.io/ordinal";

/// On a snapshot: what the run was due to, such as `creation`.
pub const SLOT_ANNOTATION: &str = "backup.sts-backup.io/slot";

/// On a snapshot: when the cut was ordered, by the agent's clock, RFC 3339.
pub const TIME_ANNOTATION: &str = "backup.sts-backup.io/time";

/// On a snapshot: a [`Consistency`](crate::run::Consistency).
pub const CONSISTENCY_ANNOTATION: &str = "backup.sts-backup.io/consistency";

/// On a snapshot: the replicas that the `StatefulSet` had.
pub const REPLICAS_ANNOTATION: &str = "backup.sts-backup.io/replicas";

/// On a snapshot: how many snapshots make the recovery point complete.
pub const VOLUMES_ANNOTATION: &str = "backup.sts-backup.io/volumes";

/// On a namespace: the other namespaces, separated by commas, whose restores may be of its `StatefulSets`.
pub const ALLOW_RESTORE_FROM_ANNOTATION: &str = "backup.sts-backup.io/allow-restore-from";

/// On a `StatefulSetRestore` that only plans: the hash of the plan that may run.
pub const APPROVED_PLAN_ANNOTATION: &str = "backup.sts-backup.io/approved-plan";

/// On a `StatefulSetRestore`: any new value brings the old volumes back; a time is usual.
pub const ROLLBACK_REQUESTED_AT_ANNOTATION: &str = "backup.sts-backup.io/rollback-requested-at";

/// On a `StatefulSetRestore` or a `StatefulSet`: `true` lets a restore run although somebody else scales the `StatefulSet`.
pub const ALLOW_CONTESTED_ANNOTATION: &str = "backup.sts-backup.io/allow-contested";

/// On a `StatefulSetRestore` while it has volumes in hand: its deletion waits until the application is served again.
pub const RESTORE_FINALIZER: &str = "backup.sts-backup.io/restore";

/// On a volume or a staged claim: the uid of the restore that has it in hand.
pub const RESTORE_LABEL: &str = "backup.sts-backup.io/restore";

/// On a volume that a restore has in hand: the reclaim policy that it had, or is to have.
pub const RECLAIM_POLICY_ANNOTATION: &str = "backup.sts-backup.io/reclaim-policy";

/// On a volume that a restore has in hand: `namespace/name` of the claim that it is or was for.
pub const FOR_CLAIM_ANNOTATION: &str = "backup.sts-backup.io/for-claim";

/// On a volume that a restore has left over: when it goes, RFC 3339.
pub const EXPIRES_AT_ANNOTATION: &str = "backup.sts-backup.io/expires-at";

/// On a policy, `true`: the hub placed it, and the agent keeps it as the hub wants it.
pub const FROM_HUB_LABEL: &str = "hub.sts-backup.io/managed";

/// Who writes the fields of such a policy.
pub const HUB_FIELD_MANAGER: &str = "sts-backup-hub";

/// On such a policy: hash of what the hub sent.
pub const HUB_HASH_ANNOTATION: &str = "hub.sts-backup.io/hash";

/// On such a policy: what the hub sent, so that it can be put back while the hub is away.
pub const HUB_SPEC_ANNOTATION: &str = "hub.sts-backup.io/spec";

/// On such a policy, `true`: neither the hub nor the agent changes it.
pub const HUB_PAUSED_ANNOTATION: &str = "hub.sts-backup.io/paused";

/// On the `ConfigMap` of the link: what of the hub somebody accepts that the agent holds back.
pub const ACCEPT_ANNOTATION: &str = "hub.sts-backup.io/accept";

/// The longest name of an object (RFC 1123 subdomain).
const MAX_NAME: usize = 253;

/// The name of a run's snapshot of a claim: the same for every attempt to create it.
///
/// It ends with the run's id. A claim's name that would make it too long is cut, and followed by a part of its
/// hash.
#[must_use]
pub fn snapshot_name(claim: &str, run: &RunId) -> String {
    let name = format!("{claim}-{run}");
    if name.len() <= MAX_NAME {
        return name;
    }
    let tail = format!("-{}-{run}", short_hash(&[claim]));
    let head = &claim[..claim.floor_char_boundary(MAX_NAME - tail.len())];
    format!("{}{tail}", head.trim_end_matches(['-', '.']))
}

/// The name of the claim by which a restore has a new volume made for a claim: the same for every attempt to create it.
#[must_use]
pub fn staged_claim_name(claim: &str, restore_uid: &str, staging: i32) -> String {
    let tail = format!("-restore-{}", short_hash(&[claim, restore_uid, &staging.to_string()]));
    let head = &claim[..claim.floor_char_boundary(MAX_NAME - tail.len())];
    format!("{}{tail}", head.trim_end_matches(['-', '.']))
}

/// The longest name of an object that is a label value.
const MAX_LABEL_VALUE: usize = 63;

/// The name of a policy's backup of a `StatefulSet`, in the namespace of that.
///
/// It ends with a part of the hash of both names, and what is before that is cut where it is too long.
#[must_use]
pub fn policy_backup_name(policy: &str, stateful_set: &str) -> String {
    let tail = format!("-{}", short_hash(&[policy, stateful_set]));
    let head = format!("{policy}-{stateful_set}");
    let head = &head[..head.floor_char_boundary(MAX_LABEL_VALUE - tail.len())];
    format!("{}{tail}", head.trim_end_matches(['-', '.']))
}

/// Eight hexadecimal digits of the SHA-256 of the parts, each ended by a zero byte, so that no two lists of
/// parts mean the same.
#[must_use]
pub fn short_hash(parts: &[&str]) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update(part.as_bytes());
        hasher.update([0]);
    }
    hex::encode(&hasher.finalize()[..4])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_named_by_its_claim_and_run() {
        let run = RunId::from("20260102-030405-0badcafe".to_owned());
        assert_eq!(snapshot_name("data-db-0", &run), "data-db-0-20260102-030405-0badcafe");
    }

    #[test]
    fn long_claim_names_give_different_legal_snapshot_names() {
        let run = RunId::from("20260102-030405-0badcafe".to_owned());
        let one = snapshot_name(&format!("{}-1", "x".repeat(251)), &run);
        let two = snapshot_name(&format!("{}-2", "x".repeat(251)), &run);
        assert_ne!(one, two);
        assert!(one.len() <= MAX_NAME && two.len() <= MAX_NAME);
        assert!(one.ends_with("-20260102-030405-0badcafe"));
    }

    #[test]
    fn a_policy_s_backup_is_named_by_policy_and_stateful_set() {
        assert_eq!(policy_backup_name("gold", "db"), "gold-db-dd4f4782");
        assert_ne!(policy_backup_name("a-b", "c"), policy_backup_name("a", "b-c"));
    }

    #[test]
    fn long_names_give_different_backup_names_that_are_label_values() {
        let (policy, set) = ("p".repeat(63), "s".repeat(200));
        let names = ["1", "2"].map(|end| policy_backup_name(&policy, &format!("{set}{end}")));
        assert_ne!(names[0], names[1]);
        assert!(names.iter().all(|name| name.len() == 63), "{names:?}");
        // What is cut may not leave a name that no object can have.
        let name = policy_backup_name(&"p".repeat(53), "db");
        assert_eq!(name.len(), 62, "{name}");
        assert!(!name.contains("--"), "{name}");
    }

    #[test]
    fn parts_do_not_run_into_each_other() {
        assert_ne!(short_hash(&["ab", "c"]), short_hash(&["a", "bc"]));
    }
}
