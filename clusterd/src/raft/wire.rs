//! What Raft messages look like in a `RaftMessage`.
//!
//! ```text
//! every request   target node u64 | body
//! append          vote | previous log id | commit log id | count u32 | entries
//! append answer   0 | matching log id      accepted
//!                 1 | log id               conflict there
//!                 2 | vote                 a higher vote is known
//! vote            0 or 1 (pre-vote) | JSON
//! snapshot        first message: JSON of SnapshotHead; then chunks of the file's bytes
//! transfer        JSON
//! ```
//! The target's number is in every request because an address may by now belong to another node.

use openraft::raft::{AppendEntriesRequest, StreamAppendError, StreamAppendResult};
use proto::peer::RaftMessage;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::codec::{self, DecodeError, Reader};
use super::types::{SnapshotMeta, TypeConfig, Vote};

pub(super) type AppendRequest = AppendEntriesRequest<TypeConfig>;
pub(super) type AppendAnswer = StreamAppendResult<TypeConfig>;

/// Entries that one append may carry: far above what a leader sends.
const ENTRIES_MAX: u32 = 65_536;

/// Announces a snapshot.
#[derive(Serialize, Deserialize)]
pub(super) struct SnapshotHead {
    pub vote: Vote,
    pub meta: SnapshotMeta,
    pub bytes: u64,
}

fn addressed(target: u64) -> Vec<u8> {
    target.to_le_bytes().to_vec()
}

/// The node that a request is for, and its body.
pub(super) fn target(payload: &[u8]) -> Result<(u64, &[u8]), DecodeError> {
    let mut reader = Reader::new("request", payload);
    let target = reader.u64()?;
    Ok((target, reader.rest()))
}

/// A request that is JSON, with a leading byte that says which kind.
pub(super) fn json_request(
    target: u64,
    kind: u8,
    body: &impl Serialize,
) -> Result<RaftMessage, DecodeError> {
    let mut payload = addressed(target);
    payload.push(kind);
    payload.extend_from_slice(&to_json(body)?);
    Ok(RaftMessage { payload })
}

/// The kind and JSON of a body made by [`json_request`].
pub(super) fn parse_json<T: DeserializeOwned>(body: &[u8]) -> Result<(u8, T), DecodeError> {
    let (kind, json) = body
        .split_first()
        .ok_or_else(|| DecodeError::new("request", "empty"))?;
    Ok((*kind, from_json(json)?))
}

pub(super) fn to_json(value: &impl Serialize) -> Result<Vec<u8>, DecodeError> {
    serde_json::to_vec(value).map_err(|error| DecodeError::new("message", error.to_string()))
}

pub(super) fn from_json<T: DeserializeOwned>(json: &[u8]) -> Result<T, DecodeError> {
    serde_json::from_slice(json).map_err(|error| DecodeError::new("message", error.to_string()))
}

pub(super) fn append_request(
    target: u64,
    request: &AppendRequest,
) -> Result<RaftMessage, DecodeError> {
    let mut payload = addressed(target);
    codec::put_vote(&mut payload, &request.vote);
    codec::put_log_id(&mut payload, request.prev_log_id.as_ref());
    codec::put_log_id(&mut payload, request.leader_commit.as_ref());
    payload.extend_from_slice(&(request.entries.len() as u32).to_le_bytes());
    for entry in &request.entries {
        codec::put_entry(&mut payload, entry)?;
    }
    Ok(RaftMessage { payload })
}

pub(super) fn parse_append_request(body: &[u8]) -> Result<AppendRequest, DecodeError> {
    let mut reader = Reader::new("append", body);
    let vote = codec::take_vote(&mut reader)?;
    let prev_log_id = codec::take_log_id(&mut reader)?;
    let leader_commit = codec::take_log_id(&mut reader)?;
    let count = reader.u32()?;
    if count > ENTRIES_MAX {
        return Err(DecodeError::new("append", format!("{count} entries")));
    }
    let entries = (0..count)
        .map(|_| codec::take_entry(&mut reader))
        .collect::<Result<_, _>>()?;
    reader.end()?;
    Ok(AppendRequest {
        vote,
        prev_log_id,
        entries,
        leader_commit,
    })
}

pub(super) fn append_answer(answer: &AppendAnswer) -> RaftMessage {
    let mut payload = Vec::with_capacity(26);
    match answer {
        Ok(matching) => {
            payload.push(0);
            codec::put_log_id(&mut payload, matching.as_ref());
        }
        Err(StreamAppendError::Conflict(log_id)) => {
            payload.push(1);
            codec::put_log_id(&mut payload, Some(log_id));
        }
        Err(StreamAppendError::HigherVote(vote)) => {
            payload.push(2);
            codec::put_vote(&mut payload, vote);
        }
    }
    RaftMessage { payload }
}

pub(super) fn parse_append_answer(payload: &[u8]) -> Result<AppendAnswer, DecodeError> {
    let mut reader = Reader::new("append answer", payload);
    let answer = match reader.u8()? {
        0 => Ok(codec::take_log_id(&mut reader)?),
        1 => Err(StreamAppendError::Conflict(
            codec::take_log_id(&mut reader)?
                .ok_or_else(|| DecodeError::new("append answer", "a conflict nowhere"))?,
        )),
        2 => Err(StreamAppendError::HigherVote(codec::take_vote(
            &mut reader,
        )?)),
        other => {
            return Err(DecodeError::new(
                "append answer",
                format!("unknown kind {other}"),
            ));
        }
    };
    reader.end()?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use openraft::EntryPayload;
    use openraft::vote::RaftLeaderId;

    use super::super::types::{CommandBytes, Entry, LeaderId, LogId};
    use super::*;

    fn log_id(index: u64) -> LogId {
        LogId {
            leader_id: LeaderId::new(4, 2),
            index,
        }
    }

    #[test]
    fn an_append_reads_back_and_a_cut_one_is_refused() {
        let command = CommandBytes(bytes::Bytes::from_static(b"command"));
        let request = AppendRequest {
            vote: Vote::new_committed(4, 2),
            prev_log_id: Some(log_id(9)),
            entries: vec![
                Entry {
                    log_id: log_id(10),
                    payload: EntryPayload::Blank,
                },
                Entry {
                    log_id: log_id(11),
                    payload: EntryPayload::Normal(command),
                },
            ],
            leader_commit: None,
        };
        let message = append_request(77, &request).unwrap();
        let (to, body) = target(&message.payload).unwrap();
        assert_eq!(to, 77);
        let back = parse_append_request(body).unwrap();
        assert_eq!(
            (back.vote, back.prev_log_id, back.leader_commit),
            (request.vote, request.prev_log_id, None)
        );
        assert_eq!(back.entries, request.entries);
        for cut in 0..body.len() {
            assert!(parse_append_request(&body[..cut]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn every_answer_reads_back() {
        for answer in [
            Ok(None),
            Ok(Some(log_id(3))),
            Err(StreamAppendError::Conflict(log_id(5))),
            Err(StreamAppendError::HigherVote(Vote::new(8, 1))),
        ] {
            assert_eq!(
                parse_append_answer(&append_answer(&answer).payload).unwrap(),
                answer
            );
        }
        assert!(parse_append_answer(&[]).is_err());
        assert!(parse_append_answer(&[9]).is_err());
    }
}
