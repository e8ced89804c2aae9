//! The source of the guest's faults: its userfaultfd, and its hand-over to umem.
//!
//! - [`uffd`]: the ioctls and events of a userfaultfd
//! - [`handoff`]: the message by which the guest side hands over userfaultfd and RAM file
//! - [`open`]: opening a userfaultfd for memory of this process
//! - [`own`]: a userfaultfd for memory of this process, where umem is a part of the guest side

pub(crate) mod handoff;
pub(crate) mod open;
pub(crate) mod own;
pub(crate) mod pagemap;
pub(crate) mod uffd;
