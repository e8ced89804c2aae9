//! Figures of a migration: shared counters and histograms, and the result at its end.

mod completed;
pub(crate) mod counters;
pub(crate) mod faults;
mod latency;
pub(crate) mod map;

pub use completed::{Completed, CpuTime};
pub(crate) use counters::Counters;
pub use latency::{FaultStages, Latency, Stage};
pub(crate) use latency::{latency_histogram, record};
