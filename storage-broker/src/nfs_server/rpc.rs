//! The RPC layer as a server sees it (RFC 5531): the head of a call, who it is from, the head of a reply.

use bytes::Bytes;

use super::permission::{Caller, FURTHER_GROUPS_MAX};
use crate::nfs::xdr::{Decoder, XdrError};

const CALL: u32 = 0;
const REPLY: u32 = 1;
const RPC_VERSION: u32 = 2;
const ACCEPTED: u32 = 0;
const DENIED: u32 = 1;

const AUTH_NONE: u32 = 0;
const AUTH_SYS: u32 = 1;

/// The question for TLS (RFC 9289, section 4.1).
const AUTH_TLS: u32 = crate::tls::starttls::AUTH_TLS;

/// The largest credential or verifier (RFC 5531, section 8.2).
const AUTH_BYTES_MAX: u32 = 400;

/// The longest name of a machine in AUTH_SYS.
const MACHINE_BYTES_MAX: u32 = 255;

/// Room for the head of a reply.
const REPLY_HEAD_BYTES: usize = 28;

/// A call, as far as every program understands it.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) xid: u32,
    pub(super) program: u32,
    pub(super) version: u32,
    pub(super) procedure: u32,
    pub(super) from: Claim,
    pub(super) arguments: Decoder,
}

/// Who a call says it is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// It does not say (AUTH_NONE).
    Nobody,
    /// AUTH_SYS.
    System(Caller),
    /// It asks for TLS and says nothing of itself (AUTH_TLS).
    Tls,
    /// In a manner that this server does not take.
    Other,
    /// What it says cannot be understood.
    Malformed,
    /// Its verifier is not the one that belongs to its credential.
    BadVerifier,
}

/// What stands where a call should be.
#[derive(Debug)]
pub(super) enum Message {
    /// A call.
    Call(Call),
    /// A call of another RPC version: it is answered, not executed.
    OtherVersion {
        /// What the answer refers to.
        xid: u32,
    },
}

/// Understands the head of a message; an error means that the stream is not RPC.
pub(super) fn decode(record: Bytes) -> Result<Message, XdrError> {
    let mut decoder = Decoder(record);
    let xid = decoder.u32()?;
    if decoder.u32()? != CALL {
        return Err(XdrError::BadValue);
    }
    if decoder.u32()? != RPC_VERSION {
        return Ok(Message::OtherVersion { xid });
    }
    let (program, version, procedure) = (decoder.u32()?, decoder.u32()?, decoder.u32()?);
    let flavor = decoder.u32()?;
    let credential = decoder.opaque(AUTH_BYTES_MAX)?;
    let verifier_flavor = decoder.u32()?;
    let verifier = decoder.opaque(AUTH_BYTES_MAX)?;
    let from = match flavor {
        AUTH_NONE => Claim::Nobody,
        AUTH_TLS if !credential.is_empty() => Claim::Malformed,
        AUTH_TLS if verifier_flavor != AUTH_NONE || !verifier.is_empty() => Claim::BadVerifier,
        AUTH_TLS => Claim::Tls,
        AUTH_SYS => system_caller(credential).map_or(Claim::Malformed, Claim::System),
        _ => Claim::Other,
    };
    Ok(Message::Call(Call {
        xid,
        program,
        version,
        procedure,
        from,
        arguments: decoder,
    }))
}

/// `authsys_parms` of RFC 5531, appendix A.
fn system_caller(credential: Bytes) -> Result<Caller, XdrError> {
    let mut decoder = Decoder(credential);
    decoder.u32()?;
    decoder.opaque(MACHINE_BYTES_MAX)?;
    let (uid, gid, groups) = (decoder.u32()?, decoder.u32()?, decoder.u32()?);
    if groups as usize > FURTHER_GROUPS_MAX {
        return Err(XdrError::TooLong {
            length: groups,
            bound: FURTHER_GROUPS_MAX as u32,
        });
    }
    let further_groups = (0..groups)
        .map(|_| decoder.u32())
        .collect::<Result<_, _>>()?;
    decoder.end()?;
    Ok(Caller {
        uid,
        gid,
        further_groups,
    })
}

/// Why a call that was understood is not executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// No such program here.
    ProgramUnavailable,
    /// The program exists in another version only.
    VersionMismatch {
        /// The version there is.
        only: u32,
    },
    /// No such procedure.
    ProcedureUnavailable,
    /// The arguments cannot be understood.
    GarbageArguments,
    /// The results cannot be expressed.
    SystemError,
    /// The credential cannot be understood, or has no place here.
    BadCredential,
    /// The verifier is not the one that belongs to the credential.
    BadVerifier,
    /// This program wants AUTH_SYS, or this server wants TLS.
    TooWeak,
}

/// The reply to the question for TLS; the next bytes of the connection are the handshake's.
pub(super) fn start_tls(xid: u32) -> Vec<u8> {
    let token = crate::tls::starttls::STARTTLS;
    let mut reply = Vec::with_capacity(REPLY_HEAD_BYTES + token.len());
    push(&mut reply, &[0, xid, REPLY, ACCEPTED, AUTH_NONE]);
    push(&mut reply, &[token.len() as u32]);
    reply.extend(token);
    push(&mut reply, &[0]);
    reply
}

/// A reply: the head of a successful one, with the results to be appended.
pub(super) fn accepted(xid: u32, results_bytes: usize) -> Vec<u8> {
    let mut reply = Vec::with_capacity(REPLY_HEAD_BYTES + results_bytes);
    // The mark of the record, filled in by `finish`.
    push(&mut reply, &[0, xid, REPLY, ACCEPTED, AUTH_NONE, 0, 0]);
    reply
}

/// The reply to a call that is not executed.
pub(super) fn refused(xid: u32, refusal: Refusal) -> Vec<u8> {
    const AUTH_ERROR: u32 = 1;
    let mut reply = Vec::with_capacity(REPLY_HEAD_BYTES + 8);
    let accepted = [0, xid, REPLY, ACCEPTED, AUTH_NONE, 0];
    let denied = [0, xid, REPLY, DENIED, AUTH_ERROR];
    let words: (&[u32], &[u32]) = match refusal {
        Refusal::ProgramUnavailable => (&accepted, &[1]),
        Refusal::VersionMismatch { only } => (&accepted, &[2, only, only]),
        Refusal::ProcedureUnavailable => (&accepted, &[3]),
        Refusal::GarbageArguments => (&accepted, &[4]),
        Refusal::SystemError => (&accepted, &[5]),
        Refusal::BadCredential => (&denied, &[1]),
        Refusal::BadVerifier => (&denied, &[3]),
        Refusal::TooWeak => (&denied, &[5]),
    };
    push(&mut reply, words.0);
    push(&mut reply, words.1);
    reply
}

/// The reply to a call of another RPC version.
pub(super) fn other_version(xid: u32) -> Vec<u8> {
    const RPC_MISMATCH: u32 = 0;
    let mut reply = Vec::with_capacity(REPLY_HEAD_BYTES);
    push(
        &mut reply,
        &[
            0,
            xid,
            REPLY,
            DENIED,
            RPC_MISMATCH,
            RPC_VERSION,
            RPC_VERSION,
        ],
    );
    reply
}

fn push(reply: &mut Vec<u8>, words: &[u32]) {
    reply.extend(words.iter().flat_map(|word| word.to_be_bytes()));
}

/// Makes a reply a record of one fragment (RFC 5531, section 11).
pub(super) fn finish(mut reply: Vec<u8>) -> Vec<u8> {
    let length = (reply.len() - 4) as u32 | 1 << 31;
    reply[..4].copy_from_slice(&length.to_be_bytes());
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[u32]) -> Bytes {
        words
            .iter()
            .flat_map(|word| word.to_be_bytes())
            .collect::<Vec<u8>>()
            .into()
    }

    #[test]
    fn a_caller_is_understood_with_its_groups() {
        let system = [7, 0, 50_000, 0x4000_0001, 2, 8, 9];
        let mut call = vec![1, CALL, 2, 100_003, 3, 1, AUTH_SYS, system.len() as u32 * 4];
        call.extend(system);
        call.extend([0, 0, 42]);
        let Message::Call(mut call) = decode(words(&call)).unwrap() else {
            panic!("a call")
        };
        let caller = Caller {
            uid: 50_000,
            gid: 0x4000_0001,
            further_groups: vec![8, 9],
        };
        assert_eq!(
            (call.xid, call.program, call.from),
            (1, 100_003, Claim::System(caller))
        );
        assert_eq!(call.arguments.u32(), Ok(42));
    }

    #[test]
    fn a_credential_with_too_many_groups_or_too_few_bytes_is_malformed() {
        for credential in [
            vec![7, 0, 1, 1, 17],
            vec![7, 0, 1, 1, 2, 8],
            vec![7, 0, 1],
            vec![],
        ] {
            let mut call = vec![
                1,
                CALL,
                2,
                100_003,
                3,
                1,
                AUTH_SYS,
                credential.len() as u32 * 4,
            ];
            call.extend(credential);
            call.extend([0, 0]);
            let Message::Call(call) = decode(words(&call)).unwrap() else {
                panic!("a call")
            };
            assert_eq!(call.from, Claim::Malformed);
        }
    }

    #[test]
    fn what_is_not_a_call_is_an_error() {
        for record in [
            vec![],
            vec![1],
            vec![1, REPLY, 0, 0, 0, 0],
            vec![1, CALL, 2, 3],
        ] {
            assert!(decode(words(&record)).is_err(), "{record:?}");
        }
        assert!(matches!(
            decode(words(&[1, CALL, 3])),
            Ok(Message::OtherVersion { xid: 1 })
        ));
    }
}
