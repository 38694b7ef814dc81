//! A guest's READs, cut into pieces that the server takes and put together again.

use std::collections::{HashMap, VecDeque};

use bytes::{Bytes, BytesMut};
use tokio::sync::oneshot;

/// One READ to be sent: a part of a guest's request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    request: u64,
    index: usize,
    pub(super) offset: u64,
    pub(super) length: u32,
}

#[derive(Debug)]
struct Open {
    /// What has arrived of each piece.
    pieces: Vec<BytesOrParts>,
    pieces_left: usize,
    reply: oneshot::Sender<Bytes>,
}

#[derive(Debug, Default)]
struct BytesOrParts(Vec<Bytes>);

/// The READs of one disk.
#[derive(Debug, Default)]
pub(super) struct Reads {
    open: HashMap<u64, Open>,
    waiting: VecDeque<Piece>,
    sent: Vec<Piece>,
    next: u64,
}

impl Reads {
    pub(super) fn push(
        &mut self,
        offset: u64,
        length: u32,
        piece_max: u32,
        reply: oneshot::Sender<Bytes>,
    ) {
        let request = self.next;
        self.next += 1;
        let count = length.div_ceil(piece_max) as usize;
        for index in 0..count {
            let start = index as u32 * piece_max;
            self.waiting.push_back(Piece {
                request,
                index,
                offset: offset + u64::from(start),
                length: piece_max.min(length - start),
            });
        }
        let pieces = (0..count).map(|_| BytesOrParts::default()).collect();
        self.open.insert(
            request,
            Open {
                pieces,
                pieces_left: count,
                reply,
            },
        );
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Takes the next piece to send.
    pub(super) fn next(&mut self) -> Option<Piece> {
        let piece = self.waiting.pop_front()?;
        self.sent.push(piece.clone());
        Some(piece)
    }

    /// The piece was not read: it is to be sent again, first.
    pub(super) fn again(&mut self, piece: Piece) {
        self.sent.retain(|sent| *sent != piece);
        self.waiting.push_front(piece);
    }

    /// Everything that was sent is to be sent again.
    pub(super) fn resend(&mut self) {
        for piece in self.sent.drain(..).rev() {
            self.waiting.push_front(piece);
        }
    }

    /// Some or all of a piece has arrived; answers the guest when it was the last.
    pub(super) fn arrived(&mut self, mut piece: Piece, data: Bytes, eof: bool) {
        self.sent.retain(|sent| *sent != piece);
        let Some(open) = self.open.get_mut(&piece.request) else {
            return;
        };
        let Some(parts) = open.pieces.get_mut(piece.index) else {
            return;
        };
        let arrived = u32::try_from(data.len())
            .unwrap_or(u32::MAX)
            .min(piece.length);
        parts.0.push(data);
        piece.offset += u64::from(arrived);
        piece.length -= arrived;
        if piece.length > 0 {
            if !eof {
                self.waiting.push_front(piece);
                return;
            }
            // The file is shorter than it was when it was opened; what is not there is zeroes.
            parts.0.push(Bytes::from(vec![0; piece.length as usize]));
        }
        open.pieces_left -= 1;
        if open.pieces_left == 0
            && let Some(open) = self.open.remove(&piece.request)
        {
            let mut parts = open.pieces.into_iter().flat_map(|piece| piece.0);
            let first = parts.next().unwrap_or_default();
            let mut rest = parts.peekable();
            let data = if rest.peek().is_none() {
                first
            } else {
                let mut whole = BytesMut::from(first);
                rest.for_each(|part| whole.extend_from_slice(&part));
                whole.freeze()
            };
            // The guest's side may have lost interest.
            let _ = open.reply.send(data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_come_together_in_order_however_they_arrive() {
        let mut reads = Reads::default();
        let (reply, mut answer) = oneshot::channel();
        reads.push(100, 10, 4, reply);
        let pieces: Vec<Piece> = std::iter::from_fn(|| reads.next()).collect();
        assert_eq!(
            pieces
                .iter()
                .map(|p| (p.offset, p.length))
                .collect::<Vec<_>>(),
            [(100, 4), (104, 4), (108, 2)]
        );
        reads.arrived(pieces[2].clone(), Bytes::from_static(b"ij"), true);
        reads.arrived(pieces[0].clone(), Bytes::from_static(b"ab"), false);
        let rest = reads.next().unwrap();
        assert_eq!((rest.offset, rest.length), (102, 2));
        reads.arrived(rest, Bytes::from_static(b"cd"), false);
        assert!(answer.try_recv().is_err());
        reads.arrived(pieces[1].clone(), Bytes::from_static(b"efgh"), false);
        assert_eq!(answer.try_recv().unwrap(), &b"abcdefghij"[..]);
        assert!(reads.is_empty());
    }

    #[test]
    fn a_file_that_ends_early_reads_as_zeroes() {
        let mut reads = Reads::default();
        let (reply, mut answer) = oneshot::channel();
        reads.push(0, 4, 1024, reply);
        let piece = reads.next().unwrap();
        reads.arrived(piece, Bytes::from_static(b"a"), true);
        assert_eq!(answer.try_recv().unwrap(), &b"a\0\0\0"[..]);
    }

    #[test]
    fn what_was_sent_is_sent_again_in_its_old_order() {
        let mut reads = Reads::default();
        for offset in [0, 10, 20] {
            reads.push(offset, 10, 1024, oneshot::channel().0);
        }
        reads.next();
        reads.next();
        reads.resend();
        let offsets: Vec<u64> = std::iter::from_fn(|| reads.next())
            .map(|p| p.offset)
            .collect();
        assert_eq!(offsets, [0, 10, 20]);
    }
}
