//! What must have arrived: the counts and digests that both sides make alike, and *Final*.

use super::payload::malformed;
use super::{Frame, Kind, Reader};
use crate::error::FrameError;
use crate::options::CHANNELS_MAX;
use crate::stats::SendTimings;

/// What one channel carried: counted alike on both sides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChannelTotals {
    /// Frames of pages and of zero runs.
    pub frames: u64,
    /// Pages with contents.
    pub pages: u64,
    /// Pages named as zero.
    pub zero_pages: u64,
    /// The sums of those frames, chained in order.
    pub digest: u64,
}

impl ChannelTotals {
    /// Takes account of a frame.
    pub fn add(&mut self, pages: u64, zero_pages: u64, payload_sum: u64) {
        self.frames += 1;
        self.pages += pages;
        self.zero_pages += zero_pages;
        self.digest =
            (self.digest.rotate_left(1) ^ payload_sum).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    /// Compares what was sent with what arrived.
    pub fn compare(&self, arrived: &ChannelTotals) -> Result<(), FrameError> {
        let figures = [
            ("frames", self.frames, arrived.frames),
            ("pages", self.pages, arrived.pages),
            ("zero pages", self.zero_pages, arrived.zero_pages),
            ("digest", self.digest, arrived.digest),
        ];
        match figures
            .into_iter()
            .find(|(_, sent, arrived)| sent != arrived)
        {
            None => Ok(()),
            Some((what, sent, arrived)) => Err(FrameError::Digest {
                what,
                sent,
                arrived,
            }),
        }
    }
}

/// What must have arrived for the machine to be whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Final {
    /// The last round.
    pub round: u32,
    /// One for each channel, in order.
    pub channels: Vec<ChannelTotals>,
    /// Length of the device state.
    pub device_state_bytes: u64,
    /// Its xxh3-64.
    pub device_state_sum: u64,
    /// The source's stamps so far.
    pub timings: SendTimings,
}

impl Final {
    /// As a frame.
    pub fn encode(&self) -> Frame {
        let mut out = Vec::with_capacity(Kind::Final.limit());
        out.extend_from_slice(&self.round.to_le_bytes());
        out.extend_from_slice(&(self.channels.len() as u32).to_le_bytes());
        let t = &self.timings;
        let numbers = [
            self.device_state_bytes,
            self.device_state_sum,
            t.started_ns,
            t.vcpus_stopped_ns,
            t.quiet_ns,
            t.final_sent_ns,
        ];
        let channels = self.channels.iter();
        let totals = channels.flat_map(|c| [c.frames, c.pages, c.zero_pages, c.digest]);
        for number in numbers.into_iter().chain(totals) {
            out.extend_from_slice(&number.to_le_bytes());
        }
        Frame::new(Kind::Final, &out)
    }

    /// From a payload.
    pub fn decode(payload: &[u8]) -> Result<Final, FrameError> {
        let mut reader = Reader::new(Kind::Final.label(), payload);
        let round = reader.u32()?;
        let count = reader.u32()?;
        if count == 0 || count > u32::from(CHANNELS_MAX) {
            return Err(malformed(Kind::Final, "no channels, or too many"));
        }
        let (device_state_bytes, device_state_sum) = (reader.u64()?, reader.u64()?);
        let timings = SendTimings {
            started_ns: reader.u64()?,
            vcpus_stopped_ns: reader.u64()?,
            quiet_ns: reader.u64()?,
            final_sent_ns: reader.u64()?,
            complete_ns: 0,
        };
        let channels = (0..count)
            .map(|_| {
                Ok(ChannelTotals {
                    frames: reader.u64()?,
                    pages: reader.u64()?,
                    zero_pages: reader.u64()?,
                    digest: reader.u64()?,
                })
            })
            .collect::<Result<_, _>>()?;
        reader.end()?;
        Ok(Final {
            round,
            channels,
            device_state_bytes,
            device_state_sum,
            timings,
        })
    }
}
