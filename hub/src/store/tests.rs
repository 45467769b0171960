use std::collections::BTreeSet;
use std::sync::Arc;

use super::*;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn id(number: u128) -> ClusterId {
    ClusterId::new(Uuid::from_u128(number))
}

fn key(name: &str) -> ObjectKey {
    ObjectKey { kind: "StatefulSetBackup".to_owned(), namespace: "shop".to_owned(), name: name.to_owned() }
}

async fn open(directory: &tempfile::TempDir) -> Store {
    Store::open(&directory.path().join("hub.db")).await.unwrap()
}

fn gold() -> Placed {
    let body = Body { hash: vec![1], json: Arc::from(&b"{}"[..]) };
    BTreeMap::from([("gold".to_owned(), Some(body)), ("old".to_owned(), None)])
}

/// As a tombstone it would remove the policy from its clusters.
#[tokio::test]
async fn a_policy_whose_body_is_lost_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(&directory).await;
    store.add_cluster(id(1), "prod-eu-1", &BTreeMap::new(), at(1)).await.unwrap();
    store.place(vec![Placement { cluster: id(1), revision: 7, placed: gold() }]).await.unwrap();
    store.close().await;
    let unguarded = SqliteConnectOptions::new().filename(directory.path().join("hub.db")).foreign_keys(false);
    let damage = SqlitePool::connect_with(unguarded).await.unwrap();
    sqlx::query("DELETE FROM bodies").execute(&damage).await.unwrap();
    damage.close().await;

    let error = open(&directory).await.clusters().await.unwrap_err();
    assert!(error.to_string().contains("a policy without its body: \"gold\""), "{error}");
}

#[tokio::test]
async fn what_was_written_is_there_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(&directory).await;
    let labels = BTreeMap::from([("env".to_owned(), "prod".to_owned())]);
    store.add_cluster(id(1), "prod-eu-1", &labels, at(1)).await.unwrap();
    let placement = Placement { cluster: id(1), revision: 7, placed: gold() };
    store.place(vec![placement]).await.unwrap();
    store.revoke_cluster(id(1), "prod-eu-1", at(2)).await.unwrap();
    let first = store.id();
    store.close().await;
    assert!(store.forget_before(at(0)).await.is_err(), "it is closed");

    let store = open(&directory).await;
    assert_eq!(store.id(), first);
    let clusters = store.clusters().await.unwrap();
    let [row] = &clusters[..] else { unreachable!("{clusters:?}") };
    assert_eq!((row.id, &*row.name, &row.labels, row.revision), (id(1), "prod-eu-1", &labels, 7));
    assert_eq!(row.revoked, Some(at(2)));
    assert_eq!(row.placed, gold());
    let audit = store.audit(10).await.unwrap();
    let actions: Vec<_> = audit.iter().map(|(_, action, object, _)| (&**action, &**object)).collect();
    assert_eq!(actions, [("ClusterRevoked", "prod-eu-1"), ("ClusterAdded", "prod-eu-1")]);
}

#[tokio::test]
async fn another_file_is_another_store() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    assert_ne!(open(&one).await.id(), open(&two).await.id());
}

#[tokio::test]
async fn what_fails_alone_is_undone_alone() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(&directory).await;
    let none = BTreeMap::new();
    let add = |number, name: &'static str| {
        let (store, none) = (store.clone(), none.clone());
        async move { store.add_cluster(id(number), name, &none, at(1)).await.is_ok() }
    };
    // All of them in one commit.
    let done = tokio::join!(add(1, "a"), add(2, "a"), add(3, "b"));
    assert_eq!(done, (true, false, true));
    assert_eq!(store.clusters().await.unwrap().len(), 2);
    assert_eq!(store.audit(10).await.unwrap().len(), 2, "of what was undone, nothing is told");
}

#[tokio::test]
async fn a_run_that_is_reported_twice_is_known_once() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(&directory).await;
    store.add_cluster(id(1), "a", &BTreeMap::new(), at(1)).await.unwrap();
    let run = |run: &str, result: &str| HistoryRow {
        key: key("db"),
        uid: "uid".to_owned(),
        run: run.to_owned(),
        started: at(5),
        result: result.to_owned(),
        body: "{}".to_owned(),
    };
    let report = |history| Report {
        objects: vec![ObjectRow { key: key("db"), body: "{}".to_owned(), hash: vec![1] }],
        gone: Vec::new(),
        history,
    };
    store.report(id(1), report(vec![run("r1", "Completed")])).await.unwrap();
    store.report(id(1), report(vec![run("r1", "Completed"), run("r2", "Failed")])).await.unwrap();
    let gone = Report { gone: vec![key("db")], ..Report::default() };
    store.report(id(1), gone).await.unwrap();
    assert!(store.objects("StatefulSetBackup", None).await.unwrap().is_empty());
    let history = store.history("StatefulSetBackup", Some(id(1)), 10).await.unwrap();
    let runs: BTreeSet<_> = history.iter().map(|(_, row)| row.run.clone()).collect();
    assert_eq!((history.len(), runs.len()), (2, 2));
    store.forget_before(at(6)).await.unwrap();
    assert!(store.history("StatefulSetBackup", None, 10).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_report_of_all_forgets_what_is_in_none() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(&directory).await;
    for number in [1, 2] {
        store.add_cluster(id(number), &number.to_string(), &BTreeMap::new(), at(1)).await.unwrap();
        let objects =
            ["a", "b"].map(|name| ObjectRow { key: key(name), body: "{}".to_owned(), hash: vec![1] }).into();
        store.report(id(number), Report { objects, ..Report::default() }).await.unwrap();
    }
    store.keep_only(id(1), BTreeSet::from([key("b")])).await.unwrap();
    let left = store.objects("StatefulSetBackup", None).await.unwrap();
    let left: Vec<_> = left.iter().map(|(cluster, row)| (cluster.parse().unwrap(), &*row.key.name)).collect();
    assert_eq!(left, [(id(1), "b"), (id(2), "a"), (id(2), "b")]);
    let of_one = store.objects("StatefulSetBackup", Some(id(1))).await.unwrap();
    assert_eq!(of_one.into_iter().map(|(_, row)| row.key).collect::<Vec<_>>(), [key("b")]);
}

#[tokio::test]
async fn a_full_disk_acknowledges_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(&directory).await;
    store.add_cluster(id(1), "a", &BTreeMap::new(), at(1)).await.unwrap();
    // No page more than there are: what SQLite sees of a disk that is full.
    store
        .write(|connection| {
            Box::pin(async move {
                sqlx::query("PRAGMA max_page_count = 1").execute(connection).await?;
                Ok(())
            })
        })
        .await
        .unwrap();
    let objects = vec![ObjectRow { key: key("a"), body: "x".repeat(1 << 20), hash: vec![1] }];
    let refused = store.report(id(1), Report { objects: objects.clone(), ..Report::default() }).await;
    assert!(refused.is_err());
    assert!(store.objects("StatefulSetBackup", None).await.unwrap().is_empty());
    // With room again it goes on.
    store
        .write(|connection| {
            Box::pin(async move {
                sqlx::query("PRAGMA max_page_count = 1000000").execute(connection).await?;
                Ok(())
            })
        })
        .await
        .unwrap();
    store.report(id(1), Report { objects, ..Report::default() }).await.unwrap();
    assert_eq!(store.objects("StatefulSetBackup", None).await.unwrap().len(), 1);
}

#[tokio::test]
async fn the_history_of_an_older_hub_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let options =
        SqliteConnectOptions::new().filename(directory.path().join("hub.db")).create_if_missing(true);
    let older = SqlitePool::connect_with(options).await.unwrap();
    let mut migrations = sqlx::migrate!("./migrations");
    migrations.migrations.to_mut().truncate(2);
    migrations.run(&older).await.unwrap();
    let cluster = id(1).to_string();
    for statement in [
        format!("INSERT INTO clusters (id, name, labels, added_ms) VALUES ('{cluster}', 'prod', '{{}}', 1)"),
        format!(
            "INSERT INTO history (cluster, uid, run, kind, namespace, name, started_ms, result, body) \
             VALUES ('{cluster}', 'uid', 'r1', 'StatefulSetBackup', 'shop', 'db', 5000, 'Completed', '{{}}')"
        ),
    ] {
        sqlx::query(sqlx::AssertSqlSafe(statement)).execute(&older).await.unwrap();
    }
    older.close().await;
    let history = open(&directory).await.history("StatefulSetBackup", Some(id(1)), 10).await.unwrap();
    let [(_, row)] = &history[..] else { unreachable!("{history:?}") };
    let told = (&row.key, &*row.uid, &*row.run, row.started, &*row.result, &*row.body);
    assert_eq!(told, (&key("db"), "uid", "r1", at(5), "Completed", "{}"));
}
