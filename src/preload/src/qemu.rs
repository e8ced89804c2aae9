//! A QEMU gets the options that umem needs, also behind a chain of wrappers: its `main` is called with more words than
//! the command line has.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Once;
use std::sync::atomic::Ordering;

use crate::config::{self, Adds};
use crate::report::{self, Code, Failure};
use crate::{state, sys};

type Main = extern "C" fn(c_int, *mut *mut c_char, *mut *mut c_char) -> c_int;
type Start = unsafe extern "C" fn(
    Main,
    c_int,
    *mut *mut c_char,
    *mut c_void,
    *mut c_void,
    *mut c_void,
    *mut c_void,
) -> c_int;

/// The C library's start of every program, which calls `main`.
///
/// # Safety
///
/// Only for the program's entry, which has the words of the command line from the kernel.
#[expect(unreachable_pub, reason = "the dynamic loader finds the function by its name")]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __libc_start_main(
    main: Main,
    count: c_int,
    words: *mut *mut c_char,
    init: *mut c_void,
    fini: *mut c_void,
    loader_fini: *mut c_void,
    stack_end: *mut c_void,
) -> c_int {
    // SAFETY: the kernel's own list of words, `count` of them.
    let (count, words) = unsafe { with_options(count, words) }.unwrap_or((count, words));
    let Some(start) = sys::next_symbol(c"__libc_start_main") else {
        sys::write_stderr(b"umem: the C library has no __libc_start_main\n");
        sys::exit(1);
    };
    // SAFETY: the C library's function of this name has this type.
    let start = unsafe { std::mem::transmute::<*mut c_void, Start>(start) };
    // SAFETY: the caller's arguments, of which the words are as many as said, and end with a null.
    unsafe { start(main, count, words, init, fini, loader_fini, stack_end) }
}

/// The words of a QEMU's command line with the needed options; None if there is nothing to add.
///
/// # Safety
///
/// `words` are `count` strings.
unsafe fn with_options(count: c_int, words: *mut *mut c_char) -> Option<(c_int, *mut *mut c_char)> {
    let config = config::get()?;
    let adds = config.adds?;
    let count = usize::try_from(count).ok().filter(|&count| count > 0)?;
    // SAFETY: the caller's promise.
    let given = unsafe { std::slice::from_raw_parts(words, count) };
    // SAFETY: each is a string, which stays in place as long as the process lives.
    let texts: Vec<&[u8]> =
        given.iter().map(|&word| unsafe { CStr::from_ptr(word) }.to_bytes()).collect();
    if !is_qemu(texts.first()?) {
        return None;
    }
    config::IS_QEMU.store(true, Ordering::Relaxed);
    let option = |word: &[u8]| -> Option<Vec<u8>> {
        let name = word.strip_prefix(b"-")?;
        Some(name.strip_prefix(b"-").unwrap_or(name).to_vec())
    };
    let refuse = |text: &str| -> ! {
        report::failure(config.socket, "", &Failure::new(Code::Options, 0, text));
        sys::exit(1);
    };
    let mut added: Vec<CString> = Vec::new();
    let mut add = |word: &str| added.extend(CString::new(word));
    let is_daemon = texts.iter().any(|word| option(word).as_deref() == Some(b"daemonize"));
    if is_daemon {
        refuse("-daemonize hides QEMU from umem: leave it out; umem starts QEMU itself");
    }
    let incoming = texts.iter().position(|word| option(word).as_deref() == Some(b"incoming"));
    match incoming.map(|index| texts.get(index + 1).copied().unwrap_or_default()) {
        None => {
            add("-incoming");
            add("defer");
        }
        Some(b"defer") => {}
        Some(_) => refuse(
            "QEMU's own -incoming would wait for another source: leave it out, umem adds `-incoming \
             defer`",
        ),
    }
    let mut umems_end = None;
    if adds == Adds::Monitor {
        let Ok((theirs, ours)) = UnixStream::pair() else {
            refuse("no socket for QEMU's monitor: too many descriptors are open");
        };
        // QEMU uses it as long as it lives.
        let number = ours.into_raw_fd();
        add("-chardev");
        add(&format!("socket,id=umem-qmp,fd={number}"));
        add("-mon");
        add("chardev=umem-qmp,mode=control");
        umems_end = Some(theirs);
    }
    let sent = report::qemu(config.socket, umems_end.as_ref().map(AsRawFd::as_raw_fd));
    if sent.is_err() {
        refuse("umem is gone, or a program between umem and QEMU has closed umem's socket");
    }
    let mut all: Vec<*mut c_char> = given.to_vec();
    all.extend(added.into_iter().map(CString::into_raw));
    let count = c_int::try_from(all.len()).ok()?;
    all.push(std::ptr::null_mut());
    // Like the kernel's own words, these stay until the process ends.
    Some((count, Box::leak(all.into_boxed_slice()).as_mut_ptr()))
}

/// Called when a program maps writable memory at an address of its choice. A QEMU does so for all of its RAM blocks,
/// the firmware's included, on its main thread and before its monitor answers. From the first such mapping on this
/// object reads umem's commands, which name RAM by its address, and programs that QEMU starts inherit nothing of this
/// object.
pub(crate) fn maps_ram() {
    static BEGUN: Once = Once::new();
    if !config::is_qemu() || BEGUN.is_completed() {
        return;
    }
    let Some(config) = config::get() else { return };
    BEGUN.call_once(|| {
        config.hide();
        if let Err(errno) = state::listen(config.socket) {
            let text = "the thread that reads umem's commands cannot be started";
            report::failure(config.socket, "", &Failure::new(Code::Options, errno, text));
            sys::exit(1);
        }
    });
}

/// Recognises a QEMU by the name that it was called by, or by its file's name: `qemu-system-x86_64`, `qemu-kvm`, `kvm`.
fn is_qemu(called: &[u8]) -> bool {
    let file = std::fs::read_link("/proc/self/exe").unwrap_or_default();
    [Path::new(std::ffi::OsStr::from_bytes(called)), &file].into_iter().any(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.contains("qemu-system-") || name.contains("qemu-kvm") || name == "kvm"
    })
}
