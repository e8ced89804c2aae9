//! How a lane opens: a hello from the source, a welcome or a refusal from the destination, 128
//! bytes each way.
//!
//! ```text
//!            0       8     10    12   13 14    16    18 20    24       32      48      80    128
//! hello      UMEMLANE min   max   role 0 index lanes 0  epoch capabil. session proof   sum, 0
//! welcome    UMEMWELC version 0   0    0 0     0     0  0     capabil. session proof   sum, 0
//! refusal    UMEMWELC 0     code  text, NUL padded ............................................
//! ```
//!
//! The sum, a CRC32C of the 80 bytes before it, is present with [`Capabilities::CHECKSUM`],
//! otherwise zero.
//!
//! The zeroes are checked. A later version that needs more fields announces them with a capability,
//! so that older ends do not take its hello for garbage.

use crate::bytes::{array, put, u16_at, u32_at, u64_at};
use crate::checksum::body_sum;
use crate::fault::{FaultCode, parse_text, push_text};
use crate::limits::*;
use std::fmt;

const _: () = assert!(REFUSAL_TEXT_BYTES_MAX == HELLO_BYTES - 12);

/// Bytes of a hello, a welcome or a refusal.
pub const HELLO_BYTES: usize = 128;

/// The protocol versions that this crate implements.
pub const PROTOCOL: VersionRange = VersionRange { min: 1, max: 1 };

const HELLO_MAGIC: &[u8; 8] = b"UMEMLANE";
const WELCOME_MAGIC: &[u8; 8] = b"UMEMWELC";

mod field {
    pub(super) const MAGIC: usize = 0;
    pub(super) const VERSION_MIN: usize = 8;
    pub(super) const VERSION_MAX: usize = 10;
    pub(super) const ROLE: usize = 12;
    pub(super) const RESERVED_ROLE: usize = 13;
    pub(super) const INDEX: usize = 14;
    pub(super) const BULK_LANES: usize = 16;
    pub(super) const RESERVED_LANES: usize = 18;
    pub(super) const EPOCH: usize = 20;
    pub(super) const CAPABILITIES: usize = 24;
    pub(super) const SESSION: usize = 32;
    pub(super) const PROOF: usize = 48;
    pub(super) const SUM: usize = 80;
    pub(super) const RESERVED: usize = 84;

    /// In a welcome.
    pub(super) const VERSION: usize = VERSION_MIN;
    pub(super) const RESERVED_VERSION: usize = VERSION_MAX;
    /// In a refusal.
    pub(super) const CODE: usize = VERSION_MAX;
    pub(super) const TEXT: usize = ROLE;
}

const _: () = assert!(field::MAGIC + HELLO_MAGIC.len() == field::VERSION_MIN);
const _: () = assert!(field::SESSION + size_of::<SessionId>() == field::PROOF);
const _: () = assert!(field::PROOF + size_of::<[u8; 32]>() == field::SUM);
const _: () = assert!(field::SUM + size_of::<u32>() == field::RESERVED);
const _: () = assert!(field::RESERVED <= HELLO_BYTES);
const _: () = assert!(field::TEXT + REFUSAL_TEXT_BYTES_MAX == HELLO_BYTES);

/// The source's first message on a lane.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// The versions that the source supports.
    pub versions: VersionRange,
    /// The source's capabilities beyond its version.
    pub capabilities: Capabilities,
    /// The same on all lanes of one migration.
    pub session: SessionId,
    /// The lane's role.
    pub role: LaneRole,
    /// 0 for the demand lane, 1 to [`Hello::bulk_lanes`] for the bulk lanes.
    pub index: u16,
    /// How many bulk lanes the session has, at most [`LANES_MAX`]. With 0 (a URI that is a single
    /// connection) background pages share the demand lane.
    pub bulk_lanes: u16,
    /// 0 for the lanes that begin a session. Each later attempt to replace lost lanes has a higher
    /// number, so that lanes of different attempts do not mix. Needs [`Capabilities::RECOVERY`].
    pub epoch: u32,
    /// Proves that the sender knows the session's secret; the caller defines the scheme.
    pub proof: [u8; 32],
}

impl Hello {
    /// The bytes to send. Does not check: a hello that [`Hello::decode`] would refuse is a mistake
    /// of this end, and is sent nevertheless.
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut out = [0; HELLO_BYTES];
        put(&mut out, field::MAGIC, HELLO_MAGIC);
        put(&mut out, field::VERSION_MIN, &self.versions.min.to_le_bytes());
        put(&mut out, field::VERSION_MAX, &self.versions.max.to_le_bytes());
        out[field::ROLE] = self.role as u8;
        put(&mut out, field::INDEX, &self.index.to_le_bytes());
        put(&mut out, field::BULK_LANES, &self.bulk_lanes.to_le_bytes());
        put(&mut out, field::EPOCH, &self.epoch.to_le_bytes());
        put(&mut out, field::CAPABILITIES, &self.capabilities.0.to_le_bytes());
        put(&mut out, field::SESSION, &self.session.0);
        put(&mut out, field::PROOF, &self.proof);
        put_sum(&mut out, self.capabilities);
        out
    }

    /// Reads and checks a source's hello. The caller checks the versions ([`Welcome::answer`]), the
    /// session and the proof.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Hello, HelloError> {
        if array(bytes, field::MAGIC) != *HELLO_MAGIC {
            return Err(HelloError::NotUmem);
        }
        let versions = VersionRange {
            min: u16_at(bytes, field::VERSION_MIN),
            max: u16_at(bytes, field::VERSION_MAX),
        };
        if !versions.is_valid() {
            return Err(HelloError::VersionRange(versions));
        }
        let reserved = [
            &bytes[field::RESERVED_ROLE..field::INDEX],
            &bytes[field::RESERVED_LANES..field::EPOCH],
            &bytes[field::RESERVED..],
        ];
        check_zero(&reserved)?;
        let capabilities = check_sum(bytes)?;
        let (role, index, bulk_lanes) = decode_lane(bytes)?;
        Ok(Hello {
            versions,
            capabilities,
            session: SessionId(array(bytes, field::SESSION)),
            role,
            index,
            bulk_lanes,
            epoch: u32_at(bytes, field::EPOCH),
            proof: array(bytes, field::PROOF),
        })
    }
}

fn decode_lane(bytes: &[u8; HELLO_BYTES]) -> Result<(LaneRole, u16, u16), HelloError> {
    let role = match bytes[field::ROLE] {
        1 => LaneRole::Demand,
        2 => LaneRole::Bulk,
        role => return Err(HelloError::Role(role)),
    };
    let index = u16_at(bytes, field::INDEX);
    let bulk_lanes = u16_at(bytes, field::BULK_LANES);
    if bulk_lanes > LANES_MAX {
        return Err(HelloError::Lanes(bulk_lanes));
    }
    let fits = match role {
        LaneRole::Demand => index == 0,
        LaneRole::Bulk => (1..=bulk_lanes).contains(&index),
    };
    if fits { Ok((role, index, bulk_lanes)) } else { Err(HelloError::Index { index, bulk_lanes }) }
}

/// The destination's acceptance of a lane.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Welcome {
    /// The version that both ends use from here on.
    pub version: u16,
    /// The capabilities of both ends.
    pub capabilities: Capabilities,
    /// The hello's session.
    pub session: SessionId,
    /// Proves that the destination knows the session's secret.
    pub proof: [u8; 32],
}

impl Welcome {
    /// The answer to a hello: the highest common version and the common capabilities.
    pub fn answer(
        hello: &Hello,
        ours: VersionRange,
        capabilities: Capabilities,
        proof: [u8; 32],
    ) -> Result<Welcome, HelloError> {
        let version = select_version(ours, hello.versions)
            .ok_or(HelloError::NoCommonVersion { ours, theirs: hello.versions })?;
        let capabilities = capabilities.intersection(hello.capabilities);
        Ok(Welcome { version, capabilities, session: hello.session, proof })
    }

    /// Whether this welcome fits the `hello` that the source sent.
    pub fn check(&self, hello: &Hello) -> Result<(), HelloError> {
        if !(hello.versions.min..=hello.versions.max).contains(&self.version) {
            return Err(HelloError::NotOffered("a version"));
        }
        if !hello.capabilities.contains(self.capabilities) {
            return Err(HelloError::NotOffered("a capability"));
        }
        if self.session != hello.session {
            return Err(HelloError::OtherSession);
        }
        Ok(())
    }

    /// The bytes to send.
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut out = [0; HELLO_BYTES];
        put(&mut out, field::MAGIC, WELCOME_MAGIC);
        put(&mut out, field::VERSION, &self.version.to_le_bytes());
        put(&mut out, field::CAPABILITIES, &self.capabilities.0.to_le_bytes());
        put(&mut out, field::SESSION, &self.session.0);
        put(&mut out, field::PROOF, &self.proof);
        put_sum(&mut out, self.capabilities);
        out
    }

    /// The bytes that refuse a lane; the source reads them as [`HelloError::Refused`]. The text is
    /// cut to [`REFUSAL_TEXT_BYTES_MAX`] bytes.
    pub fn refuse(code: FaultCode, text: &str) -> [u8; HELLO_BYTES] {
        let mut out = Vec::with_capacity(HELLO_BYTES);
        out.extend_from_slice(WELCOME_MAGIC);
        out.extend_from_slice(&0u16.to_le_bytes());
        out.extend_from_slice(&code.number().to_le_bytes());
        push_text(&mut out, text, REFUSAL_TEXT_BYTES_MAX);
        out.resize(HELLO_BYTES, 0);
        array(&out, 0)
    }

    /// Reads and checks a destination's answer; a refusal is an error.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Welcome, HelloError> {
        if array(bytes, field::MAGIC) != *WELCOME_MAGIC {
            return Err(HelloError::NotUmem);
        }
        let version = u16_at(bytes, field::VERSION);
        if version == 0 {
            return Err(decode_refusal(bytes).unwrap_or(HelloError::RefusalUnreadable));
        }
        check_zero(&[
            &bytes[field::RESERVED_VERSION..field::CAPABILITIES],
            &bytes[field::RESERVED..],
        ])?;
        Ok(Welcome {
            version,
            capabilities: check_sum(bytes)?,
            session: SessionId(array(bytes, field::SESSION)),
            proof: array(bytes, field::PROOF),
        })
    }
}

/// With [`Capabilities::CHECKSUM`]: writes the sum of the bytes before it.
fn put_sum(out: &mut [u8; HELLO_BYTES], capabilities: Capabilities) {
    if capabilities.contains(Capabilities::CHECKSUM) {
        let sum = body_sum(&out[..field::SUM]);
        put(out, field::SUM, &sum.to_le_bytes());
    }
}

/// The capabilities, after a check of the sum if they include [`Capabilities::CHECKSUM`].
fn check_sum(bytes: &[u8; HELLO_BYTES]) -> Result<Capabilities, HelloError> {
    let capabilities = Capabilities(u64_at(bytes, field::CAPABILITIES));
    let sum = u32_at(bytes, field::SUM);
    match capabilities.contains(Capabilities::CHECKSUM) {
        true if sum != body_sum(&bytes[..field::SUM]) => Err(HelloError::Sum),
        false if sum != 0 => Err(HelloError::Reserved),
        _ => Ok(capabilities),
    }
}

fn decode_refusal(bytes: &[u8; HELLO_BYTES]) -> Option<HelloError> {
    let code = FaultCode::from_number(u16_at(bytes, field::CODE))?;
    let padded = &bytes[field::TEXT..];
    let text_bytes = padded.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    let text = parse_text(&padded[..text_bytes])?.to_owned();
    Some(HelloError::Refused { code, text })
}

pub(crate) fn check_zero(reserved: &[&[u8]]) -> Result<(), HelloError> {
    match reserved.iter().all(|bytes| bytes.iter().all(|&byte| byte == 0)) {
        true => Ok(()),
        false => Err(HelloError::Reserved),
    }
}

/// Versions of the protocol, both ends included. Zero is not a version.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub struct VersionRange {
    /// The oldest.
    pub min: u16,
    /// The newest.
    pub max: u16,
}

impl VersionRange {
    fn is_valid(self) -> bool {
        1 <= self.min && self.min <= self.max
    }
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.min, self.max)
    }
}

/// The newest version in both ranges.
pub fn select_version(ours: VersionRange, theirs: VersionRange) -> Option<u16> {
    let common = VersionRange { min: ours.min.max(theirs.min), max: ours.max.min(theirs.max) };
    common.is_valid().then_some(common.max)
}

/// An end's capabilities beyond its version, a bit each. Unknown bits are kept until the
/// intersection drops them. All lanes of a session carry the same.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Capabilities(pub u64);

impl Capabilities {
    /// Nothing beyond the version.
    pub const NONE: Capabilities = Capabilities(0);

    /// Acknowledgements: the source asks for them because it frees acknowledged pages, and the
    /// destination sends them. Without this no ack frame is sent.
    pub const ACKS: Capabilities = Capabilities(1);

    /// Recovery: when lanes are lost after the switchover, both ends keep what they have, the
    /// source opens new ones with a higher [`Hello::epoch`], and the destination reports which
    /// pages it has. Without this a lost lane ends the migration.
    pub const RECOVERY: Capabilities = Capabilities(2);

    /// Checksums: every frame carries checksums, and a wrong one counts as a lost lane
    /// ([`checksum`](crate::checksum)). Without this only the checks of TCP and TLS detect damage.
    pub const CHECKSUM: Capabilities = Capabilities(4);

    /// Digests of every page: zeroes and holes count, so that a page which never came changes the
    /// digest. Only with [`Capabilities::CHECKSUM`]; without this no digest is sent, as the other
    /// end's digest would leave out zeroes.
    pub const WHOLE_DIGESTS: Capabilities = Capabilities(8);

    /// Rounds: the source sends pages while its guest runs, and sends a page again after a write. A
    /// source asks for this if it will send rounds; the destination then expects them before
    /// *stopped*.
    pub const ROUNDS: Capabilities = Capabilities(16);

    /// External switchover: neither end has the guest run, as a program beside both of them does. A
    /// source asks for this if its end is run by such a program; the destination has it if its end
    /// is. Either end refuses a peer without it.
    pub const EXTERNAL: Capabilities = Capabilities(32);

    /// The capabilities of either.
    pub const fn union(self, other: Capabilities) -> Capabilities {
        Capabilities(self.0 | other.0)
    }

    /// The capabilities of both.
    pub const fn intersection(self, other: Capabilities) -> Capabilities {
        Capabilities(self.0 & other.0)
    }

    /// Whether `self` includes all of `other`.
    pub const fn contains(self, other: Capabilities) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Names one migration; chosen at random by the source.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub struct SessionId(pub [u8; 16]);

/// A lane's role. Zero is never a role.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum LaneRole {
    /// Requests, their answers, and control.
    Demand = 1,
    /// Background pages.
    Bulk = 2,
}

/// The reason why a lane failed to open.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HelloError {
    /// The first eight bytes are no umem magic.
    #[error("the peer does not speak umem")]
    NotUmem,
    /// The version range is empty, reversed, or contains zero.
    #[error("the peer's versions {0} are not a range")]
    VersionRange(VersionRange),
    /// The version ranges do not overlap.
    #[error("no common protocol version: this end supports {ours}, the peer {theirs}")]
    NoCommonVersion {
        /// The versions that this end supports.
        ours: VersionRange,
        /// The versions that the peer supports.
        theirs: VersionRange,
    },
    /// The lane's role is neither demand nor bulk.
    #[error("unknown lane role {0}")]
    Role(u8),
    /// The lane's index does not fit its role and the number of bulk lanes.
    #[error("lane index {index} does not fit its role among {bulk_lanes} bulk lanes")]
    Index {
        /// The index received.
        index: u16,
        /// The number of bulk lanes received.
        bulk_lanes: u16,
    },
    /// More bulk lanes than [`LANES_MAX`].
    #[error("{0} bulk lanes, at most {LANES_MAX} are possible")]
    Lanes(u16),
    /// Bytes that must be zero are not.
    #[error("reserved bytes of the hello are not zero")]
    Reserved,
    /// The checksum is wrong.
    #[error("the checksum of a hello or a welcome is wrong: bytes changed in transit")]
    Sum,
    /// Proofs of a secret in a scheme that this end does not know.
    #[error("the peer proves its secret with scheme {0}, which this end does not know")]
    AuthVersion(u16),
    /// The destination answered a nonce with neither a nonce nor a refusal.
    #[error("the destination asks for no secret")]
    NoNonce,
    /// The destination refused the lane.
    #[error("the destination refused: {text} ({code})")]
    Refused {
        /// The reason, for programs.
        code: FaultCode,
        /// The reason, for people.
        text: String,
    },
    /// A refusal's code or text is not valid.
    #[error("the destination refused the lane, and its reason is not readable")]
    RefusalUnreadable,
    /// The welcome chose a value that the hello did not offer.
    #[error("the destination chose {0} that was not offered")]
    NotOffered(&'static str),
    /// The welcome belongs to another session.
    #[error("the welcome is for another session")]
    OtherSession,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello {
            versions: VersionRange { min: 1, max: 0x0203 },
            capabilities: Capabilities(0x8877_6655_4433_2211),
            session: SessionId([0x51; 16]),
            role: LaneRole::Bulk,
            index: 2,
            bulk_lanes: 4,
            epoch: 0x0b0a_0908,
            proof: [0x9f; 32],
        }
    }

    fn hello_bytes() -> [u8; HELLO_BYTES] {
        let mut bytes = [0xa5; HELLO_BYTES];
        bytes[..8].copy_from_slice(b"UMEMLANE");
        bytes[8..24].copy_from_slice(&[1, 0, 3, 2, 2, 0, 2, 0, 4, 0, 0, 0, 8, 9, 10, 11]);
        bytes[24..32].copy_from_slice(&[0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88]);
        bytes[32..48].fill(0x51);
        bytes[48..80].fill(0x9f);
        bytes[80..].fill(0);
        bytes
    }

    fn welcome_bytes() -> [u8; HELLO_BYTES] {
        let mut bytes = hello_bytes();
        bytes[..8].copy_from_slice(b"UMEMWELC");
        bytes[8..24].fill(0);
        bytes[8] = 3;
        bytes
    }

    fn welcome() -> Welcome {
        Welcome {
            version: 3,
            capabilities: hello().capabilities,
            session: hello().session,
            proof: hello().proof,
        }
    }

    /// The result of decoding a hello with some of its bytes changed.
    fn with(at: usize, changed: &[u8]) -> Result<Hello, HelloError> {
        let mut bytes = hello_bytes();
        put(&mut bytes, at, changed);
        Hello::decode(&bytes)
    }

    #[test]
    fn hello_layout_is_128_literal_bytes() {
        assert_eq!(hello().encode(), hello_bytes());
        assert_eq!(Hello::decode(&hello_bytes()), Ok(hello()));
        let demand = Hello { role: LaneRole::Demand, index: 0, bulk_lanes: 0, ..hello() };
        assert_eq!(Hello::decode(&demand.encode()), Ok(demand));
    }

    #[test]
    fn invalid_hello_is_refused() {
        assert_eq!(with(0, b"GET / HT"), Err(HelloError::NotUmem));
        assert_eq!(HelloError::NotUmem.to_string(), "the peer does not speak umem");
        for (min, max) in [(0, 1), (2, 1), (0, 0)] {
            let versions = VersionRange { min, max };
            let range = Err(HelloError::VersionRange(versions));
            assert_eq!(with(8, &[min as u8, 0, max as u8, 0]), range);
        }
        for role in [0, 3, 255] {
            assert_eq!(with(12, &[role]), Err(HelloError::Role(role)));
        }
        for at in [13, 18, 19, 80, 127] {
            assert_eq!(with(at, &[1]), Err(HelloError::Reserved));
        }
        assert_eq!(with(16, &[65, 0]), Err(HelloError::Lanes(65)));
        for index in [0, 5] {
            assert_eq!(
                with(14, &[index]),
                Err(HelloError::Index { index: index.into(), bulk_lanes: 4 })
            );
        }
        assert_eq!(with(12, &[1]), Err(HelloError::Index { index: 2, bulk_lanes: 4 }));
    }

    #[test]
    fn every_flipped_bit_of_a_checked_hello_and_welcome_is_detected() {
        let capabilities = Capabilities::CHECKSUM.union(Capabilities::ACKS);
        let hello = Hello { capabilities, ..hello() };
        let welcome = Welcome { capabilities, ..welcome() };
        assert_eq!(Hello::decode(&hello.encode()), Ok(hello.clone()));
        assert_eq!(Welcome::decode(&welcome.encode()), Ok(welcome.clone()));
        for bit in 0..8 * HELLO_BYTES {
            let flipped = |mut bytes: [u8; HELLO_BYTES]| {
                bytes[bit / 8] ^= 1 << (bit % 8);
                bytes
            };
            assert!(Hello::decode(&flipped(hello.encode())).is_err(), "bit {bit}");
            assert!(Welcome::decode(&flipped(welcome.encode())).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn welcome_layout_is_128_literal_bytes() {
        assert_eq!(welcome().encode(), welcome_bytes());
        assert_eq!(Welcome::decode(&welcome_bytes()), Ok(welcome()));
        assert_eq!(Welcome::decode(&hello_bytes()), Err(HelloError::NotUmem));
        for at in [10, 12, 23, 80, 127] {
            let mut bytes = welcome_bytes();
            bytes[at] = 1;
            assert_eq!(Welcome::decode(&bytes), Err(HelloError::Reserved));
        }
    }

    #[test]
    fn refusal_carries_code_and_text() {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..8].copy_from_slice(b"UMEMWELC");
        bytes[10] = 8;
        bytes[12..16].copy_from_slice(b"full");
        assert_eq!(Welcome::refuse(FaultCode::Refused, "full"), bytes);
        let refused = HelloError::Refused { code: FaultCode::Refused, text: "full".into() };
        assert_eq!(Welcome::decode(&bytes), Err(refused));

        let long = "x".repeat(200);
        let Err(HelloError::Refused { text, .. }) =
            Welcome::decode(&Welcome::refuse(FaultCode::Other, &long))
        else {
            panic!("not refused");
        };
        assert_eq!(text, long[..REFUSAL_TEXT_BYTES_MAX]);

        bytes[13] = 0;
        assert_eq!(Welcome::decode(&bytes), Err(HelloError::RefusalUnreadable));
        bytes[10] = 0;
        assert_eq!(Welcome::decode(&bytes), Err(HelloError::RefusalUnreadable));
    }

    #[test]
    fn newest_common_version_is_chosen() {
        let select = |a, b, c, d| {
            select_version(VersionRange { min: a, max: b }, VersionRange { min: c, max: d })
        };
        assert_eq!(select(1, 1, 1, 1), Some(1));
        assert_eq!(select(1, 3, 2, 9), Some(3));
        assert_eq!(select(2, 9, 1, 3), Some(3));
        assert_eq!(select(1, 1, 2, 2), None);
        assert_eq!(select(0, 0, 0, 5), None);
    }

    #[test]
    fn welcome_that_does_not_fit_its_hello_is_refused() {
        let ours = VersionRange { min: 1, max: 3 };
        let answer = Welcome::answer(&hello(), ours, Capabilities(0xff), [7; 32]).unwrap();
        assert_eq!((answer.version, answer.capabilities), (3, Capabilities(0x11)));
        assert_eq!(answer.check(&hello()), Ok(()));

        let newer = VersionRange { min: 0x0204, max: 0x0204 };
        let theirs = hello().versions;
        assert_eq!(
            Welcome::answer(&hello(), newer, Capabilities::NONE, [7; 32]),
            Err(HelloError::NoCommonVersion { ours: newer, theirs })
        );
        let check = |welcome: Welcome| welcome.check(&hello());
        let version = HelloError::NotOffered("a version");
        assert_eq!(check(Welcome { version: 0x0204, ..welcome() }), Err(version));
        let capability = HelloError::NotOffered("a capability");
        assert_eq!(check(Welcome { capabilities: Capabilities(2), ..welcome() }), Err(capability));
        let session = SessionId([0; 16]);
        assert_eq!(check(Welcome { session, ..welcome() }), Err(HelloError::OtherSession));
    }
}
