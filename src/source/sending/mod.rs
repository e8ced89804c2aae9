//! How a bulk lane sends pages.

pub(in crate::source) mod batch;
pub(in crate::source) mod outlet;
pub(in crate::source) mod pace;
pub(crate) mod seal;
