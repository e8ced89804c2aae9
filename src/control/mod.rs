//! What decides whose the guest is.

pub(crate) mod event;
pub(crate) mod liveness;
pub(crate) mod suspicion;
