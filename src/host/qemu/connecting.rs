//! A QEMU that itself listens for a migration, or does so by its manager's command (`-incoming unix:PATH`,
//! `migrate-incoming`): umem is its source.
//!
//! ```text
//! umem: connects       the device state, and the end       reads
//! QEMU: listens        loads, asks for pages                SHUT 0: loaded; anything else: not
//! ```
//!
//! umem asks its monitor for its RAM, as with any QEMU, and always sends it a `stop` before the state is loaded:
//! without it QEMU would start a guest that ran at the source as soon as the state is loaded, and the source may still
//! keep its guest then. [`Switchover`] determines which side starts the guest afterwards.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use serde_json::json;

use super::{GUEST_RUNS, Qemu};
use crate::error::{Context, Error, Result};
use crate::host::kind::Listening;
use crate::host::monitor::{Handle, Loaded, Monitor};
use crate::host::switchover::Switchover;

/// The message `MIG_RP_MSG_SHUT` of QEMU's migration/migration.h: the destination is done. Its 4 bytes are 0 on
/// success.
const SHUT: u16 = 1;

/// Bytes of a message's data at most (`max_len` of `source_return_path_thread` in QEMU's migration/migration.c).
const DATA_BYTES_MAX: usize = 512;

/// A QEMU that waits for its guest at a socket.
pub(super) struct Connected {
    qemu: Qemu,
    listening: Listening,
    socket: Option<UnixStream>,
}

impl Connected {
    /// A QEMU that listens at this address.
    pub(super) fn new(qemu: Qemu, listening: Listening) -> Connected {
        Connected { qemu, listening, socket: None }
    }

    /// QEMU's own reason, if it still reports one.
    fn why(&mut self, otherwise: &str) -> Error {
        let migration = self.qemu.qmp.execute("query-migrate", json!({}));
        let reason = migration.ok().and_then(|it| it["error-desc"].as_str().map(str::to_owned));
        let reason = reason.unwrap_or_else(|| otherwise.to_owned());
        Error::Host(format!("its device state: {reason}"))
    }
}

impl Monitor for Connected {
    fn name(&self) -> &'static str {
        "a QEMU that listens for its guest"
    }

    fn handle(&self) -> Result<Option<Handle>> {
        self.qemu.handle()
    }

    /// From here on QEMU waits for its stream, which comes when the guest has stopped.
    fn prepare(&mut self) -> Result<()> {
        self.qemu.qmp.execute("stop", json!({}))?;
        let socket = UnixStream::connect(&self.listening.path).map_err(|error| {
            let path = self.listening.path.display();
            Error::Host(format!(
                "cannot connect to the migration socket {path}, which --connect names: {error}; have QEMU listen there \
                 first, with -incoming unix:{path} or, after -incoming defer, with the monitor command \
                 migrate-incoming unix:{path}"
            ))
        })?;
        self.socket = Some(socket);
        Ok(())
    }

    fn load_state(&mut self, state: Vec<u8>) -> Result<Loaded> {
        let Some((&was_live, state)) = state.split_first() else {
            return Err(Error::Host(
                "the source sends no device state, for which QEMU waits: give `umem migrate` the source's QEMU, with \
                 --listen or --qmp"
                    .into(),
            ));
        };
        self.qemu.is_live = was_live == GUEST_RUNS;
        if self.socket.is_none() {
            self.prepare()?;
        }
        let mut socket = self.socket.take().expect("it has been connected");
        self.qemu.qmp.has_run();
        // QEMU may refuse it half-way; then its status has the reason.
        let written = socket.write_all(state);
        let _ = socket.shutdown(Shutdown::Write);
        let heard = hear_the_end(&socket)?;
        match heard {
            Some(0) => written.context(|| "giving QEMU its device state")?,
            Some(_) => return Err(self.why("QEMU says that it could not be loaded")),
            None => {
                return Err(self.why(
                    "QEMU closed its migration socket before the device state was loaded (its own messages say why)",
                ));
            }
        }
        // The event comes before the answer.
        self.qemu.qmp.execute("query-status", json!({}))?;
        if self.qemu.qmp.has_run() {
            return Err(Error::Host(
                "another program started its guest before the source's QEMU had given the guest up, so the guest \
                 continues at the source; send `cont` here only when the source's migration has completed"
                    .into(),
            ));
        }
        Ok(Loaded { runs: self.qemu.is_live })
    }

    /// With an external switchover the manager's `cont` does that.
    fn run(&mut self) -> Result<()> {
        match self.listening.switchover {
            Switchover::Umem => self.qemu.run(),
            Switchover::External => Ok(()),
        }
    }
}

/// Reads a destination's return path up to its last message, and returns that message's value; None if the message has
/// not come.
fn hear_the_end(mut socket: &UnixStream) -> Result<Option<u32>> {
    let what = || "reading the return path of QEMU's migration";
    loop {
        let mut head = [0; 4];
        if !fill(&mut socket, &mut head).context(what)? {
            return Ok(None);
        }
        let [kind, bytes] = [[head[0], head[1]], [head[2], head[3]]].map(u16::from_be_bytes);
        let bytes = usize::from(bytes);
        if bytes > DATA_BYTES_MAX {
            return Err(Error::Host(format!(
                "its return path has an unknown message of type {kind} with {bytes} bytes"
            )));
        }
        let mut data = vec![0; bytes];
        if !fill(&mut socket, &mut data).context(what)? {
            return Ok(None);
        }
        // Answers to pings, and the acknowledgement that lets a source stop its guest, come before.
        if kind == SHUT
            && let Ok(value) = <[u8; 4]>::try_from(&data[..])
        {
            return Ok(Some(u32::from_be_bytes(value)));
        }
    }
}

/// Fills `bytes`. False if the other end has closed before.
fn fill(socket: &mut &UnixStream, mut bytes: &mut [u8]) -> std::io::Result<bool> {
    while !bytes.is_empty() {
        match socket.read(bytes) {
            Ok(0) => return Ok(false),
            Ok(count) => bytes = &mut bytes[count..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The result of a return path that comes in these pieces.
    fn heard(pieces: &[&[u8]]) -> Result<Option<u32>> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || pieces.iter().for_each(|piece| theirs.write_all(piece).unwrap()));
            hear_the_end(&ours)
        })
    }

    #[test]
    fn return_path_ends_with_shut_and_not_with_a_pong() {
        let pong = [0, 2, 0, 4, 0, 0, 0, 0];
        let ack = [0, 7, 0, 0];
        let well = [0, 1, 0, 4, 0, 0, 0, 0];
        let badly = [0, 1, 0, 4, 0, 0, 0, 1];
        assert_eq!(heard(&[&pong, &ack, &well]).unwrap(), Some(0));
        assert_eq!(heard(&[&pong, &well[..3], &well[3..]]).unwrap(), Some(0));
        assert_eq!(heard(&[&badly]).unwrap(), Some(1));
        assert_eq!(heard(&[&pong, &well[..7]]).unwrap(), None);
        assert_eq!(heard(&[]).unwrap(), None);
        let error = heard(&[&[0, 9, 3, 0]]).unwrap_err().to_string();
        assert!(error.contains("type 9 with 768 bytes"), "{error}");
    }
}
