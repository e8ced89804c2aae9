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
use crate::host::thread::Answer;
use crate::memory::check_pages;
use crate::transport::lane::Listener;
use crate::transport::uri::Uri;

/// Memory of this process that is to be a region of the guest.
#[derive(Clone, Copy, Debug)]
pub struct Memory<'a> {
    /// Where it is mapped; whole pages of its page size.
    pub start: NonNull<c_void>,
    /// Its size, bytes, whole pages of its page size.
    pub bytes: u64,
    /// The file of which all is mapped there, MAP_SHARED: a memfd, or a file on tmpfs or hugetlbfs,
    /// open for reading and writing, which holds nothing yet. None if the memory is MAP_PRIVATE |
    /// MAP_ANONYMOUS. The descriptor is duplicated.
    pub file: Option<BorrowedFd<'a>>,
}

/// Where a destination is to receive, and from whom.
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
    /// Nothing yet.
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

    /// Adds a region. `name` is the same at the source.
    ///
    /// # Safety
    /// The memory belongs to the guest: nobody in this process holds a reference into it, and it stays
    /// mapped where it is until the [`Destination`] has been dropped. Whoever touches a missing page
    /// of it after [`start`](DestinationSetup::start) waits. Pages of it are discarded with `madvise`, shared ones with
    /// `MADV_REMOVE` and anonymous ones with `MADV_DONTNEED`, until the end: the kernel says nothing of a hole that
    /// `fallocate` punches in the file, and reports `MADV_DONTNEED` of shared memory as if it were a discard.
    ///
    /// # Errors
    /// A file that cannot be used or holds something already, or a size of 0.
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

    /// Uses a userfaultfd of the program's own, with which every region must be registered already,
    /// for missing faults and, where it is shared, for minor faults. The descriptor is duplicated;
    /// nobody else reads it any more, and it becomes non-blocking. The regions leave it at the end.
    ///
    /// Made without `UFFD_USER_MODE_ONLY`. Without `UFFD_FEATURE_EVENT_REMOVE` nobody may discard
    /// pages of the regions before the end, without `UFFD_FEATURE_EVENT_FORK` umem's
    /// `MADV_DONTFORK` keeps the memory from forked children meanwhile.
    ///
    /// # Errors
    /// A descriptor that cannot be duplicated.
    pub fn userfaultfd(&mut self, userfaultfd: BorrowedFd<'_>) -> Result<()> {
        let duplicate = userfaultfd.try_clone_to_owned();
        self.userfaultfd = Some(duplicate.context(|| "duplicating the userfaultfd")?);
        Ok(())
    }

    /// Listens at `uri` from [`start`](DestinationSetup::start) on, and takes a source with up to
    /// `lanes_max` bulk lanes, 1 to 64.
    ///
    /// # Errors
    /// [`Error::Usage`] for a number of lanes out of range, and for `fd:` and `exec:`.
    pub fn listen(&mut self, uri: Uri, lanes_max: u16) -> Result<()> {
        check_address(&uri)?;
        self.way = Some(Way::Listen { uri, lanes_max: check_lanes(lanes_max)? });
        Ok(())
    }

    /// Uses these connected stream sockets, 1 to 65: the first for demanded pages, the others for the
    /// rest; a single one is for all. They are umem's from here on. At the source are their other ends, in the same order.
    ///
    /// # Errors
    /// [`Error::Usage`] for too few or too many, and for what is no connected stream socket.
    pub fn connections(&mut self, sockets: Vec<OwnedFd>) -> Result<()> {
        check_connections(&sockets)?;
        self.way = Some(Way::Connections(sockets));
        Ok(())
    }

    /// Whether the migration goes on when connections are lost after the switchover, if the source does too.
    /// If nothing is said it does where it listens, and not where it was given connections: then the
    /// program has to give others.
    pub fn recover(&mut self, recovers: bool) {
        self.recovers = Some(recovers);
    }

    /// The cores for the threads of the demand lane and the bulk lanes, in this order; umem chooses if
    /// nothing is said.
    pub fn cores(&mut self, cores: &[usize]) {
        self.cores = cores.to_vec();
    }

    /// Begins: listens, and registers the regions. From here on whoever touches them waits.
    ///
    /// # Errors
    /// [`Error::Usage`] where there is no region or no way to the source; an address that cannot be
    /// listened at; memory that is not as it was said to be; no permission for userfaultfd. The
    /// regions are as before then.
    pub fn start(self) -> Result<Destination> {
        let DestinationSetup { regions, userfaultfd, way, recovers, cores } = self;
        check_pages()?;
        if regions.is_empty() {
            return Err(Error::Usage("nothing to receive: add the guest's regions first".into()));
        }
        let way = way.ok_or_else(|| {
            Error::Usage("no way for the source: give an address or connections first".into())
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
        // Taken back where no thread could be started.
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

/// The file with its device and inode; it must hold nothing.
fn take_file(name: &str, file: BorrowedFd<'_>) -> Result<(File, (u64, u64))> {
    let what = || format!("RAM {name}");
    let file = File::from(file.try_clone_to_owned().context(what)?);
    let metadata = file.metadata().context(what)?;
    if metadata.blocks() > 0 {
        return Err(Error::Unsupported(format!(
            "RAM {name}: its file has contents already, which no fault would ever replace: give a \
             fresh one, and do not touch the memory before it is registered"
        )));
    }
    let identity = (metadata.dev(), metadata.ino());
    Ok((file, identity))
}

/// The regions as another process would hand them over.
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

/// A destination that runs. Dropping it ends it at once: before the switchover as
/// [`Destination::cancel`] does; after it whoever touches a page that has not come waits for ever.
pub struct Destination {
    handle: Handle<Option<Guarded>>,
    uri: Option<Uri>,
}

handle!(Destination);

impl Destination {
    /// Where it listens at first, with a port that the kernel chose; none if it was given connections.
    pub fn uri(&self) -> Option<&Uri> {
        self.uri.as_ref()
    }

    /// Answers [`Event::LoadState`]: the device state is loaded.
    ///
    /// # Errors
    /// [`Error::Usage`] if that is not asked.
    pub fn loaded(&self) -> Result<()> {
        self.handle.desk.answer(Open::Load, || Answer::Loaded(Ok(())))
    }

    /// Answers [`Event::Run`]: the vCPUs run.
    ///
    /// # Errors
    /// [`Error::Usage`] if that is not asked.
    pub fn running(&self) -> Result<()> {
        self.handle.desk.answer(Open::Run, || Answer::Running(Ok(())))
    }

    /// Ends a pause, or does without connections that were given: listens at `uri`, from now on until the
    /// end, and nowhere else. Returns where that is, with a port that the kernel chose.
    ///
    /// # Errors
    /// [`Error::Usage`] for `fd:` and `exec:`, before the switchover, and where the migration does not
    /// recover; an address that cannot be listened at.
    pub fn resume_at(&self, uri: &Uri) -> Result<Uri> {
        check_address(uri)?;
        let listener = Listener::bind(uri)?;
        let bound = listener.uri(uri);
        self.handle.desk.order(LinkOrder::Listen(listener))?;
        Ok(bound)
    }

    /// After a failure with [`Guest::AtDestination`](super::Guest::AtDestination): no vCPU runs any
    /// more and nobody believes what the guest's memory holds. Missing pages become zeroes, and
    /// whoever waits for one goes on. Has no effect where nothing is waited for.
    ///
    /// # Errors
    /// [`Error::Usage`] before the last event.
    pub fn guest_has_stopped(&self) -> Result<()> {
        if !self.handle.desk.wait_for_end(std::time::Duration::ZERO) {
            return Err(Error::Usage(
                "the migration still runs, and the guest's pages still arrive: end the migration before the waiting"
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
        // What is still waited for stays so.
        self.handle.end();
    }
}
