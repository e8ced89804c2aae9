//! Numbers that depend on a seed alone.

/// Numbers that depend on a seed alone (splitmix64), which is printed; `UMEM_SEED` gives another one.
pub(crate) struct Seeded(u64);

impl Seeded {
    pub(crate) fn new(otherwise: u64) -> Seeded {
        let seed = std::env::var("UMEM_SEED").ok().map(|seed| seed.parse().expect("a number"));
        let seed = seed.unwrap_or(otherwise);
        println!("UMEM_SEED={seed}");
        Seeded(seed)
    }

    /// The next one, below `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}
