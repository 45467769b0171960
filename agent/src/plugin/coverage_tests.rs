use std::sync::Mutex;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::StatusCode;
use kube::Client;
use serde_json::Value;

use super::*;

fn read<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn namespace(name: &str, annotations: &Value) -> PartialObjectMeta<Namespace> {
    read(json!({ "metadata": { "name": name, "annotations": annotations } }))
}

fn set(namespace: &str, name: &str, annotations: &Value, claims: &Value) -> KnownSet {
    read(json!({
        "metadata": {
            "namespace": namespace, "name": name, "creationTimestamp": "2026-01-01T00:00:00Z", "annotations": annotations,
        },
        "spec": { "volumeClaimTemplates": claims },
    }))
}

/// A backup with a complete point of that hour of the third of February, and a newer one that is not complete.
fn backup(path: (&str, &str), of: &Value, hour: Option<u8>) -> StatefulSetBackup {
    let point = |hour: u8, complete: bool| {
        json!({
            "id": "r", "time": format!("2026-02-03T{hour:02}:00:00.000000Z"), "complete": complete, "readyVolumes": 1,
            "expectedVolumes": 1, "replicas": 1, "consistency": "Application", "sizeBytes": 1, "hold": false,
        })
    };
    let points: Vec<Value> =
        hour.into_iter().flat_map(|hour| [point(hour + 1, false), point(hour, true)]).collect();
    read(json!({
        "metadata": { "namespace": path.0, "name": path.1, "uid": path.1 },
        "spec": { "statefulSetRef": of, "schedule": "@hourly" },
        "status": { "recoveryPoints": points },
    }))
}

fn suspended(mut backup: StatefulSetBackup) -> StatefulSetBackup {
    backup.spec.suspend = true;
    backup
}

/// As the policy makes it.
fn owned(mut backup: StatefulSetBackup, policy: &str) -> StatefulSetBackup {
    backup.metadata.labels = Some(read(json!({ "backup.sts-backup.io/from-policy": policy })));
    backup.metadata.owner_references = Some(read(json!([{
        "apiVersion": "backup.sts-backup.io/v1alpha1", "kind": "StatefulSetBackupPolicy", "name": policy, "uid": policy,
    }])));
    backup
}

fn policy(name: &str, rpo: Option<&str>) -> Arc<StatefulSetBackupPolicy> {
    let mut spec = json!({ "template": { "spec": {} } });
    if let Some(rpo) = rpo {
        spec["rpo"] = json!(rpo);
    }
    read::<StatefulSetBackupPolicy>(json!({ "metadata": { "name": name, "uid": name }, "spec": spec })).into()
}

fn now() -> Timestamp {
    "2026-02-03T12:00:00Z".parse().unwrap()
}

/// One `StatefulSet` of each kind.
fn world() -> World {
    let (none, claims) = (json!({}), json!([{ "metadata": { "name": "data" } }]));
    let exclude = json!({ "backup.sts-backup.io/exclude": "true" });
    let here = |name: &str| json!({ "name": name });
    let shop = |name: &str| json!({ "namespace": "shop", "name": name });
    let backups = [
        owned(backup(("shop", "gold-db"), &here("db"), Some(9)), "gold"),
        owned(backup(("shop", "gold-queue"), &here("queue"), Some(1)), "gold"),
        owned(backup(("shop", "tin-log"), &here("log"), Some(1)), "tin"),
        suspended(backup(("shop", "paused"), &here("cache"), Some(8))),
        backup(("ops", "far"), &shop("granted"), Some(10)),
        suspended(backup(("shop", "near"), &here("granted"), Some(2))),
        backup(("evil", "far"), &shop("alone"), Some(11)),
    ];
    World::of(
        [policy("gold", Some("6h")), policy("tin", None)],
        backups.map(Arc::new),
        &[
            set("shop", "db", &none, &claims),
            set("shop", "queue", &none, &claims),
            set("shop", "log", &none, &claims),
            set("shop", "cache", &none, &claims),
            set("shop", "granted", &none, &claims),
            set("shop", "alone", &none, &claims),
            set("shop", "scratch", &exclude, &claims),
            set("shop", "web", &none, &json!([])),
            set("dev", "db", &none, &claims),
            set("going", "db", &none, &claims),
        ],
        &[
            namespace("shop", &json!({ "backup.sts-backup.io/allow-backup-from": "other, ops" })),
            namespace("dev", &exclude),
            namespace("ops", &none),
            namespace("evil", &none),
            read(json!({ "metadata": { "name": "going", "deletionTimestamp": "2026-02-03T00:00:00Z" } })),
        ],
    )
}

fn states(covered: &[Covered]) -> Vec<(&str, State)> {
    covered.iter().map(|covered| (covered.stateful_set.as_str(), covered.state)).collect()
}

#[test]
fn every_set_with_claims_has_its_state_and_the_sum_is_below() {
    assert_eq!(
        render(&covered(&world(), None, now()), now()),
        "NAMESPACE   STATEFULSET   STATE         BACKUP         NEWEST-POINT   POLICY\n\
         dev         db            Excluded      -              -              -\n\
         shop        alone         Unprotected   -              -              -\n\
         shop        cache         Idle          paused         4h             -\n\
         shop        db            Protected     gold-db        3h             gold\n\
         shop        granted       Protected     ops/far,near   120m           -\n\
         shop        log           Protected     tin-log        11h            tin\n\
         shop        queue         Overdue       gold-queue     11h            gold\n\
         shop        scratch       Excluded      -              -              -\n\
         \n6 StatefulSets: 3 protected, 1 idle, 1 overdue, 1 unprotected; 2 excluded\n"
    );
}

#[test]
fn an_rpo_that_is_named_goes_before_those_of_policies() {
    let by = |hours| {
        let covered = covered(&world(), Some(Duration::from_hours(hours)), now());
        let overdue = covered.into_iter().filter(|covered| covered.state == State::Overdue);
        overdue.map(|covered| covered.stateful_set).collect::<Vec<_>>()
    };
    assert_eq!(by(1), ["db", "granted", "log", "queue"]);
    assert_eq!(by(11), ["log", "queue"], "at the RPO a point is too old");
    assert_eq!(by(12), [""; 0]);
}

#[test]
fn without_policies_nothing_is_overdue_and_their_names_are_known() {
    let mut world = world();
    world.policies.clear();
    let covered = covered(&world, None, now());
    assert!(covered.iter().all(|covered| covered.state != State::Overdue && covered.rpo.is_none()));
    let queue = covered.iter().find(|covered| covered.stateful_set == "queue").unwrap();
    assert_eq!((queue.state, queue.policy.as_deref()), (State::Protected, Some("gold")));
}

#[test]
fn a_backup_that_a_policy_left_behind_is_not_that_policy_s() {
    let mut world = world();
    for backup in &mut world.backups {
        backup.owner = None;
    }
    let covered = covered(&world, None, now());
    assert!(covered.iter().all(|covered| covered.policy.is_none() && covered.state != State::Overdue));
}

#[test]
fn only_gaps_fail_and_only_when_asked_to() {
    let all = covered(&world(), None, now());
    assert_eq!(exit(&all, false), Exit::Success);
    for covered in all {
        let expected = match covered.stateful_set.as_str() {
            "alone" | "cache" | "queue" => Exit::Failure,
            _ => Exit::Success,
        };
        assert_eq!(exit(std::slice::from_ref(&covered), true), expected, "{covered:?}");
    }
    assert_eq!(exit(&[], true), Exit::Success);
}

#[test]
fn programs_get_what_it_was_judged_by() {
    let said = data(&covered(&world(), None, now()));
    assert_eq!(
        said["statefulSets"][6],
        json!({
            "namespace": "shop", "statefulSet": "queue", "state": "Overdue", "policy": "gold", "rpo": "21600s",
            "backups": [{ "namespace": "shop", "name": "gold-queue", "suspended": false }],
            "newestPoint": "2026-02-03T01:00:00.000000Z",
        })
    );
    assert_eq!(
        said["summary"],
        json!({
            "statefulSets": 6, "protected": 3, "idle": 1, "overdue": 1, "unprotected": 1, "excluded": 2,
        })
    );
}

#[test]
fn the_sum_tells_only_what_there_is() {
    let all = covered(&world(), None, now());
    let only = |state| all.iter().filter(|covered| covered.state == state).cloned().collect::<Vec<_>>();
    assert_eq!(summary(&only(State::Protected)), "3 StatefulSets: 3 protected");
    assert_eq!(summary(&only(State::Unprotected)), "1 StatefulSet: 1 unprotected");
    assert_eq!(summary(&only(State::Excluded)), "0 StatefulSets; 2 excluded");
    assert_eq!(states(&only(State::Idle)), [("cache", State::Idle)]);
}

#[test]
fn an_empty_answer_says_where_it_looked() {
    assert_eq!(
        nothing_in(&Scope::Namespace("shop".to_owned())),
        "No StatefulSet with volumeClaimTemplates in namespace shop.\n  kubectl stsbackup coverage -A looks in all namespaces"
    );
    assert!(!nothing_in(&Scope::All).contains("-A"));
}

const SETS: &str = "/apis/apps/v1/namespaces/shop/statefulsets";
const BACKUPS: &str = "/apis/backup.sts-backup.io/v1alpha1/namespaces/shop/statefulsetbackups";
const ALL_BACKUPS: &str = "/apis/backup.sts-backup.io/v1alpha1/statefulsetbackups";
const POLICIES: &str = "/apis/backup.sts-backup.io/v1alpha1/statefulsetbackuppolicies";

/// What somebody reads who may read only the paths that are answered, and which paths were asked for.
async fn read_by(
    annotations: &Value,
    answers: &[(&'static str, Value)],
    how: &Coverage,
) -> (Result<World, Error>, Vec<String>) {
    let mut answers = answers.to_vec();
    answers.push((
        "/api/v1/namespaces/shop",
        json!({ "metadata": { "name": "shop", "annotations": annotations } }),
    ));
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&asked);
    let answer = move |request: Request| {
        let path = request.uri().path().to_owned();
        let found = answers.iter().find(|(at, _)| *at == path).map(|(_, answer)| answer.clone());
        seen.lock().unwrap().push(path);
        let refusal = json!({
            "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 403, "reason": "Forbidden", "message": "no",
        });
        let code = if found.is_some() { StatusCode::OK } else { StatusCode::FORBIDDEN };
        async move { (code, Body::from(found.unwrap_or(refusal).to_string())) }
    };
    let cluster = Cluster::of(Client::new(Router::new().fallback(answer), "default"), "shop");
    let world = observe(&cluster, &Scope::Namespace("shop".to_owned()), how).await;
    let asked = asked.lock().unwrap().clone();
    (world, asked)
}

fn listed(items: &Value) -> Value {
    json!({ "apiVersion": "v1", "kind": "List", "metadata": {}, "items": items })
}

fn sets() -> Value {
    listed(&json!([{
        "metadata": { "namespace": "shop", "name": "db", "creationTimestamp": "2026-01-01T00:00:00Z" },
        "spec": { "replicas": 1, "volumeClaimTemplates": [{ "metadata": { "name": "data" } }] },
    }]))
}

fn one_backup(namespace: &str) -> Value {
    listed(&json!([{
        "metadata": { "namespace": namespace, "name": "nightly" },
        "spec": { "statefulSetRef": { "namespace": "shop", "name": "db" }, "schedule": "@hourly" },
    }]))
}

fn how(rpo: Option<Duration>, fail: bool) -> Coverage {
    Coverage { all_namespaces: false, rpo, fail, output: None }
}

#[tokio::test]
async fn who_may_not_list_policies_gets_an_answer_and_a_check_fails() {
    let answers = [(SETS, sets()), (BACKUPS, one_backup("shop"))];
    let (world, _) = read_by(&json!({}), &answers, &how(None, false)).await;
    assert_eq!(states(&covered(&world.unwrap(), None, now())), [("db", State::Protected)]);

    let (world, _) = read_by(&json!({}), &answers, &how(None, true)).await;
    assert!(matches!(world.unwrap_err(), Error::Forbidden { .. }));

    let (world, asked) = read_by(&json!({}), &answers, &how(Some(Duration::from_hours(1)), true)).await;
    assert_eq!(world.unwrap().backups.len(), 1);
    assert_eq!(asked, ["/api/v1/namespaces/shop", SETS, BACKUPS], "with --rpo nobody asks for policies");
}

#[tokio::test]
async fn backups_of_other_namespaces_are_looked_for_where_they_are_let_in() {
    let granted = json!({ ALLOW_BACKUP_FROM_ANNOTATION: "ops" });
    let policies = (POLICIES, listed(&json!([])));
    let answers = [(SETS, sets()), (ALL_BACKUPS, one_backup("ops")), policies.clone()];
    let (world, _) = read_by(&granted, &answers, &how(None, true)).await;
    assert_eq!(states(&covered(&world.unwrap(), None, now())), [("db", State::Protected)]);

    let answers = [(SETS, sets()), (BACKUPS, listed(&json!([]))), policies];
    let (world, asked) = read_by(&granted, &answers, &how(None, true)).await;
    assert_eq!(states(&covered(&world.unwrap(), None, now())), [("db", State::Unprotected)]);
    assert_eq!(asked[2..4], [ALL_BACKUPS, BACKUPS], "its own count all the same");
}
