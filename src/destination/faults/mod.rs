//! Faults of the guest, and their latencies.

pub(in crate::destination) mod latency;
pub(crate) mod messages;
pub(crate) mod serving;
