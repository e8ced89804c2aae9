//! The opening of a lane: its hello, and the destination's welcome.

use std::fs::File;
use std::io::{self, Read};

use umem_wire::{
    Capabilities, FaultCode, HELLO_BYTES, Hello, LaneRole, PROTOCOL, SessionId, Welcome,
};

use super::Lane;
use crate::error::{Context, Result};
use crate::transport::foreign;

/// A hello or a welcome that is arriving, in any number of pieces.
pub(crate) struct HelloBytes {
    bytes: [u8; HELLO_BYTES],
    filled: usize,
}

impl HelloBytes {
    pub(crate) fn new() -> HelloBytes {
        HelloBytes { bytes: [0; HELLO_BYTES], filled: 0 }
    }

    /// Whether some of it has come.
    pub(crate) fn has_begun(&self) -> bool {
        self.filled > 0
    }

    /// Why the peer is no umem, as soon as its bytes tell; "it" in the text is the peer.
    pub(crate) fn foreign(&self) -> Option<String> {
        foreign::why(&self.bytes[..self.filled])
    }

    /// Reads the bytes available, without waiting; returns the whole once it is complete.
    pub(crate) fn read(&mut self, lane: &Lane) -> io::Result<Option<[u8; HELLO_BYTES]>> {
        let rest = &mut self.bytes[self.filled..];
        match lane.hear(rest) {
            Ok(0) => return Err(closed()),
            Ok(count) => self.filled += count,
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => return Err(closed()),
                _ => return Err(error),
            },
        }
        Ok((self.filled == HELLO_BYTES).then_some(self.bytes))
    }
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the other side closed it")
}

/// The capabilities that a session with checksums asks for. Without the second at the peer, the
/// first still holds.
const CHECKED: Capabilities = Capabilities::CHECKSUM.union(Capabilities::WHOLE_DIGESTS);

/// The capabilities of a destination. `recovers`: a source can reach it again, by itself or through
/// a takeover.
pub(crate) fn capabilities(recovers: bool) -> Capabilities {
    let recovery = if recovers { Capabilities::RECOVERY } else { Capabilities::NONE };
    Capabilities::ACKS.union(CHECKED).union(recovery).union(Capabilities::ROUNDS)
}

/// The same of a destination whose guest is run by a program beside umem, or not.
pub(crate) fn capabilities_with(recovers: bool, is_external: bool) -> Capabilities {
    let external = if is_external { Capabilities::EXTERNAL } else { Capabilities::NONE };
    capabilities(recovers).union(external)
}

/// Answers a hello that does not fit, unless its sender has closed the lane.
pub(crate) fn refuse(lane: &Lane, code: FaultCode, text: &str) {
    let _ = lane.say(&Welcome::refuse(code, text));
}

/// A session at its source: the common fields of its lanes' hellos.
#[derive(Clone, Copy)]
pub(crate) struct Session {
    pub(crate) id: SessionId,
    pub(crate) bulk_lanes: u16,
    pub(crate) capabilities: Capabilities,
}

impl Session {
    /// A new session. `acks`: acknowledgements are wanted; `recovers`: this side can open lanes
    /// again.
    pub(crate) fn new(bulk_lanes: u16, acks: bool, recovers: bool) -> Result<Session> {
        let acks = if acks { Capabilities::ACKS } else { Capabilities::NONE };
        let recovery = if recovers { Capabilities::RECOVERY } else { Capabilities::NONE };
        Ok(Session { id: new_session()?, bulk_lanes, capabilities: acks.union(recovery) })
    }

    /// The same, with checksums or without.
    pub(crate) fn checked(self, checked: bool) -> Session {
        let sums = if checked { CHECKED } else { Capabilities::NONE };
        Session { capabilities: self.capabilities.union(sums), ..self }
    }

    /// The same, with or without rounds.
    pub(crate) fn in_rounds(self, has_rounds: bool) -> Session {
        let rounds = if has_rounds { Capabilities::ROUNDS } else { Capabilities::NONE };
        Session { capabilities: self.capabilities.union(rounds), ..self }
    }

    /// Whether there is a program beside both sides that has the guest run.
    pub(crate) fn is_external(&self) -> bool {
        self.capabilities.contains(Capabilities::EXTERNAL)
    }

    /// The same, with a program beside both sides that has the guest run, or without.
    pub(crate) fn external(self, is_external: bool) -> Session {
        let external = if is_external { Capabilities::EXTERNAL } else { Capabilities::NONE };
        Session { capabilities: self.capabilities.union(external), ..self }
    }

    /// The hello of lane `index`, 0 for the demand lane, in the attempt number `epoch`.
    pub(crate) fn hello(&self, index: u16, epoch: u32) -> Hello {
        Hello {
            versions: PROTOCOL,
            capabilities: self.capabilities,
            session: self.id,
            role: if index == 0 { LaneRole::Demand } else { LaneRole::Bulk },
            index,
            bulk_lanes: self.bulk_lanes,
            epoch,
            proof: [0; 32],
        }
    }
}

/// An unpredictable session id.
pub(crate) fn new_session() -> Result<SessionId> {
    let mut id = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut id))
        .context(|| "reading /dev/urandom")?;
    Ok(SessionId(id))
}
