//! A relay between a source and a destination that breaks its connections, and changes bits in transit.
//!
//! It cuts where the test requests: after a number of bytes towards the destination, possibly in the middle of a frame
//! or a page, or at once. Later connections are relayed again, so that the destination stays at one address for the
//! source.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::DEADLINE;

/// The ends of connections that a cut closes; the other ends look alive until something is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ends {
    Both,
    Source,
    Destination,
}

/// One scheduled cut.
#[derive(Clone, Copy, Debug)]
struct Cut {
    bytes_left: u64,
    ends: Ends,
}

/// See the [module](self).
pub(crate) struct Cutter {
    uri: String,
    shared: Arc<Shared>,
}

struct Shared {
    destination: String,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// In order, each counted from the previous one.
    cuts: std::collections::VecDeque<Cut>,
    cuts_done: u32,
    /// Bytes relayed to the destination, on all lanes so far.
    passed: u64,
    connections: Vec<Connection>,
    /// Since the last cut.
    lanes: usize,
    /// Bytes at the start of each bulk lane that are always relayed: a hello by default.
    greeting: u64,
    /// On bulk lanes only these bytes are relayed.
    holds_bulk: bool,
    /// Bytes that may still be relayed on demand lanes, to the destination and to the source.
    limits: [Option<u64>; 2],
    /// Bytes received on demand lanes, relayed or not, in either direction.
    demand: [u64; 2],
    /// Bytes from one changed bit to the next, to the destination and to the source; counted from the guest's start at
    /// the destination.
    flips: [std::collections::VecDeque<u64>; 2],
    is_running: bool,
    flips_done: u32,
    /// The interval of changed bits in bytes, for each connection to the destination.
    flips_every: Option<u64>,
    /// New connections are closed at once.
    refuses: bool,
    /// New connections are closed from the next cut on.
    refuses_after_cut: bool,
    ended: bool,
}

struct Connection {
    source: TcpStream,
    destination: TcpStream,
}

/// Bytes of a hello, at the start of every lane.
const HELLO: u64 = umem_wire::HELLO_BYTES as u64;

/// To the destination.
const OUT: usize = 0;
/// To the source.
const BACK: usize = 1;

impl Cutter {
    /// Relays to `uri`, a `tcp:HOST:PORT`, without cuts. Pages are held back on bulk lanes until
    /// [`Cutter::let_pages_go`].
    pub(crate) fn to(uri: &str) -> Cutter {
        let destination = uri.strip_prefix("tcp:").expect("a tcp: URI").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("the listener is bound").port();
        let state = Mutex::new(State { greeting: HELLO, holds_bulk: true, ..State::default() });
        let shared = Arc::new(Shared { destination, state, changed: Condvar::new() });
        let accepting = shared.clone();
        // Ends with the test's process: it holds only its port.
        std::thread::spawn(move || {
            for source in listener.incoming().flatten() {
                accepting.clone().relay(source);
            }
        });
        Cutter { uri: format!("tcp:127.0.0.1:{port}"), shared }
    }

    /// The address for the source to connect to.
    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// The address it relays to, HOST:PORT.
    pub(crate) fn destination(&self) -> &str {
        &self.shared.destination
    }

    /// Cuts repeatedly, after about this many bytes of any lane towards the destination.
    pub(crate) fn cut_after(&self, bytes: impl IntoIterator<Item = (u64, Ends)>) {
        let cuts = bytes.into_iter().map(|(bytes_left, ends)| Cut { bytes_left, ends });
        self.lock().cuts.extend(cuts);
    }

    /// Changes a bit repeatedly, after this many bytes of any lane to the destination; counted from the destination's
    /// running frame on a plain lane.
    pub(crate) fn flip_after(&self, bytes: impl IntoIterator<Item = u64>) {
        self.lock().flips[OUT].extend(bytes);
    }

    /// The same towards the source.
    pub(crate) fn flip_answers_after(&self, bytes: impl IntoIterator<Item = u64>) {
        self.lock().flips[BACK].extend(bytes);
    }

    /// Changes a bit of every this many bytes of each connection to the destination; None stops that.
    pub(crate) fn flip_every(&self, bytes: Option<u64>) {
        self.lock().flips_every = bytes;
    }

    /// As [`Cutter::flip_after`], from the first byte on.
    pub(crate) fn flip_at_once_after(&self, bytes: u64) {
        let mut state = self.lock();
        state.is_running = true;
        state.flips[OUT].push_back(bytes);
    }

    /// Waits until this many bits have been changed in total.
    pub(crate) fn wait_for_flips(&self, count: u32) {
        self.wait_until(|state| state.flips_done >= count);
    }

    /// Refuses connections from the next cut on, until [`Cutter::admit`].
    pub(crate) fn refuse_after_cut(&self) {
        self.lock().refuses_after_cut = true;
    }

    pub(crate) fn let_pages_go(&self) {
        self.lock().holds_bulk = false;
        self.shared.changed.notify_all();
    }

    /// Lanes begin with more than a hello: with this many bytes at most.
    pub(crate) fn lengthen_greetings(&self, bytes: u64) {
        self.lock().greeting = bytes;
    }

    /// Relays this many more bytes on demand lanes to the destination; None for all.
    pub(crate) fn limit_demand(&self, bytes: Option<u64>) {
        self.lock().limits[OUT] = bytes;
        self.shared.changed.notify_all();
    }

    /// Relays this many more bytes on demand lanes to the source; None for all.
    pub(crate) fn limit_answers(&self, bytes: Option<u64>) {
        self.lock().limits[BACK] = bytes;
        self.shared.changed.notify_all();
    }

    /// Waits until this many bytes have arrived from the source on the demand lane, relayed or not.
    pub(crate) fn wait_for_demand(&self, bytes: u64) {
        self.wait_until(|state| state.demand[OUT] >= bytes);
    }

    /// Bytes that have arrived from the source on the demand lane, relayed or not.
    pub(crate) fn demand(&self) -> u64 {
        self.lock().demand[OUT]
    }

    /// Waits until this many bytes have arrived from the destination on the demand lane.
    pub(crate) fn wait_for_answers(&self, bytes: u64) {
        self.wait_until(|state| state.demand[BACK] >= bytes);
    }

    /// Bytes relayed to the destination so far, including those lost later.
    pub(crate) fn passed(&self) -> u64 {
        self.lock().passed
    }

    /// Waits until this many bytes have been relayed.
    pub(crate) fn wait_for_passed(&self, bytes: u64) {
        self.wait_until(|state| state.passed >= bytes);
    }

    /// Waits for this many cuts in total.
    pub(crate) fn wait_for_cuts(&self, count: u32) {
        self.wait_until(|state| state.cuts_done >= count);
    }

    /// The number of cuts once there are this many, or after `patience`.
    pub(crate) fn cuts_within(&self, count: u32, patience: Duration) -> u32 {
        let changed = &self.shared.changed;
        let waited =
            changed.wait_timeout_while(self.lock(), patience, |state| state.cuts_done < count);
        waited.unwrap().0.cuts_done
    }

    /// Cuts every connection now. With `refuse` new connections are refused.
    pub(crate) fn cut(&self, ends: Ends, refuse: bool) {
        let mut state = self.lock();
        state.refuses = refuse;
        state.cut(ends);
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Relays connections again.
    pub(crate) fn admit(&self) {
        self.lock().refuses = false;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap()
    }

    fn wait_until(&self, mut is_so: impl FnMut(&State) -> bool) {
        let waited =
            self.shared.changed.wait_timeout_while(self.lock(), DEADLINE, |state| !is_so(state));
        assert!(!waited.unwrap().1.timed_out(), "waited {DEADLINE:?} for bytes or cuts");
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        self.lock().ended = true;
        self.cut(Ends::Both, true);
    }
}

impl State {
    /// Ends all connections; the copying threads fail, and their bytes are lost.
    fn cut(&mut self, ends: Ends) {
        for Connection { source, destination } in self.connections.drain(..) {
            // Fails if the peer has closed it already.
            if ends != Ends::Destination {
                let _ = source.shutdown(Shutdown::Both);
            }
            if ends != Ends::Source {
                let _ = destination.shutdown(Shutdown::Both);
            }
        }
        self.refuses |= std::mem::take(&mut self.refuses_after_cut);
        self.lanes = 0;
        self.demand = [0; 2];
        self.cuts_done += 1;
    }
}

impl Shared {
    fn relay(self: Arc<Shared>, source: TcpStream) {
        let clone = |socket: &TcpStream| socket.try_clone().expect("a descriptor");
        let mut state = self.state.lock().unwrap();
        if state.refuses {
            return;
        }
        let Ok(destination) = TcpStream::connect(&self.destination) else { return };
        let lane = state.lanes;
        let cuts_seen = state.cuts_done;
        state.lanes += 1;
        let [to_source, from_destination] = [clone(&source), clone(&destination)];
        state
            .connections
            .push(Connection { source: clone(&source), destination: clone(&destination) });
        drop(state);
        let shared = self.clone();
        let frames = Frames::default();
        let out = Way { shared, lane, direction: OUT, cuts_seen, passed: 0, frames };
        std::thread::spawn(move || out.pass(source, destination));
        let frames = Frames::default();
        let back = Way { shared: self, lane, direction: BACK, cuts_seen, passed: 0, frames };
        std::thread::spawn(move || back.pass(from_destination, to_source));
    }
}

/// One direction of one connection.
struct Way {
    shared: Arc<Shared>,
    /// 0 for the demand lane.
    lane: usize,
    direction: usize,
    /// The connection is older than the next cut.
    cuts_seen: u32,
    passed: u64,
    /// To the source, where no pages go.
    frames: Frames,
}

/// Parses relayed frames.
#[derive(Default)]
struct Frames {
    /// Of the current header.
    header: Vec<u8>,
    /// Of the current body.
    left: u64,
}

/// The tag of the running frame.
const RUNNING: u8 = umem_wire::Kind::Running as u8;

impl Frames {
    /// Whether these bytes contain the last byte of a running frame.
    fn say_running(&mut self, bytes: &[u8]) -> bool {
        let mut is_running = false;
        for &byte in bytes {
            if self.left > 0 {
                self.left -= 1;
                continue;
            }
            self.header.push(byte);
            if self.header.len() == umem_wire::HEADER_BYTES {
                is_running |= self.header[0] == RUNNING;
                let body = self.header[4..8].try_into().expect("four bytes");
                self.left = u32::from_le_bytes(body).into();
                self.header.clear();
            }
        }
        is_running
    }
}

impl Way {
    /// Copies until either side closes, or a cut.
    fn pass(mut self, mut from: TcpStream, mut to: TcpStream) {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            self.count_received(count as u64);
            let mut rest = &mut buffer[..count];
            while !rest.is_empty() {
                let Some(allowed) = self.allow(rest.len() as u64) else { return };
                let (now, later) = rest.split_at_mut(allowed as usize);
                self.flip(now);
                if to.write_all(now).is_err() {
                    return;
                }
                if self.has_passed(allowed) {
                    return;
                }
                rest = later;
            }
        }
        if !self.is_cut(&self.shared.state.lock().unwrap()) {
            let _ = to.shutdown(Shutdown::Write);
        }
    }

    fn is_cut(&self, state: &State) -> bool {
        state.ended || state.cuts_done != self.cuts_seen
    }

    fn count_received(&self, count: u64) {
        let mut state = self.shared.state.lock().unwrap();
        if self.lane == 0 && !self.is_cut(&state) {
            state.demand[self.direction] += count;
            drop(state);
            self.shared.changed.notify_all();
        }
    }

    /// Waits until at least one of `count` bytes may be relayed, and returns how many; None after a cut.
    fn allow(&self, count: u64) -> Option<u64> {
        let mut state = self.shared.state.lock().unwrap();
        loop {
            if self.is_cut(&state) {
                return None;
            }
            let mut allowed = count;
            if self.lane == 0 {
                allowed = allowed.min(state.limits[self.direction].unwrap_or(u64::MAX));
            } else if self.direction == OUT && state.holds_bulk {
                allowed = allowed.min(state.greeting.saturating_sub(self.passed));
            }
            if let (OUT, Some(cut)) = (self.direction, state.cuts.front()) {
                allowed = allowed.min(cut.bytes_left);
            }
            if allowed > 0 {
                if let (0, Some(left)) = (self.lane, &mut state.limits[self.direction]) {
                    *left -= allowed;
                }
                return Some(allowed);
            }
            state = self.shared.changed.wait(state).unwrap();
        }
    }

    /// Changes the scheduled bits of bytes that are about to be relayed.
    fn flip(&mut self, bytes: &mut [u8]) {
        let mut state = self.shared.state.lock().unwrap();
        if !state.is_running {
            if (self.lane, self.direction) == (0, BACK) {
                let welcome = HELLO.saturating_sub(self.passed).min(bytes.len() as u64);
                state.is_running = self.frames.say_running(&bytes[welcome as usize..]);
            }
            return;
        }
        let mut flipped = 0;
        let mut at = 0;
        while let Some(next) = state.flips[self.direction].front_mut() {
            let left = bytes.len() as u64 - at;
            if *next >= left {
                *next -= left;
                break;
            }
            at += *next;
            bytes[at as usize] ^= 1 << (at % 8);
            at += 1;
            flipped += 1;
            state.flips[self.direction].pop_front();
        }
        if let (OUT, Some(every)) = (self.direction, state.flips_every) {
            let positions = self.passed..self.passed + bytes.len() as u64;
            for (byte, _) in
                bytes.iter_mut().zip(positions).filter(|(_, at)| at % every == every - 1)
            {
                *byte ^= 4;
                flipped += 1;
            }
        }
        state.flips_done += flipped;
        drop(state);
        if flipped > 0 {
            self.shared.changed.notify_all();
        }
    }

    /// Counts written bytes; true if the last of them is the last before a cut.
    fn has_passed(&mut self, count: u64) -> bool {
        self.passed += count;
        let mut state = self.shared.state.lock().unwrap();
        if self.direction == OUT {
            state.passed += count;
            self.shared.changed.notify_all();
        }
        if self.is_cut(&state) {
            return true;
        }
        let (OUT, Some(cut)) = (self.direction, state.cuts.front_mut()) else { return false };
        cut.bytes_left = cut.bytes_left.saturating_sub(count);
        if cut.bytes_left > 0 {
            return false;
        }
        let ends = cut.ends;
        state.cuts.pop_front();
        state.cut(ends);
        drop(state);
        self.shared.changed.notify_all();
        true
    }
}
