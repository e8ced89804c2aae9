//! The source as a part of another program: its memory, its monitor's answers, its sockets.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::poll::PollFlags;

use super::link::open_over;
use super::memory::SourceMemory;
use super::{InboxMessage, Link, Migration, Order, Plan, Precopy, wait};
use crate::control::liveness::STEP_TIMEOUT;
use crate::control::source::Input;
use crate::error::Result;
use crate::host::embedder::{self, Embedder, LinkOrder};
use crate::host::thread::HostThread;
use crate::memory::region::RamFile;
use crate::observe::watch::Watch;
use crate::runtime::idle::IdleCores;
use crate::runtime::inbox::Inbox;
use crate::runtime::role::Role;
use crate::statistics::Completed;
use crate::transport::lane::Session;
use crate::transport::secure::{self, ClientAuth};
use crate::transport::uri::Uri;

/// The way to the destination.
pub(crate) enum Way {
    /// The destination's address, and the number of bulk lanes.
    Dial { uri: Uri, lanes: u16 },
    /// A socket for each lane, the demand lane's first.
    Connections(Vec<OwnedFd>),
}

/// The memory to send, and how to send it.
pub(crate) struct OutgoingConfig {
    pub(crate) way: Way,
    pub(crate) files: Vec<RamFile>,
    pub(crate) postcopy: bool,
    /// As in [`Options`](super::Options); the program reports the writes.
    pub(crate) precopy: Option<Precopy>,
    /// Whether to continue over other connections when these are lost after the switchover.
    pub(crate) recovers: bool,
    /// Whether both sides use checksums.
    pub(crate) checksum: bool,
    /// As in [`Options`](super::Options).
    pub(crate) cores: Vec<usize>,
}

/// Moves one guest away. No thread of the migration remains when this returns.
pub(crate) fn send(departure: OutgoingConfig, embedder: &Arc<dyn Embedder>) -> Result<Completed> {
    let OutgoingConfig { way, files, postcopy, precopy, recovers, checksum, cores } = departure;
    let inbox = Inbox::embedded(embedder.canceller())?;
    let post = inbox.post();
    embedder.answers(Box::new(move |answer| post.send(InboxMessage::Host(answer))));
    let memory = SourceMemory::new(files, false).checked(checksum).in_rounds(precopy.is_some());
    let memory = Arc::new(memory);
    memory.claim(false)?;
    let wait = |fds: &[(BorrowedFd<'_>, PollFlags)], limit| wait(&inbox, fds, limit);
    // The program authenticates its peer: it can give connections that it has secured.
    let pass = Arc::new(ClientAuth::default());
    let (session, lanes, uri, stays_local) = match way {
        Way::Dial { uri, lanes } => {
            let session = Session::new(lanes, false, recovers)?.checked(checksum);
            let session = session.in_rounds(precopy.is_some());
            let open = |index| secure::dial(&uri, &session.hello(index, 0), &pass, &wait);
            let lanes = (0..=lanes).map(open).collect::<Result<Vec<_>>>()?;
            let stays_local = secure::stays_local(&uri, &wait)?;
            (session, lanes, Some(uri), stays_local)
        }
        Way::Connections(sockets) => {
            let stays_local = sockets.iter().all(secure::is_local);
            let count = u16::try_from(sockets.len()).expect("checked when they were given") - 1;
            let session = Session::new(count, false, recovers)?.checked(checksum);
            let session = session.in_rounds(precopy.is_some());
            let lanes = open_over(sockets, &session, 0, &pass, &wait)?;
            (session, lanes, None, stays_local)
        }
    };
    let link = Link::new(session, pass, uri, &lanes);
    embedder.connected(link.shutdown_handle());
    embedder.watch(memory.counters.clone(), memory.total_bytes());
    let asking = embedder.clone();
    let host = HostThread::elsewhere(move |question| asking.ask(question));
    let watch = Watch::new(Role::Source, false, None);
    let plan = Plan {
        postcopy,
        background: true,
        precopy,
        cores: &cores,
        // The monitor decides how deeply the machine's cores sleep.
        idle_cores: IdleCores::Sleep,
        order: Order::Adaptive,
        step_timeout: STEP_TIMEOUT,
        watch: &watch,
        quiet: true,
        has_monitor: false,
        stays_local,
    };
    let (recovers, post) = (link.recovers(), inbox.post());
    let migration =
        Migration::start(&plan, embedder.clone().output(), inbox, (lanes, link), memory, host)?;
    embedder.takes_orders(
        session.bulk_lanes + 1,
        Box::new(move |order| {
            embedder::check(recovers, &watch)?;
            post.send(match order {
                LinkOrder::Pause => InboxMessage::Pause,
                LinkOrder::Resume => InboxMessage::Resume(None),
                LinkOrder::Dial(uri) => InboxMessage::Resume(Some(uri)),
                LinkOrder::Reconnect(sockets) => InboxMessage::Reconnect(sockets),
                LinkOrder::Listen(_) => unreachable!("a source listens nowhere"),
            });
            Ok(())
        }),
    );
    let report = migration.drive(Input::Begin)?;
    report.check_digests().map(|()| report)
}
