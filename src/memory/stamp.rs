//! Detects changes of a file since its guest stopped.
//!
//! A stopped guest's RAM file, and a snapshot, must not change. A change shows in the file's
//! length, its modification time, and, for memory, its allocated size. A write through a mapping
//! shows only if its page was not mapped for writing: the guest's own mapping is the exception, and
//! the guest is stopped. Memory that QEMU frees for a balloon, and a hole that another process
//! punches, look the same; neither is right after the guest's stop. Holes that umem punches itself
//! (`--release-ram`) are recognised by their time and size.
//!
//! Changes of a file's name, owner or mode also change its change time (ctime), which is not
//! compared: all of those are allowed. A process that resets the modification time hides its
//! writes.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

use serde::{Deserialize, Serialize};

/// The attributes of a file at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    /// Allocated units of 512 bytes, for memory only: a disk's file system may count differently.
    blocks: Option<u64>,
}

impl Stamp {
    pub(crate) fn of(metadata: &Metadata, is_memory: bool) -> Stamp {
        Stamp {
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            blocks: is_memory.then(|| metadata.blocks()),
        }
    }

    /// How a later stamp shows a change of the file. The file may hold more than before, as reading
    /// a hole through a mapping allocates it.
    pub(crate) fn difference(&self, now: &Stamp) -> Option<String> {
        if let (Some(before), Some(now)) = (self.blocks, now.blocks)
            && now < before
        {
            let gone = (before - now) * 512;
            return Some(format!("{gone} bytes of it were freed (a hole was punched)"));
        }
        let is_modified = self.modified != now.modified;
        is_modified.then(|| "it was written to, truncated or punched".to_owned())
    }

    /// Whether the file lost more than `bytes` until the later stamp `now`.
    pub(crate) fn lost_more_than(&self, bytes: u64, now: &Stamp) -> bool {
        let (Some(before), Some(now)) = (self.blocks, now.blocks) else { return false };
        before.saturating_sub(now).saturating_mul(512) > bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_no_change_but_shrinking_and_writing_are() {
        let stamp = Stamp { modified: (5, 6), blocks: Some(80) };
        assert_eq!(stamp.difference(&stamp), None);
        assert_eq!(stamp.difference(&Stamp { blocks: Some(88), ..stamp }), None);
        let punched = stamp.difference(&Stamp { blocks: Some(72), ..stamp }).unwrap();
        assert!(punched.starts_with("4096 bytes"), "{punched}");
        assert!(stamp.difference(&Stamp { modified: (5, 7), ..stamp }).is_some());
    }
}
