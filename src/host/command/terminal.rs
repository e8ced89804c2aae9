//! The terminal that umem and COMMAND share as their standard input.

use std::io::{IsTerminal, stdin};

/// A terminal's settings.
pub(super) struct Terminal(libc::termios);

impl Terminal {
    /// The settings of the standard input, if that is a terminal.
    pub(super) fn of_stdin() -> Option<Terminal> {
        if !stdin().is_terminal() {
            return None;
        }
        // SAFETY: a zeroed termios is a valid value of that type, which consists of integers.
        let mut settings: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: `settings` outlives the call.
        let result = unsafe { libc::tcgetattr(libc::STDIN_FILENO, &raw mut settings) };
        (result == 0).then_some(Terminal(settings))
    }

    /// Restores the settings after the end of a COMMAND that could not do so itself: a QEMU with `-nographic` has
    /// switched off echo and signals.
    pub(super) fn restore(&self) {
        // Setting them from the background would stop umem.
        if !is_in_background() {
            // SAFETY: the settings are whole, as tcgetattr has made them.
            let _ =
                unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const self.0) };
        }
    }
}

/// Whether the standard input is this process's controlling terminal, and another process group has it.
pub(super) fn is_in_background() -> bool {
    // SAFETY: numbers only; both fail, or answer, without any other effect.
    let (foreground, own) = unsafe { (libc::tcgetpgrp(libc::STDIN_FILENO), libc::getpgrp()) };
    // None if it is not a terminal, or not the controlling terminal of this process.
    foreground >= 0 && foreground != own
}
