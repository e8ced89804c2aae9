//! Linked operations: each starts when the one before it has succeeded.
//!
//! A chain goes to the kernel as a whole or not at all. When a member fails, or is
//! [short](crate::Outcome::Short), its completion carries the cause, and every later member is
//! [`NotStarted`](crate::Outcome::NotStarted) and names the failed one. The kernel itself only
//! reports ECANCELED, also for *earlier* members when it refuses a later one outright; `Links`
//! finds the member at fault.

use std::ops::Deref;

use crate::key::Key;
use crate::op::Op;

/// Most members of a chain. The longest chain in use is a request with the receives of its answer's
/// header and page; the rest is reserve.
pub const CHAIN_MAX: usize = 16;

/// Operations to run one after the other.
#[derive(Debug, Default)]
pub struct Chain {
    members: Vec<(Op, u64)>,
}

impl Chain {
    /// An empty chain. [`Ring::chain`](crate::Ring::chain) makes one without allocating.
    pub fn new() -> Chain {
        Chain::default()
    }

    /// Adds an operation that starts when all before it have succeeded.
    #[must_use]
    pub fn then(mut self, op: Op, token: u64) -> Chain {
        self.members.push((op, token));
        self
    }

    /// The number of members.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether the chain is empty. Submitting an empty chain submits nothing.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// The operations and their tokens, in order.
    pub fn into_members(self) -> Vec<(Op, u64)> {
        self.members
    }

    pub(crate) fn from_storage(members: Vec<(Op, u64)>) -> Chain {
        debug_assert!(members.is_empty());
        Chain { members }
    }

    pub(crate) fn members(&self) -> &[(Op, u64)] {
        &self.members
    }
}

/// The keys of a submitted chain, in order.
#[derive(Clone, Copy, Debug)]
pub struct Keys {
    keys: [Key; CHAIN_MAX],
    len: u8,
}

impl Keys {
    pub(crate) const EMPTY: Keys = Keys { keys: [Key::NONE; CHAIN_MAX], len: 0 };

    pub(crate) fn push(&mut self, key: Key) {
        self.keys[usize::from(self.len)] = key;
        self.len += 1;
    }
}

impl Deref for Keys {
    type Target = [Key];

    fn deref(&self) -> &[Key] {
        &self.keys[..usize::from(self.len)]
    }
}

/// The progress of a submitted chain.
#[derive(Debug)]
pub(crate) struct Links {
    pub(crate) keys: Keys,
    /// Members without a result yet.
    pub(crate) outstanding: u8,
    /// Members that succeeded: the first ones. The next one may have started.
    pub(crate) succeeded: u8,
    /// The first member that failed or was short: it broke the chain.
    pub(crate) failed: Option<Key>,
}

impl Links {
    pub(crate) fn new(members: usize) -> Links {
        Links { keys: Keys::EMPTY, outstanding: members as u8, succeeded: 0, failed: None }
    }
}

/// An operation's place in its chain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    /// Index of its [`Links`].
    pub(crate) chain: u32,
    /// The place, from 0.
    pub(crate) position: u8,
}
