//! Figures of a migration: counters and histograms that everybody may use, and what they come to at its end.

mod completed;
pub(crate) mod counters;
pub(crate) mod faults;
mod latency;
pub(crate) mod map;

pub use completed::{Completed, CpuTime};
pub(crate) use counters::Counters;
pub use latency::{FaultStages, Latency, Stage};
pub(crate) use latency::{latency_histogram, record};
