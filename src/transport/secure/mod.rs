//! Who may be at the other end of a lane, and who may read what goes over it.
//!
//! Two means, and neither is tied to the other. *TLS 1.3* with certificates on both sides
//! ([`credentials`]) keeps everything secret and whole. rustls shakes hands ([`tls`](crate::transport::tls)), then records are
//! made and taken apart there: on a bulk lane by the lane's own thread, in the buffer that its
//! ring receives into or sends from. Before a demand lane a thread of its own does it
//! ([`pump`]), between the connection and a socket pair, whose other end is the lane. A *secret* that both sides have ([`secret`]) says who may open a lane, and nothing
//! more: what follows can be read, and changed by whoever sits on the path.
//!
//! A destination has a [`ServerAuth`], a source a [`ClientAuth`]. Each lane is opened anew by them, whether it is
//! the first or one that takes a lost lane's place: nothing is resumed.

mod dialing;
mod greeting;
mod opening;
mod pump;
mod secret;
mod welcome;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ServerConfig};
use umem_wire::LaneRole;

use super::lane::{HELLO_TIMEOUT, Lane, Listener};
use super::tls::{Fate, Handshake, Session, credentials, explain};
use super::uri::Uri;
use crate::error::{Error, Result};
use crate::runtime::inbox::Wait;

pub(crate) use dialing::{connect_to, dial, is_local, open, open_shared, stays_local};
pub(crate) use greeting::introduce;
pub(crate) use opening::{Opened, Opening, Progress};
pub(crate) use welcome::welcome;

use pump::Pumps;
use secret::{Challenge, Secret};

/// What the user asks for, the same on both sides but where it says otherwise.
#[derive(Clone, Debug, Default)]
pub struct Security {
    /// TLS: the directory of the certificates and keys, named as QEMU's are.
    pub tls_creds: Option<PathBuf>,
    /// At the source: the name that the destination's certificate must have, where it is not the
    /// URI's host.
    pub tls_hostname: Option<String>,
    /// The file of the secret that both sides share.
    pub secret_file: Option<PathBuf>,
    /// At the destination: anybody may connect.
    pub insecure: bool,
}

/// What a destination wants of whoever dials.
#[derive(Default)]
pub(crate) struct ServerAuth {
    tls: Option<Arc<ServerConfig>>,
    secret: Option<Secret>,
    /// Anybody may dial.
    insecure: bool,
    pumps: Pumps,
}

impl ServerAuth {
    /// Reads what the options name.
    pub(crate) fn load(security: &Security) -> Result<ServerAuth> {
        Ok(ServerAuth {
            tls: security.tls_creds.as_deref().map(credentials::server).transpose()?,
            secret: security.secret_file.as_deref().map(Secret::load).transpose()?,
            insecure: security.insecure,
            pumps: Pumps::default(),
        })
    }

    /// Refuses to listen where anybody could dial and nobody has said that they may; what has been
    /// agreed to is put in words.
    pub(crate) fn check_open(&self, way_in: &WayIn<'_>, uri: &Uri) -> Result<Option<String>> {
        if self.tls.is_some() || self.secret.is_some() || way_in.is_local() {
            return Ok(None);
        }
        if self.insecure {
            return Ok(Some(format!(
                "{uri} is open: everybody who reaches it can send a guest here, and everybody on the path \
                 can read and change it"
            )));
        }
        Err(Error::Usage(format!(
            "{uri} would be open to everybody who can reach it: give --tls-creds DIR (certificates on \
             both sides), or --secret-file FILE (a secret that both sides have), or --insecure where \
             you trust every host of the network"
        )))
    }

    /// A lane that has come, now that it is known what it is for.
    pub(crate) fn seat(&self, lane: Lane, role: LaneRole, index: u16) -> Result<Lane> {
        Ok(self.pumps.seat(lane, Fate::unnamed(), role)?.assign(role, index))
    }

    /// What stands at the lost lane's end, as [`Pumps::explain`] tells it.
    pub(crate) fn explain(&self, error: Error) -> Error {
        self.pumps.explain(error)
    }

    /// For events: how lanes are secured.
    pub(crate) fn describe(&self) -> &'static str {
        describe(self.tls.is_some(), self.secret.is_some())
    }
}

fn describe(tls: bool, secret: bool) -> &'static str {
    match (tls, secret) {
        (true, true) => "tls+secret",
        (true, false) => "tls",
        (false, true) => "secret",
        (false, false) => "none",
    }
}

/// Where sources come in, as far as it matters who can reach it.
pub(crate) enum WayIn<'a> {
    Listener(&'a Listener),
    /// Its other end, if it is TCP, may be anybody's: who has accepted it is not known.
    Connection(&'a std::os::fd::OwnedFd),
}

impl WayIn<'_> {
    /// Only this machine's own processes get here.
    pub(crate) fn is_local(&self) -> bool {
        match self {
            WayIn::Listener(listener) => is_local(listener),
            WayIn::Connection(socket) => is_local(socket),
        }
    }
}

/// What a source shows, and what it wants to see.
#[derive(Default)]
pub(crate) struct ClientAuth {
    tls: Option<Tls>,
    secret: Option<Secret>,
    pumps: Pumps,
}

struct Tls {
    config: Arc<ClientConfig>,
    /// Whom the destination's certificate must be for.
    name: ServerName<'static>,
}

impl ClientAuth {
    /// Reads what the options name, for a destination at `uri`.
    pub(crate) fn load(security: &Security, uri: &Uri) -> Result<ClientAuth> {
        let tls = match &security.tls_creds {
            None => None,
            Some(directory) => {
                let name = expected_name(uri, security.tls_hostname.as_deref())?;
                Some(Tls { config: credentials::client(directory)?, name })
            }
        };
        let secret = security.secret_file.as_deref().map(Secret::load).transpose()?;
        Ok(ClientAuth { tls, secret, pumps: Pumps::default() })
    }

    pub(crate) fn has_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// A new proof for a lane, if there is a secret.
    fn challenge(&self) -> Result<Option<Challenge>> {
        self.secret.as_ref().map(Secret::challenge).transpose()
    }

    /// Puts TLS around a connection on which nothing has been said, if that is asked for.
    fn wrap(
        &self,
        lane: Lane,
        role: LaneRole,
        limit: Option<Duration>,
        wait: Wait<'_>,
    ) -> Result<Lane> {
        let Some(tls) = &self.tls else { return Ok(lane) };
        let failed = |what| Error::Insecure { side: "destination", what };
        let session = Session::client(tls.config.clone(), tls.name.clone())
            .map_err(|error| failed(explain::failure(&error)))?;
        let mut handshake = Handshake::new(lane.socket(), session);
        let mut deadline = limit.map(|limit| Instant::now() + limit);
        while !handshake.advance().map_err(failed)? {
            if handshake.has_begun() {
                deadline.get_or_insert(Instant::now() + HELLO_TIMEOUT);
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if !wait(&[handshake.interest()], left)? {
                let what = "it does not answer in TLS; was it started with --tls-creds?";
                return Err(failed(what.into()));
            }
        }
        let channel = handshake.finish().map_err(|error| failed(explain::failure(&error)))?;
        let fate = Fate::named(lane.name.clone());
        self.pumps.seat(lane.secured(channel), fate, role)
    }

    /// As [`ServerAuth::explain`].
    pub(crate) fn explain(&self, error: Error) -> Error {
        self.pumps.explain(error)
    }

    /// As [`ServerAuth::describe`].
    pub(crate) fn describe(&self) -> &'static str {
        describe(self.tls.is_some(), self.secret.is_some())
    }
}

/// Whom the destination's certificate must be for: the URI's host, unless the user names another.
fn expected_name(uri: &Uri, named: Option<&str>) -> Result<ServerName<'static>> {
    let name = match (named, uri) {
        (Some(name), _) => name,
        (None, Uri::Tcp { host, .. }) => host,
        (None, _) => {
            return Err(Error::Usage(format!(
                "{uri} has no host whose name the destination's certificate could have: give it with \
                 --tls-hostname"
            )));
        }
    };
    ServerName::try_from(name.to_owned()).map_err(|_| {
        Error::Usage(format!(
            "{name:?} is neither a host's name nor an address, which the destination's certificate \
             could be for: give one with --tls-hostname"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_that_a_certificate_must_have() {
        let name = |uri: &str, named| expected_name(&uri.parse().unwrap(), named);
        let there = ServerName::try_from("there.example").unwrap();
        assert_eq!(name("tcp:there.example:1", None).unwrap(), there);
        assert_eq!(name("tcp:10.0.0.1:1", Some("there.example")).unwrap(), there);
        assert_eq!(name("unix:/run/x", Some("there.example")).unwrap(), there);
        let address = name("tcp:[::1]:1", None).unwrap();
        assert!(matches!(address, ServerName::IpAddress(_)), "{address:?}");
        for uri in ["unix:/run/x", "fd:3", "exec:ssh there", "tcp::4444"] {
            let error = name(uri, None).unwrap_err().to_string();
            assert!(error.contains("--tls-hostname"), "{uri}: {error}");
        }
    }
}
