//! Turns a panic into an error with its message.
//!
//! The umem program prints the panic as well, as every Rust program does, but never blocks on a
//! full stderr ([`print_panics`](crate::runtime::print::print_panics)). Inside another program umem
//! prints nothing: with [`keep_quiet`] the panics of umem's threads, and of calls into umem, end in
//! the error alone. A panic hook is global to the process; panics of all other threads still go to
//! the hook that was installed before.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
#[cfg(debug_assertions)]
use std::path::PathBuf;
use std::sync::Once;
#[cfg(debug_assertions)]
use std::sync::OnceLock;

use crate::error::{Error, Result};

/// The prefix of the names of umem's threads.
pub(crate) const THREAD_PREFIX: &str = "umem-";

thread_local! {
    /// The last panic of this thread, with its place.
    static LAST: RefCell<Option<String>> = const { RefCell::new(None) };
    /// Whether the thread is inside a call into umem.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// The error that a caught panic becomes.
pub(crate) fn error(payload: &(dyn Any + Send)) -> Error {
    let text = LAST.take().unwrap_or_else(|| message(payload).to_owned());
    Error::Internal(text.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn message(payload: &(dyn Any + Send)) -> &str {
    match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (None, Some(text)) => text,
        (None, None) => "a panic without a message",
    }
}

/// The result of `call`, or the error of its panic. The caller undoes partial work.
pub(crate) fn caught<T>(call: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|payload| Err(error(&*payload)))
}

/// A place at which a test can make a thread panic, as [`PANIC_VARIABLE`] says. Only in builds with
/// debug assertions, which tests use.
#[cfg(debug_assertions)]
pub(crate) fn point(place: std::fmt::Arguments<'_>) {
    static WANTED: OnceLock<Option<(String, PathBuf)>> = OnceLock::new();
    let read = || {
        let given = std::env::var(PANIC_VARIABLE).ok()?;
        let (place, file) = given.split_once('=')?;
        Some((place.to_owned(), file.into()))
    };
    let Some((wanted, file)) = WANTED.get_or_init(read) else { return };
    // The thread that removes the file panics, and no other.
    if place.to_string() == *wanted && std::fs::remove_file(file).is_ok() {
        panic!("requested by a test, at {place}");
    }
}

#[cfg(not(debug_assertions))]
pub(crate) fn point(_: std::fmt::Arguments<'_>) {}

/// `PLACE=FILE`: the first thread that reaches the place while the file exists removes the file and
/// panics.
#[cfg(debug_assertions)]
const PANIC_VARIABLE: &str = "UMEM_TEST_PANIC";

/// Stops printing umem's own panics.
pub(crate) fn keep_quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let others = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !is_ours() {
                return others(panic);
            }
            let place = panic.location().map_or_else(String::new, |at| format!(" at {at}"));
            LAST.set(Some(format!("{}{place}", message(panic.payload()))));
        }));
    });
}

fn is_ours() -> bool {
    INSIDE.get()
        || std::thread::current().name().is_some_and(|name| name.starts_with(THREAD_PREFIX))
}

/// Runs a call into umem, on any thread.
pub(crate) fn inside<T>(call: impl FnOnce() -> T) -> T {
    struct Leave(bool);
    impl Drop for Leave {
        fn drop(&mut self) {
            INSIDE.set(self.0);
        }
    }
    let _leave = Leave(INSIDE.replace(true));
    call()
}
