//! The destination's side of the library.

use std::ffi::c_void;
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use super::desk::{HostChannel, Open};
use super::handle::{Handle, check_address, check_connections, check_lanes, handle};
use super::{Event, Stats};
use crate::destination::embedded::{Entrance, IncomingConfig, receive};
use crate::error::{Context, Error, Result};
use crate::fault::handoff::Handed;
use crate::fault::own::{Area, Guarded, Mapped};
use crate::host::embedder::LinkOrder;
use crate::host::monitor::{Answer, Loaded};
use crate::memory::check_pages;
use crate::transport::lane::Listener;
use crate::transport::uri::Uri;

/// Memory of this process that becomes a region of the guest.
#[derive(Clone, Copy, Debug)]
pub struct Memory<'a> {
    /// Its start address; whole pages of its page size.
    pub start: NonNull<c_void>,
    /// Its size, bytes, whole pages of its page size.
    pub bytes: u64,
    /// The file that is mapped there as a whole, MAP_SHARED: a memfd, or a file on tmpfs or hugetlbfs, open for reading
    /// and writing, without contents. None if the memory is MAP_PRIVATE | MAP_ANONYMOUS. The descriptor is duplicated.
    pub file: Option<BorrowedFd<'a>>,
}

/// The memory that a destination receives, and its source.
pub struct DestinationSetup {
    regions: Vec<(Area, Option<File>)>,
    userfaultfd: Option<OwnedFd>,
    way: Option<Way>,
    recovers: Option<bool>,
    cores: Vec<usize>,
}

enum Way {
    Listen { uri: Uri, lanes_max: u16 },
    Connections(Vec<OwnedFd>),
}

impl DestinationSetup {
    /// An empty setup.
    #[expect(clippy::new_without_default, reason = "an empty setup is no default of anything")]
    pub fn new() -> DestinationSetup {
        DestinationSetup {
            regions: Vec::new(),
            userfaultfd: None,
            way: None,
            recovers: None,
            cores: Vec::new(),
        }
    }

    /// Adds a region. The region has the same `name` at the source.
    ///
    /// # Safety
    /// The memory belongs to the guest: this process holds no reference into it, and it stays mapped at its address
    /// until the [`Destination`] has been dropped. After [`start`](DestinationSetup::start) a thread that touches a
    /// missing page waits. Until the end pages are discarded with `madvise`, shared ones with `MADV_REMOVE` and
    /// anonymous ones with `MADV_DONTNEED`: the kernel does not report a hole that `fallocate` punches in the file, and
    /// reports `MADV_DONTNEED` of shared memory as if it were a discard.
    ///
    /// # Errors
    /// A file that is unusable or has contents, or a size of 0.
    pub unsafe fn region(&mut self, name: &str, memory: &Memory<'_>) -> Result<()> {
        let start = memory.start.as_ptr().expose_provenance() as u64;
        let end = start.checked_add(memory.bytes).filter(|end| *end > start).ok_or_else(|| {
            Error::Usage(format!("RAM {name} of {} bytes: no memory is that large", memory.bytes))
        })?;
        let file = memory.file.map(|file| take_file(name, file)).transpose()?;
        let mapped = file.as_ref().map(|(_, file)| Mapped { file: *file, offset: 0 });
        let area = Area { name: name.to_owned(), addresses: start..end, file: mapped };
        self.regions.push((area, file.map(|(file, _)| file)));
        Ok(())
    }

    /// Uses a userfaultfd of the program. Every region must already be registered with it for missing faults and, if
    /// shared, for minor faults. The descriptor is duplicated and becomes non-blocking; only umem reads it from here
    /// on. umem unregisters the regions at the end.
    ///
    /// It must have been made without `UFFD_USER_MODE_ONLY`. Without `UFFD_FEATURE_EVENT_REMOVE` the program must not
    /// discard pages of the regions before the end. Without `UFFD_FEATURE_EVENT_FORK` umem sets `MADV_DONTFORK`, which
    /// keeps the memory from forked children until then.
    ///
    /// # Errors
    /// A descriptor that cannot be duplicated.
    pub fn userfaultfd(&mut self, userfaultfd: BorrowedFd<'_>) -> Result<()> {
        let duplicate = userfaultfd.try_clone_to_owned();
        self.userfaultfd = Some(duplicate.context(|| "duplicating the userfaultfd")?);
        Ok(())
    }

    /// Listens at `uri` from [`start`](DestinationSetup::start) on, and accepts a source with up to `lanes_max` bulk
    /// lanes, 1 to 64.
    ///
    /// # Errors
    /// [`Error::Usage`] for a number of lanes out of range, and for `fd:` and `exec:`.
    pub fn listen(&mut self, uri: Uri, lanes_max: u16) -> Result<()> {
        check_address(&uri)?;
        self.way = Some(Way::Listen { uri, lanes_max: check_lanes(lanes_max)? });
        Ok(())
    }

    /// Uses these connected stream sockets, 1 to 65: the first for demanded pages, the others for the rest; a single
    /// one carries both. umem owns them from here on. The source gets their other ends in the same order.
    ///
    /// # Errors
    /// [`Error::Usage`] for too few or too many, and for a descriptor other than a connected stream socket.
    pub fn connections(&mut self, sockets: Vec<OwnedFd>) -> Result<()> {
        check_connections(&sockets)?;
        self.way = Some(Way::Connections(sockets));
        Ok(())
    }

    /// Whether the migration continues when connections are lost after the switchover, if the source does too. The
    /// default is true for a destination that listens, and false for one with given connections: its program has to
    /// give others.
    pub fn recover(&mut self, recovers: bool) {
        self.recovers = Some(recovers);
    }

    /// The cores for the threads of the demand lane and the bulk lanes, in this order; umem chooses by default.
    pub fn cores(&mut self, cores: &[usize]) {
        self.cores = cores.to_vec();
    }

    /// Starts: listens, and registers the regions. From here on a thread that touches them waits.
    ///
    /// # Errors
    /// [`Error::Usage`] without a region, an address or connections; an address that cannot be listened on; memory
    /// unlike its description; no permission for userfaultfd. After an error the regions are as before.
    pub fn start(self) -> Result<Destination> {
        let DestinationSetup { regions, userfaultfd, way, recovers, cores } = self;
        check_pages()?;
        if regions.is_empty() {
            return Err(Error::Usage("nothing to receive: add the guest's regions first".into()));
        }
        let way = way.ok_or_else(|| {
            Error::Usage("no address and no connections for the source: give either first".into())
        })?;
        let recovers = recovers.unwrap_or(matches!(way, Way::Listen { .. }));
        let (entrance, uri, lanes_max) = match way {
            Way::Listen { uri, lanes_max } => {
                let listener = Listener::bind(&uri)?;
                let uri = listener.uri(&uri);
                (Entrance::Listener(listener), Some(uri), lanes_max)
            }
            Way::Connections(sockets) => (Entrance::Connections(sockets), None, 0),
        };
        let desk = Arc::new(HostChannel::new()?);
        let (areas, files): (Vec<_>, Vec<_>) = regions.into_iter().unzip();
        let guarded = Guarded::new(areas, userfaultfd.as_ref().map(std::os::fd::AsFd::as_fd))?;
        let handed = hand_over(&guarded, files);
        let reception = IncomingConfig { entrance, handed, lanes_max, recovers, cores };
        // Unregistered if a thread could not be started.
        let shared = Arc::new(Mutex::new(Some(guarded)));
        let theirs = shared.clone();
        let end = move |desk: &HostChannel, is_completed: bool| {
            let guarded = take(&theirs)?;
            if is_completed || !desk.guest_waits() {
                guarded.release();
                return None;
            }
            Some(guarded)
        };
        match Handle::start(desk, move |desk| receive(reception, &(desk.clone() as _)), end) {
            Ok(handle) => Ok(Destination { handle, uri }),
            Err(error) => {
                take(&shared).into_iter().for_each(Guarded::release);
                Err(error)
            }
        }
    }
}

fn take(shared: &Mutex<Option<Guarded>>) -> Option<Guarded> {
    shared.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// The file with its device and inode; an error if it has contents.
fn take_file(name: &str, file: BorrowedFd<'_>) -> Result<(File, (u64, u64))> {
    let what = || format!("RAM {name}");
    let file = File::from(file.try_clone_to_owned().context(what)?);
    let metadata = file.metadata().context(what)?;
    if metadata.blocks() > 0 {
        return Err(Error::Unsupported(format!(
            "RAM {name}: its file has contents already, which no fault would replace: give a \
             fresh one, and do not touch the memory before it is registered"
        )));
    }
    let identity = (metadata.dev(), metadata.ino());
    Ok((file, identity))
}

/// The regions in the form of a hand-over by another process.
fn hand_over(guarded: &Guarded, files: Vec<Option<File>>) -> Vec<Handed> {
    guarded
        .areas()
        .zip(files)
        .map(|((area, page_bytes), file)| Handed {
            file_offset: 0,
            name: Some(area.name.clone()),
            kind: area.kind(),
            address: area.addresses.start,
            bytes: area.bytes(),
            offset: 0,
            page_shift: u8::try_from(page_bytes.trailing_zeros()).expect("at most 64"),
            uffd: guarded.uffd(),
            file,
        })
        .collect()
}

/// A running destination. Dropping it ends it at once: before the switchover as [`Destination::cancel`] does; after the
/// switchover a thread that touches a missing page waits forever.
pub struct Destination {
    handle: Handle<Option<Guarded>>,
    uri: Option<Uri>,
}

handle!(Destination);

impl Destination {
    /// The address of the first listener, with the port that the kernel chose; None with given connections.
    pub fn uri(&self) -> Option<&Uri> {
        self.uri.as_ref()
    }

    /// Answers [`Event::LoadState`]: the device state is loaded.
    ///
    /// # Errors
    /// [`Error::Usage`] if the question is not open.
    pub fn loaded(&self) -> Result<()> {
        self.handle.desk.answer(Open::Load, || Answer::Loaded(Ok(Loaded { runs: true })))
    }

    /// Answers [`Event::Run`]: the vCPUs run.
    ///
    /// # Errors
    /// [`Error::Usage`] if the question is not open.
    pub fn running(&self) -> Result<()> {
        self.handle.desk.answer(Open::Run, || Answer::Running(Ok(())))
    }

    /// Ends a pause, or replaces connections that were given: listens at `uri` alone from now on until the end. Returns
    /// the address with the port that the kernel chose.
    ///
    /// # Errors
    /// [`Error::Usage`] for `fd:` and `exec:`, before the switchover, and if the migration does not recover; an address
    /// that cannot be listened on.
    pub fn resume_at(&self, uri: &Uri) -> Result<Uri> {
        check_address(uri)?;
        let listener = Listener::bind(uri)?;
        let bound = listener.uri(uri);
        self.handle.desk.order(LinkOrder::Listen(listener))?;
        Ok(bound)
    }

    /// After a failure with [`Guest::AtDestination`](super::Guest::AtDestination): no vCPU runs any more, and the
    /// contents of guest memory are no longer used. Missing pages become zeroes, and waiting threads continue. Has no
    /// effect if no page is missing.
    ///
    /// # Errors
    /// [`Error::Usage`] before the last event.
    pub fn guest_has_stopped(&self) -> Result<()> {
        if !self.handle.desk.wait_for_end(std::time::Duration::ZERO) {
            return Err(Error::Usage(
                "the migration still runs, and the guest's pages still arrive: end the migration first"
                    .into(),
            ));
        }
        if let Some(guarded) = self.handle.join().flatten() {
            guarded.release();
        }
        Ok(())
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        // Missing pages stay missing.
        self.handle.end();
    }
}
