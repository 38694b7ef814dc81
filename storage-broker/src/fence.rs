//! The fence: moving files from token to token on the server, and how long to wait after it.
//!
//! ```text
//!  claim (once a file) ──acknowledged on all──► [settle, after a takeover] ──► verify + COMMIT ──► run
//!        └── anything else ──► the token is burnt; ask the log for the next
//! ```
//!
//! A disk file belongs to the broker's uid, its group is the token's gid, its mode is 0060. So
//! only who presents the token's gid may read or write it, and only the broker may move it on.

use std::future::Future;

use bytes::Bytes;
use cluster_model::ids::Token;
use futures::future::join_all;

use crate::nfs::client::SetAttributes;
use crate::nfs::{Credential, FileHandle, NfsClient, NfsError, Stable, Status};

/// The mode of a disk: its group, the token, may read and write; nobody else may, the broker included.
pub const DISK_MODE: u32 = 0o060;

/// The mode of a disk whose content is still being made.
pub const UNFINISHED_MODE: u32 = 0o020;

/// The uid under which the broker itself does data I/O: any but its own, which the server's
/// owner override would favour; what counts is the group.
pub const fn data_uid(broker_uid: u32) -> u32 {
    broker_uid ^ 1
}

/// The identity that claims: the owner, asserting the group that it grants.
pub const fn claimant(broker_uid: u32, token: Token) -> Credential {
    Credential {
        uid: broker_uid,
        gid: token.gid(),
    }
}

/// The identity that does data I/O on the broker's behalf.
pub const fn data_credential(broker_uid: u32, token: Token) -> Credential {
    Credential {
        uid: data_uid(broker_uid),
        gid: token.gid(),
    }
}

/// Why a claim is not acknowledged. Whatever the reason, the token is burnt: ask the log for the next.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    /// The server did not do it.
    #[error("the claim of {token} on `{path}` was refused: {why}")]
    Refused {
        /// The token.
        token: Token,
        /// The first file concerned.
        path: String,
        /// What was said.
        why: String,
        /// Whether it would refuse every other token, too.
        for_good: bool,
    },
    /// The server may have done it, or may yet do it.
    #[error("the claim of {token} on `{path}` has no certain answer: {why}")]
    Unknown {
        /// The token.
        token: Token,
        /// The first file concerned.
        path: String,
        /// What happened.
        why: String,
    },
}

/// A file to claim, found.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// Its path, for messages.
    pub path: String,
    /// Its server and export.
    pub client: NfsClient,
    /// The file.
    pub file: FileHandle,
    /// The uid that owns it.
    pub broker_uid: u32,
}

/// Sends SETATTR(gid = token) once to every file, all at a time, and waits for every answer.
///
/// # Errors
/// See [`ClaimError`]: anything but OK from every file.
pub async fn claim(files: &[Claimed], token: Token) -> Result<(), ClaimError> {
    let claims = files.iter().map(|file| claim_one(file, token));
    // Every answer is waited for, so that none is in doubt without need.
    join_all(claims).await.into_iter().collect()
}

async fn claim_one(file: &Claimed, token: Token) -> Result<(), ClaimError> {
    let grant = SetAttributes {
        gid: Some(token.gid()),
        ..SetAttributes::default()
    };
    let answer = file
        .client
        .setattr(claimant(file.broker_uid, token), &file.file, grant)
        .await;
    let path = file.path.clone();
    match answer {
        Ok(()) => Ok(()),
        Err(error @ NfsError::Status { status, .. }) => Err(ClaimError::Refused {
            token,
            path,
            why: format!("{error}; {}", claim_advice(status)),
            // JUKEBOX: not now (RFC 1813, section 2.6).
            for_good: status != Status::NFS3ERR_JUKEBOX,
        }),
        Err(error) if error.is_unknown() => Err(ClaimError::Unknown {
            token,
            path,
            why: error.to_string(),
        }),
        Err(error) => Err(ClaimError::Refused {
            token,
            path,
            why: error.to_string(),
            for_good: false,
        }),
    }
}

fn claim_advice(status: Status) -> &'static str {
    match status {
        Status::NFS3ERR_PERM | Status::NFS3ERR_ACCES => {
            "the file must belong to the broker's uid, and the export must keep uids and groups as they are (no all_squash)"
        }
        Status::NFS3ERR_STALE | Status::NFS3ERR_NOENT => "the file is gone",
        Status::NFS3ERR_NOSPC | Status::NFS3ERR_DQUOT => "free space on the volume",
        Status::NFS3ERR_ROFS => "export the volume read-write",
        _ => "see the server's log",
    }
}

/// Why a file cannot be relied on after a takeover.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// The file is not under the token (any more).
    #[error(
        "`{path}` is not under {token}: owner {uid}, group {gid:#x}, mode {mode:o}; claim it again under a fresh token"
    )]
    NotOurs {
        /// The file.
        path: String,
        /// The token expected.
        token: Token,
        /// The owner found.
        uid: u32,
        /// The group found.
        gid: u32,
        /// The mode found.
        mode: u32,
    },
    /// The server did not answer as it should.
    #[error("`{path}` could not be verified: {source}")]
    Nfs {
        /// The file.
        path: String,
        /// What happened.
        source: NfsError,
    },
}

/// Reads every file's owner, group and mode back.
///
/// # Errors
/// See [`VerifyError`].
pub async fn verify_group(files: &[Claimed], token: Token) -> Result<(), VerifyError> {
    each(files, |file| async move {
        let attributes = file
            .client
            .getattr(claimant(file.broker_uid, token), &file.file)
            .await
            .map_err(|source| VerifyError::Nfs {
                path: file.path.clone(),
                source,
            })?;
        if (attributes.uid, attributes.gid, attributes.mode)
            == (file.broker_uid, token.gid(), DISK_MODE)
        {
            return Ok(());
        }
        Err(VerifyError::NotOurs {
            path: file.path.clone(),
            token,
            uid: attributes.uid,
            gid: attributes.gid,
            mode: attributes.mode,
        })
    })
    .await
}

/// COMMITs every file whole, under the token: what a dead owner left uncommitted must not vanish
/// later, under a journal that has been replayed over it.
///
/// # Errors
/// See [`VerifyError`].
pub async fn commit_whole(files: &[Claimed], token: Token) -> Result<(), VerifyError> {
    each(files, |file| async move {
        let credential = data_credential(file.broker_uid, token);
        match file.client.commit(credential, &file.file).await {
            Ok(_) => Ok(()),
            Err(source) => Err(VerifyError::Nfs {
                path: file.path.clone(),
                source,
            }),
        }
    })
    .await
}

async fn each<'a, F: Future<Output = Result<(), VerifyError>>>(
    files: &'a [Claimed],
    act: impl Fn(&'a Claimed) -> F,
) -> Result<(), VerifyError> {
    join_all(files.iter().map(act)).await.into_iter().collect()
}

/// Writes all of `data`, however small the pieces that the server takes.
///
/// # Errors
/// What the server said.
pub(crate) async fn write_all(
    client: &NfsClient,
    credential: Credential,
    file: &FileHandle,
    mut offset: u64,
    mut data: Bytes,
    stable: Stable,
) -> Result<(), NfsError> {
    while !data.is_empty() {
        let reply = client
            .write(credential, file, offset, &data, stable)
            .await?;
        let count = (reply.count as usize).min(data.len());
        offset += count as u64;
        data = data.slice(count..);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::dialer::Dialer;
    use crate::nfs::mount;
    use crate::nfs::scripted_server::{DISK, ScriptedServer};

    #[test]
    fn the_broker_never_does_data_io_as_the_owner() {
        for uid in [0, 1, 50_000, u32::MAX] {
            assert_ne!(data_uid(uid), uid);
        }
    }

    #[tokio::test]
    async fn a_claim_that_is_not_answered_is_unknown_and_is_not_sent_again() {
        let server = ScriptedServer::start(4096, Token(1).gid()).await;
        let timeout = Duration::from_millis(200);
        let client = mount(&server.url(), &Dialer::default(), timeout)
            .await
            .unwrap();
        let anybody = Credential { uid: 1, gid: 1 };
        let file = client.lookup(anybody, client.root(), DISK).await.unwrap();
        let claimed = Claimed {
            path: DISK.into(),
            client: client.clone(),
            file,
            broker_uid: 50_000,
        };
        claim(std::slice::from_ref(&claimed), Token(2))
            .await
            .unwrap();
        verify_group(std::slice::from_ref(&claimed), Token(2))
            .await
            .unwrap();
        let other = verify_group(std::slice::from_ref(&claimed), Token(1)).await;
        assert!(
            matches!(other, Err(VerifyError::NotOurs { .. })),
            "{other:?}"
        );
        server.world().mute_setattr = true;
        let unknown = claim(std::slice::from_ref(&claimed), Token(3)).await;
        assert!(
            matches!(unknown, Err(ClaimError::Unknown { .. })),
            "{unknown:?}"
        );
        assert_eq!(server.world().setattrs, 2);
        let refused = claim(&[claimed], Token(4)).await;
        assert!(
            matches!(refused, Err(ClaimError::Refused { .. })),
            "{refused:?}"
        );
        assert_eq!(
            server.world().setattrs,
            2,
            "nothing is sent on a dead connection"
        );
    }
}
