//! A secret that both sides know, and proofs of it that do not reveal it.
//!
//! ```text
//! source                                       destination
//!    | nonce s ------------------------------------> |
//!    | <------------------------------------ nonce d |
//!    | hello, proof h -----------------------------> |
//!    | <--------------------------- welcome, proof w |
//!
//!    h = HMAC-SHA256(secret, "umem hello 1"   | s | d | hello with a proof of zeroes)
//!    w = HMAC-SHA256(secret, "umem welcome 1" | s | d | hello with h | welcome with a proof of zeroes)
//! ```
//!
//! The hello has the session, the lane's role and index and the capabilities, so that a proof is
//! for one lane of one session; the nonces are fresh on each side, so that it is for one
//! connection.

use std::io::ErrorKind;
use std::path::Path;

use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};
use umem_wire::{HELLO_BYTES, Hello, Nonce, Welcome};

use crate::error::{Error, Result};
use crate::transport::tls::credentials::read_private;

/// An eavesdropper on the opening of one lane could find a shorter secret by trying.
const SECRET_BYTES_MIN: usize = 16;

/// The longest; HMAC-SHA256 has no use for more than 64 bytes.
const SECRET_BYTES_MAX: u64 = 4096;

const HELLO_LABEL: &[u8] = b"umem hello 1";
const WELCOME_LABEL: &[u8] = b"umem welcome 1";

/// The secret, as a key.
#[derive(Clone)]
pub(super) struct Secret(hmac::Key);

impl Secret {
    /// Reads a file that only its owner can read. A line end after the secret is ignored.
    pub(super) fn load(path: &Path) -> Result<Secret> {
        if std::fs::metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound) {
            let path = path.display();
            return Err(Error::Environment(format!(
                "{path}: No such file; --secret-file names the secret that both sides have: make one with (umask 077; \
                 head -c 32 /dev/urandom | base64 > {path}), and copy it to the other side"
            )));
        }
        let bytes = read_private(path, SECRET_BYTES_MAX)?;
        let secret = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
        if secret.len() < SECRET_BYTES_MIN {
            let path = path.display();
            return Err(Error::Environment(format!(
                "{path} has a secret of {} bytes, and one of less than {SECRET_BYTES_MIN} could be \
                 guessed: make one with (umask 077; head -c 32 /dev/urandom | base64 > {path}), and \
                 give both sides the same",
                secret.len()
            )));
        }
        Ok(Secret::new(secret))
    }

    fn new(secret: &[u8]) -> Secret {
        Secret(hmac::Key::new(hmac::HMAC_SHA256, secret))
    }

    /// The beginning of a lane, at the source.
    pub(super) fn challenge(&self) -> Result<Challenge> {
        Ok(Challenge { secret: self.clone(), nonce: fresh()? })
    }

    /// The answer to a source's nonce, at the destination.
    pub(super) fn answer(&self, theirs: Nonce) -> Result<Answer> {
        Ok(Answer(Exchange { secret: self.clone(), source: theirs, destination: fresh()? }))
    }
}

fn fresh() -> Result<Nonce> {
    let mut bytes = [0; 32];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| Error::Environment("the kernel returned no random numbers".into()))?;
    Ok(Nonce(bytes))
}

/// A source's nonce, before the answer to it.
pub(super) struct Challenge {
    secret: Secret,
    nonce: Nonce,
}

impl Challenge {
    /// The bytes to send first.
    pub(super) fn ask(&self) -> [u8; HELLO_BYTES] {
        self.nonce.encode_ask()
    }

    /// The hello with its proof, and the material to check the welcome.
    pub(super) fn prove(self, answer: Nonce, hello: &Hello) -> (Hello, Proven) {
        let Challenge { secret, nonce } = self;
        let exchange = Exchange { secret, source: nonce, destination: answer };
        let proof = exchange.hello_proof(hello);
        let hello = Hello { proof, ..hello.clone() };
        (hello.clone(), Proven { exchange, hello })
    }
}

/// A source that has sent its proof, and waits for the destination's.
pub(super) struct Proven {
    exchange: Exchange,
    hello: Hello,
}

impl Proven {
    /// Whether the destination knows the secret too.
    pub(crate) fn accepts(&self, welcome: &Welcome) -> bool {
        let Exchange { secret, .. } = &self.exchange;
        let said = self.exchange.welcome(&self.hello, welcome);
        hmac::verify(&secret.0, &said, &welcome.proof).is_ok()
    }
}

/// A destination's answer to a nonce, and the material to check the proof.
pub(crate) struct Answer(Exchange);

impl Answer {
    /// The bytes to send.
    pub(super) fn encode(&self) -> [u8; HELLO_BYTES] {
        self.0.destination.encode_answer()
    }

    /// Whether the sender of this hello knows the secret.
    pub(super) fn accepts(&self, hello: &Hello) -> bool {
        hmac::verify(&self.0.secret.0, &self.0.hello(hello), &hello.proof).is_ok()
    }

    /// The welcome's proof that the destination knows the secret too.
    pub(crate) fn welcome_proof(&self, hello: &Hello, welcome: &Welcome) -> [u8; 32] {
        self.0.tag(&self.0.welcome(hello, welcome))
    }
}

/// One lane's two nonces.
struct Exchange {
    secret: Secret,
    source: Nonce,
    destination: Nonce,
}

impl Exchange {
    fn hello_proof(&self, hello: &Hello) -> [u8; 32] {
        self.tag(&self.hello(hello))
    }

    fn tag(&self, said: &[u8]) -> [u8; 32] {
        let tag = hmac::sign(&self.secret.0, said);
        tag.as_ref().try_into().expect("SHA-256 has 32 bytes")
    }

    /// The input of a hello's proof.
    fn hello(&self, hello: &Hello) -> Vec<u8> {
        let bare = Hello { proof: [0; 32], ..hello.clone() };
        [HELLO_LABEL, &self.source.0, &self.destination.0, &bare.encode()].concat()
    }

    /// The input of a welcome's proof.
    fn welcome(&self, hello: &Hello, welcome: &Welcome) -> Vec<u8> {
        let bare = Welcome { proof: [0; 32], ..welcome.clone() };
        let (hello, bare) = (hello.encode(), bare.encode());
        [WELCOME_LABEL, &self.source.0, &self.destination.0, &hello, &bare].concat()
    }
}

#[cfg(test)]
mod tests {
    use umem_wire::{Capabilities, LaneRole, PROTOCOL, SessionId};

    use super::*;

    fn hello() -> Hello {
        Hello {
            versions: PROTOCOL,
            capabilities: Capabilities::ACKS,
            session: SessionId([7; 16]),
            role: LaneRole::Bulk,
            index: 2,
            bulk_lanes: 3,
            epoch: 0,
            proof: [0; 32],
        }
    }

    fn nonce(ask: &[u8; HELLO_BYTES]) -> Nonce {
        match umem_wire::Opening::decode(ask) {
            Ok(umem_wire::Opening::Ask(nonce)) => nonce,
            other => panic!("{other:?}"),
        }
    }

    /// Both sides of an exchange up to the hello.
    fn exchange(source: &[u8], destination: &[u8]) -> (Hello, Proven, Answer) {
        let challenge = Secret::new(source).challenge().unwrap();
        let answer = Secret::new(destination).answer(nonce(&challenge.ask())).unwrap();
        let theirs = Nonce::decode_answer(&answer.encode()).unwrap();
        let (hello, proven) = challenge.prove(theirs, &hello());
        (hello, proven, answer)
    }

    fn welcome(answer: &Answer, hello: &Hello) -> Welcome {
        let bare = Welcome::answer(hello, PROTOCOL, Capabilities::ACKS, [0; 32]).unwrap();
        Welcome { proof: answer.welcome_proof(hello, &bare), ..bare }
    }

    #[test]
    fn equal_secrets_prove_each_side_to_the_other() {
        let (hello, proven, answer) = exchange(b"a secret of ours", b"a secret of ours");
        assert!(answer.accepts(&hello));
        assert!(proven.accepts(&welcome(&answer, &hello)));
    }

    #[test]
    fn different_secrets_fail_on_both_sides() {
        let (hello, proven, answer) = exchange(b"a secret of ours", b"a secret of mine");
        assert!(!answer.accepts(&hello));
        assert!(!proven.accepts(&welcome(&answer, &hello)));
    }

    #[test]
    fn proof_fails_for_another_lane_session_or_connection() {
        let secret = b"a secret of ours";
        let (hello, proven, answer) = exchange(secret, secret);
        let (_, _, elsewhere) = exchange(secret, secret);
        assert!(!elsewhere.accepts(&hello), "a replay");
        for other in [
            Hello { index: 1, ..hello.clone() },
            Hello { bulk_lanes: 2, ..hello.clone() },
            Hello { session: SessionId([8; 16]), ..hello.clone() },
            Hello { capabilities: Capabilities::NONE, ..hello.clone() },
            Hello { role: LaneRole::Demand, index: 0, ..hello.clone() },
            Hello { proof: [0; 32], ..hello.clone() },
        ] {
            assert!(!answer.accepts(&other), "{other:?}");
        }
        let good = welcome(&answer, &hello);
        assert!(!proven.accepts(&welcome(&elsewhere, &hello)), "a replay");
        assert!(!proven.accepts(&Welcome { capabilities: Capabilities::NONE, ..good.clone() }));
        assert!(!proven.accepts(&Welcome { proof: hello.proof, ..good }), "a reflection");
    }
}
