//! The source's side of the library.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use super::desk::{HostChannel, Open};
use super::handle::{Handle, check_address, check_connections, check_lanes, handle};
use super::{Event, Stats};
use crate::error::{Context, Error, Result};
use crate::host::embedder::LinkOrder;
use crate::host::monitor::Answer;
use crate::memory::check_pages;
use crate::memory::region::RamFile;
use crate::source::Precopy;
use crate::source::embedded::{OutgoingConfig, Way, send};
use crate::transport::uri::Uri;

/// The memory that a source moves, and its destination.
pub struct SourceSetup {
    files: Vec<RamFile>,
    way: Option<Way>,
    postcopy: bool,
    precopy: Option<Precopy>,
    has_log: bool,
    recovers: Option<bool>,
    checksum: bool,
    cores: Vec<usize>,
}

impl SourceSetup {
    /// An empty setup; postcopy is on.
    #[expect(clippy::new_without_default, reason = "an empty setup is no default of anything")]
    pub fn new() -> SourceSetup {
        SourceSetup {
            files: Vec::new(),
            way: None,
            postcopy: true,
            precopy: None,
            has_log: false,
            recovers: None,
            checksum: false,
            cores: Vec::new(),
        }
    }

    /// Adds a region: a whole file that the guest maps MAP_SHARED, or a file that does not change. The descriptor is
    /// duplicated. The region has the same `name` at the destination.
    ///
    /// # Errors
    /// A descriptor other than a regular file open for reading; a size other than whole pages.
    pub fn region(&mut self, name: &str, file: BorrowedFd<'_>) -> Result<()> {
        let named = |what: String| Error::Unsupported(format!("RAM {name}: {what}"));
        let file = file.try_clone_to_owned().context(|| format!("RAM {name}"))?;
        let file = RamFile::of_owner(name, File::from(file));
        self.files.push(file.map_err(|error| named(error.to_string()))?);
        Ok(())
    }

    /// Connects to a destination that listens at `uri`, with a lane for demanded pages and `lanes`
    /// more, 1 to 64, for the rest.
    ///
    /// # Errors
    /// [`Error::Usage`] for a number of lanes out of range, and for `fd:` and `exec:`.
    pub fn dial(&mut self, uri: Uri, lanes: u16) -> Result<()> {
        check_address(&uri)?;
        self.way = Some(Way::Dial { uri, lanes: check_lanes(lanes)? });
        Ok(())
    }

    /// Uses these connected stream sockets, 1 to 65: the first for demanded pages, the others for the rest; a single
    /// one carries both. umem owns them from here on. The destination gets their other ends in the same order.
    ///
    /// # Errors
    /// [`Error::Usage`] for too few or too many, and for a descriptor other than a connected stream socket.
    pub fn connections(&mut self, sockets: Vec<OwnedFd>) -> Result<()> {
        check_connections(&sockets)?;
        self.way = Some(Way::Connections(sockets));
        Ok(())
    }

    /// Whether pages are sent after the switchover (the default), or all of them before the switchover, while the guest
    /// stands still.
    pub fn postcopy(&mut self, postcopy: bool) {
        self.postcopy = postcopy;
    }

    /// Sends pages also before the guest stops, and again those that the guest writes meanwhile: in at most
    /// `passes_max` passes, until the rest takes no longer than `downtime_limit` to send. The program reports writes
    /// with [`Source::written`] and needs at least one bulk lane.
    pub fn precopy(&mut self, passes_max: u32, downtime_limit: Duration) {
        self.precopy =
            Some(Precopy { passes_max, downtime_limit, timeout: None, max_bandwidth: None });
    }

    /// Whether the migration continues when connections are lost after the switchover, if the destination does too.
    /// The default is true for a source that dials, and false for one with given connections: its program has to give
    /// others.
    pub fn recover(&mut self, recovers: bool) {
        self.recovers = Some(recovers);
    }

    /// Whether the program has a log of its guest's writes. [`Event::ReadLog`] asks for its contents after each pass,
    /// and the program answers with [`Source::log_read`]. Without a log umem judges a pass by the writes reported by
    /// its end. Has no effect without [`precopy`](SourceSetup::precopy).
    pub fn log(&mut self, has_log: bool) {
        self.has_log = has_log;
    }

    /// Whether both sides check every frame and every page for bits that change in transit, besides TCP's own checksum;
    /// the default is false. A damaged page reaches no guest: its connections count as lost. Before the switchover that
    /// ends the migration. Afterwards, if both sides [recover](SourceSetup::recover), the page is sent again. After
    /// eight such losses without a valid page in between the migration is [`Paused`](Event::Paused). At the end both
    /// sides compare digests of their memory; if they differ, both sides have [`Failed`](Event::Failed) with
    /// [`Error::Damaged`]. The destination follows the source's choice.
    pub fn checksum(&mut self, checksum: bool) {
        self.checksum = checksum;
    }

    /// The cores for the threads of the demand lane and the bulk lanes, in this order; umem chooses by default.
    pub fn cores(&mut self, cores: &[usize]) {
        self.cores = cores.to_vec();
    }

    /// Starts: connects, and asks the program to stop its guest when the destination is ready.
    ///
    /// # Errors
    /// [`Error::Usage`] without a region, an address or connections; a thread or an eventfd that the kernel refuses.
    pub fn start(self) -> Result<Source> {
        let SourceSetup { files, way, postcopy, precopy, has_log, recovers, checksum, cores } =
            self;
        check_pages()?;
        if files.is_empty() {
            return Err(Error::Usage("nothing to move: add the guest's regions first".into()));
        }
        let way = way.ok_or_else(|| {
            Error::Usage(
                "no address and no connections of the destination: give either first".into(),
            )
        })?;
        let is_single = matches!(&way, Way::Connections(sockets) if sockets.len() == 1);
        if precopy.is_some() && is_single {
            let what =
                "precopy needs a connection besides the one for demanded pages: give two or more";
            return Err(Error::Usage(what.into()));
        }
        let region_bytes = files.iter().map(|file| file.bytes).collect();
        let recovers = recovers.unwrap_or(matches!(way, Way::Dial { .. }));
        let departure = OutgoingConfig { way, files, postcopy, precopy, recovers, checksum, cores };
        let migrate = move |desk: &Arc<HostChannel>| send(departure, &(desk.clone() as _));
        let desk = HostChannel::new()?.with_log(has_log);
        let handle = Handle::start(Arc::new(desk), migrate, |_, _| ())?;
        Ok(Source { handle, region_bytes })
    }
}

/// A running source. Dropping it ends it at once: before the switchover as [`Source::cancel`] does; after the
/// switchover the destination's guest loses its missing pages.
pub struct Source {
    handle: Handle<()>,
    region_bytes: Box<[u64]>,
}

/// Bytes of a page of [`Source::written_bitmap`].
const LOG_PAGE_BYTES: u64 = 4096;

handle!(Source);

impl Source {
    /// Answers [`Event::Stop`]: the guest's memory has no writer any more.
    ///
    /// # Errors
    /// [`Error::Usage`] if the question is not open.
    pub fn stopped(&self) -> Result<()> {
        self.handle.desk.answer(Open::Stop, || Answer::Stopped(Ok(None)))
    }

    /// With [`precopy`](SourceSetup::precopy): the guest, a device or the program has written these bytes of guest
    /// memory. `region` is the number of the region in the order in which they were added. Must be called after each
    /// write, by any thread, and before [`Source::stopped`] for the last writes; a page without a report arrives as it
    /// was sent before.
    ///
    /// # Errors
    /// [`Error::Usage`] if the region has no such bytes, and after [`Source::stopped`]: the guest must stand still
    /// then.
    pub fn written(&self, region: u16, offset: u64, bytes: u64) -> Result<()> {
        self.written_ranges(region, &[(offset, bytes)])
    }

    /// As [`written`](Source::written), for several ranges, each an offset and a length in bytes. If one of them does
    /// not exist, none is reported.
    ///
    /// # Errors
    /// As [`Source::written`].
    pub fn written_ranges(&self, region: u16, ranges: &[(u64, u64)]) -> Result<()> {
        let region_bytes = self.region_bytes.get(usize::from(region)).copied().unwrap_or(0);
        for &(offset, bytes) in ranges {
            if offset.checked_add(bytes).is_none_or(|end| end > region_bytes) {
                return Err(Error::Usage(format!(
                    "region {region} has no {bytes} bytes at {offset}: nothing was written there"
                )));
            }
        }
        self.handle.desk.written(region, ranges.iter().copied())
    }

    /// As [`written`](Source::written), with a bitmap in the layout of KVM's dirty log (`KVM_GET_DIRTY_LOG` of a slot
    /// that begins where the region does): one bit for each page of 4 KiB, in little-endian words of 64 bits, the
    /// region's first page at bit 0 of the first word. Pages beyond the last word count as not written.
    ///
    /// # Errors
    /// As [`Source::written`]; a bit of a page that the region does not have.
    pub fn written_bitmap(&self, region: u16, words: &[u64]) -> Result<()> {
        self.written_ranges(region, &ranges(words))
    }

    /// Answers [`Event::ReadLog`]: all contents of the log have been reported.
    ///
    /// # Errors
    /// [`Error::Usage`] if the question is not open.
    pub fn log_read(&self) -> Result<()> {
        self.handle.desk.answer(Open::ReadLog, || Answer::Looked(Ok(())))
    }

    /// Answers [`Event::SaveState`] with the device state, which the destination's program receives unchanged. The
    /// state may be empty.
    ///
    /// # Errors
    /// [`Error::Usage`] if the question is not open.
    pub fn saved(&self, state: Vec<u8>) -> Result<()> {
        self.handle.desk.answer(Open::Save, || Answer::Saved(Ok(state)))
    }

    /// Ends a pause, or replaces connections that were given: dials `uri` from now on until the end.
    ///
    /// # Errors
    /// [`Error::Usage`] for `fd:` and `exec:`, before the switchover, and if the migration does not recover.
    pub fn resume_at(&self, uri: Uri) -> Result<()> {
        check_address(&uri)?;
        self.handle.desk.order(LinkOrder::Dial(uri))
    }
}

/// The ranges that a bitmap of pages marks: offsets and lengths in bytes, in order, without adjacent ranges.
fn ranges(words: &[u64]) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for (index, word) in (0..).zip(words) {
        let mut rest = u64::from_le(*word);
        while rest != 0 {
            let first = rest.trailing_zeros();
            let pages = (rest >> first).trailing_ones();
            let ones = u64::MAX >> (u64::BITS - pages);
            rest &= !(ones << first);
            let offset = (index * u64::from(u64::BITS) + u64::from(first)) * LOG_PAGE_BYTES;
            let bytes = u64::from(pages) * LOG_PAGE_BYTES;
            match ranges.last_mut() {
                Some((before, len)) if *before + *len == offset => *len += bytes,
                _ => ranges.push((offset, bytes)),
            }
        }
    }
    ranges
}

impl Drop for Source {
    fn drop(&mut self) {
        self.handle.end();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::memory::claim;

    /// A source over one connection, and the connection's other end.
    fn source(file: &File) -> (Source, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut setup = SourceSetup::new();
        setup.region("ram0", file.as_fd()).unwrap();
        setup.connections(vec![ours.into()]).unwrap();
        (setup.start().unwrap(), theirs)
    }

    #[test]
    fn bitmap_runs_across_words_become_one_range() {
        let pages = |words: &[u64]| {
            let in_pages = |(offset, bytes): (u64, u64)| (offset >> 12, bytes >> 12);
            ranges(words).into_iter().map(in_pages).collect::<Vec<_>>()
        };
        assert!(pages(&[]).is_empty());
        assert_eq!(pages(&[0, 0b1]), [(64, 1)]);
        assert_eq!(pages(&[0b1101, 0]), [(0, 1), (2, 2)]);
        assert_eq!(pages(&[1 << 63, 0b11, 1 << 63]), [(63, 3), (191, 1)]);
        assert_eq!(pages(&[u64::MAX, u64::MAX, 0b10]), [(0, 128), (129, 1)]);
    }

    #[test]
    fn second_source_of_a_file_is_refused_and_the_programs_locks_stay() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(1 << 20).unwrap();
        let (first, mut destination) = source(&file);
        // The source sends its hello once it holds the file's lock.
        destination.read_exact(&mut [0]).unwrap();
        let (second, _connection) = source(&file);
        let event = second.wait(Some(Duration::from_secs(100))).unwrap();
        let Some(Event::Failed(failure)) = event else { panic!("{event:?}") };
        let text = failure.error.to_string();
        assert!(text.contains("another umem moves the guest in this file"), "{text}");
        drop(first);
        assert!(claim::take_move(file.as_fd()).unwrap(), "the file is still locked");
        claim::end_move(file.as_fd());
        let (_third, mut destination) = source(&file);
        destination.read_exact(&mut [0]).unwrap();
    }
}
