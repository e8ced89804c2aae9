//! Faults of the guest, and what they take.

pub(in crate::destination) mod latency;
pub(crate) mod messages;
pub(crate) mod serving;
