//! TLS 1.3 with certificates on both sides, without lanes: rustls does the handshake ([`session`]),
//! then umem encrypts and decrypts records ([`records`], [`channel`]).

mod channel;
pub(crate) mod credentials;
pub(crate) mod explain;
mod fate;
mod records;
mod session;
#[cfg(test)]
pub(crate) mod testing;

pub(crate) use channel::Channel;
pub(crate) use credentials::protect_process;
pub(crate) use fate::Fate;
pub(crate) use records::Outgoing;
#[cfg(feature = "fuzz")]
pub(crate) use records::fuzz as fuzz_records;
pub(crate) use session::{Handshake, Session};
