//! `describe`: all about one `StatefulSetBackup`, and what to do about it.

use jiff::Timestamp;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use sts_backup_api::backup::{Hook, HookPods, OnError, StatefulSetBackup, StatefulSetBackupStatus};
use sts_backup_api::conditions;
use sts_backup_api::run::RunResult;
use sts_backup_service::clock;

use super::cluster::{Cluster, Scope, list_all};
use super::describe_run::{current_run, history, points};
use super::error::Error;
use super::list::{phase_word, target};
use super::remedy::{remedy, thaw_trouble};
use super::timing::{next_line, retention_line, schedule, schedule_line};
use super::{Exit, output};
use sts_backup_service::table::{age, indented, lines, moment, table};

/// How many events are shown, the newest ones.
const EVENTS: usize = 15;

/// Shows one backup.
pub(super) async fn describe(cluster: &Cluster, name: &str) -> Result<Exit, Error> {
    let backup = cluster.backup(name).await?;
    let events = events_of(cluster, &backup).await.map_err(|err| err.brief());
    output::print(&render(&backup, &events, clock::now()))?;
    Ok(Exit::Success)
}

async fn events_of(cluster: &Cluster, backup: &StatefulSetBackup) -> Result<Vec<Event>, Error> {
    let api: Api<Event> = cluster.api(&Scope::Namespace(backup.namespace().unwrap_or_default()));
    let uid = backup.uid().unwrap_or_default();
    let about = ListParams::default().fields(&format!("regarding.uid={uid}"));
    list_all(&api, &about, "list Events").await
}

fn render(backup: &StatefulSetBackup, events: &Result<Vec<Event>, String>, now: Timestamp) -> String {
    let unseen = StatefulSetBackupStatus::default();
    let status = backup.status.as_ref().unwrap_or(&unseen);
    let run = status.current_run.as_ref().map(|run| current_run(run, now)).unwrap_or_default();
    let events = match events {
        Ok(events) => section("Events", &event_table(events, now), "none recent"),
        Err(why) => section("Events", "", why),
    };
    [
        head(backup, status, now),
        section("Conditions", &condition_table(&status.conditions, now), "none yet"),
        section("Current run", &run, "none"),
        section("Recovery points", &points(&status.recovery_points, now), "none"),
        section("History", &history(&status.history, now), "no run has ended yet"),
        events,
        section("What to do", &what_to_do(backup, now), "nothing, all is well"),
    ]
    .concat()
}

/// A heading and what is below it, or one line that says what it means that there is nothing.
fn section(heading: &str, body: &str, nothing: &str) -> String {
    if body.is_empty() {
        format!("{heading}: {nothing}\n")
    } else {
        format!("{heading}:\n{}", indented(body))
    }
}

fn head(backup: &StatefulSetBackup, status: &StatefulSetBackupStatus, now: Timestamp) -> String {
    let spec = &backup.spec;
    let mut said = vec![
        ("Name", backup.name_any()),
        ("Namespace", backup.namespace().unwrap_or_default()),
        ("StatefulSet", target(backup)),
        ("Created", backup.creation_timestamp().map_or("-".to_owned(), |created| moment(created.0, now))),
        ("Phase", status.phase.map_or("not seen by the agent yet", phase_word).to_owned()),
        ("Schedule", schedule_line(spec)),
        ("Next run", next_line(backup, now)),
    ];
    if schedule(spec).is_some() {
        said.push(("Missed runs", status.missed_runs.to_string()));
    }
    said.extend([
        ("Retention", retention_line(spec.retention_policy.as_ref())),
        ("Class", spec.snapshot_class().unwrap_or("the default of each volume's CSI driver").to_owned()),
        (
            "Templates",
            if spec.volume_claim_templates.is_empty() {
                "all".to_owned()
            } else {
                spec.volume_claim_templates.join(", ")
            },
        ),
    ]);
    if spec.allow_partial {
        said.push(("Partial", "allowed: claims that are missing or unfit are left out".to_owned()));
    }
    said.push(("Pre hook", spec.pre_backup_hook.as_ref().map_or("none".to_owned(), hook_line)));
    said.push(("Post hook", spec.post_backup_hook.as_ref().map_or("none".to_owned(), hook_line)));
    said.push((
        "Limits",
        format!(
            "frozen at most {} s, snapshots ready within {} s",
            spec.max_freeze_seconds, spec.snapshot_timeout_seconds
        ),
    ));
    let success = status.last_successful_time.as_ref();
    said.push(("Last success", success.map_or("never".to_owned(), |time| moment(time.0, now))));
    lines(said.iter().map(|(name, value)| format!("{:<13} {value}", format!("{name}:"))))
}

/// A hook in one line, however many its command has.
fn hook_line(hook: &Hook) -> String {
    const MAX: usize = 100;
    let command = hook.command.join(" ").split_whitespace().collect::<Vec<_>>().join(" ");
    let cut = command.floor_char_boundary(MAX);
    let more = if cut < command.len() { "…" } else { "" };
    let pods = match hook.pods {
        HookPods::All => "every pod",
        HookPods::First => "the first pod",
    };
    let container = hook.container_name.as_deref().unwrap_or("default");
    let on_error = match hook.on_error {
        OnError::Fail => "Fail",
        OnError::Continue => "Continue",
    };
    format!(
        "{}{more} (container {container} of {pods}, {} s, onError {on_error})",
        &command[..cut],
        hook.timeout_seconds
    )
}

fn condition_table(conditions: &[Condition], now: Timestamp) -> String {
    if conditions.is_empty() {
        return String::new();
    }
    let row = |condition: &Condition| {
        vec![
            condition.type_.clone(),
            condition.status.clone(),
            condition.reason.clone(),
            age(condition.last_transition_time.0, now),
            one_line(&condition.message),
        ]
    };
    table(&["TYPE", "STATUS", "REASON", "SINCE", "MESSAGE"], &conditions.iter().map(row).collect::<Vec<_>>())
}

/// When an event was seen last.
fn seen(event: &Event) -> Option<Timestamp> {
    let series = event.series.as_ref().map(|series| series.last_observed_time.0);
    let old = event.deprecated_last_timestamp.as_ref().map(|time| time.0);
    let first = event.event_time.as_ref().map(|time| time.0);
    let created = event.metadata.creation_timestamp.as_ref().map(|time| time.0);
    series.or(old).or(first).or(created)
}

fn event_table(events: &[Event], now: Timestamp) -> String {
    if events.is_empty() {
        return String::new();
    }
    let mut newest: Vec<_> = events.iter().map(|event| (seen(event), event)).collect();
    newest.sort_by_key(|(seen, _)| *seen);
    let older = newest.len().saturating_sub(EVENTS);
    let row = |(seen, event): &(Option<Timestamp>, &Event)| {
        let times = event.series.as_ref().map(|series| series.count).or(event.deprecated_count).unwrap_or(1);
        let seen = seen.map_or("-".to_owned(), |seen| age(seen, now));
        vec![
            if times > 1 { format!("{seen} (x{times})") } else { seen },
            event.type_.clone().unwrap_or_default(),
            event.reason.clone().unwrap_or_default(),
            one_line(event.note.as_deref().unwrap_or_default()),
        ]
    };
    let rows: Vec<_> = newest[older..].iter().map(row).collect();
    table(&["LAST SEEN", "TYPE", "REASON", "MESSAGE"], &rows)
}

pub(super) fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The next step for everything that is wrong, in the order of urgency: what is frozen first.
fn what_to_do(backup: &StatefulSetBackup, now: Timestamp) -> String {
    let (namespace, name) = (backup.namespace().unwrap_or_default(), backup.name_any());
    let Some(status) = &backup.status else {
        return "The agent has not looked at this object: kubectl stsbackup doctor tells whether one is alive\n".to_owned();
    };
    let mut lines: Vec<String> = Vec::new();
    let mut advise = |about: String, advice: String| {
        let line = format!("{}: {advice}\n", one_line(&about));
        if !lines.contains(&line) {
            lines.push(line);
        }
    };
    if let Some(trouble) = thaw_trouble(backup, now) {
        advise(trouble, remedy("ThawFailed", &namespace, &name));
    }
    let ready = conditions::find(&status.conditions, conditions::READY);
    if let Some(ready) = ready.filter(|ready| ready.status == "False") {
        advise(format!("not ready ({})", ready.reason), remedy(&ready.reason, &namespace, &name));
    }
    if let Some(run) = status.history.first().filter(|run| run.result != RunResult::Completed) {
        let how = match run.result {
            RunResult::Failed => "failed",
            RunResult::PartiallyFailed | RunResult::Completed => "left claims out",
        };
        advise(format!("Run {} {how} ({})", run.id, run.reason), remedy(&run.reason, &namespace, &name));
    }
    lines.concat()
}

#[cfg(test)]
#[path = "describe_tests.rs"]
mod tests;
