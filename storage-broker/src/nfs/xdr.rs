//! Reading XDR (RFC 4506) with a bound on everything whose length the server chooses.
//!
//! `nfs3_types` reserves as much memory as a length field says before it looks at the data; what
//! has a variable length is therefore decoded here, and only fixed-size structures there.

use bytes::{Buf, Bytes};
use nfs3_types::xdr_codec::{Pack, Unpack};

/// Why a reply could not be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum XdrError {
    /// It ends too early.
    #[error("it ends in the middle of a field")]
    Short,
    /// A length field exceeds its bound.
    #[error("a field of {length} bytes where at most {bound} are allowed")]
    TooLong {
        /// As announced.
        length: u32,
        /// As allowed.
        bound: u32,
    },
    /// A value outside its set.
    #[error("a value that is not one of its set")]
    BadValue,
    /// Something follows the end.
    #[error("bytes after its end")]
    Trailing,
}

/// Takes fields off the front of a message.
#[derive(Debug)]
pub(crate) struct Decoder(pub(crate) Bytes);

impl Decoder {
    pub(crate) fn u32(&mut self) -> Result<u32, XdrError> {
        self.0.try_get_u32().map_err(|_| XdrError::Short)
    }

    pub(crate) fn bool(&mut self) -> Result<bool, XdrError> {
        match self.u32()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(XdrError::BadValue),
        }
    }

    /// A byte string of at most `bound` bytes, without copying it.
    pub(crate) fn opaque(&mut self, bound: u32) -> Result<Bytes, XdrError> {
        let length = self.u32()?;
        if length > bound {
            return Err(XdrError::TooLong { length, bound });
        }
        let padded = (length as usize).next_multiple_of(4);
        if self.0.len() < padded {
            return Err(XdrError::Short);
        }
        let mut field = self.0.split_to(padded);
        field.truncate(length as usize);
        Ok(field)
    }

    /// A structure in which no length is the server's choice.
    pub(crate) fn fixed<T: Unpack>(&mut self) -> Result<T, XdrError> {
        let mut rest: &[u8] = &self.0;
        let (value, used) = T::unpack(&mut rest).map_err(|error| match error {
            nfs3_types::xdr_codec::Error::Io(_) => XdrError::Short,
            _ => XdrError::BadValue,
        })?;
        self.0.advance(used);
        Ok(value)
    }

    /// An optional structure of fixed size.
    pub(crate) fn optional<T: Unpack>(&mut self) -> Result<Option<T>, XdrError> {
        if self.bool()? {
            self.fixed().map(Some)
        } else {
            Ok(None)
        }
    }

    pub(crate) fn end(&self) -> Result<(), XdrError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(XdrError::Trailing)
        }
    }
}

/// Appends a value to a message.
pub(crate) fn encode(message: &mut Vec<u8>, value: &impl Pack) -> Result<(), XdrError> {
    value
        .pack(message)
        .map(|_| ())
        .map_err(|_| XdrError::BadValue)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_beyond_its_bound_or_its_message_is_refused() {
        let mut decoder = Decoder(Bytes::from_static(&[0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4]));
        assert!(matches!(decoder.opaque(64), Err(XdrError::TooLong { .. })));
        let mut decoder = Decoder(Bytes::from_static(&[0, 0, 0, 9, 1, 2, 3, 4]));
        assert_eq!(decoder.opaque(64), Err(XdrError::Short));
    }

    #[test]
    fn padding_is_taken_and_not_shown() {
        let mut decoder = Decoder(Bytes::from_static(&[
            0, 0, 0, 5, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0, 1,
        ]));
        assert_eq!(decoder.opaque(64).unwrap(), &[1, 2, 3, 4, 5][..]);
        assert!(decoder.bool().unwrap());
        decoder.end().unwrap();
    }
}
