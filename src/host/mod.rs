//! The guest's host process: whoever runs the vCPUs (QEMU, the demo's own guest, a program that umem is a part of).
//!
//! umem never touches a vCPU itself. It asks the monitor. All that depends on what kind of monitor that is is here; both
//! sides see only the trait and what has been found:
//! - [`monitor`]: what can be asked, and the answers
//! - [`kind`]: what a kind of monitor implements; [`registry`]: the kinds
//! - [`leaving`], [`arriving`]: how a guest is found, at the source and at the destination
//! - [`thread`]: the thread that waits for the monitor, so that nobody else has to
//! - [`embedder`]: a program that umem is a part of, in the monitor's place
//! - [`qmp`]: the QMP client
//! - [`qemu`]: what is asked of a QEMU, and what its configuration must look like
//! - [`maps`]: what its process has mapped, and the very files
//! - [`command`]: the monitor that `umem incoming … -- COMMAND` starts, with the preload object
//! - [`pieces`]: some of these one by one, for tests
//! - [`switchover`]: who has the guest run
//! - [`guest`]: the demo's guest, which speaks the same QMP

pub(crate) mod arriving;
pub(crate) mod command;
pub(crate) mod embedder;
pub mod guest;
pub(crate) mod kind;
pub(crate) mod leaving;
pub(crate) mod maps;
pub(crate) mod monitor;
#[doc(hidden)]
pub mod pieces;
pub(crate) mod qemu;
pub(crate) mod qmp;
pub(crate) mod registry;
pub(crate) mod switchover;
pub(crate) mod thread;
