//! What is printed, by whomever: everything that umem writes to its standard output and error goes through here.
//!
//! Nothing that is printed may end a migration, or fail or delay it. So nothing here panics, errors are remembered
//! rather than returned, and a stream that does not take what is written at once (nobody reads the pipe, the
//! terminal is stopped) gets a thread that waits for it; there is room for [`WAITING_BYTES_MAX`], and what does not
//! fit is lost. [`finish`] waits for the rest at the end, and says what could not be written.

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

/// What may wait for a stream that takes nothing, bytes.
const WAITING_BYTES_MAX: usize = 1 << 20;

/// A pipe that takes something takes as much without waiting (PIPE_BUF).
const AT_ONCE_BYTES_MAX: usize = 4096;

/// How often it is looked whether somebody does not want to wait at the end.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

static STDOUT: Stream = Stream::new(libc::STDOUT_FILENO);
static STDERR: Stream = Stream::new(libc::STDERR_FILENO);

/// The standard library opens /dev/null in the place of a stream that is closed when a program begins.
static STDOUT_WAS_CLOSED: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// This thread is about to write something.
    static IS_PUTTING: Cell<bool> = const { Cell::new(false) };
}

/// To be called before the standard library begins, so that it does nothing but a system call.
pub(crate) fn look_at_stdout() {
    // SAFETY: numbers only.
    let is_closed = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) } < 0;
    STDOUT_WAS_CLOSED.store(is_closed, Relaxed);
}

/// On the standard output, as it is.
pub(crate) fn out(text: &str) {
    if STDOUT_WAS_CLOSED.load(Relaxed) {
        STDOUT.state().failure.get_or_insert_with(|| "it was closed when umem started".into());
        return;
    }
    STDOUT.put(text.as_bytes());
}

/// A line on the standard output, [`visible`].
pub(crate) fn out_line(text: &str) {
    out(&format!("{}\n", visible(text)));
}

/// A line on the standard error, [`visible`].
pub(crate) fn err_line(text: &str) {
    STDERR.put(format!("{}\n", visible(text)).as_bytes());
}

/// The text as nothing but text: what monitors, peers and files say may hold sequences that a terminal would obey.
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

/// Whether the standard error takes something at once.
pub(crate) fn stderr_is_ready() -> bool {
    STDERR.is_ready()
}

/// The standard error, for who wants to write there.
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

/// From here on panics are printed as everything else is: the standard library would wait for a standard error that
/// nobody reads, and the thread that has panicked would tell nobody that it has.
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

/// Waits until everything is written, or `is_over` says that nobody waits for it any more. Why something that was
/// meant for the standard output is not there, if that is so.
pub(crate) fn finish(mut is_over: impl FnMut(Duration) -> bool) -> Option<String> {
    while STDOUT.is_behind() || STDERR.is_behind() {
        if is_over(LOOK_INTERVAL) {
            break;
        }
    }
    let mut state = STDOUT.state();
    if state.is_behind() {
        state.failure.get_or_insert_with(|| "its reader does not read".into());
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
    /// The thread has something that is not written yet.
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
        // SAFETY: a standard stream is open from before `main` until the process ends, and nobody owns it.
        unsafe { BorrowedFd::borrow_raw(self.number) }
    }

    fn is_ready(&self) -> bool {
        self.poll(PollTimeout::ZERO)
    }

    fn poll(&self, limit: PollTimeout) -> bool {
        let mut fds = [PollFd::new(self.fd(), PollFlags::POLLOUT)];
        // An error shows as soon as something is written.
        poll(&mut fds, limit).is_ok_and(|count| count > 0)
    }

    fn put(&'static self, bytes: &[u8]) {
        // A panic in here would have the panic's own message wait for this thread's lock.
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
                    // A QEMU sets a terminal that it shares with us so.
                    Err(Errno::EAGAIN) => break,
                    Err(errno) => return state.fail(errno.desc()),
                }
            }
        }
        if rest.is_empty() {
            return;
        }
        if state.waiting_bytes + rest.len() > WAITING_BYTES_MAX {
            return state.fail("its reader does not read");
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

    /// Writes what waits, for as long as the process lives. After a panic nothing waits for it any more.
    fn write_or_fail(&self) {
        let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.write_on()));
        let mut state = self.state();
        state.fail(panics::error(&*panic));
        (state.is_writing, state.has_thread, state.waiting_bytes) = (false, false, 0);
        state.waiting.clear();
    }

    /// Writes what waits, for as long as the process lives.
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
