//! The wire between two embedded sides: one thread that relays bytes in pieces, holds one direction of a lane back
//! while others pass, breaks connections, and [damages](super::spoil) bytes, all by a seed.
//!
//! Numbers of bytes decide its actions, not time, so a seed makes the same choices each time; the schedule of both
//! sides' threads depends on the machine. Time decides only when nothing moves any more: then held bytes continue, and
//! the other half of a cut connection closes. After a while a connection that has lost bytes closes too: without later
//! bytes the loss is undetectable, and each side waits for the other.

#![allow(clippy::disallowed_methods, reason = "it may open all that it polls")]

use std::collections::VecDeque;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, Shutdown, recv, send, shutdown};
use umem_wire::{HEADER_BYTES, HELLO_BYTES};

use super::super::random::Random;
use super::spoil::{Spoil, Spoiler};

/// The time without movement that counts as standstill.
const STILL_MS: u8 = 3;

/// Consecutive standstills before a connection with lost bytes closes: long after both sides could detect the loss.
const STILL_TURNS: u32 = 100;

/// The most bytes that a direction holds before it stops reading.
const CAPACITY: usize = 64 << 10;

/// The ends of connections that a cut closes at once. The others look alive for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ends {
    Both,
    Source,
    Destination,
}

/// An action of the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    /// Every connection breaks.
    Cut(Ends),
    /// One connection breaks; its index modulo the number of connections.
    CutOne(usize, Ends),
    /// The driver of both sides gets an order with this number.
    Tell(u8),
    /// Bytes are damaged in one direction of a connection: its index modulo the number of connections, or the next one
    /// with traffic. After this many bytes there.
    Spoil(Option<usize>, u64, Spoil),
    /// On this many future connections one bit of the source's first bytes behind its hello changes.
    Ruin(u32),
}

/// Damage done by a path.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Spoilt {
    /// How often it damaged bytes.
    pub(crate) count: u64,
    /// Connections that it closed because both sides waited for lost bytes.
    pub(crate) stuck: u64,
}

/// Actions, each after this many bytes of all lanes and both directions since the previous one.
pub(crate) type Deeds = Vec<(u64, Deed)>;

/// The source's address and the destination's.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    Unix(PathBuf),
    /// A port on the loopback address.
    Tcp(u16),
}

impl Place {
    pub(crate) fn uri(&self) -> String {
        match self {
            Place::Unix(path) => format!("unix:{}", path.display()),
            Place::Tcp(port) => format!("tcp:127.0.0.1:{port}"),
        }
    }

    fn connect(&self) -> std::io::Result<OwnedFd> {
        match self {
            Place::Unix(path) => UnixStream::connect(path).map(OwnedFd::from),
            Place::Tcp(port) => {
                let socket = TcpStream::connect(("127.0.0.1", *port))?;
                socket.set_nodelay(true)?;
                Ok(socket.into())
            }
        }
    }
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            Listener::Unix(listener) => listener.as_fd(),
            Listener::Tcp(listener) => listener.as_fd(),
        }
    }

    fn accept(&self) -> Option<OwnedFd> {
        match self {
            Listener::Unix(listener) => listener.accept().ok().map(|(socket, _)| socket.into()),
            Listener::Tcp(listener) => listener.accept().ok().map(|(socket, _)| {
                // Pieces are sent at once.
                let _ = socket.set_nodelay(true);
                socket.into()
            }),
        }
    }
}

/// See the [module](self).
pub(crate) struct Relay {
    /// The address for the source to dial.
    pub(crate) place: Option<Place>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    orders: Mutex<Orders>,
    bell: EventFd,
    /// Readable when an order is queued.
    told: EventFd,
}

#[derive(Default)]
struct Orders {
    /// Actions from now on.
    deeds: Vec<(u64, Deed)>,
    /// New connections, the source's end and the destination's.
    given: Vec<[OwnedFd; 2]>,
    told: Vec<u8>,
    spoilt: Spoilt,
    /// The destination's address from now on.
    to: Option<Place>,
    has_ended: bool,
}

impl Relay {
    /// Between connections that are [given](Relay::pair), or, with addresses, from the first to the second.
    pub(crate) fn start(seed: u64, way: Option<(Place, Place)>) -> Relay {
        let bell = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap();
        let shared = Arc::new(Shared { orders: Mutex::default(), bell: bell(), told: bell() });
        let way = way.map(|(from, to)| {
            let listener = match &from {
                Place::Unix(path) => Listener::Unix(UnixListener::bind(path).unwrap()),
                Place::Tcp(port) => Listener::Tcp(TcpListener::bind(("127.0.0.1", *port)).unwrap()),
            };
            let from = match &listener {
                Listener::Tcp(listener) => Place::Tcp(listener.local_addr().unwrap().port()),
                Listener::Unix(_) => from,
            };
            fcntl(listener.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
            (listener, from, to)
        });
        let place = way.as_ref().map(|(_, from, _)| from.clone());
        let way = way.map(|(listener, _, to)| (listener, to));
        let thread = Thread {
            shared: shared.clone(),
            seed,
            way,
            pipes: Vec::new(),
            connections: 0,
            deeds: VecDeque::new(),
            spoils: VecDeque::new(),
            ruins: 0,
            since: 0,
            passed: 0,
            turns_still: 0,
        };
        let thread = std::thread::Builder::new().name("relay".into()).spawn(move || thread.run());
        Relay { place, shared, thread: Some(thread.unwrap()) }
    }

    /// Schedules these actions after the current ones.
    pub(crate) fn then(&self, deeds: impl IntoIterator<Item = (u64, Deed)>) {
        self.shared.orders.lock().unwrap().deeds.extend(deeds);
        let _ = self.shared.bell.write(1);
    }

    /// A connection: the source's end, and the destination's.
    pub(crate) fn pair(&self) -> (OwnedFd, OwnedFd) {
        let [(source, ours), (destination, theirs)] =
            [(); 2].map(|()| UnixStream::pair().expect("two descriptors"));
        self.shared.orders.lock().unwrap().given.push([ours.into(), theirs.into()]);
        let _ = self.shared.bell.write(1);
        (source.into(), destination.into())
    }

    /// New connections go to this address.
    pub(crate) fn lead_to(&self, to: Place) {
        self.shared.orders.lock().unwrap().to = Some(to);
        let _ = self.shared.bell.write(1);
    }

    /// Readable when [`take_told`](Relay::take_told) has an order.
    pub(crate) fn told(&self) -> std::os::fd::BorrowedFd<'_> {
        self.shared.told.as_fd()
    }

    pub(crate) fn take_told(&self) -> Vec<u8> {
        let _ = self.shared.told.read();
        std::mem::take(&mut self.shared.orders.lock().unwrap().told)
    }

    pub(crate) fn spoilt(&self) -> Spoilt {
        self.shared.orders.lock().unwrap().spoilt
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.orders.lock().unwrap().has_ended = true;
        let _ = self.shared.bell.write(1);
        if let Some(Place::Unix(path)) = &self.place {
            let _ = std::fs::remove_file(path);
        }
        let thread = self.thread.take().expect("ended once");
        if thread.join().is_err() && !std::thread::panicking() {
            panic!("the relay panicked");
        }
    }
}

/// One direction of a connection.
struct Pipe {
    connection: u64,
    /// In both directions the source's end is named first.
    from_source: bool,
    from: Arc<OwnedFd>,
    to: Arc<OwnedFd>,
    random: Random,
    bytes: Vec<u8>,
    spoiler: Spoiler,
    /// Held until this many bytes have passed elsewhere.
    held: Option<u64>,
    has_ended: bool,
    /// Its other end was cut: arriving bytes are lost, and it closes at standstill.
    is_ghost: bool,
}

struct Thread {
    shared: Arc<Shared>,
    seed: u64,
    way: Option<(Listener, Place)>,
    pipes: Vec<Pipe>,
    /// New connections so far.
    connections: u64,
    deeds: VecDeque<(u64, Deed)>,
    /// For the next direction with traffic.
    spoils: VecDeque<(u64, Spoil)>,
    /// Future connections to damage.
    ruins: u32,
    /// Bytes since the last action, and in total.
    since: u64,
    passed: u64,
    /// Turns without movement.
    turns_still: u32,
}

impl Thread {
    fn run(mut self) {
        while self.take_orders() {
            let ready = self.wait();
            let mut is_still = true;
            for index in 0..self.pipes.len() {
                let [can_read, can_write] = [ready[2 + 2 * index], ready[3 + 2 * index]];
                if can_read && self.read(index) || can_write && self.write(index) {
                    is_still = false;
                }
            }
            // Last, because the ready list refers to the old pipes.
            if ready[1] && self.accept() {
                is_still = false;
            }
            self.turns_still = if is_still && !ready[0] { self.turns_still + 1 } else { 0 };
            if self.turns_still > 0 {
                self.settle();
            }
            self.act();
            self.pipes.retain(|pipe| !(pipe.has_ended && pipe.bytes.is_empty()));
        }
    }

    fn take_orders(&mut self) -> bool {
        let _ = self.shared.bell.read();
        let mut orders = self.shared.orders.lock().unwrap();
        let given = std::mem::take(&mut orders.given);
        let deeds = std::mem::take(&mut orders.deeds);
        if let (Some(to), Some((_, way))) = (orders.to.take(), &mut self.way) {
            *way = to;
        }
        let goes_on = !orders.has_ended;
        drop(orders);
        if !deeds.is_empty() && self.deeds.is_empty() {
            self.since = 0;
        }
        self.deeds.extend(deeds);
        for [source, destination] in given {
            self.connect(source, destination);
        }
        goes_on
    }

    /// The ready descriptors: the eventfd, the listener, then each pipe's end to read from and to write to.
    fn wait(&self) -> Vec<bool> {
        let mut fds = vec![PollFd::new(self.shared.bell.as_fd(), PollFlags::POLLIN)];
        let nothing = PollFlags::empty();
        match &self.way {
            Some((listener, _)) => fds.push(PollFd::new(listener.as_fd(), PollFlags::POLLIN)),
            None => fds.push(PollFd::new(self.shared.bell.as_fd(), nothing)),
        }
        for pipe in &self.pipes {
            let reads = !pipe.has_ended && pipe.bytes.len() < CAPACITY;
            let writes = !pipe.bytes.is_empty() && pipe.held.is_none();
            let want = |is_wanted, flags| if is_wanted { flags } else { nothing };
            fds.push(PollFd::new(pipe.from.as_fd(), want(reads, PollFlags::POLLIN)));
            fds.push(PollFd::new(pipe.to.as_fd(), want(writes, PollFlags::POLLOUT)));
        }
        let is_due = |pipe: &Pipe| pipe.held.is_some() || pipe.is_ghost || pipe.spoiler.has_lost;
        let is_due = self.pipes.iter().any(is_due);
        let timeout = if is_due { PollTimeout::from(STILL_MS) } else { PollTimeout::NONE };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => panic!("poll: {errno}"),
        }
        let is_ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        fds.iter().map(is_ready).collect()
    }

    fn accept(&mut self) -> bool {
        let Some((listener, to)) = &self.way else { return false };
        let Some(source) = listener.accept() else { return false };
        if let Ok(destination) = to.connect() {
            self.connect(source, destination);
        }
        true
    }

    fn connect(&mut self, source: OwnedFd, destination: OwnedFd) {
        let connection = self.connections;
        self.connections += 1;
        let [source, destination] = [source, destination].map(Arc::new);
        for (from_source, from, to) in
            [(true, &source, &destination), (false, &destination, &source)]
        {
            let tag = 100 + 2 * connection + u64::from(from_source);
            let mut spoiler = Spoiler::default();
            if from_source && self.ruins > 0 {
                self.ruins -= 1;
                let mut random = Random::of(self.seed, tag << 32);
                let after = HELLO_BYTES as u64 + random.below(HEADER_BYTES as u64);
                spoiler.then(after, Spoil::Flip(random.below(8) as u8));
            }
            self.pipes.push(Pipe {
                connection,
                from_source,
                from: from.clone(),
                to: to.clone(),
                random: Random::of(self.seed, tag),
                bytes: Vec::new(),
                spoiler,
                held: None,
                has_ended: false,
                is_ghost: false,
            });
        }
    }

    /// Relays the available bytes, up to a number from the seed; false if nothing moved.
    fn read(&mut self, index: usize) -> bool {
        let passed = self.passed;
        let pipe = &mut self.pipes[index];
        if pipe.has_ended || pipe.bytes.len() >= CAPACITY {
            return false;
        }
        let most = usize::try_from(pipe.random.magnitude(15)).expect("64-bit");
        let mut piece = vec![0; most];
        match recv(pipe.from.as_raw_fd(), &mut piece, MsgFlags::MSG_DONTWAIT) {
            Ok(0) | Err(Errno::ECONNRESET | Errno::EPIPE | Errno::ENOTCONN) => {
                pipe.has_ended = true;
                pipe.held = None;
                pass_end(pipe);
            }
            Ok(_) if pipe.is_ghost => {}
            Ok(count) => {
                if let Some((after, what)) = self.spoils.pop_front() {
                    pipe.spoiler.then(after, what);
                }
                let before = pipe.spoiler.done;
                pipe.spoiler.pass(&piece[..count], &mut pipe.bytes);
                if pipe.spoiler.done > before {
                    let mut orders = self.shared.orders.lock().unwrap();
                    orders.spoilt.count += pipe.spoiler.done - before;
                }
                if pipe.held.is_none() && pipe.random.percent(4) {
                    pipe.held = Some(passed + pipe.random.magnitude(17));
                }
            }
            Err(Errno::EAGAIN | Errno::EINTR) => return false,
            Err(errno) => panic!("receiving: {errno}"),
        }
        true
    }

    fn write(&mut self, index: usize) -> bool {
        let pipe = &mut self.pipes[index];
        if pipe.bytes.is_empty() || pipe.held.is_some() {
            return false;
        }
        // Not beyond the next action.
        let left = self.deeds.front().map_or(u64::MAX, |(after, _)| after - self.since);
        let count = pipe.bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX)).max(1);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(pipe.to.as_raw_fd(), &pipe.bytes[..count], flags) {
            Ok(count) => {
                pipe.bytes.drain(..count);
                if pipe.has_ended && pipe.bytes.is_empty() {
                    pass_end(pipe);
                }
                self.since += count as u64;
                self.passed += count as u64;
                self.act();
            }
            Err(Errno::EAGAIN | Errno::EINTR) => return false,
            // Its reader has closed: the writer's end closes too.
            Err(_) => {
                pipe.bytes.clear();
                pipe.has_ended = true;
                close(&pipe.from);
            }
        }
        true
    }

    /// Runs the due actions.
    fn act(&mut self) {
        let passed = self.passed;
        for pipe in &mut self.pipes {
            pipe.held.take_if(|until| *until <= passed);
        }
        while let Some(&(after, deed)) = self.deeds.front()
            && after <= self.since
        {
            self.deeds.pop_front();
            self.since = 0;
            match deed {
                Deed::Cut(ends) => self.cut(None, ends),
                Deed::CutOne(which, ends) => {
                    let mut there: Vec<u64> =
                        self.pipes.iter().map(|pipe| pipe.connection).collect();
                    there.dedup();
                    if !there.is_empty() {
                        self.cut(Some(there[which % there.len()]), ends);
                    }
                }
                Deed::Tell(what) => {
                    self.shared.orders.lock().unwrap().told.push(what);
                    let _ = self.shared.told.write(1);
                }
                Deed::Ruin(connections) => self.ruins += connections,
                Deed::Spoil(None, after, what) => self.spoils.push_back((after, what)),
                Deed::Spoil(Some(which), after, what) => {
                    let mut there: Vec<&mut Pipe> =
                        self.pipes.iter_mut().filter(|p| !p.has_ended && !p.is_ghost).collect();
                    if !there.is_empty() {
                        let index = which % there.len();
                        there[index].spoiler.then(after, what);
                    }
                }
            }
        }
    }

    /// Bytes in flight are lost.
    fn cut(&mut self, which: Option<u64>, ends: Ends) {
        for pipe in &mut self.pipes {
            if which.is_some_and(|connection| connection != pipe.connection) || pipe.is_ghost {
                continue;
            }
            pipe.bytes.clear();
            pipe.held = None;
            let sees_it = match ends {
                Ends::Both => true,
                Ends::Source => pipe.from_source,
                Ends::Destination => !pipe.from_source,
            };
            if sees_it {
                close(&pipe.from);
                pipe.has_ended = true;
            } else {
                pipe.is_ghost = true;
            }
        }
    }

    /// Nothing moves.
    fn settle(&mut self) {
        for pipe in &mut self.pipes {
            pipe.held = None;
            if pipe.is_ghost {
                close(&pipe.from);
                pipe.has_ended = true;
            }
        }
        if self.turns_still < STILL_TURNS {
            return;
        }
        let lost = self.pipes.iter().filter(|pipe| pipe.spoiler.has_lost && !pipe.has_ended);
        for connection in lost.map(|pipe| pipe.connection).collect::<Vec<_>>() {
            self.shared.orders.lock().unwrap().spoilt.stuck += 1;
            self.cut(Some(connection), Ends::Both);
        }
    }
}

/// The end of a stream is relayed to its reader.
fn pass_end(pipe: &Pipe) {
    if pipe.bytes.is_empty() {
        let _ = shutdown(pipe.to.as_raw_fd(), Shutdown::Write);
    }
}

fn close(socket: &OwnedFd) {
    let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
}
