//! Data and holes of a RAM file.
//!
//! SEEK_DATA finds them, with two flaws. It moves the position of an open file, which other
//! processes may share: the position is restored. (Opening such a file again would lose the locks
//! on it.) And hugetlbfs reports all of a file as data: there the file is read, which fills no
//! hole, whereas touching a mapping would allocate a huge page. Pages of zeroes count as holes
//! then.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Mutex, PoisonError};

/// Size of the first read of a huge page, where most pages have data, and of later reads.
const PROBE_BYTES: usize = 4096;
const READ_BYTES: usize = 64 << 10;

/// The first data of the range; none if all of it is a hole. `is_shared`: other processes share the
/// open file.
pub(super) fn next(file: &File, range: Range<u64>, is_shared: bool) -> io::Result<Option<u64>> {
    // One thread at a time: another would restore a position in use.
    static TURN: Mutex<()> = Mutex::new(());
    let found = if is_shared {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let position = seek(file, 0, libc::SEEK_CUR)?;
        let found = seek(file, range.start, libc::SEEK_DATA);
        seek(file, position, libc::SEEK_SET)?;
        found
    } else {
        seek(file, range.start, libc::SEEK_DATA)
    };
    match found {
        Ok(found) => Ok(Some(found).filter(|&found| found < range.end)),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The same for a file in huge pages of `1 << page_shift` bytes.
pub(super) fn next_huge(file: &File, range: Range<u64>, page_shift: u8) -> io::Result<Option<u64>> {
    let metadata = file.metadata()?;
    if range.is_empty() || metadata.blocks() == 0 {
        return Ok(None);
    }
    if metadata.blocks().saturating_mul(512) >= metadata.len() {
        return Ok(Some(range.start));
    }
    let page_bytes = 1u64 << page_shift;
    let mut buffer = Vec::new();
    for page in (range.start >> page_shift)..range.end.div_ceil(page_bytes) {
        let start = page << page_shift;
        if has_data(file, start..start + page_bytes, &mut buffer)? {
            return Ok(Some(start.max(range.start)));
        }
    }
    Ok(None)
}

fn has_data(file: &File, page: Range<u64>, buffer: &mut Vec<u8>) -> io::Result<bool> {
    let (mut at, mut most) = (page.start, PROBE_BYTES);
    while at < page.end {
        let left = usize::try_from(page.end - at).map_or(most, |left| left.min(most));
        buffer.resize(left, 0);
        let count = match file.read_at(buffer, at) {
            Ok(0) => return Ok(false),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        // With `any` the compiler would compare one byte at a time.
        if buffer[..count].iter().fold(0, |all, byte| all | byte) != 0 {
            return Ok(true);
        }
        (at, most) = (at + count as u64, READ_BYTES);
    }
    Ok(false)
}

fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<u64> {
    let offset = i64::try_from(offset).expect("file offsets fit");
    // SAFETY: lseek touches no memory; the file is open for as long as it is borrowed.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    u64::try_from(found).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom};

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn file() -> File {
        let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(64 << 10).unwrap();
        file.write_all_at(&[1], 16 << 10).unwrap();
        file.write_all_at(&[1], 40 << 10).unwrap();
        file
    }

    #[test]
    fn shared_file_position_is_restored() {
        let mut theirs = file();
        theirs.seek(SeekFrom::Start(12345)).unwrap();
        let shared = theirs.try_clone().unwrap();
        assert_eq!(next(&shared, 0..64 << 10, true).unwrap(), Some(16 << 10));
        assert_eq!(next(&shared, 48 << 10..64 << 10, true).unwrap(), None);
        assert_eq!(theirs.stream_position().unwrap(), 12345);
        assert_eq!(next(&shared, 20 << 10..64 << 10, true).unwrap(), Some(40 << 10));
        assert_eq!(theirs.stream_position().unwrap(), 12345);
    }

    #[test]
    fn threads_restore_the_file_position_in_turn() {
        let mut theirs = file();
        theirs.seek(SeekFrom::Start(12345)).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        assert_eq!(next(&theirs, 0..64 << 10, true).unwrap(), Some(16 << 10));
                    }
                });
            }
        });
        assert_eq!(theirs.stream_position().unwrap(), 12345);
    }

    #[test]
    fn data_search_stays_within_the_range() {
        let file = file();
        assert_eq!(next(&file, 0..16 << 10, false).unwrap(), None);
        assert_eq!(next(&file, 0..20 << 10, false).unwrap(), Some(16 << 10));
        // Treats the pages as large, so that the file is read.
        assert_eq!(next_huge(&file, 0..16 << 10, 13).unwrap(), None);
        assert_eq!(next_huge(&file, 0..64 << 10, 13).unwrap(), Some(16 << 10));
        assert_eq!(next_huge(&file, 18 << 10..64 << 10, 13).unwrap(), Some(18 << 10));
        assert_eq!(next_huge(&file, 24 << 10..64 << 10, 13).unwrap(), Some(40 << 10));
        assert_eq!(next_huge(&file, 48 << 10..64 << 10, 13).unwrap(), None);
        // Allocated and unwritten pages read as zeroes.
        file.write_all_at(&[0; 4096], 0).unwrap();
        assert_eq!(next_huge(&file, 0..16 << 10, 13).unwrap(), None);
        file.write_all_at(&[0; 64 << 10], 0).unwrap();
        assert_eq!(next_huge(&file, 0..16 << 10, 13).unwrap(), Some(0), "the whole range has data");
    }
}
