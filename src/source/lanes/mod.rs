//! The threads that serve the source's lanes.

pub(crate) mod bulk;
pub(crate) mod demand;
