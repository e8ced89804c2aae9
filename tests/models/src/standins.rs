//! The dependencies of the files under test.

pub(crate) mod error {
    #[derive(Debug)]
    pub(crate) struct Error(String);

    pub(crate) type Result<T> = std::result::Result<T, Error>;

    impl Error {
        pub(crate) fn protocol(lane: impl Into<String>, what: impl Into<String>) -> Error {
            Error(format!("{}: {}", lane.into(), what.into()))
        }
    }
}

pub(crate) mod words {
    use std::ops::Deref;

    use crate::sync::AtomicU64;

    /// Of one process.
    pub(crate) struct AtomicWords(Box<[AtomicU64]>);

    impl AtomicWords {
        pub(crate) fn zeroed(words: u64) -> AtomicWords {
            AtomicWords((0..words).map(|_| AtomicU64::new(0)).collect())
        }
    }

    impl Deref for AtomicWords {
        type Target = [AtomicU64];

        fn deref(&self) -> &[AtomicU64] {
            &self.0
        }
    }
}

pub(crate) mod region {
    use crate::error::Result;
    use crate::memory::kind::Backing;
    use crate::sync::AtomicU32;
    use crate::sync::Ordering::SeqCst;

    /// A RAM file of a few pages of 4 KiB, each marked zero or not. The kernel locks a page for each operation on it.
    pub(crate) struct RamFile {
        pub(crate) backing: Backing,
        pages: Vec<AtomicU32>,
    }

    impl RamFile {
        pub(crate) fn of_zeroes(pages: u64) -> RamFile {
            let pages = (0..pages).map(|_| AtomicU32::new(0)).collect();
            RamFile { backing: Backing::Small, pages }
        }

        pub(crate) fn write(&self, page: usize) {
            self.pages[page].store(1, SeqCst);
        }

        pub(crate) fn is_zero(&self, page: usize) -> bool {
            self.pages[page].load(SeqCst) == 0
        }

        pub(crate) fn discard(&self, offset: u64, bytes: u64) -> Result<()> {
            for page in offset >> 12..(offset + bytes) >> 12 {
                self.pages[page as usize].store(0, SeqCst);
            }
            Ok(())
        }

        /// For the mark of a file that is being moved, which no thread here reads.
        pub(crate) fn end_move(&self) {}

        pub(crate) fn next_data(&self, _: u64) -> Result<Option<u64>> {
            unreachable!("only private memory does this")
        }

        pub(crate) fn next_data_in(&self, _: std::ops::Range<u64>) -> Result<Option<u64>> {
            unreachable!("only private memory does this")
        }
    }
}
