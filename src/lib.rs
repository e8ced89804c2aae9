//! umem moves running guests between hosts. The guest's memory moves before the guest (precopy), after it (postcopy),
//! or both.
//!
//! With postcopy alone the guest starts on the destination without memory. A page that the guest touches is fetched
//! first; all other pages stream in behind. The way of a page from the source's socket into the guest has seven
//! steps:
//!
//! 1. A vCPU touches a missing page. The kernel reports the fault on the guest's userfaultfd, which
//!    [`destination`]'s demand thread reads through its ring.
//! 2. The page is *wanted* now. Unless the page is already in flight, the thread requests it.
//! 3. The [`source`]'s demand thread claims the page (every page leaves once) and answers at once:
//!    a header, and the page straight from the guest's RAM file.
//! 4. The destination receives the header, learns where the page belongs, moves it from Missing to
//!    Landing, and receives the bytes directly into the guest's shared memory.
//! 5. The page is Cached. It is marked so to the kernel (UFFDIO_CONTINUE), which wakes the vCPU.
//! 6. Meanwhile bulk lanes do 3 and 4 for everything else, in runs of up to 2 MiB, beginning where
//!    the last demand was. A complete 2 MiB block is unregistered from the userfaultfd.
//! 7. When every page is cached the guest leaves its userfaultfd for good.
//!
//! The protocol is [`umem_wire`], without input or output; io_uring is [`umem_ring`], without a
//! protocol. This crate combines them:

#![warn(missing_docs)]

pub mod capi;
pub mod cli;
mod control;
pub mod destination;
pub mod embed;
mod error;
mod events;
mod fault;
pub mod host;
mod memory;
pub mod observe;
mod programs;
mod runtime;
mod session;
pub mod source;
pub mod statistics;
mod transport;

pub use crate::runtime::idle::IdleCores;
pub use crate::transport::secure::Security;
pub use crate::transport::uri::Uri;
pub use error::{Error, Result};
pub use host::command::RamPath;
pub use host::kind::MonitorSocket;
pub use memory::kind::Kind;
pub use programs::demo;
pub use programs::doctor;
#[cfg(feature = "fuzz")]
#[doc(hidden)]
pub use programs::fuzz;
#[doc(inline)]
pub use statistics as report;
