//! Before the move: the guest's memory is handed over, sources connect.

pub(in crate::destination) mod accept;
pub(in crate::destination) mod prepare;
