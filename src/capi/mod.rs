//! The C interface: [`embed`](crate::embed), function by function. `umem.h` beside this file is made
//! from it (`cbindgen.toml`) and checked in; its opening has the rules that hold for every function.
//!
//! No panic leaves a function here, and none is printed: it becomes `UMEM_ERR_INTERNAL`. For that a
//! panic hook is set when the first handle is made. It is the whole process's, and leaves all panics to
//! the hook that was there before that are neither of umem's threads nor of a call into umem; a host
//! that is not written in Rust has none of those. Running out of memory is no panic and ends the
//! process, as Rust's allocator does.

#![allow(non_camel_case_types, reason = "these are the names in C")]
#![allow(clippy::missing_safety_doc, reason = "the header says once what every pointer must be")]

mod destination;
mod side;
mod source;
mod types;

pub use destination::*;
pub use source::*;
pub use types::*;
