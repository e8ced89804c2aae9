//! All output of umem to its standard output and error.
//!
//! Output must not end, fail or delay a migration. So nothing here panics, errors are remembered
//! instead of returned, and a thread takes over a stream that blocks (a pipe without a reader, a
//! stopped terminal). Up to [`WAITING_BYTES_MAX`] bytes wait; further output is lost. [`finish`]
//! waits for the rest at the end, and reports output that could not be written.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::borrow::Cow;
use std::cell::Cell;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::unistd::write;

use super::panics::{self, THREAD_PREFIX};
use super::polling::poll;

/// Most bytes that wait for a blocked stream.
const WAITING_BYTES_MAX: usize = 1 << 20;

/// A ready pipe takes this many bytes without blocking (PIPE_BUF).
const AT_ONCE_BYTES_MAX: usize = 4096;

/// How often the wait at the end checks for a signal.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

static STDOUT: Stream = Stream::new(libc::STDOUT_FILENO);
static STDERR: Stream = Stream::new(libc::STDERR_FILENO);

/// Whether stdout was closed at the start, as the standard library opens /dev/null in its place.
static STDOUT_WAS_CLOSED: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// Whether this thread is writing.
    static IS_PUTTING: Cell<bool> = const { Cell::new(false) };
}

/// Called before the standard library starts, so it only makes a system call.
pub(crate) fn look_at_stdout() {
    // SAFETY: numbers only.
    let is_closed = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) } < 0;
    STDOUT_WAS_CLOSED.store(is_closed, Relaxed);
}

/// Writes to the standard output, unchanged.
pub(crate) fn out(text: &str) {
    if STDOUT_WAS_CLOSED.load(Relaxed) {
        STDOUT.state().failure.get_or_insert_with(|| "it was closed when umem started".into());
        return;
    }
    STDOUT.put(text.as_bytes());
}

/// Writes a line to the standard output, [`visible`].
pub(crate) fn out_line(text: &str) {
    out(&format!("{}\n", visible(text)));
}

/// Writes a line to the standard error, [`visible`].
pub(crate) fn err_line(text: &str) {
    STDERR.put(format!("{}\n", visible(text)).as_bytes());
}

/// The text without control sequences for a terminal, which texts of monitors, peers and files may
/// hold.
fn visible(text: &str) -> Cow<'_, str> {
    let obeys = |character: char| character.is_control() && character != '\n' && character != '\t';
    if !text.contains(obeys) {
        return text.into();
    }
    let escape = |character: char| match obeys(character) {
        true => character.escape_unicode().to_string(),
        false => character.to_string(),
    };
    text.chars().map(escape).collect::<String>().into()
}

/// Whether the standard error takes data without blocking.
pub(crate) fn stderr_is_ready() -> bool {
    STDERR.is_ready()
}

/// The standard error as a writer.
#[derive(Clone, Copy)]
pub(crate) struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        STDERR.put(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Prints panics through this module from now on: the standard library would block on a standard
/// error without a reader, and the panicking thread could not report its error.
pub(crate) fn print_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("without a name");
        let trace = match Backtrace::capture() {
            trace if trace.status() == BacktraceStatus::Captured => format!("\n{trace}"),
            _ => String::new(),
        };
        err_line(&format!("thread {name:?} {panic}{trace}"));
    }));
}

/// Waits until everything is written, or `is_over` ends the wait. Returns why output meant for the
/// standard output is missing, if it is.
pub(crate) fn finish(mut is_over: impl FnMut(Duration) -> bool) -> Option<String> {
    while STDOUT.is_behind() || STDERR.is_behind() {
        if is_over(LOOK_INTERVAL) {
            break;
        }
    }
    let mut state = STDOUT.state();
    if state.is_behind() {
        state.failure.get_or_insert_with(|| "its reader has stopped reading".into());
    }
    state.failure.clone()
}

struct Stream {
    number: i32,
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Vec<u8>>,
    waiting_bytes: usize,
    /// The stream's thread has unwritten data.
    is_writing: bool,
    has_thread: bool,
    /// The first error.
    failure: Option<String>,
}

impl State {
    fn is_behind(&self) -> bool {
        self.is_writing || !self.waiting.is_empty()
    }

    fn fail(&mut self, why: impl ToString) {
        self.failure.get_or_insert_with(|| why.to_string());
    }
}

impl Stream {
    const fn new(number: i32) -> Stream {
        let state = State {
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            is_writing: false,
            has_thread: false,
            failure: None,
        };
        Stream { number, state: Mutex::new(state), more: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_behind(&self) -> bool {
        self.state().is_behind()
    }

    fn fd(&self) -> BorrowedFd<'static> {
        // SAFETY: a standard stream is open from before `main` until the process ends, and has no
        // owner.
        unsafe { BorrowedFd::borrow_raw(self.number) }
    }

    fn is_ready(&self) -> bool {
        self.poll(PollTimeout::ZERO)
    }

    fn poll(&self, limit: PollTimeout) -> bool {
        let mut fds = [PollFd::new(self.fd(), PollFlags::POLLOUT)];
        // An error shows at the next write.
        poll(&mut fds, limit).is_ok_and(|count| count > 0)
    }

    fn put(&'static self, bytes: &[u8]) {
        // A panic in here would make the panic's own message wait for this thread's lock.
        if IS_PUTTING.replace(true) {
            return;
        }
        self.put_or_wait(bytes);
        IS_PUTTING.set(false);
    }

    fn put_or_wait(&'static self, bytes: &[u8]) {
        let mut state = self.state();
        let mut rest = bytes;
        if !state.is_behind() {
            while !rest.is_empty() && self.is_ready() {
                match write(self.fd(), &rest[..rest.len().min(AT_ONCE_BYTES_MAX)]) {
                    Ok(count) => rest = &rest[count..],
                    Err(Errno::EINTR) => {}
                    // A QEMU that shares the terminal makes it nonblocking.
                    Err(Errno::EAGAIN) => break,
                    Err(errno) => return state.fail(errno.desc()),
                }
            }
        }
        if rest.is_empty() {
            return;
        }
        if state.waiting_bytes + rest.len() > WAITING_BYTES_MAX {
            return state.fail("its reader has stopped reading");
        }
        if !state.has_thread {
            let thread = std::thread::Builder::new().name(format!("{THREAD_PREFIX}print"));
            match thread.spawn(|| self.write_or_fail()) {
                Ok(_) => state.has_thread = true,
                Err(error) => return state.fail(error),
            }
        }
        state.waiting_bytes += rest.len();
        state.waiting.push_back(rest.to_vec());
        self.more.notify_one();
    }

    /// Writes waiting data until the process ends. After a panic of this thread no data waits for
    /// it.
    fn write_or_fail(&self) {
        let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.write_on()));
        let mut state = self.state();
        state.fail(panics::error(&*panic));
        (state.is_writing, state.has_thread, state.waiting_bytes) = (false, false, 0);
        state.waiting.clear();
    }

    /// Writes waiting data until the process ends.
    fn write_on(&self) -> Infallible {
        let mut state = self.state();
        loop {
            let Some(bytes) = state.waiting.pop_front() else {
                state = self.more.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.is_writing = true;
            drop(state);
            panics::point(format_args!("print"));
            let written = self.write_all(&bytes);
            state = self.state();
            state.is_writing = false;
            state.waiting_bytes -= bytes.len();
            if let Err(errno) = written {
                state.fail(errno.desc());
            }
        }
    }

    fn write_all(&self, mut bytes: &[u8]) -> nix::Result<()> {
        while !bytes.is_empty() {
            match write(self.fd(), bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    self.poll(PollTimeout::NONE);
                }
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }
}
