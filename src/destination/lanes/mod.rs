//! The threads that serve the destination's lanes.

pub(crate) mod acks;
pub(crate) mod bulk;
pub(crate) mod demand;
pub(in crate::destination) mod window;
