//! The order in which a guest touches its pages.

use std::str::FromStr;

use serde::Serialize;

use crate::memory::mix;

/// An order of accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Pattern {
    /// Each page once, in random order.
    Random,
    /// One after another, upwards, starting at five eighths of the memory, which plain order
    /// reaches late.
    Sequential,
    /// The same downwards.
    Backward,
    /// Every 129th page, going round.
    Strided,
    /// Nine of ten in a sixteenth of the memory, at random, the others anywhere.
    HotSet,
}

/// A stride of about half a megabyte that is no multiple of a power of two.
const STRIDE: usize = 129;

impl Pattern {
    pub(crate) const ALL: [Pattern; 5] = [
        Pattern::Random,
        Pattern::Sequential,
        Pattern::Backward,
        Pattern::Strided,
        Pattern::HotSet,
    ];

    pub(crate) fn word(self) -> &'static str {
        match self {
            Pattern::Random => "random",
            Pattern::Sequential => "sequential",
            Pattern::Backward => "backward",
            Pattern::Strided => "strided",
            Pattern::HotSet => "hot-set",
        }
    }

    /// The first `count` accesses to `pages` pages, the same each time. Page 0 is left out: the
    /// guest waits for it at its start.
    pub(crate) fn accesses(self, pages: usize, count: usize) -> Vec<usize> {
        let start = pages * 5 / 8;
        let within = |page: usize| page.clamp(1, pages - 1);
        match self {
            Pattern::Random => {
                let mut order = random_order(pages);
                order.truncate(count);
                order
            }
            Pattern::Sequential => (start..pages).chain(1..start).take(count).collect(),
            Pattern::Backward => (1..start).rev().chain((start..pages).rev()).take(count).collect(),
            Pattern::Strided => (0..count).map(|i| within((start + i * STRIDE) % pages)).collect(),
            Pattern::HotSet => {
                let mut draw = 0;
                let mut below = |limit: usize| {
                    draw = mix(draw);
                    usize::try_from(draw % limit.max(1) as u64).expect("64 bits")
                };
                let access = |_| {
                    let is_hot = below(10) < 9;
                    within(if is_hot { start + below(pages / 16) } else { below(pages) })
                };
                (0..count).map(access).collect()
            }
        }
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Pattern, String> {
        let known = Pattern::ALL.into_iter().find(|pattern| pattern.word() == text);
        known.ok_or_else(|| {
            format!("{text:?} is not random, sequential, backward, strided or hot-set")
        })
    }
}

/// All pages but the first, shuffled, the same way each time.
pub(super) fn random_order(pages: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (1..pages).collect();
    let mut draw = 0;
    for last in (1..order.len()).rev() {
        draw = mix(draw);
        order.swap(last, usize::try_from(draw % (last as u64 + 1)).expect("64 bits"));
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_pattern_touches_every_page_but_the_first_once() {
        let order = random_order(1000);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (1..1000).collect::<Vec<_>>());
        let ascending = order.windows(2).filter(|two| two[0] < two[1]).count();
        assert!((400..600).contains(&ascending), "{ascending}");
    }

    #[test]
    fn each_pattern_has_its_named_order() {
        for pattern in Pattern::ALL {
            let accesses = pattern.accesses(1600, 200);
            assert_eq!(accesses.len(), 200, "{}", pattern.word());
            assert!(accesses.iter().all(|page| (1..1600).contains(page)), "{}", pattern.word());
            assert_eq!(pattern.word().parse(), Ok(pattern));
        }
        assert_eq!(Pattern::Sequential.accesses(1600, 3), [1000, 1001, 1002]);
        assert_eq!(Pattern::Backward.accesses(1600, 3), [999, 998, 997]);
        assert_eq!(Pattern::Strided.accesses(1600, 3), [1000, 1129, 1258]);
        let hot = Pattern::HotSet.accesses(1600, 200);
        let hot = hot.iter().filter(|&&page| (1000..1100).contains(&page)).count();
        assert!((160..200).contains(&hot), "{hot} of 200");
    }
}
