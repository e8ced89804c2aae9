//! The programs of the command line that use all the rest.

pub(crate) mod bench;
pub mod demo;
pub mod doctor;
#[cfg(feature = "fuzz")]
#[doc(hidden)]
pub mod fuzz;
pub(crate) mod install;
