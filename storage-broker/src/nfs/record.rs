//! Record marking (RFC 5531, section 11): cutting a byte stream into RPC messages, within bounds.

use bytes::{Buf, Bytes, BytesMut};

/// The largest reply taken: the largest READ asked for (1 MiB), and room for its header.
pub(crate) const RECORD_BYTES_MAX: usize = (1 << 20) + (64 << 10);

/// The most fragments of one record; servers send one or two.
const FRAGMENTS_MAX: u32 = 256;

const LAST_FRAGMENT: u32 = 1 << 31;

/// Why a byte stream is not a sequence of records.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RecordError {
    /// More bytes than any reply to our calls has.
    #[error(
        "the server announced a reply of {bytes} bytes, more than the {RECORD_BYTES_MAX} taken"
    )]
    TooLong {
        /// How long the record is at least.
        bytes: usize,
    },
    /// Fragments without end.
    #[error("the server cut a reply into more than {FRAGMENTS_MAX} fragments")]
    TooManyFragments,
}

/// Takes records out of what has been received.
#[derive(Debug, Default)]
pub(crate) struct RecordReader {
    /// The earlier fragments of a record not yet complete.
    earlier: BytesMut,
    fragments: u32,
}

impl RecordReader {
    /// The next complete record at the front of `received`, which loses the bytes used.
    pub(crate) fn next(&mut self, received: &mut BytesMut) -> Result<Option<Bytes>, RecordError> {
        loop {
            let Some(header) = received.first_chunk::<4>() else {
                return Ok(None);
            };
            let header = u32::from_be_bytes(*header);
            let length = (header & !LAST_FRAGMENT) as usize;
            let total = self.earlier.len() + length;
            if total > RECORD_BYTES_MAX {
                return Err(RecordError::TooLong { bytes: total });
            }
            if received.len() < 4 + length {
                received.reserve(4 + length - received.len());
                return Ok(None);
            }
            received.advance(4);
            let fragment = received.split_to(length);
            if header & LAST_FRAGMENT != 0 {
                self.fragments = 0;
                if self.earlier.is_empty() {
                    return Ok(Some(fragment.freeze()));
                }
                self.earlier.extend_from_slice(&fragment);
                return Ok(Some(self.earlier.split().freeze()));
            }
            self.fragments += 1;
            if self.fragments > FRAGMENTS_MAX {
                return Err(RecordError::TooManyFragments);
            }
            self.earlier.extend_from_slice(&fragment);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fragment(last: bool, data: &[u8]) -> Vec<u8> {
        let mut header = data.len() as u32;
        if last {
            header |= LAST_FRAGMENT;
        }
        [&header.to_be_bytes(), data].concat()
    }

    #[test]
    fn records_arrive_whole_however_the_stream_is_cut() {
        let stream = [
            fragment(true, b"one"),
            fragment(false, b"tw"),
            fragment(false, b""),
            fragment(true, b"o"),
            fragment(true, b""),
        ]
        .concat();
        for step in 1..=stream.len() {
            let mut reader = RecordReader::default();
            let mut received = BytesMut::new();
            let mut records = Vec::new();
            for part in stream.chunks(step) {
                received.extend_from_slice(part);
                while let Some(record) = reader.next(&mut received).unwrap() {
                    records.push(record);
                }
            }
            assert_eq!(records, [&b"one"[..], b"two", b""], "in steps of {step}");
            assert!(received.is_empty());
        }
    }

    #[test]
    fn an_absurd_length_and_endless_fragments_are_refused() {
        let mut received = BytesMut::from(&[0xff, 0xff, 0xff, 0xff][..]);
        assert!(matches!(
            RecordReader::default().next(&mut received),
            Err(RecordError::TooLong { .. })
        ));
        let mut received = BytesMut::from(&[0; 4 * 1000][..]);
        assert_eq!(
            RecordReader::default().next(&mut received),
            Err(RecordError::TooManyFragments)
        );
    }
}
