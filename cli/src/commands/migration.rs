//! `clusterctl migration`: live migrations under way and past.

use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use proto::admin::{
    MigrationCancelRequest, MigrationListRequest, MigrationView, MigrationWatchRequest,
};

use crate::Context;
use crate::client::{CliError, Connection};
use crate::output::{self, Format};

/// What can be done with migrations.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Those queued and under way, and with --all the last ones that ended.
    List {
        /// Also those that ended.
        #[arg(long)]
        all: bool,
        /// Only of this machine.
        #[arg(long, default_value = "")]
        vm: String,
    },
    /// One migration, whole.
    Show {
        /// Its id, as `migration list` shows it.
        id: String,
    },
    /// Follow one to its end.
    Watch {
        /// Its id.
        id: String,
    },
    /// End one; the machine stays where it is. Refused once the cutover is in the log.
    Cancel {
        /// Its id.
        id: String,
    },
}

/// Does it.
///
/// # Errors
/// What the node refused.
pub async fn run(c: &Context, command: Command) -> Result<ExitCode, CliError> {
    let mut connection = c.connect().await?;
    match command {
        Command::List { all, vm } => {
            let list = connection
                .api
                .migration_list(MigrationListRequest { all, vm })
                .await?
                .into_inner()
                .migrations;
            match c.output {
                Format::Json => output::json(&list)?,
                Format::Table => output::table(
                    &[
                        "ID", "VM", "FROM", "TO", "STATE", "STAGE", "LEFT", "RATE", "TOTAL",
                        "BLACKOUT", "CAUSE",
                    ],
                    list.iter().map(row).collect(),
                )?,
            }
            if list.is_empty() && !all && output::interactive() {
                eprintln!(
                    "none is queued or under way; those that ended: clusterctl migration list --all"
                );
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Show { id } => {
            let view = first(&mut connection, &id).await?;
            match c.output {
                Format::Json => output::json(&view)?,
                Format::Table => output::text(describe(&view))?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Watch { id } => {
            if c.output == Format::Json {
                let mut views = connection
                    .api
                    .migration_watch(MigrationWatchRequest { migration: id })
                    .await?
                    .into_inner();
                while let Some(view) = views.message().await? {
                    output::json_line(&view)?;
                }
                return Ok(ExitCode::SUCCESS);
            }
            let end = follow(&mut connection, &id, c.timeout).await?;
            print_end(c, &end)
        }
        Command::Cancel { id } => {
            let view = connection
                .api
                .migration_cancel(MigrationCancelRequest {
                    change: c.change(),
                    migration: id,
                })
                .await?
                .into_inner();
            match c.output {
                Format::Json => output::json(&view)?,
                Format::Table => output::text(format!("✔ {} stays on {}", view.vm, view.from))?,
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn first(connection: &mut Connection, id: &str) -> Result<MigrationView, CliError> {
    connection
        .api
        .migration_watch(MigrationWatchRequest {
            migration: id.to_owned(),
        })
        .await?
        .into_inner()
        .message()
        .await?
        .ok_or_else(|| CliError::Local(format!("the node says nothing of {id}")))
}

fn row(m: &MigrationView) -> Vec<String> {
    let active = m.state == "active";
    vec![
        m.id.clone(),
        m.vm.clone(),
        m.from.clone(),
        m.to.clone(),
        m.state.clone(),
        m.stage.clone(),
        if active {
            output::bytes(m.remaining_bytes)
        } else {
            String::new()
        },
        if active {
            format!("{}/s", output::bytes(m.rate_bytes_s))
        } else {
            String::new()
        },
        if m.total_us > 0 {
            output::micros(m.total_us)
        } else {
            String::new()
        },
        if m.blackout_us > 0 {
            output::micros(m.blackout_us)
        } else {
            String::new()
        },
        m.cause.clone(),
    ]
}

/// Follows a migration to its end: a bar on a terminal, one line a stage elsewhere. When the node that was
/// asked dies, another is.
///
/// # Errors
/// When no node can be asked any more, Ctrl-C was typed, or the time is over (the migration goes on).
pub async fn follow(
    connection: &mut Connection,
    id: &str,
    timeout: Duration,
) -> Result<MigrationView, CliError> {
    let interactive = output::interactive();
    let bar = if interactive {
        ProgressBar::new(1)
    } else {
        ProgressBar::hidden()
    };
    bar.set_style(
        ProgressStyle::with_template("{prefix}  {bar:20}  {percent:>3}%  {wide_msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    let mut last: Option<MigrationView> = None;
    let mut shown = |view: &MigrationView, last: Option<&MigrationView>| {
        bar.set_prefix(format!("{}  {} → {}", view.vm, view.from, view.to));
        if view.memory_total_bytes > 0 {
            bar.set_length(view.memory_total_bytes);
            bar.set_position(view.memory_total_bytes.saturating_sub(view.remaining_bytes));
        }
        bar.set_message(progress_words(view));
        let changed =
            last.is_none_or(|last| (&last.stage, &last.state) != (&view.stage, &view.state));
        if !interactive && changed {
            eprintln!("{} {} → {}: {}", view.vm, view.from, view.to, stage(view));
        }
    };
    let watching = async {
        loop {
            match watch_once(connection, id, &mut last, &mut shown).await {
                Err(error) if error.is_about_the_connection() => connection.open_again().await?,
                outcome => return outcome,
            }
        }
    };
    let watching = output::unless_interrupted(watching, || {
        format!(
            "the migration goes on; watch it: clusterctl migration watch {id}; end it: clusterctl migration cancel {id}"
        )
    });
    let outcome = tokio::time::timeout(timeout, watching).await;
    bar.finish_and_clear();
    match outcome {
        Err(_) => Err(CliError::Local(format!(
            "{id} is still under way after {} s; watch it: clusterctl migration watch {id}",
            timeout.as_secs()
        ))),
        Ok(Err(error)) => Err(error),
        Ok(Ok(())) => last.ok_or_else(|| CliError::Local(format!("the node says nothing of {id}"))),
    }
}

async fn watch_once(
    connection: &mut Connection,
    id: &str,
    last: &mut Option<MigrationView>,
    shown: &mut impl FnMut(&MigrationView, Option<&MigrationView>),
) -> Result<(), CliError> {
    let mut views = connection
        .api
        .migration_watch(MigrationWatchRequest {
            migration: id.to_owned(),
        })
        .await?
        .into_inner();
    while let Some(view) = views.message().await? {
        shown(&view, last.as_ref());
        *last = Some(view);
    }
    Ok(())
}

/// The stage of a migration, or how it ended, in a word or two.
fn stage(m: &MigrationView) -> &str {
    match m.state.as_str() {
        "active" => &m.stage,
        other => other,
    }
}

fn progress_words(m: &MigrationView) -> String {
    match m.state.as_str() {
        "active" if m.memory_total_bytes > 0 => {
            let mut words = format!(
                "round {} · left {} · {}/s · dirty {}/s",
                m.round,
                output::bytes(m.remaining_bytes),
                output::bytes(m.rate_bytes_s),
                output::bytes(m.dirty_bytes_s)
            );
            if m.rate_bytes_s > 0 && m.remaining_bytes > 0 {
                let left_ms = m.remaining_bytes.saturating_mul(1_000) / m.rate_bytes_s;
                words.push_str(&format!(" · eta {}", output::millis(left_ms)));
            }
            format!("{words} · {}", m.stage)
        }
        _ => stage(m).to_owned(),
    }
}

/// Prints how a migration ended.
///
/// # Errors
/// When stdout is closed.
pub fn print_end(c: &Context, end: &MigrationView) -> Result<ExitCode, CliError> {
    match c.output {
        Format::Json => output::json(end)?,
        Format::Table => output::text(describe(end))?,
    }
    Ok(if end.state == "cut-over" {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// A migration in full sentences.
pub fn describe(m: &MigrationView) -> String {
    let mut lines = Vec::new();
    match m.state.as_str() {
        "cut-over" => {
            lines.push(format!(
                "✔ {} runs on {}, token t{} (was t{} on {}); cutover was log entry {}",
                m.vm, m.to, m.token_after, m.token_before, m.from, m.cutover_index
            ));
            if m.total_us > 0 {
                lines.push(format!(
                    "  {} · {} · sent {} for {} of memory",
                    output::micros(m.total_us),
                    output::counted(m.rounds.len() as u64, "round"),
                    output::bytes(m.sent_bytes),
                    output::bytes(m.memory_total_bytes)
                ));
            }
            if m.blackout_us > 0 {
                let blackout = format!("  blackout {} = ", output::micros(m.blackout_us));
                let indent = blackout.chars().count();
                lines.push(format!("{blackout}{}", output::hanging(&parts(m), indent)));
            }
        }
        "aborted" => {
            let stays = format!("✘ {} stays on {}: ", m.vm, m.from);
            lines.push(format!("{stays}{}", output::hanging(&m.reason, 2)));
        }
        _ => lines.push(format!(
            "{}  {} {} → {}: {}",
            m.id,
            m.vm,
            m.from,
            m.to,
            progress_words(m)
        )),
    }
    lines.push(format!("  {} · {} · asked by {}", m.id, m.cause, m.actor));
    if !m.rounds.is_empty() {
        let rows = m
            .rounds
            .iter()
            .map(|round| {
                vec![
                    format!("  {}", round.number),
                    round.pages.to_string(),
                    round.zero_pages.to_string(),
                    output::bytes(round.bytes),
                    output::micros(round.duration_us),
                    round.dirty_pages_after.to_string(),
                ]
            })
            .collect();
        lines.push(output::table_string(
            &["  ROUND", "PAGES", "ZERO", "BYTES", "TOOK", "DIRTY AFTER"],
            rows,
        ));
    }
    lines.join("\n")
}

/// The parts of the blackout, `stop 0.4 ms + last copy 3.1 ms + …`.
pub fn parts(m: &MigrationView) -> String {
    m.parts
        .iter()
        .map(|part| format!("{} {}", part.name, output::micros(part.us)))
        .collect::<Vec<_>>()
        .join(" + ")
}
