//! The destination's lanes, the door through which new lanes arrive, and the threads of lanes.
//! `control::destination::link` decides about them.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use umem_wire::{Capabilities, FaultCode, Frame, Hello, Standing};

use super::admission::accept::{LaneAcceptor, Lanes};
use super::lanes::demand::{Command, Resume};
use super::{Migration, encoded};
use crate::control::destination::{Entrance, Input};
use crate::error::Result;
use crate::events::CUT;
use crate::observe::output::Output;
use crate::runtime::inbox::Interest;
use crate::transport::lane::{Listener, ShutdownHandle};
use crate::transport::secure::{ServerAuth, WayIn};
use crate::transport::uri::Uri;

/// The session's lanes, or their absence.
pub(super) struct Link {
    pub(super) recovers: bool,
    /// The demand lane's hello of the last successful attempt.
    hello: Hello,
    /// What new connections must present.
    guard: Arc<ServerAuth>,
    /// The identity of the peer that began the session, with TLS.
    certificate: Option<Vec<u8>>,
    /// None for given connections, which cannot be reopened, until new ones are given.
    door: Option<LaneAcceptor>,
    pub(super) sockets: ShutdownHandle,
    /// All lanes of one attempt. They wait until the old lanes are released.
    arrived: Option<Lanes>,
    /// The place for the source to connect to, before the core decides.
    offer: Option<Offer>,
}

/// A place that the source can connect to.
pub(super) enum Offer {
    Listener(Listener),
    /// One socket a lane.
    Connections(Vec<OwnedFd>),
}

impl Link {
    pub(super) fn new(lanes: &mut Lanes, guard: Arc<ServerAuth>) -> Link {
        let (hello, certificate) = (lanes.hello.clone(), lanes.certificate.clone());
        Link {
            recovers: lanes.recovers(),
            sockets: lanes.shutdown_handle(),
            ..Link::down(hello, guard, certificate, lanes.door.take())
        }
    }

    /// An external switchover: a program beside both sides starts the guest.
    pub(super) fn is_external(&self) -> bool {
        self.hello.capabilities.contains(Capabilities::EXTERNAL)
    }

    /// The link of a session whose process is gone: without lanes, old or new.
    pub(super) fn taken_over(
        hello: Hello,
        guard: Arc<ServerAuth>,
        certificate: Option<Vec<u8>>,
        door: LaneAcceptor,
    ) -> Link {
        Link::down(hello, guard, certificate, Some(door))
    }

    /// A link that recovers and has no lanes.
    fn down(
        hello: Hello,
        guard: Arc<ServerAuth>,
        certificate: Option<Vec<u8>>,
        door: Option<LaneAcceptor>,
    ) -> Link {
        Link {
            recovers: true,
            hello,
            guard,
            certificate,
            door,
            sockets: ShutdownHandle::default(),
            arrived: None,
            offer: None,
        }
    }

    /// The source asked for checksums; a destination always supports them.
    pub(super) fn is_checked(&self) -> bool {
        self.hello.capabilities.contains(Capabilities::CHECKSUM)
    }

    /// Whether the source's digests count the same pages as this side's, zeroes and holes included.
    pub(super) fn has_whole_digests(&self) -> bool {
        self.hello.capabilities.contains(Capabilities::WHOLE_DIGESTS)
    }

    /// A handle that can end the lanes.
    pub(super) fn shutdown_handle(&self) -> ShutdownHandle {
        self.sockets.clone()
    }

    /// Where lanes that replace lost ones arrive.
    pub(super) fn entrance(&self) -> Option<Entrance> {
        self.door.as_ref().map(|door| match door.is_of_connections() {
            true => Entrance::Given,
            false => Entrance::Listener,
        })
    }

    /// Given connections are unusable now.
    pub(super) fn forget_given(&mut self) {
        self.door.take_if(|door| door.is_of_connections());
    }

    /// The guest is complete: the place where a source that missed the completion can connect, if there is one.
    pub(super) fn leave(&mut self) -> Option<LaneAcceptor> {
        self.door.take_if(|door| !door.is_of_connections())
    }

    /// Descriptors to poll for new lanes; [`answer`](Link::answer) handles the ready one.
    pub(super) fn fds(&self) -> Vec<Interest<'_>> {
        self.door.as_ref().map_or_else(Vec::new, LaneAcceptor::fds)
    }

    pub(super) fn answer(&mut self, index: usize) -> Result<()> {
        self.door.as_mut().map_or(Ok(()), |door| door.answer(index))
    }

    /// The latest time for the next [`look`](Link::look).
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.door.as_ref().and_then(LaneAcceptor::next_deadline)
    }

    /// Handles new connections, and returns a change of state. With `refusal` every connection is refused.
    pub(super) fn look(
        &mut self,
        refusal: Option<(FaultCode, Cow<'static, str>)>,
    ) -> Option<Input> {
        let door = self.door.as_mut()?;
        door.set_refusal(refusal);
        door.forget_late(Instant::now());
        if let Some(lanes) = door.whole() {
            self.arrived = Some(lanes);
            return Some(Input::Came);
        }
        (door.is_of_connections() && !door.has_all()).then_some(Input::GivenInVain)
    }

    pub(super) fn drop_lanes(&mut self) {
        self.arrived = None;
    }

    /// Sets the place where the source can connect.
    pub(super) fn offer(&mut self, offer: Offer) {
        self.offer = Some(offer);
    }

    pub(super) fn decline(&mut self) {
        self.offer = None;
    }

    /// Listens on another address with the same access rules. Returns the address.
    pub(super) fn bind(
        &mut self,
        uri: &Uri,
        found: &[SocketAddr],
        output: &Output,
    ) -> Result<String> {
        let listener = Listener::bind_found(uri, found)?;
        let uri = listener.uri(uri);
        if let Some(open) = self.guard.check_open(&WayIn::Listener(&listener), &uri)? {
            output.remark(&open);
        }
        self.offer(Offer::Listener(listener));
        Ok(uri.to_string())
    }

    /// Takes lanes of this session from the connections that were offered.
    pub(super) fn open(&mut self, output: &Output) {
        let (guard, certificate) = (self.guard.clone(), self.certificate.clone());
        self.door = self.offer.take().map(|offer| match offer {
            Offer::Listener(listener) => {
                LaneAcceptor::of_session(listener, guard, &self.hello, certificate, output)
            }
            Offer::Connections(sockets) => {
                LaneAcceptor::of_connections(sockets, guard, &self.hello, certificate, output)
            }
        });
    }
}

impl Migration<'_> {
    /// Cuts all lanes. The bulk threads have ended when this returns; the demand thread reports when it has released
    /// its lane.
    pub(super) fn sever(&mut self) {
        self.guest.set_lanes_down(true);
        self.link.sockets.sever();
        self.threads.bulk_wakers.clear();
        for thread in self.threads.bulk_threads.drain(..) {
            // A failure of the thread arrives as a message.
            let _ = thread.join();
        }
        self.progress.phase("waiting");
        self.progress.watch().entered(CUT);
    }

    /// Continues over the lanes that have arrived.
    pub(super) fn reconnect(&mut self, standing: Standing, is_complete: bool) -> Result<()> {
        let Some(lanes) = self.link.arrived.take() else { return Ok(()) };
        self.guest.set_lanes_down(false);
        self.link.sockets.replace(lanes.all());
        self.link.hello = lanes.hello.clone();
        self.threads.demand_socket = Some(lanes.demand.socket());
        self.congestion = lanes.demand.congestion.clone().unwrap_or_else(|| "none".into());
        let acks = lanes.acks();
        let resume = Resume {
            lane: lanes.demand,
            landing: self.landing.clone(),
            first: encoded(&Frame::Resume(standing)),
            last: if is_complete { self.completion() } else { Vec::new() },
        };
        self.start_bulk(lanes.bulk, acks)?;
        self.threads.command(Command::Resume(Box::new(resume)));
        self.progress.phase("filling");
        self.progress.watch().reconnected(self.core.phase_name());
        Ok(())
    }
}
