//! Every operation in flight, and the meaning of the kernel's completions for it.
//!
//! Invariants:
//! - An entry is in the slab from before its queue entry is written until its terminal completion
//!   is read; for that time it owns all the memory and descriptors that the kernel uses for it.
//! - A completion finds an entry only with the entry's own generation.
//! - A chain exists while one of its members has no result; `held` is set only during that time.
//!
//! ```text
//!   result, no MORE               -> removed, memory returned
//!   result, MORE                  -> stays (zero-copy send, multishot poll)
//!   notification                  -> removed, memory returned (zero-copy send)
//!   ECANCELED in a chain, culprit
//!     not known yet               -> held until the culprit is known
//! ```

use std::collections::VecDeque;

use io_uring::{cqueue, squeue};
use slab::Slab;

use crate::chain::{Keys, Link, Links};
use crate::completion::{Completion, Outcome};
use crate::encode::Aside;
use crate::error::Errno;
use crate::key::{Generation, Key};
use crate::op::Op;

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
    /// Storage of completed vectored sends.
    spare: Vec<Aside>,
    /// Completions that found no entry. The kernel sends none, with one exception: a notification
    /// may still follow a zero-copy send that never started.
    pub(crate) stale: u64,
}

/// The action that follows a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    Nothing,
    /// An operation that was to be cancelled before it had started has started now.
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

    /// Adds an operation and writes its queue entry. `aside` is the recipient of a message.
    pub(crate) fn insert(&mut self, op: Op, token: u64, aside: Aside) -> (Key, squeue::Entry) {
        self.insert_linked(op, token, aside, None, false)
    }

    /// Begins a chain of `members` operations, which are inserted next.
    pub(crate) fn begin_chain(&mut self, members: usize) -> u32 {
        self.chains.insert(Links::new(members)) as u32
    }

    /// Adds the next member of a chain. `linked`: another one follows.
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
        if linked { (key, entry.flags(squeue::Flags::IO_LINK)) } else { (key, entry) }
    }

    pub(crate) fn chain_keys(&self, chain: u32) -> Keys {
        self.chains[chain as usize].keys
    }

    /// Marks an operation as to be cancelled. False if it has ended or was marked already.
    pub(crate) fn mark_cancelled(&mut self, key: Key) -> bool {
        match self.get_mut(key) {
            Some(entry) if !entry.cancelled => {
                entry.cancelled = true;
                true
            }
            _ => false,
        }
    }

    /// Suppresses all further reports of an operation.
    pub(crate) fn mark_orphan(&mut self, key: Key) {
        if let Some(entry) = self.get_mut(key) {
            entry.orphan = true;
        }
    }

    /// The kernel found nothing to cancel under this [`Key::payload`]: the operation's completion
    /// is pending, or it is a later member of a chain, or it is between two of the kernel's lists
    /// and the cancellation is worth repeating.
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

    /// Applies one completion. Reports for the user are appended to `reports`.
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

    /// The number of operations in flight, by kind.
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
        let sqe = entry.op.encode(&mut entry.aside, linked).user_data(key.user_data());
        (key, sqe)
    }

    fn get_mut(&mut self, key: Key) -> Option<&mut Entry> {
        self.entries.get_mut(key.slot()).filter(|entry| entry.key == key)
    }

    /// Processes the result of a chain's member and finds the member at fault.
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
                // Either the kernel refuses a later member, whose result is still to come, or it
                // cancelled this one of its own accord.
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

    /// `failed` broke the chain: the held members did not start because of it.
    fn release_held(&mut self, keys: &Keys, failed: Key, reports: &mut VecDeque<Completion>) {
        for &key in keys.iter() {
            if let Some(held) = self.get_mut(key).and_then(|entry| entry.held.take()) {
                self.report(key, Outcome::NotStarted { failed }, held.more, reports);
            }
        }
    }

    /// Every member has its result, some are held and none failed: the first held one is at fault.
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

    /// Reports to the owner, unless it is gone. Without `more` this ends the operation.
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
            reports.push_back(Completion { key, token, outcome, memory, last: !more });
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
    /// The result has come; only the notification is missing.
    has_result: bool,
}

/// A result ECANCELED that waits until the chain's culprit is known.
#[derive(Clone, Copy, Debug)]
struct Held {
    /// A notification follows.
    more: bool,
}

impl Entry {
    /// The kernel cancels operations in its worker threads with a signal. The resulting errno
    /// depends on the operation; a splice even returns the kernel's internal numbers.
    fn interrupted(&self, result: i32) -> i32 {
        match -result {
            libc::EINTR | ERESTARTSYS..=ERESTARTNOHAND | ERESTART_RESTARTBLOCK => {
                if self.cancelled { -libc::ECANCELED } else { -libc::EINTR }
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

/// How often a cancellation that misses a started operation is repeated. One repetition has been
/// enough; the limit keeps a mistake here from becoming a busy loop.
const CANCEL_MISSES_MAX: u8 = 8;

/// Headers of vectored sends that are kept for reuse.
const SPARE_MAX: usize = 32;

/// "Try again after the signal", of several kinds (include/linux/errno.h): internal to the kernel.
const ERESTARTSYS: i32 = 512;
const ERESTARTNOHAND: i32 = 514;
const ERESTART_RESTARTBLOCK: i32 = 516;

/// `IORING_NOTIF_USAGE_ZC_COPIED` (linux/io_uring.h).
const NOTIF_USAGE_ZC_COPIED: u32 = 1 << 31;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Bytes;
    use crate::op::Fd;

    /// IORING_CQE_F_MORE and IORING_CQE_F_NOTIF (linux/io_uring.h).
    const MORE: u32 = 1 << 1;
    const NOTIF: u32 = 1 << 3;

    fn send_zc() -> Op {
        Op::send_zc(Fd::Fixed(0), Bytes::with_capacity(8)).wait_all()
    }

    fn chain_of(table: &mut Table, members: usize) -> Keys {
        let chain = table.begin_chain(members);
        for at in 0..members {
            let linked = at + 1 < members;
            table.insert_member(chain, send_zc(), at as u64, Aside::Nothing, linked);
        }
        table.chain_keys(chain)
    }

    fn complete(table: &mut Table, key: Key, result: i32, flags: u32) -> Vec<(u64, Outcome, bool)> {
        let mut reports = VecDeque::new();
        let cqe = Cqe { user_data: key.user_data(), result, flags };
        table.complete(key, cqe, &mut reports);
        for report in &reports {
            assert_eq!(report.memory.is_some(), report.last);
        }
        reports.iter().map(|report| (report.token, report.outcome, report.last)).collect()
    }

    #[test]
    fn old_key_finds_no_operation_in_its_slot() {
        let mut table = Table::new(1);
        let (old, _) = table.insert(send_zc(), 0, Aside::Nothing);
        assert_eq!(complete(&mut table, old, 8, 0), [(0, Outcome::Done(8), true)]);
        let (new, _) = table.insert(send_zc(), 1, Aside::Nothing);
        assert_eq!(new.slot(), old.slot());
        assert!(complete(&mut table, old, 0, 0).is_empty());
        assert!(!table.mark_cancelled(old));
        assert_eq!(table.cancel_missed(old.payload()), Next::Nothing);
        assert_eq!((table.len(), table.stale), (1, 1));
    }

    #[test]
    fn canceled_members_are_held_until_the_culprit_is_known() {
        let mut table = Table::new(4);
        let keys = chain_of(&mut table, 4);
        assert!(complete(&mut table, keys[0], -libc::ECANCELED, MORE).is_empty());
        assert!(complete(&mut table, keys[0], 0, NOTIF).is_empty(), "the member is held back");
        assert!(complete(&mut table, keys[1], -libc::ECANCELED, MORE).is_empty());
        let not_started = Outcome::NotStarted { failed: keys[2] };
        assert_eq!(
            complete(&mut table, keys[2], -libc::EINVAL, 0),
            [
                (0, not_started, true),
                (1, not_started, false),
                (2, Outcome::Failed(Errno::new(libc::EINVAL)), true)
            ]
        );
        assert_eq!(complete(&mut table, keys[3], -libc::ECANCELED, 0), [(3, not_started, true)]);
        let released = Outcome::Released { copied: true };
        let usage = NOTIF_USAGE_ZC_COPIED as i32;
        assert_eq!(complete(&mut table, keys[1], usage, NOTIF), [(1, released, true)]);
        assert_eq!((table.len(), table.chains.len(), table.stale), (0, 0, 0));
    }

    #[test]
    fn chain_cancelled_by_the_kernel_blames_its_first_member() {
        let mut table = Table::new(3);
        let keys = chain_of(&mut table, 3);
        assert_eq!(complete(&mut table, keys[0], 8, 0), [(0, Outcome::Done(8), true)]);
        assert!(complete(&mut table, keys[1], -libc::ECANCELED, 0).is_empty());
        let not_started = Outcome::NotStarted { failed: keys[1] };
        assert_eq!(
            complete(&mut table, keys[2], -libc::ECANCELED, 0),
            [(1, Outcome::Failed(Errno::CANCELED), true), (2, not_started, true)]
        );
        assert_eq!((table.len(), table.chains.len()), (0, 0));
    }

    #[test]
    fn short_zero_copy_member_breaks_the_chain_before_its_notification() {
        let mut table = Table::new(2);
        let keys = chain_of(&mut table, 2);
        let short = Outcome::Short { done: 3, wanted: 8 };
        assert_eq!(complete(&mut table, keys[0], 3, MORE), [(0, short, false)]);
        let not_started = Outcome::NotStarted { failed: keys[0] };
        assert_eq!(complete(&mut table, keys[1], -libc::ECANCELED, 0), [(1, not_started, true)]);
        let released = Outcome::Released { copied: false };
        assert_eq!(complete(&mut table, keys[0], 0, NOTIF), [(0, released, true)]);
        assert_eq!((table.len(), table.chains.len()), (0, 0));
    }

    #[test]
    fn missed_cancellation_is_repeated_only_after_the_start_and_up_to_a_limit() {
        let mut table = Table::new(3);
        let keys = chain_of(&mut table, 2);
        assert!(table.mark_cancelled(keys[1]));
        assert_eq!(
            table.cancel_missed(keys[1].payload()),
            Next::Nothing,
            "an earlier member has not ended"
        );
        let mut reports = VecDeque::new();
        let cqe = Cqe { user_data: keys[0].user_data(), result: 8, flags: 0 };
        assert_eq!(table.complete(keys[0], cqe, &mut reports), Next::Cancel(keys[1]));
        for _ in 0..CANCEL_MISSES_MAX {
            assert_eq!(table.cancel_missed(keys[1].payload()), Next::Cancel(keys[1]));
        }
        assert_eq!(table.cancel_missed(keys[1].payload()), Next::Nothing);
        complete(&mut table, keys[1], 8, MORE);
        assert_eq!(
            table.cancel_missed(keys[1].payload()),
            Next::Nothing,
            "the operation has a result"
        );
    }

    #[test]
    fn interrupted_worker_reports_ecanceled() {
        let mut table = Table::new(1);
        for raw in [libc::EINTR, 512, 513, 514, 516] {
            for (cancelled, errno) in [(true, libc::ECANCELED), (false, libc::EINTR)] {
                let (key, _) = table.insert(send_zc(), 0, Aside::Nothing);
                assert!(!cancelled || table.mark_cancelled(key));
                let outcome = Outcome::Failed(Errno::new(errno));
                assert_eq!(complete(&mut table, key, -raw, 0), [(0, outcome, true)]);
            }
        }
    }
}
