//! Nonces: 128 bytes each way before the hello, on a lane whose two ends prove that they know a
//! secret.
//!
//! ```text
//!              0        8       10   16      48   128
//! source's     UMEMAUTH version 0    nonce   0
//! destination's UMEMNONC version 0   nonce   0
//! ```
//!
//! The source sends first. Both nonces are fresh for each lane, so an overheard hello opens no
//! other lane. The caller computes and checks the proofs in the hello's and the welcome's `proof`.
//! The zeroes are checked. A destination may answer with a refusal instead.

use crate::bytes::{array, put, u16_at};
use crate::hello::HelloError;
use crate::hello::{HELLO_BYTES, Hello, Welcome, check_zero};

const SOURCE_MAGIC: &[u8; 8] = b"UMEMAUTH";
const DESTINATION_MAGIC: &[u8; 8] = b"UMEMNONC";

/// The scheme of the proofs; another scheme gets another number.
const VERSION: u16 = 1;

mod field {
    pub(super) const MAGIC: usize = 0;
    pub(super) const VERSION: usize = 8;
    pub(super) const RESERVED_VERSION: usize = 10;
    pub(super) const NONCE: usize = 16;
    pub(super) const RESERVED: usize = 48;
}

const _: () = assert!(field::NONCE + size_of::<Nonce>() == field::RESERVED);

/// Random bytes that one end chose for one lane.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Nonce(pub [u8; 32]);

impl Nonce {
    /// The bytes that a source sends before its hello.
    pub fn encode_ask(&self) -> [u8; HELLO_BYTES] {
        self.encode(SOURCE_MAGIC)
    }

    /// The bytes that a destination answers with.
    pub fn encode_answer(&self) -> [u8; HELLO_BYTES] {
        self.encode(DESTINATION_MAGIC)
    }

    fn encode(&self, magic: &[u8; 8]) -> [u8; HELLO_BYTES] {
        let mut out = [0; HELLO_BYTES];
        put(&mut out, field::MAGIC, magic);
        put(&mut out, field::VERSION, &VERSION.to_le_bytes());
        put(&mut out, field::NONCE, &self.0);
        out
    }

    /// Reads the destination's answer, which may be a refusal.
    pub fn decode_answer(bytes: &[u8; HELLO_BYTES]) -> Result<Nonce, HelloError> {
        match array(bytes, field::MAGIC) == *DESTINATION_MAGIC {
            true => Nonce::decode(bytes),
            // A welcome is no answer to a nonce, a refusal is one.
            false => Err(Welcome::decode(bytes).err().unwrap_or(HelloError::NoNonce)),
        }
    }

    fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Nonce, HelloError> {
        let version = u16_at(bytes, field::VERSION);
        if version != VERSION {
            return Err(HelloError::AuthVersion(version));
        }
        check_zero(&[&bytes[field::RESERVED_VERSION..field::NONCE], &bytes[field::RESERVED..]])?;
        Ok(Nonce(array(bytes, field::NONCE)))
    }
}

/// A source's first message on a lane.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Opening {
    /// A hello, without a secret.
    Hello(Hello),
    /// The source has a secret, and sends its hello after the destination's answer.
    Ask(Nonce),
}

impl Opening {
    /// Reads and checks a source's first message.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Opening, HelloError> {
        match array(bytes, field::MAGIC) == *SOURCE_MAGIC {
            true => Nonce::decode(bytes).map(Opening::Ask),
            false => Hello::decode(bytes).map(Opening::Hello),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Capabilities, FaultCode, LaneRole, PROTOCOL, SessionId};

    fn bytes(magic: &[u8; 8]) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..8].copy_from_slice(magic);
        bytes[8] = 1;
        bytes[16..48].fill(0x9f);
        bytes
    }

    #[test]
    fn nonce_layout_is_128_literal_bytes() {
        let nonce = Nonce([0x9f; 32]);
        assert_eq!(nonce.encode_ask(), bytes(b"UMEMAUTH"));
        assert_eq!(Opening::decode(&bytes(b"UMEMAUTH")), Ok(Opening::Ask(nonce)));
        assert_eq!(nonce.encode_answer(), bytes(b"UMEMNONC"));
        assert_eq!(Nonce::decode_answer(&bytes(b"UMEMNONC")), Ok(nonce));
    }

    #[test]
    fn damaged_nonce_is_refused() {
        for (at, error) in [(8, HelloError::AuthVersion(0x81)), (10, HelloError::Reserved)] {
            let mut ask = bytes(b"UMEMAUTH");
            ask[at] |= 0x80;
            assert_eq!(Opening::decode(&ask), Err(error));
        }
        for at in [15, 48, 127] {
            let mut answer = bytes(b"UMEMNONC");
            answer[at] = 1;
            assert_eq!(Nonce::decode_answer(&answer), Err(HelloError::Reserved));
        }
        assert_eq!(Opening::decode(&bytes(b"UMEMNONC")), Err(HelloError::NotUmem));
        assert_eq!(Nonce::decode_answer(&bytes(b"UMEMAUTH")), Err(HelloError::NotUmem));
    }

    #[test]
    fn decode_accepts_a_hello_first_and_a_refusal_as_answer() {
        let hello = Hello {
            versions: PROTOCOL,
            capabilities: Capabilities::NONE,
            session: SessionId([3; 16]),
            role: LaneRole::Demand,
            epoch: 0,
            index: 0,
            bulk_lanes: 1,
            proof: [0; 32],
        };
        assert_eq!(Opening::decode(&hello.encode()), Ok(Opening::Hello(hello.clone())));
        let refusal = Welcome::refuse(FaultCode::Refused, "no");
        let refused = HelloError::Refused { code: FaultCode::Refused, text: "no".into() };
        assert_eq!(Nonce::decode_answer(&refusal), Err(refused));
        let welcome = Welcome::answer(&hello, PROTOCOL, Capabilities::NONE, [0; 32]).unwrap();
        assert_eq!(Nonce::decode_answer(&welcome.encode()), Err(HelloError::NoNonce));
    }
}
