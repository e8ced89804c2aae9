//! The beginning of a session at the destination: a source dials, its lanes are accepted, its regions
//! are read.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};

use umem_wire::{Event, FaultCode, LaneRole, Receiver, RegionTable, Target};

use super::prepare::{Adopted, Prepared};
use super::{Note, Options, peer};
use crate::error::{Context, Error, Result};
use crate::inbox::{Inbox, Wake};
use crate::lane::{self, Lane, Listener};

/// The lanes of one session.
pub(super) struct Lanes {
    pub(super) demand: Lane,
    pub(super) bulk: Vec<Lane>,
}

/// Accepts the lanes of the first session that dials, demand lane first.
pub(super) fn accept(
    listener: &Listener,
    options: &Options,
    inbox: &Inbox<Note>,
    prepared: &Prepared,
) -> Result<Lanes> {
    let wait = |socket: BorrowedFd<'_>, timeout| {
        match inbox.wait(&[socket, prepared.monitor.exited()], Some(timeout))? {
            Wake::Signal => Err(Error::Interrupted("no guest had arrived".into())),
            Wake::Ready(0) => Ok(true),
            Wake::Ready(_) => Err(exited()),
            // Nobody posts before there are workers.
            Wake::Message(_) | Wake::Timeout => Ok(false),
        }
    };
    let mut lanes: Option<(Lanes, umem_wire::Hello)> = None;
    loop {
        if let Some((lanes, hello)) =
            lanes.take_if(|(lanes, hello)| lanes.bulk.len() == usize::from(hello.bulk_lanes))
        {
            debug_assert_eq!(hello.role, LaneRole::Demand);
            return Ok(lanes);
        }
        match inbox.wait(&[listener.as_fd(), prepared.monitor.exited()], None)? {
            Wake::Signal => return Err(Error::Interrupted("no guest had arrived".into())),
            Wake::Ready(0) => {}
            Wake::Ready(_) => return Err(exited()),
            Wake::Message(Note::Failed(error)) => return Err(error),
            Wake::Message(_) | Wake::Timeout => continue,
        }
        let (lane, hello) = match listener.accept(&wait)? {
            Ok(accepted) => accepted,
            Err(why) => {
                eprintln!("umem: ignored a connection: {why}");
                continue;
            }
        };
        let expected = match &lanes {
            None => hello.role == LaneRole::Demand,
            Some((lanes, first)) => {
                hello.role == LaneRole::Bulk
                    && hello.session == first.session
                    && usize::from(hello.index) == lanes.bulk.len() + 1
            }
        };
        if !expected {
            lane::refuse(&lane, FaultCode::Refused, "another migration is being received")?;
            continue;
        }
        if hello.bulk_lanes > options.lanes_max {
            let text = format!("at most {} lanes here; use --lanes there", options.lanes_max);
            lane::refuse(&lane, FaultCode::Refused, &text)?;
            continue;
        }
        if lane::welcome(&lane, &hello).is_err() {
            continue;
        }
        match &mut lanes {
            None => {
                lanes = Some((Lanes { demand: lane, bulk: Vec::new() }, hello));
            }
            Some((lanes, _)) => lanes.bulk.push(lane),
        }
    }
}

fn exited() -> Error {
    Error::Host("it exited before the guest arrived (its own messages say why)".into())
}

/// Reads the source's regions and puts ours in their order; an error is told to the source. The
/// answer has the landing table.
pub(super) fn compare(
    demand: &Lane,
    inbox: &Inbox<Note>,
    prepared: &mut Prepared,
) -> Result<(Receiver, Adopted)> {
    let mut receiver = Receiver::for_destination(LaneRole::Demand);
    let compared = read_regions(demand, inbox, prepared, &mut receiver)
        .and_then(|table| prepared.adopt(&table));
    match compared {
        Ok(adopted) => {
            receiver.set_regions(&adopted.landing);
            Ok((receiver, adopted))
        }
        Err(error) => {
            lane::tell(&demand.socket(), &error);
            Err(error)
        }
    }
}

fn read_regions(
    demand: &Lane,
    inbox: &Inbox<Note>,
    prepared: &Prepared,
    receiver: &mut Receiver,
) -> Result<RegionTable> {
    let mut socket = demand.blocking()?;
    let mut buffer = Vec::new();
    loop {
        match inbox.wait(&[socket.as_fd(), prepared.monitor.exited()], None)? {
            Wake::Signal => return Err(Error::Interrupted("no guest had arrived".into())),
            Wake::Ready(0) => {}
            Wake::Ready(_) => return Err(exited()),
            Wake::Message(_) | Wake::Timeout => continue,
        }
        let Target::Control { exact } = receiver.next_target() else {
            return Err(Error::protocol(&demand.name, "pages before the regions"));
        };
        buffer.resize(exact, 0);
        let count = socket.read(&mut buffer).context(|| demand.name.clone())?;
        if count == 0 {
            return Err(lost(demand, "the source closed it"));
        }
        receiver.control(&buffer[..count]).map_err(|error| Error::protocol(&demand.name, error))?;
        match receiver.poll_event() {
            None | Some(Event::Ping(_) | Event::Pong(_)) => {}
            Some(Event::Regions(table)) => return Ok(table),
            Some(Event::Error(fault)) => return Err(peer(fault)),
            Some(other) => {
                let what = format!("{} before the regions", other.name());
                return Err(Error::protocol(&demand.name, what));
            }
        }
    }
}

fn lost(lane: &Lane, what: &str) -> Error {
    Error::Lost { side: "source", lane: lane.name.clone(), what: what.into() }
}
