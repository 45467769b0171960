//! A default that makes snapshots slow: csi-snapshotter and snapshot-controller ask the API server five times
//! a second unless told otherwise. Pure.

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{Container, PodTemplateSpec};
use kube::{Resource, ResourceExt};

use super::{Finding, Read};

/// The containers that have the flag.
const CONTAINERS: [&str; 2] = ["csi-snapshotter", "snapshot-controller"];

const FLAG: &str = "--kube-api-qps";

/// Every workload with such a container that has no flag; or one line that all is well.
pub(super) fn check_sidecars(
    deployments: &Read<Vec<Deployment>>,
    daemon_sets: &Read<Vec<DaemonSet>>,
    stateful_sets: &Read<Vec<StatefulSet>>,
) -> Vec<Finding> {
    let mut seen = Seen::default();
    seen.look(deployments, |workload| Some(&workload.spec.as_ref()?.template));
    seen.look(daemon_sets, |workload| Some(&workload.spec.as_ref()?.template));
    seen.look(stateful_sets, |workload| Some(&workload.spec.as_ref()?.template));
    if seen.findings.is_empty() && seen.quick > 0 {
        seen.findings.push(Finding::ok("Snapshot sidecars", format!("all set {FLAG}")));
    }
    seen.findings
}

#[derive(Default)]
struct Seen {
    findings: Vec<Finding>,
    quick: usize,
}

impl Seen {
    fn look<K: Resource<DynamicType = ()>>(
        &mut self,
        workloads: &Read<Vec<K>>,
        template: impl Fn(&K) -> Option<&PodTemplateSpec>,
    ) {
        let kind = K::kind(&());
        let workloads = match workloads {
            Ok(workloads) => workloads,
            Err(why) => {
                self.findings.push(Finding::unread(format!("Snapshot sidecars in {kind}s"), why));
                return;
            }
        };
        for workload in workloads {
            let spec = template(workload).and_then(|template| template.spec.as_ref());
            for container in spec.iter().flat_map(|spec| &spec.containers) {
                if !CONTAINERS.contains(&container.name.as_str()) {
                    continue;
                }
                if has_flag(container) {
                    self.quick += 1;
                    continue;
                }
                let namespace = workload.namespace().unwrap_or_default();
                self.findings.push(Finding::warn(
                    format!("{kind} {namespace}/{}", workload.name_any()),
                    format!(
                        "container {} does not set {FLAG}: 10 parallel snapshots took 16 s at the default of 5 requests a second, 0.9 s with 200",
                        container.name
                    ),
                    "add the arguments --kube-api-qps=200 --kube-api-burst=400",
                ));
            }
        }
    }
}

fn has_flag(container: &Container) -> bool {
    let mut words = container.command.iter().chain(&container.args).flatten();
    // With one dash as well, as Go's flags are, and also inside a shell's one word.
    words.any(|word| word.contains(&FLAG[1..]))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn deployment(container: &str, args: &Value) -> Vec<Deployment> {
        vec![
            serde_json::from_value(json!({
                "metadata": { "name": "storage", "namespace": "csi" },
                "spec": {
                    "selector": {},
                    "template": { "spec": { "containers": [{ "name": container, "args": args }] } },
                },
            }))
            .unwrap(),
        ]
    }

    fn check(container: &str, args: &Value) -> Vec<Finding> {
        check_sidecars(&Ok(deployment(container, args)), &Ok(Vec::new()), &Ok(Vec::new()))
    }

    #[test]
    fn a_sidecar_at_the_default_rate_is_told_with_the_measured_cost() {
        let findings = check("csi-snapshotter", &json!(["--v=2"]));
        assert_eq!(
            findings,
            [Finding::warn(
                "Deployment csi/storage",
                "container csi-snapshotter does not set --kube-api-qps: 10 parallel snapshots took 16 s at the default of 5 requests a second, 0.9 s with 200",
                "add the arguments --kube-api-qps=200 --kube-api-burst=400",
            )]
        );
    }

    #[test]
    fn a_sidecar_with_the_flag_is_well_and_other_containers_do_not_matter() {
        let well = [Finding::ok("Snapshot sidecars", "all set --kube-api-qps")];
        assert_eq!(check("snapshot-controller", &json!(["--kube-api-qps=100"])), well);
        assert_eq!(check("snapshot-controller", &json!(["-kube-api-qps", "100"])), well);
        assert_eq!(check("web", &json!([])), []);
    }

    #[test]
    fn workloads_that_may_not_be_read_are_named() {
        let findings = check_sidecars(&Ok(Vec::new()), &Err("forbidden".to_owned()), &Ok(Vec::new()));
        assert_eq!(findings, [Finding::unread("Snapshot sidecars in DaemonSets", "forbidden")]);
    }
}
