//! A relay between a source and a destination.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};

/// Passes on what the two sides say over TCP, counts the pages' way and can hold back the answers of
/// the demand lane, which are the destination's steps: migration then stands still at a known place.
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
    /// Bytes that may still go to the source on the demand lane; no limit if none.
    answers_left: Option<usize>,
    /// Bytes that have gone to the destination, by lane; the demand lane is the first.
    sent: Vec<u64>,
    sockets: Vec<TcpStream>,
    is_cut: bool,
}

impl Tap {
    /// Relays to `uri`, a `tcp:HOST:PORT`. `answers` limits the bytes that go to the source on the
    /// demand lane.
    pub(crate) fn to(uri: &str, answers: Option<usize>) -> Tap {
        let destination = uri.strip_prefix("tcp:").expect("a tcp: URI").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        let state = State { answers_left: answers, ..State::default() };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let accepting = shared.clone();
        // Ends with the test's process: it holds nothing but its port.
        std::thread::spawn(move || {
            for source in listener.incoming().flatten() {
                let Ok(destination) = TcpStream::connect(&destination) else { continue };
                accepting.clone().relay(source, destination);
            }
        });
        Tap { uri: format!("tcp:127.0.0.1:{port}"), shared }
    }

    /// Where the source is to connect.
    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// Bytes that have gone to the destination on the bulk lanes.
    pub(crate) fn bulk_bytes(&self) -> u64 {
        self.shared.state.lock().unwrap().sent.iter().skip(1).sum()
    }

    /// Cuts every connection.
    pub(crate) fn cut(&self) {
        let mut state = self.shared.state.lock().unwrap();
        state.is_cut = true;
        for socket in &state.sockets {
            // Fails when its peer has closed it already.
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
            pass(source, destination, |count| {
                shared.state.lock().unwrap().sent[lane] += count as u64;
                count
            });
        });
        std::thread::spawn(move || {
            pass(from_destination, to_source, |count| {
                if lane == 0 { self.take_answers(count) } else { count }
            });
        });
    }

    /// Waits until at least one of `count` bytes may pass, and says how many may.
    fn take_answers(&self, count: usize) -> usize {
        let mut state = self.state.lock().unwrap();
        while !state.is_cut {
            match &mut state.answers_left {
                None => return count,
                Some(0) => {}
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

/// Copies until either side closes; `allow` says how many of the bytes at hand may go now.
fn pass(mut from: TcpStream, mut to: TcpStream, mut allow: impl FnMut(usize) -> usize) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let mut rest = &buffer[..count];
        while !rest.is_empty() {
            let (now, later) = rest.split_at(allow(rest.len()));
            if to.write_all(now).is_err() {
                return;
            }
            rest = later;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
