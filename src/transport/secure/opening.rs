//! A connection that a destination has accepted, up to its hello: TLS and the secret, if
//! configured, come before anything else is read. No step waits; the caller has many of these and
//! waits for all of them.

use umem_wire::{FaultCode, HELLO_BYTES, Hello};

use super::ServerAuth;
use super::secret::Answer;
use crate::runtime::inbox::{Interest, readable};
use crate::transport::lane::{self, HelloBytes, Lane};
use crate::transport::tls::{Handshake, Session, explain};

/// A connection whose peer is not authenticated yet.
pub(crate) struct Opening {
    lane: Lane,
    stage: Stage,
    /// The peer's certificate.
    certificate: Option<Vec<u8>>,
}

enum Stage {
    Tls(Box<Handshake>),
    /// A hello, or a nonce before it.
    First(HelloBytes),
    /// A hello with a proof.
    Proof(HelloBytes, Box<Answer>),
}

/// A connection whose peer is authenticated and has sent its hello.
pub(crate) struct Opened {
    pub(crate) lane: Lane,
    pub(crate) hello: Hello,
    /// The material of the welcome's proof, if there is a secret.
    pub(crate) answer: Option<Answer>,
    /// The peer's certificate, with TLS.
    pub(crate) certificate: Option<Vec<u8>>,
}

/// The progress of an opening.
pub(crate) enum Progress {
    /// More bytes are needed.
    Waits(Opening),
    Opened(Opened),
}

impl Opening {
    /// For a connection without any data received.
    pub(crate) fn new(lane: Lane, guard: &ServerAuth) -> Result<Opening, String> {
        let stage = match &guard.tls {
            None => Stage::First(HelloBytes::new()),
            Some(config) => {
                let session = Session::server(config.clone());
                let session = session.map_err(|error| explain::failure(&error))?;
                Stage::Tls(Box::new(Handshake::new(lane.socket(), session)))
            }
        };
        Ok(Opening { lane, stage, certificate: None })
    }

    /// The events that it waits for.
    pub(crate) fn interest(&self) -> Interest<'_> {
        match &self.stage {
            Stage::Tls(handshake) => handshake.interest(),
            Stage::First(_) | Stage::Proof(..) => readable(&self.lane),
        }
    }

    /// Whether the peer has sent something.
    pub(crate) fn has_begun(&self) -> bool {
        match &self.stage {
            Stage::Tls(handshake) => handshake.has_begun(),
            Stage::First(bytes) => self.certificate.is_some() || bytes.has_begun(),
            Stage::Proof(..) => true,
        }
    }

    /// Advances without waiting. An error is the reason for refusing the peer, which has been sent
    /// to it.
    pub(crate) fn advance(mut self, guard: &ServerAuth) -> Result<Progress, String> {
        loop {
            let read = match &mut self.stage {
                Stage::Tls(handshake) => match handshake.advance() {
                    Ok(false) => return Ok(Progress::Waits(self)),
                    Ok(true) => {
                        self = self.past_tls()?;
                        continue;
                    }
                    Err(_) if handshake.is_plain() => {
                        return Err(self.refuse("only TLS is accepted here: give --tls-creds"));
                    }
                    Err(why) => return Err(format!("TLS: {why}")),
                },
                Stage::First(bytes) | Stage::Proof(bytes, _) => {
                    let read = bytes.read(&self.lane);
                    if let Some(why) = bytes.foreign() {
                        return Err(why);
                    }
                    read
                }
            };
            match read {
                Ok(None) => return Ok(Progress::Waits(self)),
                Ok(Some(bytes)) => match self.heard(&bytes, guard)? {
                    Progress::Waits(opening) => self = opening,
                    opened @ Progress::Opened(_) => return Ok(opened),
                },
                Err(error) => return Err(self.ended(&error)),
            }
        }
    }

    /// Proceeds after both sides have shown their certificates.
    fn past_tls(self) -> Result<Opening, String> {
        let Opening { lane, stage, .. } = self;
        let Stage::Tls(handshake) = stage else { unreachable!("the handshake is the first stage") };
        let certificate = handshake.peer_certificate();
        if certificate.is_none() {
            return Err("TLS: it shows no certificate".into());
        }
        let channel = handshake.finish();
        let channel = channel.map_err(|error| format!("TLS: {}", explain::failure(&error)))?;
        let lane = lane.secured(channel);
        Ok(Opening { lane, stage: Stage::First(HelloBytes::new()), certificate })
    }

    /// Processes 128 received bytes.
    fn heard(self, bytes: &[u8; HELLO_BYTES], guard: &ServerAuth) -> Result<Progress, String> {
        if let Stage::Proof(_, answer) = &self.stage {
            let hello = Hello::decode(bytes).map_err(|error| error.to_string())?;
            if !answer.accepts(&hello) {
                return Err(self.refuse("it does not know the secret of this --secret-file"));
            }
            let Opening { lane, stage: Stage::Proof(_, answer), certificate } = self else {
                unreachable!("the stage was matched above");
            };
            let opened = Opened { lane, hello, answer: Some(*answer), certificate };
            return Ok(Progress::Opened(opened));
        }
        match (umem_wire::Opening::decode(bytes), &guard.secret) {
            (Ok(umem_wire::Opening::Hello(hello)), None) => {
                let Opening { lane, certificate, .. } = self;
                Ok(Progress::Opened(Opened { lane, hello, answer: None, certificate }))
            }
            (Ok(umem_wire::Opening::Ask(nonce)), Some(secret)) => {
                let answer = secret.answer(nonce).map_err(|error| error.to_string())?;
                // The queue has room: only TLS has been sent before.
                self.lane.say(&answer.encode()).map_err(|error| error.to_string())?;
                let stage = Stage::Proof(HelloBytes::new(), Box::new(answer));
                Ok(Progress::Waits(Opening { stage, ..self }))
            }
            (Ok(umem_wire::Opening::Hello(_)), Some(_)) => {
                Err(self.refuse("a secret is required here: give --secret-file"))
            }
            (Ok(umem_wire::Opening::Ask(_)), None) => {
                Err(self.refuse("no secret is known here: start umem incoming with --secret-file"))
            }
            (Err(error), _) => Err(error.to_string()),
        }
    }

    /// Sends the reason for the refusal to the peer, and returns it for the log.
    fn refuse(&self, why: &str) -> String {
        lane::refuse(&self.lane, FaultCode::Refused, why);
        format!("refused: {why}")
    }

    fn ended(&self, error: &std::io::Error) -> String {
        match self.lane.cause() {
            Some(cause) => format!("TLS: {cause}"),
            None => error.to_string(),
        }
    }
}
