//! The C interface: [`embed`](crate::embed), function by function. `umem.h` beside this file is generated from it
//! (`cbindgen.toml`) and checked in. The header's opening comment has the rules that hold for every function.
//!
//! No panic leaves a function here, and none is printed: a panic becomes `UMEM_ERR_INTERNAL`. The first handle sets a
//! panic hook for the whole process. The hook handles panics of umem's threads and of calls into umem, and passes
//! every other panic to the previous hook; only a host written in Rust has such panics. Running out of memory is not
//! a panic: Rust's allocator ends the process.

#![allow(non_camel_case_types, reason = "C uses these names")]
#![allow(clippy::missing_safety_doc, reason = "the header states the rule for pointers once")]

mod destination;
mod endpoint;
mod source;
mod types;

pub use destination::*;
pub use source::*;
pub use types::*;
