//! The destination as a part of another program, which provides the memory, the monitor's answers and the sockets.

use crate::error;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use umem_wire::{FaultCode, Hello, LaneRole};

use super::admission::accept::{self, AdmissionPolicy, Lanes};
use super::admission::prepare::Prepared;
use super::{InboxMessage, Migration, Open, Plan};
use crate::control::liveness::STEP_TIMEOUT;
use crate::error::{Error, Result};
use crate::fault::handoff::Handed;
use crate::host::embedder::{self, Embedder, LinkOrder};
use crate::host::thread::HostThread;
use crate::observe::watch::Watch;
use crate::runtime::idle::IdleCores;
use crate::runtime::inbox::{Inbox, Wake};
use crate::runtime::role::Role;
use crate::statistics::Completed;
use crate::transport::lane::{self, HELLO_TIMEOUT, HelloBytes, Lane, Listener};
use crate::transport::secure::{self, ServerAuth};

/// Where the source connects.
pub(crate) enum Entrance {
    Listener(Listener),
    /// One socket a lane, the demand lane's first.
    Connections(Vec<OwnedFd>),
}

/// The options of an embedded destination.
pub(crate) struct IncomingConfig {
    pub(crate) entrance: Entrance,
    pub(crate) handed: Vec<Handed>,
    /// The most bulk lanes that a source may open at an address.
    pub(crate) lanes_max: u16,
    /// Continue over other connections if these are lost after the switchover.
    pub(crate) recovers: bool,
    /// As in [`Options`](super::Options).
    pub(crate) cores: Vec<usize>,
}

/// Receives one guest into memory of this process. No thread of the migration runs when this returns.
pub(crate) fn receive(
    reception: IncomingConfig,
    embedder: &Arc<dyn Embedder>,
) -> Result<Completed> {
    let IncomingConfig { entrance, handed, lanes_max, recovers, cores } = reception;
    let inbox = Inbox::embedded(embedder.canceller())?;
    let post = inbox.post();
    embedder.answers(Box::new(move |answer| post.send(InboxMessage::Host(answer))));
    let output = embedder.clone().output();
    let mut prepared = Prepared::here(handed)?;
    // The program decides which peers may connect: it can give connections that it has secured.
    let guard = Arc::new(ServerAuth::default());
    let lanes = match entrance {
        Entrance::Listener(listener) => accept::Entrance::Listener(listener).accept(
            &guard,
            terms(lanes_max, recovers),
            &output,
            &inbox,
            &prepared,
        )?,
        Entrance::Connections(sockets) => match <[OwnedFd; 1]>::try_from(sockets) {
            Ok([single]) => accept::Entrance::Connection(single).accept(
                &guard,
                terms(0, recovers),
                &output,
                &inbox,
                &prepared,
            )?,
            Err(sockets) => accept_connected(sockets, recovers, &inbox)?,
        },
    };
    embedder.connected(lanes.shutdown_handle());
    let (receiver, adopted) = accept::compare(&lanes.demand, &inbox, &mut prepared, STEP_TIMEOUT)?;
    let asking = embedder.clone();
    let host = HostThread::elsewhere(move |question| asking.ask(question));
    // The monitor is responsible for the machine's idle states.
    let idle_cores = IdleCores::Sleep;
    let watch = Watch::new(Role::Destination, false, None);
    let plan = Plan {
        touch: false,
        cores: &cores,
        idle_cores,
        watch: &watch,
        quiet: true,
        step_timeout: STEP_TIMEOUT,
    };
    let open = Open { lanes, guard, receiver, adopted, keeping: None, runs_itself: false };
    let migration = Migration::start(&plan, output, &inbox, open, host, &mut prepared.side)?;
    embedder.connected_by(migration.link.shutdown_handle());
    embedder.watch(migration.guest.counters.clone(), migration.guest.total_bytes());
    let (recovers, post) = (migration.link.recovers, inbox.post());
    embedder.takes_orders(
        migration.lane_count + 1,
        Box::new(move |order| {
            embedder::check(recovers, &watch)?;
            post.send(match order {
                LinkOrder::Pause => InboxMessage::Pause,
                LinkOrder::Resume => InboxMessage::Resume(None),
                LinkOrder::Listen(listener) => InboxMessage::Listen(listener),
                LinkOrder::Reconnect(sockets) => InboxMessage::Reconnect(sockets),
                LinkOrder::Dial(_) => unreachable!("a destination does not dial"),
            });
            Ok(())
        }),
    );
    // This side keeps no session that a source could resume.
    let (report, _) = migration.drive(&mut prepared.side)?;
    report.check_digests().map(|()| report)
}

/// The source chooses whether there are checksums.
fn terms(lanes_max: u16, recovers: bool) -> AdmissionPolicy {
    AdmissionPolicy { lanes_max, recovers, checksum: false, is_external: false }
}

/// Opens a lane on each of several connections. The source may send its hellos at any time.
fn accept_connected(
    sockets: Vec<OwnedFd>,
    recovers: bool,
    inbox: &Inbox<InboxMessage>,
) -> Result<Lanes> {
    let count = u16::try_from(sockets.len()).expect("their number is checked") - 1;
    let mut first: Option<Hello> = None;
    let mut lanes = Vec::new();
    for (index, socket) in (0..).zip(sockets) {
        let role = if index == 0 { LaneRole::Demand } else { LaneRole::Bulk };
        let mut lane = Lane::new(socket, error::lane_name(role, index))?;
        // A source that has sent one hello sends all of them promptly.
        let deadline = first.as_ref().map(|_| Instant::now() + HELLO_TIMEOUT);
        let hello = read_hello(&lane, inbox, deadline)?;
        let session = first.as_ref().map_or(hello.session, |first| first.session);
        let is_expected = hello.role == role
            && hello.index == index
            && hello.bulk_lanes == count
            && hello.epoch == 0
            && hello.session == session;
        if !is_expected {
            let text = format!(
                "{} connections here: the source must be given the other ends of the same ones, in \
                 the same order",
                count + 1
            );
            lane::refuse(&lane, FaultCode::Refused, &text);
            return Err(Error::protocol(&lane.name, text));
        }
        secure::welcome(&mut lane, &hello, lane::capabilities(recovers), None)?;
        first.get_or_insert(hello);
        lanes.push(lane);
    }
    let bulk = lanes.split_off(1);
    let demand = lanes.pop().expect("there is one connection at least");
    let hello = first.expect("there is one connection at least");
    Ok(Lanes { demand, bulk, hello, certificate: None, door: None })
}

/// Reads the purpose of a connection from the source's hello: until `deadline`, or, without one, for [`HELLO_TIMEOUT`]
/// from the first byte on.
fn read_hello(
    lane: &Lane,
    inbox: &Inbox<InboxMessage>,
    mut deadline: Option<Instant>,
) -> Result<Hello> {
    let mut bytes = HelloBytes::new();
    let lost = |why: String| Error::Lost {
        side: "source",
        lane: lane.name.clone(),
        what: format!("no source: {why}"),
    };
    loop {
        match inbox.wait(&[lane.as_fd()], accept::left(deadline, &lost)?)? {
            Wake::Signal => return Err(Error::Interrupted("no guest had arrived".into())),
            Wake::Ready(_) => {}
            // No message arrives before there are workers.
            Wake::Message(_) | Wake::Timeout => continue,
        }
        let read = bytes.read(lane);
        if let Some(why) = bytes.foreign() {
            return Err(Error::protocol(&lane.name, why));
        }
        match read {
            Ok(None) => {}
            Ok(Some(bytes)) => {
                let hello = Hello::decode(&bytes);
                return hello.map_err(|error| Error::protocol(&lane.name, error));
            }
            Err(error) => return Err(lost(error.to_string())),
        }
        if bytes.has_begun() {
            deadline.get_or_insert(Instant::now() + HELLO_TIMEOUT);
        }
    }
}
