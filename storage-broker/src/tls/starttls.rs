//! The question whether a server offers TLS, and its answer, byte by byte (RFC 9289, section 4.1).

use bytes::Bytes;

use crate::nfs::xdr::{Decoder, XdrError};

/// The credential flavor of the question (RFC 9289, section 4.1); its body is empty.
pub(crate) const AUTH_TLS: u32 = 7;

/// The verifier's body in the answer of a server that goes on with TLS.
pub(crate) const STARTTLS: &[u8; 8] = b"STARTTLS";

/// The question's bytes, with the mark of the record.
pub(crate) const QUESTION_BYTES: usize = 44;

/// The largest answer taken: the head of a reply with a verifier of 400 bytes (RFC 5531).
pub(crate) const ANSWER_BYTES_MAX: usize = 512;

const VERIFIER_BYTES_MAX: u32 = 400;
const LAST_FRAGMENT: u32 = 1 << 31;
const CALL: u32 = 0;
const REPLY: u32 = 1;
const RPC_VERSION: u32 = 2;
const NULL: u32 = 0;
const AUTH_NONE: u32 = 0;

/// What a server answered to the question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The next bytes are to be a ClientHello.
    StartTls,
    /// The connection stays in clear; how it said so.
    No(String),
}

/// A NULL call of that program and version with the credential AUTH_TLS: one record.
pub(crate) fn question(xid: u32, (program, version): (u32, u32)) -> [u8; QUESTION_BYTES] {
    let words = [
        LAST_FRAGMENT | (QUESTION_BYTES as u32 - 4),
        xid,
        CALL,
        RPC_VERSION,
        program,
        version,
        NULL,
        // The credential, then the verifier: a flavor and an empty body each.
        AUTH_TLS,
        0,
        AUTH_NONE,
        0,
    ];
    let mut bytes = [0; QUESTION_BYTES];
    for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
        place.copy_from_slice(&word.to_be_bytes());
    }
    bytes
}

/// The length of the answer behind this mark of a record, if it can be one.
pub(crate) fn answer_bytes(mark: u32) -> Option<usize> {
    let length = (mark & !LAST_FRAGMENT) as usize;
    (mark & LAST_FRAGMENT != 0 && length <= ANSWER_BYTES_MAX).then_some(length)
}

/// Reads an answer, without the mark of the record.
pub(crate) fn judge(xid: u32, answer: Bytes) -> Result<Answer, XdrError> {
    let mut answer = Decoder(answer);
    if answer.u32()? != xid || answer.u32()? != REPLY {
        return Err(XdrError::BadValue);
    }
    match answer.u32()? {
        // MSG_ACCEPTED
        0 => {
            let flavor = answer.u32()?;
            let verifier = answer.opaque(VERIFIER_BYTES_MAX)?;
            let status = answer.u32()?;
            if status != 0 {
                return Ok(Answer::No(format!(
                    "it does not execute the call (accept_stat {status})"
                )));
            }
            answer.end()?;
            if flavor == AUTH_NONE && verifier[..] == STARTTLS[..] {
                Ok(Answer::StartTls)
            } else {
                Ok(Answer::No("it answers as if not asked".into()))
            }
        }
        // MSG_DENIED
        1 => match answer.u32()? {
            0 => Ok(Answer::No("it speaks another version of RPC".into())),
            1 => {
                let status = answer.u32()?;
                Ok(Answer::No(format!(
                    "it does not know the question (auth_stat {status})"
                )))
            }
            _ => Err(XdrError::BadValue),
        },
        _ => Err(XdrError::BadValue),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[u32]) -> Bytes {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        bytes.into()
    }

    /// "STARTTLS" as two words.
    const TOKEN: [u32; 2] = [0x5354_4152, 0x5454_4c53];

    #[test]
    fn the_question_is_a_null_call_with_an_empty_auth_tls_credential() {
        assert_eq!(
            question(0x0102_0304, (100_003, 3)),
            [
                0x80, 0, 0, 40, // one fragment
                1, 2, 3, 4, // xid
                0, 0, 0, 0, // CALL
                0, 0, 0, 2, // RPC version
                0, 1, 0x86, 0xa3, // program 100003
                0, 0, 0, 3, // version
                0, 0, 0, 0, // procedure NULL
                0, 0, 0, 7, 0, 0, 0, 0, // credential: AUTH_TLS, empty
                0, 0, 0, 0, 0, 0, 0, 0, // verifier: AUTH_NONE, empty
            ]
        );
    }

    #[test]
    fn only_the_token_in_the_verifier_of_a_success_starts_tls() {
        let yes = [9, REPLY, 0, AUTH_NONE, 8, TOKEN[0], TOKEN[1], 0];
        assert_eq!(judge(9, words(&yes)), Ok(Answer::StartTls));
        let no: [&[u32]; 8] = [
            // A server that does not offer it, or a token stripped on the way.
            &[9, REPLY, 0, AUTH_NONE, 0, 0],
            // Another token, another flavor, a shorter token.
            &[9, REPLY, 0, AUTH_NONE, 8, TOKEN[0], TOKEN[0], 0],
            &[9, REPLY, 0, AUTH_TLS, 8, TOKEN[0], TOKEN[1], 0],
            &[9, REPLY, 0, AUTH_NONE, 4, TOKEN[0], 0],
            // PROG_UNAVAIL with the token.
            &[9, REPLY, 0, AUTH_NONE, 8, TOKEN[0], TOKEN[1], 1],
            // AUTH_ERROR: AUTH_BADCRED, AUTH_REJECTEDCRED.
            &[9, REPLY, 1, 1, 1],
            &[9, REPLY, 1, 1, 2],
            // RPC_MISMATCH.
            &[9, REPLY, 1, 0, 2, 2],
        ];
        for answer in no {
            let judged = judge(9, words(answer));
            assert!(
                matches!(judged, Ok(Answer::No(_))),
                "{answer:?}: {judged:?}"
            );
        }
    }

    #[test]
    fn what_is_no_answer_to_the_question_is_an_error() {
        let bad: [&[u32]; 6] = [
            &[8, REPLY, 0, AUTH_NONE, 8, TOKEN[0], TOKEN[1], 0],
            &[9, CALL, 0, AUTH_NONE, 8, TOKEN[0], TOKEN[1], 0],
            &[9, REPLY, 2],
            &[9, REPLY, 0, AUTH_NONE, u32::MAX],
            &[9, REPLY, 0, AUTH_NONE, 8, TOKEN[0]],
            // Something behind the results of NULL.
            &[9, REPLY, 0, AUTH_NONE, 8, TOKEN[0], TOKEN[1], 0, 0],
        ];
        for answer in bad {
            assert!(judge(9, words(answer)).is_err(), "{answer:?}");
        }
        assert_eq!(answer_bytes(0x8000_0020), Some(32));
        assert_eq!(answer_bytes(0x20), None, "a fragment with more to come");
        assert_eq!(answer_bytes(0x8000_0201), None, "longer than any answer");
    }
}
