//! The succession of passes.
//!
//! Lanes go from pass to pass independently, so that they do not wait for each other. A pass that all lanes have left
//! is retired: the retirer's thread checks its memory, if requested, and frees it. Lanes wait for a slow retirer, which
//! bounds the memory ([`REGIONS_ALIVE_MAX`](super::pages::REGIONS_ALIVE_MAX)).

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::protocol::Counts;
use crate::error::Result;
use crate::statistics::Counters;

/// The memory of a pass.
pub(super) trait Memory: Send + Sync {
    fn counters(&self) -> &Counters;
}

/// The passes of one side, in order.
pub(super) struct Passes<M> {
    lanes: usize,
    make: Box<dyn Fn(u64) -> Result<M> + Send + Sync>,
    region_bytes: u64,
    state: Mutex<State<M>>,
}

struct State<M> {
    /// The next pass without a lane.
    next: u64,
    /// Bytes in the passes from there on; None without an end.
    left: Option<u64>,
    /// Passes that a lane is in, or has yet to enter.
    alive: Vec<Alive<M>>,
    /// Counters of the finished passes.
    counted: Counts,
}

struct Alive<M> {
    number: u64,
    memory: Arc<M>,
    lanes_left: usize,
}

impl<M: Memory> Passes<M> {
    /// Passes of `region_bytes` each until `bytes`, whole pages, are used up; `make` makes the memory.
    pub(super) fn new(
        lanes: u16,
        region_bytes: u64,
        bytes: Option<u64>,
        make: impl Fn(u64) -> Result<M> + Send + Sync + 'static,
    ) -> Passes<M> {
        let state = State { next: 0, left: bytes, alive: Vec::new(), counted: Counts::default() };
        Passes { lanes: lanes.into(), make: Box::new(make), region_bytes, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State<M>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The memory of a pass, for a lane that has left the one before; None after the last one.
    pub(super) fn enter(&self, number: u64) -> Result<Option<Arc<M>>> {
        let mut state = self.state();
        if let Some(alive) = state.alive.iter().find(|alive| alive.number == number) {
            return Ok(Some(alive.memory.clone()));
        }
        assert_eq!(number, state.next, "a lane leaves a pass before it enters the next one");
        let bytes = self.region_bytes.min(state.left.unwrap_or(u64::MAX));
        if bytes == 0 {
            return Ok(None);
        }
        let memory = Arc::new((self.make)(bytes)?);
        state.left = state.left.map(|left| left - bytes);
        state.next += 1;
        state.alive.push(Alive { number, memory: memory.clone(), lanes_left: 0 });
        Ok(Some(memory))
    }

    /// A lane has left a pass, and holds no reference to it any more. The last lane gets its memory.
    pub(super) fn leave(&self, number: u64) -> Option<Arc<M>> {
        let mut state = self.state();
        let index = state.alive.iter().position(|alive| alive.number == number)?;
        state.alive[index].lanes_left += 1;
        if state.alive[index].lanes_left < self.lanes {
            return None;
        }
        let memory = state.alive.remove(index).memory;
        state.counted = state.counted + counts(memory.counters());
        Some(memory)
    }

    /// The memory that is left when lanes have been cut off.
    pub(super) fn take_rest(&self) -> Vec<Arc<M>> {
        let mut state = self.state();
        let alive = std::mem::take(&mut state.alive);
        let rest = alive.iter().map(|alive| counts(alive.memory.counters()));
        state.counted = rest.fold(state.counted, |sum, counts| sum + counts);
        alive.into_iter().map(|alive| alive.memory).collect()
    }

    /// Bytes moved so far.
    pub(super) fn counts(&self) -> Counts {
        let state = self.state();
        let alive = state.alive.iter().map(|alive| counts(alive.memory.counters()));
        alive.fold(state.counted, |sum, counts| sum + counts)
    }
}

fn counts(counters: &Counters) -> Counts {
    Counts {
        bytes: counters.data_bytes.load(Relaxed),
        zero_bytes: counters.zero_bytes.load(Relaxed) + counters.hole_bytes.load(Relaxed),
        zero_copied_bytes: counters.zero_copied_bytes.load(Relaxed),
        copied_bytes: counters.copied_bytes.load(Relaxed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counted(Counters);

    impl Memory for Counted {
        fn counters(&self) -> &Counters {
            &self.0
        }
    }

    #[test]
    fn passes_end_at_the_byte_limit_and_count_each_lane_once() {
        let made = Arc::new(Mutex::new(Vec::new()));
        let makes = made.clone();
        let passes = Passes::new(2, 8 << 20, Some((8 << 20) + 8192), move |bytes| {
            makes.lock().unwrap().push(bytes);
            Ok(Counted(Counters::default()))
        });
        let first = passes.enter(0).unwrap().unwrap();
        Counters::add(&first.0.data_bytes, 7);
        drop(first);
        assert!(passes.leave(0).is_none());
        let last = passes.enter(1).unwrap().unwrap();
        Counters::add(&last.0.data_bytes, 5);
        assert!(passes.enter(2).unwrap().is_none());
        assert_eq!(*made.lock().unwrap(), [8 << 20, 8192]);
        assert_eq!(passes.counts().bytes, 12);
        assert!(passes.leave(0).is_some());
        assert_eq!(passes.counts().bytes, 12);
        assert_eq!(passes.take_rest().len(), 1);
        assert_eq!(passes.counts().bytes, 12);
    }
}
