//! A source's connection up to the welcome: TLS and proofs of the secret, if configured, then the
//! hello. Signals end every wait.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{MsgFlags, send};
use umem_wire::{Capabilities, HELLO_BYTES, Hello, HelloError, Nonce, PROTOCOL, Welcome};

use super::{Challenge, ClientAuth};
use crate::error::{Error, Result, WITHOUT_PASSES};
use crate::runtime::inbox::Wait;
use crate::transport::lane::{HELLO_TIMEOUT, HelloBytes, Lane};

/// Makes a connection a lane: TLS and proofs of the secret, if configured, hello and welcome.
pub(crate) fn introduce(
    lane: Lane,
    hello: &Hello,
    pass: &ClientAuth,
    limit: Option<Duration>,
    wait: Wait<'_>,
) -> Result<Lane> {
    let mut lane = pass.wrap(lane, hello.role, limit, wait)?.assign(hello.role, hello.index);
    // After a TLS handshake the peer is known to be there.
    let limit = limit.or(pass.has_tls().then_some(HELLO_TIMEOUT));
    let deadline = Cell::new(limit.map(|limit| Instant::now() + limit));
    lane.capabilities = Greeting { lane: &lane, deadline, wait }.run(hello, pass.challenge()?)?;
    Ok(lane)
}

/// A hello in flight, and the answer to it.
struct Greeting<'a> {
    lane: &'a Lane,
    /// None until the other side has sent something, if that may take any time.
    deadline: Cell<Option<Instant>>,
    wait: Wait<'a>,
}

impl Greeting<'_> {
    /// Returns the capabilities of both sides.
    fn run(&self, hello: &Hello, challenge: Option<Challenge>) -> Result<Capabilities> {
        let (hello, proven) = match challenge {
            None => (hello.clone(), None),
            Some(challenge) => {
                self.say(&challenge.ask())?;
                let answer = Nonce::decode_answer(&self.hear()?);
                let answer = answer.map_err(|error| self.refused(error))?;
                let (hello, proven) = challenge.prove(answer, hello);
                (hello, Some(proven))
            }
        };
        self.say(&hello.encode())?;
        let welcome = Welcome::decode(&self.hear()?).map_err(|error| self.refused(error))?;
        if proven.is_some_and(|proven| !proven.accepts(&welcome)) {
            let what = "it does not know the secret; give both sides the same --secret-file";
            return Err(Error::Insecure { side: "destination", what: what.into() });
        }
        self.check(&welcome, &hello)
    }

    fn check(&self, welcome: &Welcome, hello: &Hello) -> Result<Capabilities> {
        welcome.check(hello).map_err(|error| Error::protocol(&self.lane.name, error))?;
        // Without recovery a lost lane ends the migration, which is no reason not to begin one.
        let lacks = |needed| {
            let needed = hello.capabilities.intersection(needed);
            !welcome.capabilities.contains(needed)
        };
        if lacks(Capabilities::CHECKSUM) {
            return Err(Error::Unsupported(
                "the destination cannot verify checksums: leave out --checksum, or use a newer umem \
                 there"
                    .into(),
            ));
        }
        if lacks(Capabilities::ROUNDS) {
            return Err(Error::Unsupported(format!(
                "the destination supports protocol {} without rounds, in which pages come while the guest runs; this \
                 side supports {} with rounds: use {WITHOUT_PASSES}, or a newer umem there",
                welcome.version, PROTOCOL.max
            )));
        }
        if lacks(Capabilities::EXTERNAL) {
            return Err(Error::Unsupported(
                "the destination would have the guest run by itself, and with --switchover external a program beside \
                 both sides does that: give `umem incoming` --switchover external and --connect, or use a newer umem \
                 there"
                    .into(),
            ));
        }
        if !lacks(Capabilities::ACKS) {
            return Ok(welcome.capabilities);
        }
        Err(Error::Unsupported(
            "the destination does not acknowledge pages, so they cannot be freed here: leave \
             out --release-ram, or use a newer umem there"
                .into(),
        ))
    }

    fn say(&self, bytes: &[u8; HELLO_BYTES]) -> Result<()> {
        let bytes = self.lane.sealed(bytes).map_err(|error| self.lost(&error))?;
        let mut sent = 0;
        while sent < bytes.len() {
            self.wait(PollFlags::POLLOUT)?;
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(self.lane.as_fd().as_raw_fd(), &bytes[sent..], flags) {
                Ok(count) => sent += count,
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(errno) => return Err(self.lost(&errno.into())),
            }
        }
        Ok(())
    }

    fn hear(&self) -> Result<[u8; HELLO_BYTES]> {
        let mut answer = HelloBytes::new();
        loop {
            let read = answer.read(self.lane);
            if let Some(why) = answer.foreign() {
                let what = format!("{why}; give the address at which `umem incoming` listens");
                return Err(Error::protocol(&self.lane.name, what));
            }
            if answer.has_begun() && self.deadline.get().is_none() {
                self.deadline.set(Some(Instant::now() + HELLO_TIMEOUT));
            }
            match read {
                Ok(Some(bytes)) => return Ok(bytes),
                Ok(None) => self.wait(PollFlags::POLLIN)?,
                Err(error) => return Err(self.lost(&error)),
            }
        }
    }

    fn wait(&self, flags: PollFlags) -> Result<()> {
        let left = self.deadline.get().map(|at| at.saturating_duration_since(Instant::now()));
        match (self.wait)(&[(self.lane.as_fd(), flags)], left)? {
            true => Ok(()),
            false => Err(self.lost(&io::ErrorKind::TimedOut.into())),
        }
    }

    fn refused(&self, error: HelloError) -> Error {
        match error {
            HelloError::Refused { code, text } => Error::Peer { side: "destination", code, text },
            other => Error::protocol(&self.lane.name, other),
        }
    }

    fn lost(&self, error: &io::Error) -> Error {
        if let Some(cause) = self.lane.cause() {
            return Error::Insecure { side: "destination", what: cause };
        }
        Error::Lost {
            side: "destination",
            lane: self.lane.name.clone(),
            what: format!("no welcome: {error}; check that `umem incoming` listens there"),
        }
    }
}
