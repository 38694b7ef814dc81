//! Pages, regions and bitmaps of pages: the arithmetic that both sides share.

use serde::{Deserialize, Serialize};

/// The unit of memory that the engine counts in, bytes.
pub const PAGE_SIZE: usize = 4096;

/// Pages in a chunk (2 MiB): what one `clear_dirty` covers, and the unit that is dealt out to channels.
///
/// A page always travels on the channel of its chunk, so that a newer copy cannot be overtaken by
/// an older one and rounds need no barrier between channels.
pub const CHUNK_PAGES: u64 = 512;

/// A run of guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Guest-physical address of the first byte, page aligned.
    pub guest_address: u64,
    /// Length in pages of [`PAGE_SIZE`].
    pub pages: u64,
}

impl Region {
    /// Words of a bitmap with one bit a page.
    pub(crate) fn bitmap_words(&self) -> usize {
        self.pages.div_ceil(64) as usize
    }

    /// A bitmap with every page set, and no bit beyond the last page.
    pub(crate) fn full_bitmap(&self) -> Vec<u64> {
        let mut bits = vec![u64::MAX; self.bitmap_words()];
        self.mask_tail(&mut bits);
        bits
    }

    /// Clears the bits beyond the last page.
    pub(crate) fn mask_tail(&self, bits: &mut [u64]) {
        let used = self.pages % 64;
        if let Some(last) = bits.last_mut()
            && used != 0
        {
            *last &= (1 << used) - 1;
        }
    }
}

/// Total pages of `regions`.
pub(crate) fn total_pages(regions: &[Region]) -> u64 {
    regions.iter().map(|r| r.pages).sum()
}

/// The pages that are set in a bitmap.
pub(crate) fn count_set(bits: &[u64]) -> u64 {
    bits.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// Which channel carries the chunk of `page`; `region` shifts the deal so that several short
/// regions do not all start on channel 0.
pub(crate) fn channel_of(region: usize, page: u64, channels: u16) -> u16 {
    ((page / CHUNK_PAGES + region as u64) % u64::from(channels)) as u16
}

/// The runs (first, count) of set bits, in order.
pub(crate) fn runs(bits: &[u64]) -> impl Iterator<Item = (u64, u64)> + '_ {
    let total = bits.len() as u64 * 64;
    let mut at = 0u64;
    std::iter::from_fn(move || {
        let start = next_bit(bits, at, total, true)?;
        let end = next_bit(bits, start, total, false).unwrap_or(total);
        at = end;
        Some((start, end - start))
    })
}

/// The first bit at or after `from` that is set (or clear), looking at whole words.
fn next_bit(bits: &[u64], from: u64, total: u64, set: bool) -> Option<u64> {
    let mut at = from;
    while at < total {
        let word = bits[(at / 64) as usize];
        let word = (if set { word } else { !word }) >> (at % 64);
        if word != 0 {
            return Some(at + u64::from(word.trailing_zeros()));
        }
        at = (at / 64 + 1) * 64;
    }
    None
}

/// Whether a page holds only zeros.
///
/// Comparing with a zero page is one `memcmp`, which libc does with the widest vectors this processor has,
/// in debug builds too, and which ends at the first difference.
pub(crate) fn is_zero(page: &[u8]) -> bool {
    static ZERO: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
    page == &ZERO[..page.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_bitmap_has_no_bit_beyond_the_region() {
        let region = Region {
            guest_address: 0,
            pages: 130,
        };
        let bits = region.full_bitmap();
        assert_eq!(bits.len(), 3);
        assert_eq!(count_set(&bits), 130);
        assert_eq!(runs(&bits).collect::<Vec<_>>(), vec![(0, 130)]);
    }

    #[test]
    fn only_a_page_of_zeros_is_zero() {
        let mut page = vec![0u8; PAGE_SIZE];
        assert!(is_zero(&page));
        for at in [0, 1, 31, 2048, PAGE_SIZE - 1] {
            page[at] = 1;
            assert!(!is_zero(&page), "byte {at}");
            page[at] = 0;
        }
    }

    proptest! {
        #[test]
        fn runs_name_exactly_the_set_bits(words in proptest::collection::vec(
            prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 0..8)) {
            let mut expected = Vec::new();
            for page in 0..words.len() as u64 * 64 {
                if words[(page / 64) as usize] >> (page % 64) & 1 == 1 {
                    expected.push(page);
                }
            }
            let found = runs(&words).collect::<Vec<_>>();
            let pages = found.iter().flat_map(|&(first, n)| first..first + n).collect::<Vec<_>>();
            prop_assert_eq!(pages, expected);
            // Runs are maximal: two neighbours never touch.
            prop_assert!(found.windows(2).all(|w| w[0].0 + w[0].1 < w[1].0));
        }
    }
}
