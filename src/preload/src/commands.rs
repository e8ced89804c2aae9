//! The thread that reads umem's commands, after the first hand-over.

use std::fmt::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::{block, handover, report, state, sys};

/// The stack: little more than [`RECEIVE_SIZE`] and the formatting of a short line.
const STACK_SIZE: usize = 128 << 10;

/// The most bytes of a command; longer lines are dropped unread. The longest command has a region's name, of 63 bytes
/// at most.
const LINE_SIZE_MAX: usize = 256;

/// Bytes of one receive: some hundred commands.
const RECEIVE_SIZE: usize = 8 << 10;

/// Answers are collected up to this size, and sent at the latest after the last received command.
const ANSWERS_SIZE_MAX: usize = 8 << 10;

/// The interval between attempts to accept the connection of a umem that takes over.
const ACCEPT_INTERVAL: Duration = Duration::from_millis(100);

/// Starts the thread, once. It blocks all signals: QEMU's threads handle QEMU's signals.
pub(crate) fn start(socket: i32) -> Result<(), i32> {
    static STARTED: AtomicBool = AtomicBool::new(false);
    if STARTED.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    thread(move || serve(socket)).inspect_err(|_| STARTED.store(false, Ordering::Relaxed))
}

fn thread(body: impl FnOnce() + Send + 'static) -> Result<(), i32> {
    let builder = std::thread::Builder::new().name("umem-preload".into()).stack_size(STACK_SIZE);
    match sys::with_signals_blocked(|| builder.spawn(body)) {
        Ok(_) => Ok(()),
        Err(error) => Err(error.raw_os_error().unwrap_or(sys::EINVAL)),
    }
}

/// The objects kept for a umem that takes over, until `release`.
struct Session {
    /// The socket to which it connects.
    listener: OwnedFd,
    /// The state of the guest's pages, and the monitor's socket; this object does not read them.
    kept: Vec<OwnedFd>,
}

static SESSION: Mutex<Option<Arc<Session>>> = Mutex::new(None);

/// Keeps a session. The first descriptor is the listener. There is at most one session.
fn keep_session(descriptors: Vec<OwnedFd>) {
    let mut descriptors = descriptors.into_iter();
    let Some(listener) = descriptors.next() else { return };
    let session = Arc::new(Session { listener, kept: descriptors.collect() });
    let mut slot = SESSION.lock().unwrap_or_else(PoisonError::into_inner);
    if slot.is_some() || session.kept.is_empty() {
        return;
    }
    let accepting = session.clone();
    // Without the thread no umem can take over, as before the session.
    if thread(move || accept(&accepting)).is_ok() {
        *slot = Some(session);
    }
}

/// Hands over again to each umem that connects: its predecessor is gone.
fn accept(session: &Session) {
    loop {
        let socket = match sys::accept(session.listener.as_raw_fd()) {
            Ok(socket) => socket,
            // Released: the socket is no longer used.
            Err(sys::EINVAL) => return,
            Err(errno) => {
                // Usually the program has no descriptor left. No event reports a free one, so the thread tries
                // again; a umem that takes over waits meanwhile.
                if errno != sys::EINTR {
                    std::thread::sleep(ACCEPT_INTERVAL);
                }
                continue;
            }
        };
        let kept: Vec<i32> = session.kept.iter().map(AsRawFd::as_raw_fd).collect();
        let line = format!("{{\"session\":{}}}\n", kept.len());
        let handed = handover::again(socket.as_raw_fd())
            .and_then(|()| report::send(socket.as_raw_fd(), line.as_bytes(), &kept));
        if handed.is_ok() {
            // An unserved umem gives up, and may try again.
            let _ = thread(move || serve(socket.as_raw_fd()));
        }
    }
}

fn release() -> usize {
    let released = handover::release();
    let session = SESSION.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(session) = session {
        sys::shut_down(session.listener.as_raw_fd());
    }
    released
}

/// Carries out commands until `release` or the end of umem. A guest that may have run here then stays and waits, with
/// every descriptor open. A guest that has not arrived never will, so its process ends.
fn serve(socket: i32) {
    if catch_unwind(|| carry_out_all(socket)).is_err() {
        // umem sees the end of this side; the guest's memory stays protected.
        sys::shut_down(socket);
    }
    if !state::guest_may_run() {
        sys::kill_this_process();
    }
}

fn carry_out_all(socket: i32) {
    let mut commands = Commands {
        line: Vec::with_capacity(LINE_SIZE_MAX),
        answers: String::new(),
        descriptors: Vec::new(),
        stale: Vec::new(),
    };
    let mut buffer = [0; RECEIVE_SIZE];
    loop {
        let received = match sys::receive(socket, &mut buffer, &mut commands.descriptors) {
            Ok(count @ 1..) => buffer.get(..count).unwrap_or_default(),
            Err(sys::EINTR) => continue,
            Ok(0) | Err(_) => break,
        };
        state::begin();
        // No command has more descriptors.
        commands.descriptors.truncate(sys::DESCRIPTORS_MAX);
        let end = commands.carry_out(socket, received);
        if commands.send_answers(socket).is_err() || end == End::Released {
            break;
        }
    }
}

/// Received bytes, and answers to send.
struct Commands {
    /// The start of a line. A line of [`LINE_SIZE_MAX`] is too long, and is dropped at its end.
    line: Vec<u8>,
    answers: String,
    /// Descriptors of lines that are not carried out yet.
    descriptors: Vec<OwnedFd>,
    /// Ranges for the next `empty`: addresses and lengths.
    stale: Vec<(usize, usize)>,
}

#[derive(PartialEq, Eq)]
enum End {
    /// The end of the received bytes.
    Received,
    /// The end of all commands, after `release`.
    Released,
}

impl Commands {
    fn carry_out(&mut self, socket: i32, received: &[u8]) -> End {
        for &byte in received {
            if byte != b'\n' {
                if self.line.len() < LINE_SIZE_MAX {
                    self.line.push(byte);
                }
                continue;
            }
            let line = std::mem::take(&mut self.line);
            if line.len() < LINE_SIZE_MAX && self.command(socket, &line) == End::Released {
                return End::Released;
            }
            self.line = line;
            self.line.clear();
            // Fails only without a reader, and the end of the stream reports that too.
            if self.answers.len() >= ANSWERS_SIZE_MAX && self.send_answers(socket).is_err() {
                return End::Received;
            }
        }
        End::Received
    }

    fn command(&mut self, socket: i32, line: &[u8]) -> End {
        match line {
            b"keep" => state::keep(),
            b"settled" => state::settle(),
            b"ping" => self.answers.push_str("{\"pong\":1}\n"),
            b"session" => keep_session(std::mem::take(&mut self.descriptors)),
            b"release" => {
                state::keep();
                state::settle();
                self.answer(format_args!("{{\"released\":{}}}\n", release()));
                return End::Released;
            }
            _ => {
                if let Some((address, length)) = parse_touch(line) {
                    self.touch(address, length);
                } else if let Some((address, length, name)) = parse_register(line) {
                    if let Err(failure) = block::register(socket, address, length, name) {
                        self.answers.push_str(&report::failure_line(name, &failure));
                    }
                } else if let Some(range) = parse_stale(line) {
                    self.stale.push(range);
                } else if let Some(address) = parse_empty(line) {
                    self.empty(address);
                } else if let Some((address, name)) = parse_name(line) {
                    handover::rename(address, name);
                } else if let Some(address) = parse_forget(line) {
                    handover::forget(address);
                }
            }
        }
        End::Received
    }

    fn touch(&mut self, address: usize, length: usize) {
        match handover::touch(address, length) {
            Ok(()) => self.answer(format_args!("{{\"touched\":{address},\"size\":{length}}}\n")),
            Err((name, failure)) => self.answers.push_str(&report::failure_line(&name, &failure)),
        }
    }

    fn empty(&mut self, address: usize) {
        let stale = std::mem::take(&mut self.stale);
        match block::empty(address, &stale) {
            Ok(length) => {
                self.answer(format_args!("{{\"emptied\":{address},\"size\":{length}}}\n"));
            }
            Err(failure) => self.answers.push_str(&report::failure_line("", &failure)),
        }
    }

    fn answer(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a String does not fail.
        let _ = self.answers.write_fmt(line);
    }

    fn send_answers(&mut self, socket: i32) -> Result<(), i32> {
        let sent = report::send(socket, self.answers.as_bytes(), &[]);
        self.answers.clear();
        sent
    }
}

/// `touch ADDRESS LENGTH`
fn parse_touch(line: &[u8]) -> Option<(usize, usize)> {
    parse_range(line, "touch ")
}

/// `stale ADDRESS LENGTH`
fn parse_stale(line: &[u8]) -> Option<(usize, usize)> {
    parse_range(line, "stale ")
}

fn parse_range(line: &[u8], command: &str) -> Option<(usize, usize)> {
    let (address, length) =
        std::str::from_utf8(line).ok()?.strip_prefix(command)?.split_once(' ')?;
    Some((address.parse().ok()?, length.parse().ok()?))
}

/// `empty ADDRESS`
fn parse_empty(line: &[u8]) -> Option<usize> {
    std::str::from_utf8(line).ok()?.strip_prefix("empty ")?.parse().ok()
}

/// `register ADDRESS LENGTH NAME`
fn parse_register(line: &[u8]) -> Option<(usize, usize, &str)> {
    let mut words = std::str::from_utf8(line).ok()?.strip_prefix("register ")?.splitn(3, ' ');
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?))
}

/// `name ADDRESS NAME`
fn parse_name(line: &[u8]) -> Option<(usize, &str)> {
    let (address, name) = std::str::from_utf8(line).ok()?.strip_prefix("name ")?.split_once(' ')?;
    Some((address.parse().ok()?, name))
}

/// `forget ADDRESS`
fn parse_forget(line: &[u8]) -> Option<usize> {
    std::str::from_utf8(line).ok()?.strip_prefix("forget ")?.parse().ok()
}
