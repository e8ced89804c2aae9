//! The source as a part of another program: its memory, its monitor's answers, its sockets.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::poll::PollFlags;

use super::memory::SourceMemory;
use super::{Link, Migration, Note, Order, Plan, wait};
use crate::control::liveness::STEP_TIMEOUT;
use crate::embed::desk::Desk;
use crate::embed::link::{self, LinkOrder};
use crate::error::Result;
use crate::host::thread::HostThread;
use crate::idle::IdleCores;
use crate::inbox::Inbox;
use crate::lane::{self, Lane, Session, Wait};
use crate::memory::region::RamFile;
use crate::observe::watch::{Role, Watch};
use crate::report::Completed;
use crate::secure::Pass;
use crate::uri::Uri;

/// The way to the destination.
pub(crate) enum Way {
    /// Where it listens, and how many bulk lanes to open there.
    Dial { uri: Uri, lanes: u16 },
    /// One for each lane, the demand lane's first.
    Connections(Vec<OwnedFd>),
}

/// What to send, and how.
pub(crate) struct Departure {
    pub(crate) way: Way,
    pub(crate) files: Vec<RamFile>,
    pub(crate) postcopy: bool,
    /// Go on over other connections when these are lost after the switchover.
    pub(crate) recovers: bool,
    /// Both sides check what comes.
    pub(crate) checksum: bool,
    /// As in [`Options`](super::Options).
    pub(crate) cores: Vec<usize>,
}

/// Moves one guest away. Nothing of it runs any more when this returns.
pub(crate) fn send(departure: Departure, desk: &Arc<Desk>) -> Result<Completed> {
    let Departure { way, files, postcopy, recovers, checksum, cores } = departure;
    let inbox = Inbox::embedded(desk.canceller())?;
    let post = inbox.post();
    desk.answers(move |answer| post.send(Note::Host(answer)));
    let memory = Arc::new(SourceMemory::new(files, false).checked(checksum));
    memory.claim(false)?;
    let wait = |fds: &[(BorrowedFd<'_>, PollFlags)], limit| wait(&inbox, fds, limit);
    // Who is there is the program's own matter: it can give connections that it has secured.
    let pass = Arc::new(Pass::default());
    let (session, lanes, uri, stays_local) = match way {
        Way::Dial { uri, lanes } => {
            let session = Session::new(lanes, false, recovers)?.checked(checksum);
            let open = |index| lane::dial(&uri, &session.hello(index, 0), &pass, &wait);
            let lanes = (0..=lanes).map(open).collect::<Result<Vec<_>>>()?;
            let stays_local = lane::stays_local(&uri, &wait)?;
            (session, lanes, Some(uri), stays_local)
        }
        Way::Connections(sockets) => {
            let stays_local = sockets.iter().all(lane::is_local);
            let count = u16::try_from(sockets.len()).expect("checked when they were given") - 1;
            let session = Session::new(count, false, recovers)?.checked(checksum);
            let lanes = open_over(sockets, &session, 0, &pass, &wait)?;
            (session, lanes, None, stays_local)
        }
    };
    let link = Link::new(session, pass, uri, &lanes);
    desk.connected(link.severable());
    desk.watch(memory.counters.clone(), memory.total_bytes());
    let asking = desk.clone();
    let host = HostThread::elsewhere(move |question| asking.ask(question));
    let watch = Watch::new(Role::Source, false, None);
    let plan = Plan {
        postcopy,
        background: true,
        precopy: None,
        cores: &cores,
        // How deeply the whole machine sleeps is the monitor's affair.
        idle_cores: IdleCores::Sleep,
        order: Order::Adaptive,
        step_timeout: STEP_TIMEOUT,
        watch: &watch,
        quiet: true,
        has_monitor: false,
        stays_local,
    };
    let (recovers, post) = (link.recovers(), inbox.post());
    let migration = Migration::start(&plan, desk.output(), inbox, (lanes, link), memory, host)?;
    desk.takes_orders(session.bulk_lanes + 1, move |order| {
        link::check(recovers, &watch)?;
        post.send(match order {
            LinkOrder::Pause => Note::Pause,
            LinkOrder::Resume => Note::Resume(None),
            LinkOrder::Dial(uri) => Note::Resume(Some(uri)),
            LinkOrder::Reconnect(sockets) => Note::Reconnect(sockets),
            LinkOrder::Listen(_) => unreachable!("a source listens nowhere"),
        });
        Ok(())
    });
    let report = migration.drive()?;
    report.check_digests().map(|()| report)
}

/// Opens all lanes on connections that are there already; a single one is for all. The first answer may take as long
/// as the destination's program does.
pub(super) fn open_over(
    sockets: Vec<OwnedFd>,
    session: &Session,
    epoch: u32,
    pass: &Pass,
    wait: Wait<'_>,
) -> Result<Vec<Lane>> {
    let open = |(index, socket)| {
        let hello = session.hello(index, epoch);
        match session.bulk_lanes {
            0 => lane::open_shared(socket, &hello, pass, wait),
            _ => lane::open(socket, &hello, wait),
        }
    };
    (0..).zip(sockets).map(open).collect()
}
