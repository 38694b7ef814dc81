//! Live migrations: list, follow, cancel.

use std::time::Duration;

use cluster_model::{Command, MigrationId};
use proto::admin::{
    MigrationCancelRequest, MigrationListReply, MigrationListRequest, MigrationView,
    MigrationWatchRequest,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::asker::Asker;
use super::error::not_found;
use super::service::{AdminService, Answers, asked, migration_named, vm_named};
use super::views;

/// How often progress is looked at for a watcher.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);
/// How long a watcher waits, after the end, for what both sides measured.
const SUMMARY_PATIENCE: Duration = Duration::from_secs(3);
/// Views that wait for a slow watcher at most.
const QUEUE: usize = 16;

impl AdminService {
    pub(super) async fn migration_list(
        &self,
        asker: &Asker,
        request: MigrationListRequest,
    ) -> Result<MigrationListReply, Status> {
        let state = self.cluster_state()?;
        let soft = self.backend.soft().await;
        let only = if request.vm.is_empty() {
            None
        } else {
            Some(vm_named(asker, &state, &request.vm)?.id)
        };
        let migrations = state
            .migrations
            .values()
            .filter(|migration| request.all || migration.is_open())
            .filter(|migration| only.is_none_or(|only| only == migration.vm))
            .filter(|migration| asker.sees_what_is_of(state.vms.get(&migration.vm)))
            .map(|migration| views::migration(&state, &soft, migration))
            .collect();
        Ok(MigrationListReply { migrations })
    }

    pub(super) async fn migration_watch(
        &self,
        asker: &Asker,
        request: MigrationWatchRequest,
    ) -> Result<Answers<MigrationView>, Status> {
        let id = migration_named(asker, &*self.cluster_state()?, &request.migration)?.id;
        let (sender, receiver) = mpsc::channel(QUEUE);
        let service = self.clone();
        tokio::spawn(async move {
            let mut states = service.backend.state();
            let mut last = None;
            let mut ended_since: Option<tokio::time::Instant> = None;
            loop {
                let view = service.migration_view(id).await;
                let Some(view) = view else {
                    let _ = sender
                        .send(Err(not_found(
                            &service.state(),
                            "migration",
                            &id.to_string(),
                        )))
                        .await;
                    return;
                };
                let ended = !view.cancellable;
                let measured = !view.summary_json.is_empty() || view.state == "aborted";
                if last.as_ref() != Some(&view) {
                    if sender.send(Ok(view.clone())).await.is_err() {
                        return;
                    }
                    last = Some(view);
                }
                if ended {
                    let since = *ended_since.get_or_insert_with(tokio::time::Instant::now);
                    if measured || since.elapsed() > SUMMARY_PATIENCE {
                        return;
                    }
                }
                // A change of the log is shown at once, progress at its own pace.
                tokio::select! {
                    changed = states.changed() => if changed.is_err() { return },
                    () = tokio::time::sleep(PROGRESS_EVERY) => {}
                    () = sender.closed() => return,
                }
            }
        });
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }

    pub(super) async fn migration_view(&self, id: MigrationId) -> Option<MigrationView> {
        let soft = self.backend.soft().await;
        let state = self.state();
        state
            .migrations
            .get(&id)
            .map(|migration| views::migration(&state, &soft, migration))
    }

    pub(super) async fn migration_cancel(
        &self,
        asker: &Asker,
        request: MigrationCancelRequest,
    ) -> Result<MigrationView, Status> {
        let change = asked(asker, request.change)?;
        let id = migration_named(asker, &*self.cluster_state()?, &request.migration)?.id;
        let reason = if change.reason.is_empty() {
            format!("cancelled by {}", change.actor)
        } else {
            format!("cancelled by {}: {}", change.actor, change.reason)
        };
        self.propose(
            &change,
            Command::AbortMigration {
                migration: id,
                reason,
            },
        )
        .await?;
        metrics::counter!("clusterd_migration_cancelled_total").increment(1);
        self.migration_view(id)
            .await
            .ok_or_else(|| not_found(&self.state(), "migration", &id.to_string()))
    }
}
