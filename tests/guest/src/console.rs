//! Whole lines on the console, which the kernel has opened as standard input and output.

use std::io::{BufRead, Write};

/// Lines end in a newline alone: the terminal adds no carriage returns.
pub(crate) fn make_raw() {
    // SAFETY: zero is a valid value of every field, and tcgetattr fills them.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is alive for the calls. Without a terminal they fail, which is fine.
    unsafe {
        if libc::tcgetattr(libc::STDOUT_FILENO, &raw mut settings) == 0 {
            libc::cfmakeraw(&raw mut settings);
            libc::tcsetattr(libc::STDOUT_FILENO, libc::TCSANOW, &raw const settings);
        }
    }
}

/// One write, so that lines of different threads do not mix.
pub(crate) fn line(text: &str) {
    let line = format!("{text}\n");
    // An unwritable console leaves no place for an error.
    let _ = std::io::stdout().lock().write_all(line.as_bytes());
}

/// Waits until this line comes in. False if no more lines come.
pub(crate) fn waits_for(text: &str) -> bool {
    // The console may have bytes of other origin.
    let lines = std::io::stdin().lock().split(b'\n');
    lines.map_while(Result::ok).any(|line| line.trim_ascii() == text.as_bytes())
}
