//! Linked operations: each starts when the one before it has succeeded.
//!
//! A chain goes to the kernel as a whole or not at all. When a member fails, or is
//! [short](crate::Outcome::Short), that member says so, and every later one is
//! [`NotStarted`](crate::Outcome::NotStarted) and names it. The kernel itself only says ECANCELED, and
//! to *earlier* members too when it refuses a later one outright; `Links` finds out whose fault it was.

use std::ops::Deref;

use crate::key::Key;
use crate::op::Op;

/// Members of a chain at most. The longest one in sight is a request with the receives of its answer's
/// header and page; the rest is room.
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

    /// Its members.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether it has none. An empty chain is submitted as nothing at all.
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

/// How far a submitted chain has come.
#[derive(Debug)]
pub(crate) struct Links {
    pub(crate) keys: Keys,
    /// Members without a result yet.
    pub(crate) outstanding: u8,
    /// Members that succeeded; they are the first ones. The next one may have started.
    pub(crate) succeeded: u8,
    /// The first member that failed or was short: it broke the chain.
    pub(crate) failed: Option<Key>,
}

impl Links {
    pub(crate) fn new(members: usize) -> Links {
        Links { keys: Keys::EMPTY, outstanding: members as u8, succeeded: 0, failed: None }
    }
}

/// Where an operation stands in its chain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    /// Index of its [`Links`].
    pub(crate) chain: u32,
    /// Its place, from 0.
    pub(crate) position: u8,
}
