//! The hooks of `docs/hooks.md`, as they stand there, freeze and thaw real databases.

use anyhow::{Result, ensure};
use sts_backup_e2e::kit::hooks::Hooks;
use sts_backup_e2e::kit::{Cluster, Namespace, Postgres, Redis, WriteLoad, with_temp_namespace};

/// Longer than a test: what ends such a freeze is the post hook.
const NEVER: u32 = 600;

/// Short, for freezes that must end by themselves, but longer than it takes to see them in force.
const SOON: u32 = 10;

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn the_documented_postgres_hooks_stop_all_writes_and_let_them_go_on() -> Result<()> {
    with_postgres(async |ns, postgres| {
        let hooks = Postgres::freeze_hooks(NEVER)?;
        let mut load = WriteLoad::start(postgres, 0).await?;
        load.wait_until(50).await?;

        run(ns, postgres, &hooks, Step::Pre).await?;
        ensure!(postgres.is_frozen(0).await?, "the pre hook returned before the freeze was in force");
        postgres.await_blocked_writer(0).await?;
        // The next row is sent when the last one is acknowledged, and it waits.
        let (rows, committed) = (postgres.rows(0).await?, load.committed());
        ensure!(rows.count == committed, "{rows:?} in the table, {committed} acknowledged");
        let new_table = "SET lock_timeout = '1s'; CREATE TABLE late ()";
        ensure!(postgres.psql(0, new_table).await.is_err(), "a table was created in a frozen database");

        run(ns, postgres, &hooks, Step::Post).await?;
        load.wait_until(committed + 50).await?;
        ensure!(!postgres.is_frozen(0).await?, "the post hook left the freeze in force");
        let committed = load.stop().await?;
        let rows = postgres.rows(0).await?;
        ensure!(rows.is_unbroken() && rows.count == committed, "{rows:?} of {committed}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn the_documented_postgres_freeze_ends_by_itself() -> Result<()> {
    with_postgres(async |ns, postgres| {
        let hooks = Postgres::freeze_hooks(SOON)?;
        let mut load = WriteLoad::start(postgres, 0).await?;
        load.wait_until(1).await?;

        run(ns, postgres, &hooks, Step::Pre).await?;
        postgres.await_blocked_writer(0).await?;
        load.wait_until(load.committed() + 50).await?;
        load.stop().await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn the_documented_postgres_hooks_can_be_repeated() -> Result<()> {
    with_postgres(async |ns, postgres| {
        let hooks = Postgres::freeze_hooks(NEVER)?;
        for step in [Step::Post, Step::Pre, Step::Pre] {
            run(ns, postgres, &hooks, step).await?;
        }
        ensure!(postgres.is_frozen(0).await?, "the second pre hook ended the freeze");
        for step in [Step::Post, Step::Post] {
            run(ns, postgres, &hooks, step).await?;
            ensure!(!postgres.is_frozen(0).await?, "it is frozen after the post hook");
        }
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_postgres_post_hook_stops_a_freeze_that_still_waits_for_its_locks() -> Result<()> {
    with_postgres(async |ns, postgres| {
        let hooks = Postgres::freeze_hooks(NEVER)?;
        postgres.psql(0, "CREATE TABLE held ()").await?;
        // One transaction: psql sends a `-c` as a whole.
        let transaction =
            "SET application_name = 'holder'; INSERT INTO held DEFAULT VALUES; SELECT pg_sleep(50)";
        let exists =
            |name| format!("SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = '{name}'");
        let (held, outcome) = tokio::join!(postgres.psql(0, transaction), async {
            postgres.await_true(0, "the transaction is open", &exists("holder")).await?;
            let pod = postgres.pod_name(0);
            let (pre, thawed) = tokio::join!(hooks.pre.run(ns, &pod), async {
                postgres.await_true(0, "the freeze waits", &exists("sts-backup-freezing")).await?;
                run(ns, postgres, &hooks, Step::Post).await
            });
            thawed?;
            ensure!(pre?.exit_code != 0, "the pre hook succeeded without a freeze");
            let end = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity \
                       WHERE application_name = 'holder'";
            postgres.psql(0, end).await?;
            ensure!(!postgres.is_frozen(0).await?, "the freeze came after the thaw");
            Ok(())
        });
        outcome?;
        ensure!(held.is_err(), "the transaction ended before the freeze had to wait for it");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn the_documented_redis_hooks_stop_writes_and_let_them_go_on() -> Result<()> {
    with_redis(async |ns, redis| {
        let hooks = Redis::freeze_hooks(NEVER)?;
        let pod = redis.pod_name(0);
        // Nothing is frozen yet.
        hooks.post.run(ns, &pod).await?.success()?;
        redis.redis_cli(0, &["SET", "n", "1"]).await?;

        hooks.pre.run(ns, &pod).await?.success()?;
        let (written, thawed) = tokio::join!(redis.redis_cli(0, &["INCR", "n"]), async {
            redis.await_blocked_writer(0).await?;
            let n = redis.redis_cli(0, &["GET", "n"]).await?;
            ensure!(n == "1", "n became {n} in a frozen Redis");
            hooks.post.run(ns, &pod).await?.success()
        });
        thawed?;
        ensure!(written? == "2", "the write that waited was lost");
        hooks.post.run(ns, &pod).await?.success()?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn the_documented_redis_freeze_ends_by_itself() -> Result<()> {
    with_redis(async |ns, redis| {
        let hooks = Redis::freeze_hooks(SOON)?;
        hooks.pre.run(ns, &redis.pod_name(0)).await?.success()?;
        let write = ["INCR", "n"];
        let (written, blocked) = tokio::join!(redis.redis_cli(0, &write), redis.await_blocked_writer(0));
        blocked?;
        ensure!(written? == "1", "the write that waited was lost");
        Ok(())
    })
    .await
}

#[derive(Clone, Copy)]
enum Step {
    Pre,
    Post,
}

async fn run(ns: &Namespace, postgres: &Postgres, hooks: &Hooks, step: Step) -> Result<()> {
    let hook = match step {
        Step::Pre => &hooks.pre,
        Step::Post => &hooks.post,
    };
    hook.run(ns, &postgres.pod_name(0)).await?.success()?;
    Ok(())
}

async fn with_postgres(test: impl AsyncFnOnce(&Namespace, &Postgres) -> Result<()>) -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "hooks", async |ns| {
        let postgres = Postgres::new(ns, "db");
        postgres.deploy().await?;
        test(ns, &postgres).await
    })
    .await
}

async fn with_redis(test: impl AsyncFnOnce(&Namespace, &Redis) -> Result<()>) -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "hooks", async |ns| {
        let redis = Redis::new(ns, "cache");
        redis.deploy().await?;
        test(ns, &redis).await
    })
    .await
}
