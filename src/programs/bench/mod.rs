//! `umem bench`: the page throughput of a link, with iperf3's interface.
//!
//! A *test* is a stream of pages between a client and a server, in one direction or both. It consists of *passes*: each
//! is the background of a migration of its own, made by the same code (`source::bulk`, `destination::bulk`), from a
//! file of real pages into a fresh one that is registered with a userfaultfd. So every page is allocated, checked,
//! landed and unregistered as in a migration; a thread beside the lanes frees the memory of a finished pass
//! ([`passes`]). With `--discard` pages do not land: sendfile at one end, a hot buffer at the other ([`lanes`]). With
//! `--fault-rate` pages are demanded meanwhile (`faults.rs`).
//!
//! The two programs exchange lines of JSON on a control connection ([`protocol`]). Each lane is a connection that sends
//! its purpose and then belongs to the stream. The client decides when to measure and when to stop; either side counts
//! its own sent or landed bytes ([`side`], for each direction).
//!
//! ```text
//! client                                server
//! hello, test ------------------------> one test at a time, or refused
//!   <--------------------- accepted     (cookie, bytes of a pass)
//! hello, join (each lane) ------------>
//!   <---------------------- started     every lane is there
//! measure (after --omit) -------------> counts from here
//! ask faults (each interval) ---------> if it is the server that has them
//!   <----------------------- faults
//! stop, or finish (with -n) ----------> counted until here
//!   <----------------------- result
//! ```

mod client;
mod clock;
mod fault_limits;
mod faults;
mod lanes;
mod lobby;
mod memory;
mod options;
mod pages;
mod passes;
mod protocol;
mod report;
mod server;
mod side;
mod sides;
mod verdict;

pub(crate) use client::run as run_client;
pub(crate) use fault_limits::faults;
pub(crate) use options::Client;
pub(crate) use pages::{MemoryKind, PageKind, REGION_BYTES_MAX};
pub(crate) use protocol::{JOIN_TIMEOUT, Test};
pub(crate) use server::{Server, run as run_server};

/// iperf3 uses 5201.
pub(crate) const PORT: u16 = 5202;
