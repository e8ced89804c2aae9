//! A relay between a source and a destination.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};

use umem_wire::{HEADER_BYTES, Kind};

/// Relays the bytes of both sides over TCP, counts those of the pages and can hold back the frames that the destination
/// sends on the demand lane, which are its steps: the migration then stops at a known place.
pub(crate) struct Tap {
    uri: String,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Bytes that may still go to the source on the demand lane; None for no limit.
    answers_left: Option<usize>,
    /// After those, frames may go until one of this kind arrives.
    held: Option<Kind>,
    /// Of the current frame, which may go.
    frame_left: usize,
    /// Bytes relayed to the destination, by lane; the demand lane is the first.
    sent: Vec<u64>,
    sockets: Vec<TcpStream>,
    is_cut: bool,
}

impl Tap {
    /// Relays to `uri`, a `tcp:HOST:PORT`. `answers` limits the bytes that go to the source on the demand lane.
    pub(crate) fn to(uri: &str, answers: Option<usize>) -> Tap {
        Tap::with(uri, State { answers_left: answers, ..State::default() })
    }

    /// Relays to `uri`, and holds back the demand lane's first frame of that kind after `answers` bytes, and everything
    /// behind it.
    pub(crate) fn holding(uri: &str, answers: usize, kind: Kind) -> Tap {
        Tap::with(uri, State { answers_left: Some(answers), held: Some(kind), ..State::default() })
    }

    fn with(uri: &str, state: State) -> Tap {
        let destination = uri.strip_prefix("tcp:").expect("a tcp: URI").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("the listener is bound").port();
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let accepting = shared.clone();
        // Ends with the test's process: it holds only its port.
        std::thread::spawn(move || {
            for source in listener.incoming().flatten() {
                let Ok(destination) = TcpStream::connect(&destination) else { continue };
                accepting.clone().relay(source, destination);
            }
        });
        Tap { uri: format!("tcp:127.0.0.1:{port}"), shared }
    }

    /// The address for the source to connect to.
    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// Bytes relayed to the destination on the bulk lanes.
    pub(crate) fn bulk_bytes(&self) -> u64 {
        self.shared.state.lock().unwrap().sent.iter().skip(1).sum()
    }

    /// Releases everything.
    pub(crate) fn release(&self) {
        let mut state = self.shared.state.lock().unwrap();
        (state.answers_left, state.held) = (None, None);
        self.shared.changed.notify_all();
    }

    /// Cuts every connection.
    pub(crate) fn cut(&self) {
        let mut state = self.shared.state.lock().unwrap();
        state.is_cut = true;
        for socket in &state.sockets {
            // Fails if the peer has closed it already.
            let _ = socket.shutdown(Shutdown::Both);
        }
        self.shared.changed.notify_all();
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.cut();
    }
}

impl Shared {
    fn relay(self: Arc<Shared>, source: TcpStream, destination: TcpStream) {
        let clone = |socket: &TcpStream| socket.try_clone().expect("a descriptor");
        let lane = {
            let mut state = self.state.lock().unwrap();
            state.sockets.extend([clone(&source), clone(&destination)]);
            state.sent.push(0);
            state.sent.len() - 1
        };
        let (to_source, from_destination) = (clone(&source), clone(&destination));
        let shared = self.clone();
        std::thread::spawn(move || {
            pass(source, destination, |bytes| {
                shared.state.lock().unwrap().sent[lane] += bytes.len() as u64;
                bytes.len()
            });
        });
        std::thread::spawn(move || {
            pass(from_destination, to_source, |bytes| {
                if lane == 0 { self.take_answers(bytes) } else { bytes.len() }
            });
        });
    }

    /// Waits until at least one of these bytes may be relayed, and returns how many.
    fn take_answers(&self, bytes: &[u8]) -> usize {
        let count = bytes.len();
        let mut state = self.state.lock().unwrap();
        while !state.is_cut {
            match &mut state.answers_left {
                None => return count,
                Some(0) => {
                    if let allowed @ 1.. = state.take_frames(bytes) {
                        return allowed;
                    }
                }
                Some(left) => {
                    let allowed = count.min(*left);
                    *left -= allowed;
                    return allowed;
                }
            }
            state = self.changed.wait(state).unwrap();
        }
        count
    }
}

impl State {
    /// The number of these bytes that belong to frames that may go.
    fn take_frames(&mut self, bytes: &[u8]) -> usize {
        let Some(held) = self.held else { return 0 };
        if self.frame_left == 0 {
            if bytes[0] == held as u8 {
                return 0;
            }
            let body = bytes[4..8].try_into().expect("a header comes whole over loopback");
            self.frame_left = HEADER_BYTES + u32::from_le_bytes(body) as usize;
        }
        let allowed = bytes.len().min(self.frame_left);
        self.frame_left -= allowed;
        allowed
    }
}

/// Copies until either side closes; `allow` returns how many of the available bytes may go now.
fn pass(mut from: TcpStream, mut to: TcpStream, mut allow: impl FnMut(&[u8]) -> usize) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let mut rest = &buffer[..count];
        while !rest.is_empty() {
            let (now, later) = rest.split_at(allow(rest));
            if to.write_all(now).is_err() {
                return;
            }
            rest = later;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
