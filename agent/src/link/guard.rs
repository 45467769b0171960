//! What a hub may do in this cluster is decided here, by the agent's own configuration. Pure.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelectorRequirement;
use serde_json::{Value, json};
use sts_backup_api::link::Desired;
use sts_backup_api::policy::StatefulSetBackupPolicySpec;

use crate::config::Guardrails;

/// The label that the API server puts on every namespace.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// So many removals at once are held back, if they are also [more than a fifth](MANY_OF).
const MANY: usize = 5;
const MANY_OF: usize = 5;

/// Why a policy is not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rejection {
    pub(super) code: &'static str,
    pub(super) detail: String,
}

impl Rejection {
    pub(super) fn new(code: &'static str, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into() }
    }
}

/// What the cluster was last told, and by whom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Obeyed {
    /// The store whose policies the cluster has; empty: none's.
    pub(super) store: String,
    /// Their revision.
    pub(super) revision: u64,
    /// The store and revision that somebody in the cluster has accepted, as `STORE/REVISION`.
    pub(super) accepted: Option<String>,
}

/// How somebody in the cluster names what they accept.
pub(super) fn acceptance(store: &str, revision: u64) -> String {
    format!("{store}/{revision}")
}

/// Why nothing of this is done until somebody confirms it; none: it is done.
pub(super) fn hold(desired: &Desired, store: &str, obeyed: &Obeyed, have: usize) -> Option<String> {
    let is_accepted = obeyed.accepted.as_ref() == Some(&acceptance(store, desired.revision));
    if desired.confirmed || is_accepted || have == 0 {
        return None;
    }
    let known = &obeyed.store;
    if !known.is_empty() && known != store {
        return Some(format!(
            "the hub's store is another one, {store} instead of {known}: its database is new, or another hub's"
        ));
    }
    if known == store && desired.revision < obeyed.revision {
        return Some(format!(
            "the hub is at revision {}, and the cluster at {}: its database is an older copy",
            desired.revision, obeyed.revision
        ));
    }
    let removes = desired.removes.len();
    (removes >= MANY && removes * MANY_OF > have)
        .then(|| format!("{removes} of {have} policies would be removed at once"))
}

/// The spec that is applied for what the hub sends: as it is, but for what narrows it to the namespaces that the hub may
/// have in hand.
pub(super) fn admit(body: &[u8], rails: &Guardrails) -> Result<Value, Rejection> {
    let invalid = |error: serde_json::Error| Rejection::new("Invalid", error.to_string());
    let mut spec: Value = serde_json::from_slice(body).map_err(invalid)?;
    // Typed only to be judged: it would own defaults, and lose what is newer than this agent.
    let policy: StatefulSetBackupPolicySpec = serde_json::from_value(spec.clone()).map_err(invalid)?;
    let template = policy.template.spec_for("any");
    if !rails.allow_hub_commands
        && (template.pre_backup_hook.is_some() || template.post_backup_hook.is_some())
    {
        return Err(Rejection::new(
            "CommandsNotAllowed",
            "its template has hooks with commands, and this cluster takes none from a hub: name a hookProfile of the agent's \
             configuration, or set guardrails.allow_hub_commands there",
        ));
    }
    if let Some(retention) = &template.retention_policy {
        let kept = retention.keep_last.unwrap_or(0);
        if i64::from(kept) < rails.min_keep_last {
            return Err(Rejection::new(
                "RetentionBelowFloor",
                format!(
                    "its retentionPolicy.keepLast is {kept}, and this cluster wants at least {}: raise it, or lower \
                     guardrails.min_keep_last of the agent's configuration",
                    rails.min_keep_last
                ),
            ));
        }
    }
    if !rails.allowed_namespaces.is_empty() {
        let mut selector = policy.namespace_selector.unwrap_or_default();
        selector.match_expressions.get_or_insert_default().push(LabelSelectorRequirement {
            key: NAMESPACE_NAME.to_owned(),
            operator: "In".to_owned(),
            values: Some(rails.allowed_namespaces.clone()),
        });
        spec["namespaceSelector"] = json!(selector);
    }
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rails() -> Guardrails {
        Guardrails {
            allowed_namespaces: Vec::new(),
            allow_hub_commands: false,
            min_keep_last: 0,
            max_policies: 100,
        }
    }

    fn policy(template: &Value) -> Vec<u8> {
        json!({ "rpo": "26h", "template": { "spec": template } }).to_string().into_bytes()
    }

    fn code(admitted: Result<Value, Rejection>) -> &'static str {
        admitted.expect_err("it is refused").code
    }

    #[test]
    fn what_a_hub_may_say_is_applied_as_it_is_written() {
        let body = policy(&json!({ "schedule": "0 2 * * *", "retentionPolicy": { "keepDaily": 7 } }));
        let spec = admit(&body, &rails()).unwrap();
        assert_eq!(spec, serde_json::from_slice::<Value>(&body).unwrap());
    }

    #[test]
    fn a_hostile_hub_runs_no_command_unless_the_cluster_lets_it() {
        for hook in ["preBackupHook", "postBackupHook"] {
            let body = policy(&json!({ hook: { "command": ["rm", "-rf", "/"] } }));
            assert_eq!(code(admit(&body, &rails())), "CommandsNotAllowed");
            assert!(admit(&body, &Guardrails { allow_hub_commands: true, ..rails() }).is_ok());
        }
        let profile = json!({ "template": { "hookProfile": "postgres", "spec": {} } }).to_string();
        assert!(admit(profile.as_bytes(), &rails()).is_ok());
    }

    #[test]
    fn a_hostile_hub_reaches_only_the_namespaces_that_the_cluster_gives_it() {
        let rails = Guardrails { allowed_namespaces: vec!["shop".to_owned()], ..rails() };
        let only = json!({ "key": NAMESPACE_NAME, "operator": "In", "values": ["shop"] });
        let spec = admit(&policy(&json!({})), &rails).unwrap();
        assert_eq!(spec["namespaceSelector"]["matchExpressions"], json!([only]));
        let body = json!({
            "namespaceSelector": {
                "matchLabels": { NAMESPACE_NAME: "kube-system" },
                "matchExpressions": [{ "key": "team", "operator": "Exists" }],
            },
            "template": { "spec": {} },
        });
        let spec = admit(body.to_string().as_bytes(), &rails).unwrap();
        let selector = &spec["namespaceSelector"];
        assert_eq!(selector["matchLabels"], body["namespaceSelector"]["matchLabels"]);
        assert_eq!(selector["matchExpressions"][1], only);
    }

    #[test]
    fn a_hostile_hub_keeps_no_fewer_points_than_the_cluster_wants() {
        let rails = Guardrails { min_keep_last: 3, ..rails() };
        for retention in [json!({ "keepLast": 2 }), json!({ "keepDaily": 30 })] {
            assert_eq!(
                code(admit(&policy(&json!({ "retentionPolicy": retention })), &rails)),
                "RetentionBelowFloor"
            );
        }
        for template in [json!({}), json!({ "retentionPolicy": { "keepLast": 3 } })] {
            assert!(admit(&policy(&template), &rails).is_ok(), "{template}");
        }
    }

    #[test]
    fn what_is_no_policy_is_refused() {
        for body in [&b"{"[..], b"{}", b"[]", br#"{"template": {"spec": {"schedule": 7}}}"#] {
            assert_eq!(code(admit(body, &rails())), "Invalid");
        }
    }

    fn obeyed(store: &str, revision: u64) -> Obeyed {
        Obeyed { store: store.to_owned(), revision, accepted: None }
    }

    fn desired(revision: u64, removes: usize) -> Desired {
        let removes = (0..removes).map(|at| at.to_string()).collect();
        Desired { revision, removes, ..Desired::default() }
    }

    #[test]
    fn another_store_or_an_older_copy_changes_nothing_until_somebody_confirms() {
        let said = |desired: &Desired, store: &str, obeyed: &Obeyed| hold(desired, store, obeyed, 10);
        assert_eq!(said(&desired(1, 0), "a", &obeyed("", 0)), None, "the first hub");
        assert_eq!(said(&desired(8, 1), "a", &obeyed("a", 7)), None);
        assert_eq!(said(&desired(7, 0), "a", &obeyed("a", 7)), None);
        assert!(said(&desired(6, 0), "a", &obeyed("a", 7)).unwrap().contains("older copy"));
        assert!(said(&desired(9, 0), "b", &obeyed("a", 7)).unwrap().contains("another one"));
        let confirmed = Desired { confirmed: true, ..desired(9, 0) };
        assert_eq!(said(&confirmed, "b", &obeyed("a", 7)), None);
        let accepted = Obeyed { accepted: Some(acceptance("b", 9)), ..obeyed("a", 7) };
        assert_eq!(said(&desired(9, 0), "b", &accepted), None);
        assert!(said(&desired(10, 0), "b", &accepted).is_some(), "that is another one");
        assert_eq!(hold(&desired(1, 0), "b", &obeyed("a", 7), 0), None, "there is nothing to lose");
    }

    #[test]
    fn the_removal_of_many_policies_is_held_back() {
        for (removes, have, is_held) in [
            (4, 4, false),
            (5, 5, true),
            (5, 24, true),
            (5, 25, false),
            (6, 25, true),
            (20, 100, false),
            (21, 100, true),
        ] {
            let held = hold(&desired(8, removes), "a", &obeyed("a", 7), have);
            assert_eq!(held.is_some(), is_held, "{removes} of {have}");
        }
    }
}
