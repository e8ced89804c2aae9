//! Is a file still as it was when its guest stopped?
//!
//! A stopped guest's RAM file, and a snapshot, change no more. What shows that one has: its length, the time of
//! its last modification, and, in memory, how much of it there is. A write through a mapping shows only where its page
//! was not mapped for writing: that is the guest's own way, which stands still. What QEMU gives back for a balloon,
//! and a hole that somebody else punches, look the same; from the guest's stop on neither is right. Holes that umem
//! punches itself (`--release-ram`) are told apart by when they are punched, and by their size.
//!
//! When a file's name, owner or mode change, so does the time of its last change (ctime), which is not looked at: all
//! of those are right. Whoever sets the time of its last modification back hides what he has done.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

use serde::{Deserialize, Serialize};

/// What a file said of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    /// Units of 512 bytes that it holds, where it is memory: a disk's file system may count as it likes.
    blocks: Option<u64>,
}

impl Stamp {
    pub(crate) fn of(metadata: &Metadata, is_memory: bool) -> Stamp {
        Stamp {
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            blocks: is_memory.then(|| metadata.blocks()),
        }
    }

    /// How a later one shows that the file is not what it was; it may hold more than before, as reading a hole
    /// through a mapping allocates it.
    pub(crate) fn difference(&self, now: &Stamp) -> Option<String> {
        if let (Some(before), Some(now)) = (self.blocks, now.blocks)
            && now < before
        {
            let gone = (before - now) * 512;
            return Some(format!("{gone} bytes of it were given back (a hole was punched)"));
        }
        let is_modified = self.modified != now.modified;
        is_modified.then(|| "it was written to, truncated or punched".to_owned())
    }

    /// Whether more was given back until a later one than so many bytes.
    pub(crate) fn lost_more_than(&self, bytes: u64, now: &Stamp) -> bool {
        let (Some(before), Some(now)) = (self.blocks, now.blocks) else { return false };
        before.saturating_sub(now).saturating_mul(512) > bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growing_is_no_change_and_shrinking_and_writing_are() {
        let stamp = Stamp { modified: (5, 6), blocks: Some(80) };
        assert_eq!(stamp.difference(&stamp), None);
        assert_eq!(stamp.difference(&Stamp { blocks: Some(88), ..stamp }), None);
        let punched = stamp.difference(&Stamp { blocks: Some(72), ..stamp }).unwrap();
        assert!(punched.starts_with("4096 bytes"), "{punched}");
        assert!(stamp.difference(&Stamp { modified: (5, 7), ..stamp }).is_some());
    }
}
