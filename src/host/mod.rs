//! The guest's host process: the process that runs the vCPUs (QEMU, the demo's own guest, a program that embeds umem).
//!
//! umem does not control a vCPU itself: it asks the monitor. Everything that depends on the kind of monitor is here;
//! both sides see only the trait and the guest that was found:
//! - [`monitor`]: the questions to a monitor, and their answers
//! - [`kind`]: what a kind of monitor implements; [`registry`]: the kinds
//! - [`leaving`], [`arriving`]: how a guest is found, at the source and at the destination
//! - [`thread`]: the thread that waits for the monitor, so that the control thread does not
//! - [`embedder`]: a program that embeds umem, in the monitor's place
//! - [`qmp`]: the QMP client
//! - [`qemu`]: the commands to a QEMU, and the requirements on its configuration
//! - [`maps`]: the mappings of its process, and the mapped files
//! - [`command`]: the monitor that `umem incoming … -- COMMAND` starts, with the preload object
//! - [`pieces`]: single pieces of a move, for tests
//! - [`switchover`]: which side starts the guest
//! - [`guest`]: the demo's guest, which implements the same QMP commands

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
