//! The expected contents of a page of the demo's guest: words derived from a seed, the page's number and the number of
//! times that the page has been written.

/// Words of 8 bytes in a page of 4 KiB.
pub(crate) const PAGE_WORDS: usize = 512;

/// How the memory is filled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pattern {
    pub(crate) seed: u64,
    pub(crate) zero_percent: u32,
    pub(crate) hole_percent: u32,
}

/// The first contents of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fill {
    /// Words that differ everywhere.
    Data,
    /// Zeroes, written.
    Zero,
    /// Never written.
    Hole,
}

impl Pattern {
    /// Zero pages and holes come in groups of 16 pages, with data between, as freed memory does.
    pub(crate) fn fill(&self, page: u64) -> Fill {
        let draw = mix(self.seed ^ mix(page / 16)) % 100;
        if draw < u64::from(self.zero_percent) {
            Fill::Zero
        } else if draw < u64::from(self.zero_percent + self.hole_percent) {
            Fill::Hole
        } else {
            Fill::Data
        }
    }

    /// The words of `page` after its `generation`-th write; generation 0 is the first filling.
    pub(crate) fn words(&self, page: u64, generation: u32) -> Words {
        if generation == 0 && self.fill(page) != Fill::Data {
            return Words::ZEROES;
        }
        let base =
            mix(self.seed ^ page.wrapping_mul(0x9e37_79b9_7f4a_7c15)) ^ u64::from(generation);
        Words { base: Some(mix(base)) }
    }
}

/// The words of one page.
#[derive(Clone, Copy)]
pub(crate) struct Words {
    base: Option<u64>,
}

impl Words {
    /// The words of a page without contents.
    pub(crate) const ZEROES: Words = Words { base: None };

    pub(crate) fn word(self, word: usize) -> u64 {
        match self.base {
            None => 0,
            // One multiplication a word. It is a bijection of `base + word`, so that neighbouring words and generations
            // differ.
            Some(base) => (base ^ word as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1,
        }
    }
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
pub(crate) fn mix(mut value: u64) -> u64 {
    value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_pages_and_generations_differ() {
        let pattern = Pattern { seed: 1, zero_percent: 0, hole_percent: 0 };
        let mut seen = std::collections::HashSet::new();
        for page in 0..50 {
            for generation in 0..20 {
                assert!(seen.insert(pattern.words(page, generation).word(7)));
            }
        }
    }

    #[test]
    fn fills_have_their_configured_shares() {
        let pattern = Pattern { seed: 7, zero_percent: 20, hole_percent: 10 };
        let count = |fill| (0..160_000).filter(|&page| pattern.fill(page) == fill).count();
        assert!((28_000..36_000).contains(&count(Fill::Zero)));
        assert!((12_000..20_000).contains(&count(Fill::Hole)));
    }
}
