//! How pages leave on a bulk lane.

pub(in crate::source) mod batch;
pub(in crate::source) mod outlet;
pub(in crate::source) mod pace;
pub(crate) mod seal;
