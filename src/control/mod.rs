//! What decides whose the guest is.

pub(crate) mod event;
