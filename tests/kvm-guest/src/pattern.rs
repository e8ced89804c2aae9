//! The first contents of the guest's memory. The guest computes the same in `code`.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::Result;
use crate::memory::check_size;

/// Pages are alike in groups of 64 KiB, which is sixteen pages.
pub(crate) const GROUP_BYTES: u64 = 64 << 10;

/// Of eight groups one is written with zeroes (number 6) and one is never written (number 7): those whose addresses
/// have both of these bits. The guest reads zeroes in both.
pub(crate) const ZERO_BITS: u32 = 6 * GROUP_BYTES as u32;

/// Odd, so that different addresses give different words. The low bits of addresses are always zero, and a product's
/// high bits depend on more than its low ones: so [`word`] swaps the bytes between its two multiplications.
pub(crate) const FACTORS: [u32; 2] = [0x9e37_79b1, 0x85eb_ca77];

/// The word at an address of the guest's memory, where it is not zero.
fn word(address: u32, key: u32) -> u32 {
    let mixed = (address.wrapping_mul(FACTORS[0]) ^ key).swap_bytes();
    mixed.wrapping_mul(FACTORS[1])
}

/// The contents of a guest's memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pattern {
    /// The key of the expected words …
    pub(crate) key_first: u32,
    /// … and of the guest's writes.
    pub(crate) key_second: u32,
}

impl Pattern {
    pub(crate) fn new(seed: u32) -> Pattern {
        // Different for the same seed, and every seed has its own.
        let key_first = word(seed, 0x5bd1_e995);
        Pattern { key_first, key_second: !key_first }
    }

    /// Writes the expected contents into a file.
    pub(crate) fn fill(&self, path: &Path, bytes: u64) -> Result<()> {
        let what = |error: std::io::Error| format!("filling {}: {error}", path.display());
        check_size(bytes)?;
        let file = OpenOptions::new().write(true).create(true).truncate(true).open(path);
        let file = file.map_err(what)?;
        file.set_len(bytes).map_err(what)?;
        let mut contents = Vec::new();
        for start in (0..bytes).step_by(GROUP_BYTES as usize) {
            contents.clear();
            match start / GROUP_BYTES % 8 {
                7 => continue,
                6 => contents.resize(GROUP_BYTES as usize, 0),
                _ => (start..start + GROUP_BYTES).step_by(4).for_each(|address| {
                    let address = u32::try_from(address).expect("the size was checked");
                    contents.extend(word(address, self.key_first).to_le_bytes());
                }),
            }
            file.write_all_at(&contents, start).map_err(what)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pattern_words_differ_within_a_group_and_between_neighbours() {
        let key = Pattern::new(1).key_first;
        let words: std::collections::HashSet<u32> =
            (0..1 << 16).map(|index| word(index * 4, key)).collect();
        assert_eq!(words.len(), 1 << 16);
        let changed: u32 = (0..1 << 12)
            .map(|index| (word(index * 4, key) ^ word(index * 4 + 4, key)).count_ones())
            .sum();
        assert!(changed > 10 << 12, "{changed}");
    }

    #[test]
    fn expected_and_written_words_differ_everywhere() {
        let Pattern { key_first, key_second } = Pattern::new(7);
        assert!(
            (0..1 << 20).all(|index| word(index * 4, key_first) != word(index * 4, key_second))
        );
    }
}
