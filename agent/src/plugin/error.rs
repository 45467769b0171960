//! What can go wrong in a command, in words for the person who called it.

use kube::config::KubeconfigError;
use kube::core::Status;
use thiserror::Error as ThisError;

use super::Exit;

/// Why a command could not do its work.
#[derive(Debug, ThisError)]
pub(super) enum Error {
    #[error("start the runtime")]
    Runtime { source: std::io::Error },
    #[error("use the kubeconfig{}", .file.as_ref().map(|file| format!(" {file}")).unwrap_or_default())]
    Kubeconfig { file: Option<String>, source: Box<KubeconfigError> },
    #[error("find a cluster")]
    NoCluster { source: Box<kube::config::InferConfigError> },
    #[error("make the client")]
    Client { source: Box<kube::Error> },
    #[error("{object} does not exist")]
    NotFound { object: String, namespace: Option<String> },
    #[error("{what}: the cluster does not serve this kind")]
    NotServed { what: String },
    #[error("{what}: you may not: {says}")]
    Forbidden { what: String, says: String },
    #[error("{what}: the API server says: {says}")]
    Refused { what: String, says: String },
    #[error("{what}")]
    Request { what: String, source: Box<kube::Error> },
    #[error("read {object}: this version of the plugin does not understand it")]
    Unreadable { object: String, source: serde_json::Error },
    #[error("write to standard output")]
    Print { source: std::io::Error },
    #[error("read the answer")]
    Ask { source: std::io::Error },
    #[error("write the result")]
    Encode { source: Box<dyn std::error::Error + Send + Sync> },
    #[error("{message}")]
    Ended { exit: Exit, message: String, remedy: Option<String> },
}

impl Error {
    /// An answer of the API server to an attempt at `what` (`list StatefulSetBackups`), sorted by what its user
    /// can do about it. An object that was asked for by name and is not there is [`Self::NotFound`], which
    /// `object` names.
    pub(super) fn of(what: &str, object: Option<(&str, &str)>, err: kube::Error) -> Self {
        let what = what.to_owned();
        let kube::Error::Api(status) = err else { return Self::Request { what, source: Box::new(err) } };
        if forbidden(&status) {
            return Self::Forbidden { what, says: status.message };
        }
        if not_found(&status) {
            return match object {
                Some((namespace, object)) if names_an_object(&status) => Self::NotFound {
                    object: object.to_owned(),
                    namespace: (!namespace.is_empty()).then(|| namespace.to_owned()),
                },
                Some(_) | None => Self::NotServed { what },
            };
        }
        Self::Refused { what, says: status.message }
    }

    /// The exit code that scripts see.
    pub(super) fn exit(&self) -> Exit {
        match self {
            Self::NotFound { .. } | Self::Kubeconfig { .. } | Self::NoCluster { .. } => Exit::Usage,
            Self::Ended { exit, .. } => *exit,
            Self::Runtime { .. }
            | Self::Client { .. }
            | Self::NotServed { .. }
            | Self::Forbidden { .. }
            | Self::Refused { .. }
            | Self::Request { .. }
            | Self::Unreadable { .. }
            | Self::Print { .. }
            | Self::Ask { .. }
            | Self::Encode { .. } => Exit::Failure,
        }
    }

    /// What to do about it.
    fn remedy(&self) -> Option<String> {
        match self {
            Self::Kubeconfig { .. } => Some("name a file by --kubeconfig and a context by --context; kubectl config get-contexts lists them".to_owned()),
            Self::NoCluster { .. } => Some("name a file by --kubeconfig, or set KUBECONFIG".to_owned()),
            Self::NotFound { namespace: Some(namespace), .. } => Some(format!(
                "kubectl stsbackup list -n {namespace} shows what is there, kubectl stsbackup list -A where else to look"
            )),
            Self::NotServed { .. } => Some(
                "kubectl stsbackup doctor tells which CRDs are missing, and where they come from".to_owned(),
            ),
            Self::Forbidden { .. } => Some(
                "ask the administrator of the cluster for this right; kubectl auth can-i --list shows those you have".to_owned(),
            ),
            Self::Request { .. } => Some("can kubectl reach the cluster? Try kubectl version".to_owned()),
            Self::Unreadable { .. } => {
                Some("update kubectl-stsbackup to the version of the agent".to_owned())
            }
            Self::Ended { remedy, .. } => remedy.clone(),
            Self::NotFound { namespace: None, .. }
            | Self::Runtime { .. }
            | Self::Client { .. }
            | Self::Refused { .. }
            | Self::Print { .. }
            | Self::Ask { .. }
            | Self::Encode { .. } => None,
        }
    }

    /// The whole story: what failed, why, and what to do.
    pub(super) fn to_text(&self) -> String {
        let mut text = format!("error: {}", self.brief());
        if let Some(remedy) = self.remedy() {
            text.push_str("\n  to do: ");
            text.push_str(&remedy);
        }
        text
    }

    /// What failed and why.
    pub(super) fn brief(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(source) = cause {
            let why = source.to_string();
            // Some causes repeat what they are caused by.
            if !text.contains(&why) {
                text.push_str(": ");
                text.push_str(&why);
            }
            cause = source.source();
        }
        text
    }
}

/// A 404. kube 5.0 knows it only by its reason, which the answer for a kind that is not served does not have.
pub(super) fn not_found(status: &Status) -> bool {
    status.is_not_found() || status.code == 404
}

/// A 403, with or without its reason.
pub(super) fn forbidden(status: &Status) -> bool {
    status.is_forbidden() || status.code == 403
}

/// Whether a 404 is about an object, and not about a kind that the server does not know.
fn names_an_object(status: &Status) -> bool {
    status.details.as_ref().is_some_and(|details| !details.name.is_empty())
}

#[cfg(test)]
mod tests {
    use kube::core::response::StatusDetails;

    use super::*;

    fn answer(code: u16, reason: &str, message: &str, object: &str) -> kube::Error {
        let details = StatusDetails {
            name: object.to_owned(),
            group: String::new(),
            kind: String::new(),
            uid: String::new(),
            causes: Vec::new(),
            retry_after_seconds: 0,
        };
        let status = Status::failure(message, reason).with_code(code).with_details(details);
        kube::Error::Api(status.boxed())
    }

    #[test]
    fn an_object_that_is_not_there_is_told_from_a_kind_that_is_not_served() {
        let object = Some(("shop", "StatefulSetBackup shop/nightly"));
        let missing =
            Error::of("read it", object, answer(404, "NotFound", "\"nightly\" not found", "nightly"));
        assert_eq!(missing.exit(), Exit::Usage);
        assert_eq!(
            missing.to_text(),
            "error: StatefulSetBackup shop/nightly does not exist\n  \
             to do: kubectl stsbackup list -n shop shows what is there, kubectl stsbackup list -A where else to look"
        );

        let unknown = Error::of(
            "list StatefulSetBackups",
            object,
            answer(404, "Failed to parse error data", "404 page not found", ""),
        );
        assert_eq!(unknown.exit(), Exit::Failure);
        assert_eq!(
            unknown.to_text(),
            "error: list StatefulSetBackups: the cluster does not serve this kind\n  \
             to do: kubectl stsbackup doctor tells which CRDs are missing, and where they come from"
        );
    }

    #[test]
    fn a_missing_right_is_named_with_the_server_s_words() {
        let refused =
            Error::of("list Leases", None, answer(403, "Forbidden", "leases is forbidden: User \"ann\"", ""));
        assert_eq!(
            refused.to_text(),
            "error: list Leases: you may not: leases is forbidden: User \"ann\"\n  \
             to do: ask the administrator of the cluster for this right; kubectl auth can-i --list shows those you have"
        );
    }

    #[test]
    fn other_refusals_keep_the_server_s_words() {
        let refused =
            Error::of("ask for a run", None, answer(422, "Invalid", "metadata.annotations: Too long", ""));
        assert_eq!(
            refused.to_text(),
            "error: ask for a run: the API server says: metadata.annotations: Too long"
        );
    }
}
