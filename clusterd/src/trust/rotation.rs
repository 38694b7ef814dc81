//! Rotations of the certificate authority, as a node sees them.
//!
//! ```text
//!  issuing CA     made here, kept ──RotateAuthority──► every node renews its certificate
//!  root           made here, kept ──RotateAuthority(old + new root)──► every node believes both
//!                 ──RotateAuthority(issuing CA under the new root)──► every node renews ──RetireRoot(old)──► done
//! ```
//! Each step is proposed when what every node reports says that it is safe; whoever is asked, whoever dies: the log
//! and the key on the disk of the node that made it say how far it is. No connection is broken by any step.

use std::sync::Arc;

use cluster_model::trust::{Authority, Issuing, Root, Sha256};
use cluster_model::{ClusterState, Command, Liveness};

use super::authority::RootKey;
use super::keeper::KeeperError;
use super::sealed::RecoveryKey;
use crate::member::Member;
use crate::report::Reports;

/// A rotation that is ready to be proposed.
#[derive(Debug)]
pub struct Prepared {
    /// Roots to trust from then on.
    pub roots: Vec<Root>,
    /// What signs from then on: for a new root still the old one.
    pub issuing: Issuing,
    /// Opens the new root's key, when there is one.
    pub recovery_key: Option<RecoveryKey>,
    /// The newest root's.
    pub fingerprint: Sha256,
}

/// Makes a new issuing CA under the present root, or under a new one, and keeps its key here until the log
/// lets it sign.
///
/// # Errors
/// When the recovery key is another one, or nothing can be kept.
pub fn prepare_rotation(
    member: &Member,
    authority: &Authority,
    recovery: &RecoveryKey,
    new_root: bool,
) -> Result<Prepared, KeeperError> {
    let now_ms = member.clock.wall_ms();
    let newest = authority.roots.last().ok_or(KeeperError::NoPapers)?;
    // Whoever rotates shows that they hold the present recovery key, also for a new root.
    let present = RootKey::open(newest, recovery)?;
    let generation = authority.issuing.generation + 1;
    if !new_root {
        let next = present.issue(generation, member.node, now_ms)?;
        let issuing = next.issuing.clone();
        member.keeper.keep_next(next)?;
        return Ok(Prepared {
            roots: authority.roots.clone(),
            issuing,
            recovery_key: None,
            fingerprint: newest.fingerprint,
        });
    }
    let new_recovery = RecoveryKey::new().map_err(super::authority::AuthorityError::from)?;
    let root = RootKey::make(&new_recovery, now_ms)?;
    member
        .keeper
        .keep_next(root.issue(generation, member.node, now_ms)?)?;
    Ok(Prepared {
        roots: vec![newest.clone(), root.root.clone()],
        issuing: authority.issuing.clone(),
        recovery_key: Some(new_recovery),
        fingerprint: root.root.fingerprint,
    })
}

/// The newest root that this node believes.
pub fn newest_root_believed(member: &Member) -> Option<Sha256> {
    let papers = member.keeper.papers()?;
    let certificates = proto::tls::certificates(papers.roots.last()?).ok()?;
    Some(Sha256(proto::tls::fingerprint(certificates.first()?)))
}

/// The next step of a rotation that is under way, if this node is the one to propose it and every node that
/// lives is ready.
pub fn next_step(member: &Member, state: &ClusterState, reports: &Reports) -> Option<Command> {
    let authority = state.trust.authority.as_ref()?;
    let [old, new] = authority.roots.as_slice() else {
        return None;
    };
    let all = |ready: &dyn Fn(&crate::report::TrustReport) -> bool| {
        let mut living = state
            .nodes
            .values()
            .filter(|node| node.liveness == Liveness::Up);
        living.all(|node| {
            reports
                .get(&node.id)
                .is_some_and(|report| ready(&report.trust))
        })
    };
    let next = member.keeper.next();
    if let Some(next) = next
        && next.issuing.generation == authority.issuing.generation + 1
        && next.root_pem == new.certificate_pem
    {
        return all(&|trust| trust.newest_root == Some(new.fingerprint)).then(|| {
            Command::RotateAuthority {
                expects: authority.issuing.generation,
                roots: authority.roots.clone(),
                issuing: next.issuing.clone(),
            }
        });
    }
    // Only what was made under the new root may stay when the old one goes.
    let signs_under_new = member.keeper.issuing().is_some_and(|held| {
        held.issuing == authority.issuing && held.root_pem == new.certificate_pem
    });
    let done = signs_under_new
        && state.nodes.values().all(|node| {
            reports
                .get(&node.id)
                .is_some_and(|report| report.trust.generation == authority.issuing.generation)
        });
    done.then_some(Command::RetireRoot {
        fingerprint: old.fingerprint,
    })
}

/// Proposes [`next_step`], if there is one.
pub(super) async fn go_on(member: &Arc<Member>, state: &ClusterState, reports: &Reports) {
    if let Some(command) = next_step(member, state, reports) {
        match member.propose_own(command).await {
            Ok((index, _)) => tracing::info!(entry = %index, "a rotation of the root goes on"),
            // Another node was faster, or the next look tries again.
            Err(error) => tracing::info!(%error, "a rotation of the root does not go on yet"),
        }
    }
}
