//! Numbers that depend on a seed alone.

/// The seed of a test, which is printed; `UMEM_SEED` overrides it.
pub(crate) fn seed(otherwise: u64) -> u64 {
    let seed = std::env::var("UMEM_SEED").ok().map(|seed| seed.parse().expect("a number"));
    let seed = seed.unwrap_or(otherwise);
    println!("UMEM_SEED={seed}");
    seed
}

/// Numbers below `limit`.
pub(crate) fn seeded(seed: u64, limit: u64) -> impl Iterator<Item = u64> {
    let mut random = Random::new(seed);
    std::iter::repeat_with(move || random.below(limit))
}

/// splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// Another sequence, which depends on this seed and on `tag`, and not on earlier draws.
    pub(crate) fn of(seed: u64, tag: u64) -> Random {
        let mut random = Random(seed ^ tag.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        random.next();
        random
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Below `limit`, which is not 0.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// True in this many cases of a hundred.
    pub(crate) fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// Up to 2^`bits`, every magnitude equally likely.
    pub(crate) fn magnitude(&mut self, bits: u64) -> u64 {
        let bits = self.below(bits + 1);
        (1 << bits) + self.below(1 << bits)
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.below(from.len() as u64)).expect("an index")]
    }
}

/// The finalizer of splitmix64: each output bit depends on each input bit.
pub(crate) fn mix(value: u64) -> u64 {
    let mixed = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
