//! What to do about the reasons that conditions and runs give.
//!
//! The agent's messages say what to do about the one object that they speak of; here is the next command.

/// What to do about `reason` for the backup, whatever the message says.
pub(super) fn remedy(reason: &str, namespace: &str, name: &str) -> String {
    match reason {
        "NamespaceNotGranted" => format!(
            "let the namespace of the StatefulSet grant it: kubectl annotate namespace NAMESPACE backup.sts-backup.io/allow-backup-from={namespace}"
        ),
        "StatefulSetNotFound" => format!(
            "create the StatefulSet, or delete this object and create one that names the right one: kubectl get statefulset -n {namespace}"
        ),
        "NoSnapshotClass" => {
            "name a class in spec.volumeSnapshotClassName, or mark one of the driver's as its default: kubectl get volumesnapshotclass".to_owned()
        }
        "ThawFailed" => format!(
            "the application may still be frozen: run the postBackupHook by hand (kubectl exec), and see what it says; kubectl stsbackup describe {name} -n {namespace} shows it"
        ),
        "Interrupted" => format!("ask again: kubectl stsbackup run {name} -n {namespace} --wait"),
        _ => format!("kubectl stsbackup doctor {name} -n {namespace} checks all that the backup needs"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_next_command() {
        for reason in [
            "NamespaceNotGranted",
            "StatefulSetNotFound",
            "NoSnapshotClass",
            "ThawFailed",
            "Interrupted",
            "Else",
        ] {
            assert!(remedy(reason, "shop", "nightly").contains("kubectl"), "{reason}");
        }
    }
}
