//! The head of an RPC reply (RFC 5531, section 9): executed, refused, or neither.

use std::sync::Arc;

use nfs3_types::rpc;

use super::xdr::{Decoder, XdrError};

/// The largest verifier in a reply (RFC 5531: 400 bytes).
const VERIFIER_BYTES_MAX: u32 = 400;

/// The credential does not suffice (RFC 5531, section 9).
const AUTH_TOOWEAK: u32 = 5;

/// Not an RPC reply, or one that leaves open what the server did: the connection is given up.
pub(super) struct Malformed(pub(super) Arc<str>);

impl From<XdrError> for Malformed {
    fn from(error: XdrError) -> Self {
        Malformed(format!("a reply could not be understood: {error}").into())
    }
}

/// Reads an RPC reply's header up to its results. The inner error is a refusal: not executed.
pub(super) fn reply_header(decoder: &mut Decoder) -> Result<Result<(), String>, Malformed> {
    if decoder.u32()? != rpc::msg_type::REPLY as u32 {
        return Err(Malformed(
            "the server sent a call where a reply belongs".into(),
        ));
    }
    match decoder.u32()? {
        // MSG_ACCEPTED
        0 => {
            let _flavor = decoder.u32()?;
            let _verifier = decoder.opaque(VERIFIER_BYTES_MAX)?;
            match decoder.u32()? {
                0 => Ok(Ok(())),
                1 => Ok(Err("it does not serve this program (PROG_UNAVAIL)".into())),
                2 => Ok(Err("it does not serve this version (PROG_MISMATCH)".into())),
                3 => Ok(Err("it does not know this procedure (PROC_UNAVAIL)".into())),
                4 => Ok(Err("it could not read the arguments (GARBAGE_ARGS)".into())),
                // SYSTEM_ERR says nothing on how far it came, so it is no refusal.
                5 => Err(Malformed(
                    "the server failed inside a call (SYSTEM_ERR)".into(),
                )),
                _ => Err(XdrError::BadValue.into()),
            }
        }
        // MSG_DENIED
        1 => match decoder.u32()? {
            0 => Ok(Err("it speaks another version of RPC (RPC_MISMATCH)".into())),
            1 => match decoder.u32()? {
                AUTH_TOOWEAK => Ok(Err(
                    "it wants more than AUTH_SYS over plain TCP (AUTH_TOOWEAK): if it demands TLS, give the \
                     volume its certificate authority (`--tls-ca`)"
                        .into(),
                )),
                status => Ok(Err(format!(
                "it does not accept the credential (AUTH_ERROR {status}); does the export allow sec=sys \
                 from this address, and ports above 1023 (`insecure`)?"
                ))),
            },
            _ => Err(XdrError::BadValue.into()),
        },
        _ => Err(XdrError::BadValue.into()),
    }
}
