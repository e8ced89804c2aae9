//! Programs of the command line, which use all other folders.

pub(crate) mod bench;
pub mod demo;
pub mod doctor;
#[cfg(feature = "fuzz")]
#[doc(hidden)]
pub mod fuzz;
pub(crate) mod install;
