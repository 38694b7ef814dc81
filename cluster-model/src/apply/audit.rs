//! The audit: one record for each change that a person or a program asked for, done or refused.

use std::sync::Arc;

use super::clip;
use crate::command::{Envelope, Reply};
use crate::ids::LogIndex;
use crate::state::ClusterState;
use crate::trust::{AUDIT_MAX, Asked, AuditRecord};

/// The longest address, actor, call or request id kept in a record, bytes.
const SHORT_BYTES_MAX: usize = 256;
/// The longest reason of either side kept in a record, bytes.
const REASON_BYTES_MAX: usize = 1_024;

impl ClusterState {
    /// Records what was asked for, if anybody asked. `object` was named before the command changed anything.
    pub(super) fn record_asked(
        &mut self,
        index: LogIndex,
        envelope: &Envelope,
        object: String,
        reply: &Reply,
    ) {
        let Some(asked) = &envelope.asked else { return };
        let refused = match reply {
            Reply::Done { .. } => String::new(),
            Reply::Rejected(rejection) => rejection.in_words(self),
        };
        let short = |text: &str| clip(text.to_owned(), SHORT_BYTES_MAX);
        self.trust.audit.push_back(Arc::new(AuditRecord {
            index,
            at_ms: envelope.at_ms,
            actor: short(&envelope.actor),
            asked: Asked {
                from: short(&asked.from),
                reason: clip(asked.reason.clone(), REASON_BYTES_MAX),
                method: short(&asked.method),
            },
            request: short(&envelope.request.0),
            object: clip(object, SHORT_BYTES_MAX),
            refused: clip(refused, REASON_BYTES_MAX),
        }));
        while self.trust.audit.len() > AUDIT_MAX {
            self.trust.audit.pop_front();
        }
    }
}
