//! Every operation in flight, and what the kernel's completions mean for it.
//!
//! Invariants:
//! - An entry is in the slab from before its queue entry is written until its terminal completion is
//!   read; for that time it owns all the memory and descriptors that the kernel uses for it.
//! - A completion finds an entry only with the entry's own generation.
//! - A chain exists while one of its members has no result; `held` is set only meanwhile.
//!
//! ```text
//!   result, no MORE               -> gone, memory back
//!   result, MORE                  -> stays (zero-copy send, multishot poll)
//!   notification                  -> gone, memory back (zero-copy send)
//!   ECANCELED in a chain, culprit
//!     not known yet               -> held, until it is
//! ```

use std::collections::VecDeque;

use io_uring::{cqueue, squeue};
use slab::Slab;

use crate::chain::{Keys, Link, Links};
use crate::completion::{Completion, Outcome};
use crate::error::Errno;
use crate::key::{Generation, Key};
use crate::op::{Aside, Op};

/// One completion queue entry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cqe {
    pub(crate) user_data: u64,
    pub(crate) result: i32,
    pub(crate) flags: u32,
}

/// The operations in flight of one ring.
#[derive(Debug)]
pub(crate) struct Table {
    entries: Slab<Entry>,
    chains: Slab<Links>,
    generation: Generation,
    ops_max: u32,
    /// Storage of vectored sends that are over.
    spare: Vec<Aside>,
    /// Completions that found no entry. The kernel has none to send, but for one: a zero-copy send
    /// that never started may still be followed by a notification.
    pub(crate) stale: u64,
}

/// What is left to do after a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    Nothing,
    /// This operation was to be cancelled before it had started; it has started now.
    Cancel(Key),
}

impl Table {
    pub(crate) fn new(ops_max: u32) -> Table {
        Table {
            entries: Slab::with_capacity(ops_max as usize),
            chains: Slab::new(),
            generation: Generation::default(),
            ops_max,
            spare: Vec::new(),
            stale: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn room(&self) -> usize {
        self.ops_max as usize - self.entries.len()
    }

    /// Takes an operation in and writes its queue entry. `aside` is the recipient of a message.
    pub(crate) fn insert(&mut self, op: Op, token: u64, aside: Aside) -> (Key, squeue::Entry) {
        self.insert_linked(op, token, aside, None, false)
    }

    /// A chain that `members` operations are then inserted into.
    pub(crate) fn begin_chain(&mut self, members: usize) -> u32 {
        self.chains.insert(Links::new(members)) as u32
    }

    /// Takes the next member of a chain in. `linked`: another one follows.
    pub(crate) fn insert_member(
        &mut self,
        chain: u32,
        op: Op,
        token: u64,
        aside: Aside,
        linked: bool,
    ) -> (Key, squeue::Entry) {
        let position = self.chains[chain as usize].keys.len() as u8;
        let link = Link { chain, position };
        let (key, entry) = self.insert_linked(op, token, aside, Some(link), linked);
        self.chains[chain as usize].keys.push(key);
        if linked {
            (key, entry.flags(squeue::Flags::IO_LINK))
        } else {
            (key, entry)
        }
    }

    pub(crate) fn chain_keys(&self, chain: u32) -> Keys {
        self.chains[chain as usize].keys
    }

    /// Marks it as to be cancelled. False if it is no longer there or was marked already.
    pub(crate) fn mark_cancelled(&mut self, key: Key) -> bool {
        match self.get_mut(key) {
            Some(entry) if !entry.cancelled => {
                entry.cancelled = true;
                true
            }
            _ => false,
        }
    }

    /// Nothing more is reported about it.
    pub(crate) fn mark_orphan(&mut self, key: Key) {
        if let Some(entry) = self.get_mut(key) {
            entry.orphan = true;
        }
    }

    /// The kernel found nothing to cancel under this [`Key::payload`]: the operation's completion is on
    /// its way, or it is a later member of a chain, or it is just between two of the kernel's lists and
    /// worth another try.
    pub(crate) fn cancel_missed(&mut self, payload: u64) -> Next {
        let slot = payload as u32 as usize;
        let started = match self.entries.get(slot).and_then(|entry| entry.link) {
            Some(link) => self.chains[link.chain as usize].succeeded >= link.position,
            None => true,
        };
        match self.entries.get_mut(slot) {
            Some(entry)
                if entry.key.payload() == payload
                    && started
                    && !entry.has_result
                    && entry.held.is_none()
                    && entry.cancel_misses < CANCEL_MISSES_MAX =>
            {
                entry.cancel_misses += 1;
                Next::Cancel(entry.key)
            }
            _ => Next::Nothing,
        }
    }

    /// Applies one completion. What it means for the user is appended to `reports`.
    pub(crate) fn complete(
        &mut self,
        key: Key,
        cqe: Cqe,
        reports: &mut VecDeque<Completion>,
    ) -> Next {
        let more = cqueue::more(cqe.flags);
        let Some(entry) = self.get_mut(key) else {
            self.stale += 1;
            return Next::Nothing;
        };
        if cqueue::notif(cqe.flags) {
            if let Some(held) = &mut entry.held {
                held.more = false;
                return Next::Nothing;
            }
            let copied = cqe.result as u32 & NOTIF_USAGE_ZC_COPIED != 0;
            self.report(key, Outcome::Released { copied }, false, reports);
            return Next::Nothing;
        }
        entry.has_result = !entry.op.is_multishot();
        let result = entry.interrupted(cqe.result);
        match entry.link.take() {
            None => {
                let outcome = entry.outcome(result);
                self.report(key, outcome, more, reports);
                Next::Nothing
            }
            Some(link) => self.complete_member(key, link, result, more, reports),
        }
    }

    /// How many of each operation are in flight.
    pub(crate) fn counts(&self) -> Vec<(&'static str, usize)> {
        let mut counts: Vec<(&str, usize)> = Vec::new();
        for (_, entry) in &self.entries {
            let name = entry.op.name();
            match counts.iter_mut().find(|(other, _)| *other == name) {
                Some((_, count)) => *count += 1,
                None => counts.push((name, 1)),
            }
        }
        counts
    }

    fn insert_linked(
        &mut self,
        op: Op,
        token: u64,
        aside: Aside,
        link: Option<Link>,
        linked: bool,
    ) -> (Key, squeue::Entry) {
        assert!(self.room() > 0, "the caller has made sure of room");
        let aside = match (&op, aside) {
            (Op::SendVectored { .. }, Aside::Nothing) => self.spare.pop().unwrap_or_default(),
            (_, aside) => aside,
        };
        self.generation = self.generation.next();
        let vacant = self.entries.vacant_entry();
        let key = Key::new(vacant.key() as u32, self.generation);
        let entry = vacant.insert(Entry {
            key,
            token,
            wanted: op.wanted(linked),
            op,
            aside,
            link,
            held: None,
            orphan: false,
            cancelled: false,
            cancel_misses: 0,
            has_result: false,
        });
        let sqe = entry
            .op
            .encode(&mut entry.aside, linked)
            .user_data(key.user_data());
        (key, sqe)
    }

    fn get_mut(&mut self, key: Key) -> Option<&mut Entry> {
        self.entries
            .get_mut(key.slot())
            .filter(|entry| entry.key == key)
    }

    /// The result of a chain's member: whose fault is it?
    fn complete_member(
        &mut self,
        key: Key,
        link: Link,
        result: i32,
        more: bool,
        reports: &mut VecDeque<Completion>,
    ) -> Next {
        let entry = &mut self.entries[key.slot()];
        let links = &mut self.chains[link.chain as usize];
        links.outstanding -= 1;
        let outcome = match (result == -libc::ECANCELED, links.failed) {
            (true, Some(failed)) => Outcome::NotStarted { failed },
            (true, None) if !entry.cancelled => {
                // Either the kernel refuses a later member, which is yet to say so, or it cancelled
                // this one of its own accord.
                entry.held = Some(Held { more });
                if links.outstanding == 0 {
                    self.blame_first_held(link.chain, reports);
                }
                return Next::Nothing;
            }
            _ => entry.outcome(result),
        };
        let broke = matches!(outcome, Outcome::Failed(_) | Outcome::Short { .. });
        if broke && links.failed.is_none() {
            links.failed = Some(key);
            let keys = links.keys;
            self.release_held(&keys, key, reports);
        }
        self.report(key, outcome, more, reports);
        self.advance(link, broke)
    }

    /// After a member's result: the chain ends, or its next member has started.
    fn advance(&mut self, link: Link, broke: bool) -> Next {
        let links = &mut self.chains[link.chain as usize];
        if links.outstanding == 0 {
            self.chains.remove(link.chain as usize);
            return Next::Nothing;
        }
        if broke || links.failed.is_some() {
            return Next::Nothing;
        }
        links.succeeded = link.position + 1;
        let next = links.keys[usize::from(links.succeeded)];
        match self.get_mut(next) {
            Some(entry) if entry.cancelled => Next::Cancel(next),
            _ => Next::Nothing,
        }
    }

    /// `failed` broke the chain: the members that were held did not start because of it.
    fn release_held(&mut self, keys: &Keys, failed: Key, reports: &mut VecDeque<Completion>) {
        for &key in keys.iter() {
            if let Some(held) = self.get_mut(key).and_then(|entry| entry.held.take()) {
                self.report(key, Outcome::NotStarted { failed }, held.more, reports);
            }
        }
    }

    /// Every member has its result, some are held and none failed: the first of those is at fault.
    fn blame_first_held(&mut self, chain: u32, reports: &mut VecDeque<Completion>) {
        let keys = self.chains.remove(chain as usize).keys;
        let first = keys.iter().find_map(|&key| {
            let held = self.get_mut(key)?.held.take()?;
            Some((key, held))
        });
        if let Some((first, held)) = first {
            self.report(first, Outcome::Failed(Errno::CANCELED), held.more, reports);
            self.release_held(&keys, first, reports);
        }
    }

    /// Reports to the owner, if there still is one. Without `more` this ends the operation.
    fn report(
        &mut self,
        key: Key,
        outcome: Outcome,
        more: bool,
        reports: &mut VecDeque<Completion>,
    ) {
        let entry = &self.entries[key.slot()];
        let (token, orphan) = (entry.token, entry.orphan);
        let memory = if more { None } else { self.remove(key) };
        if !orphan {
            reports.push_back(Completion {
                key,
                token,
                outcome,
                memory,
                last: !more,
            });
        }
    }

    fn remove(&mut self, key: Key) -> Option<crate::Memory> {
        let entry = self.entries.remove(key.slot());
        if matches!(entry.aside, Aside::Vectored(_)) && self.spare.len() < SPARE_MAX {
            self.spare.push(entry.aside);
        }
        entry.op.into_memory()
    }
}

impl Default for Table {
    fn default() -> Table {
        Table::new(0)
    }
}

/// One operation in flight.
#[derive(Debug)]
struct Entry {
    key: Key,
    token: u64,
    op: Op,
    aside: Aside,
    /// See [`Op::wanted`].
    wanted: Option<u32>,
    /// Its chain, until it has its result.
    link: Option<Link>,
    held: Option<Held>,
    orphan: bool,
    cancelled: bool,
    cancel_misses: u8,
    /// Only its notification is to come.
    has_result: bool,
}

/// A result ECANCELED that waits for the chain's culprit.
#[derive(Clone, Copy, Debug)]
struct Held {
    /// A notification follows.
    more: bool,
}

impl Entry {
    /// The kernel cancels what runs in a worker thread by a signal. What the operation makes of it is
    /// its own affair; a splice lets even the kernel's internal numbers out.
    fn interrupted(&self, result: i32) -> i32 {
        match -result {
            libc::EINTR | ERESTARTSYS..=ERESTARTNOHAND | ERESTART_RESTARTBLOCK => {
                if self.cancelled {
                    -libc::ECANCELED
                } else {
                    -libc::EINTR
                }
            }
            _ => result,
        }
    }

    fn outcome(&self, result: i32) -> Outcome {
        if result < 0 {
            return match (&self.op, -result) {
                (Op::Timeout { .. }, libc::ETIME) => Outcome::Done(0),
                (_, errno) => Outcome::Failed(Errno::new(errno)),
            };
        }
        let done = result as u32;
        match self.wanted {
            Some(wanted) if done < wanted => Outcome::Short { done, wanted },
            _ => Outcome::Done(done),
        }
    }
}

/// How often a cancellation that misses a started operation is repeated. Once has been enough; the
/// limit keeps a mistake here from becoming a busy loop.
const CANCEL_MISSES_MAX: u8 = 8;

/// Headers of vectored sends that are kept for the next ones.
const SPARE_MAX: usize = 32;

/// "Try again after the signal", of several kinds (include/linux/errno.h); not meant to be seen outside
/// the kernel.
const ERESTARTSYS: i32 = 512;
const ERESTARTNOHAND: i32 = 514;
const ERESTART_RESTARTBLOCK: i32 = 516;

/// `IORING_NOTIF_USAGE_ZC_COPIED` (linux/io_uring.h).
const NOTIF_USAGE_ZC_COPIED: u32 = 1 << 31;
