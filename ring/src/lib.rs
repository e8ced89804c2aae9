//! io_uring for one thread at a time, without a protocol.
//!
//! # Thread
//!
//! A [`Ring`] belongs to the thread that made it: it is set up with `SINGLE_ISSUER` and
//! `DEFER_TASKRUN`, and is neither `Send` nor `Sync`. Completions appear only during
//! [`Ring::enter`], and are read with [`Ring::next`] afterwards.
//!
//! ```no_run
//! # use umem_ring::{Config, Op, Ring, Wait};
//! # fn main() -> Result<(), umem_ring::Error> {
//! let mut ring = Ring::new(&Config::default())?;
//! ring.submit(Op::nop(), 7)?;
//! ring.enter(Wait::One)?;
//! while let Some(completion) = ring.next() {
//!     assert_eq!(completion.token, 7);
//! }
//! # Ok(()) }
//! ```
//!
//! Other threads reach a ring in two ways, both without a lock: from a ring of their own through
//! its [`Mailbox`] ([`Op::MsgRing`]), and without a ring through its [`Waker`].
//!
//! ```compile_fail
//! fn must_be_send<T: Send>() {}
//! must_be_send::<umem_ring::Ring>();
//! ```
//!
//! # Ownership
//!
//! The memory that an operation reads or writes ([`Memory`]) and the descriptor it uses ([`Fd`])
//! move into the ring's table with [`Ring::submit`] and stay there until the *terminal* completion,
//! the one with [`Completion::last`], which returns the memory. The kernel decides which completion
//! is terminal: for a zero-copy send it is the notification, or a result (also an error) that
//! announces none.
//!
//! A [`Key`] names one operation and never a later one in the same slot. [`Ring::orphan`] gives up
//! interest in an operation: nothing more is reported, and the table keeps the memory until the
//! terminal completion, and drops it then.
//!
//! # Limits
//!
//! At most [`Config::ops_max`] operations are in flight; one more is [`Rejected`], and returned. A
//! full submission queue is not an error: it is handed to the kernel, and submission goes on.
//!
//! # Shutdown
//!
//! [`Ring::close`] cancels everything, waits for every terminal completion, then closes the ring,
//! and then frees its memory. Memory of operations that do not end in time is leaked and reported,
//! because the kernel may still use it. Dropping a ring does the same within [`DROP_PATIENCE`],
//! without a report. Operations that were submitted and not yet entered are entered first.

mod chain;
mod completion;
mod driver;
mod encode;
mod error;
mod key;
mod mail;
mod memory;
mod op;
mod setup;
mod table;

pub use chain::{CHAIN_MAX, Chain, Keys};
pub use completion::{Completion, Outcome, TOKEN_MESSAGE, TOKEN_WAKE};
pub use driver::{DROP_PATIENCE, FILES_MAX, Ring, Wait};
pub use error::{Errno, Error};
pub use key::Key;
pub use mail::{Mailbox, Waker};
pub use memory::{Bytes, Memory, Span};
pub use op::{Fd, OPERATION_BYTES_MAX, Op, PIECES_MAX, Rejected};
pub use setup::{Config, OPS_MAX};
