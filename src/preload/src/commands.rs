//! The thread that listens to umem once something has been handed over.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::{handover, report, sys};

/// It needs little more than [`LINE_SIZE_MAX`] and what formatting a short line takes.
const STACK_SIZE: usize = 128 << 10;

/// Longer lines than any command are dropped unread.
const LINE_SIZE_MAX: usize = 256;

/// Starts the thread, once. All signals are blocked in it: QEMU's are for QEMU's threads.
pub(crate) fn start(socket: i32) -> Result<(), i32> {
    static STARTED: AtomicBool = AtomicBool::new(false);
    if STARTED.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    let builder = std::thread::Builder::new().name("umem-preload".into()).stack_size(STACK_SIZE);
    let spawned = sys::with_signals_blocked(|| builder.spawn(move || serve(socket)));
    match spawned {
        Ok(_) => Ok(()),
        Err(error) => {
            STARTED.store(false, Ordering::Relaxed);
            Err(error.raw_os_error().unwrap_or(sys::EINVAL))
        }
    }
}

/// Until `release` or until umem is gone. A guest that may have run here stays then, everything open,
/// and waits; one that was still to come never will, and its process ends.
fn serve(socket: i32) {
    let mut keeps = false;
    listen(socket, &mut keeps);
    if !keeps {
        sys::kill_this_process();
    }
}

fn listen(socket: i32, keeps: &mut bool) {
    let mut line = Vec::with_capacity(LINE_SIZE_MAX);
    let mut buffer = [0; LINE_SIZE_MAX];
    loop {
        let received = match sys::receive(socket, &mut buffer) {
            Ok(0) => return,
            Ok(count) => buffer.get(..count).unwrap_or_default(),
            Err(sys::EINTR) => continue,
            Err(_) => return,
        };
        for &byte in received {
            if byte != b'\n' {
                if line.len() < LINE_SIZE_MAX {
                    line.push(byte);
                }
                continue;
            }
            match line.as_slice() {
                b"keep" => *keeps = true,
                b"release" => {
                    *keeps = true;
                    // Nobody is left to tell if this fails.
                    let _ = report::released(socket, handover::release());
                    return;
                }
                b"ping" if report::pong(socket).is_err() => return,
                _ => {}
            }
            line.clear();
        }
    }
}
