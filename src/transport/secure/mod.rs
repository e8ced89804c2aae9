//! Authentication and encryption of lanes.
//!
//! There are two independent means. *TLS 1.3* with certificates on both sides ([`credentials`])
//! protects the lanes' confidentiality and integrity. rustls does the handshake
//! ([`tls`](crate::transport::tls)); umem encrypts and decrypts the records there. On a bulk lane
//! the lane's own thread does so, in the buffer that its ring receives into or sends from. For a
//! demand lane a separate thread does so ([`pump`]), between the connection and a socket pair whose
//! other end is the lane. A *secret* that both sides have ([`secret`]) only authenticates the
//! opening of a lane: an attacker on the path can read and change the data that follows.
//!
//! A destination has a [`ServerAuth`], a source a [`ClientAuth`]. Every lane is authenticated in full,
//! also a lane that replaces a lost one: there is no resumption.

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

/// The user's security options, the same on both sides unless noted.
#[derive(Clone, Debug, Default)]
pub struct Security {
    /// TLS: the directory of the certificates and keys, named as QEMU's are.
    pub tls_creds: Option<PathBuf>,
    /// At the source: the name that the destination's certificate must have, if it is not the URI's
    /// host.
    pub tls_hostname: Option<String>,
    /// The file of the secret that both sides share.
    pub secret_file: Option<PathBuf>,
    /// At the destination: accept every peer.
    pub insecure: bool,
}

/// The credentials that a destination requires of a source.
#[derive(Default)]
pub(crate) struct ServerAuth {
    tls: Option<Arc<ServerConfig>>,
    secret: Option<Secret>,
    /// Whether every peer is accepted.
    insecure: bool,
    pumps: Pumps,
}

impl ServerAuth {
    /// Reads the files that the options name.
    pub(crate) fn load(security: &Security) -> Result<ServerAuth> {
        Ok(ServerAuth {
            tls: security.tls_creds.as_deref().map(credentials::server).transpose()?,
            secret: security.secret_file.as_deref().map(Secret::load).transpose()?,
            insecure: security.insecure,
            pumps: Pumps::default(),
        })
    }

    /// Refuses to listen on an open address without `--insecure`; with it, returns a warning.
    pub(crate) fn check_open(&self, way_in: &WayIn<'_>, uri: &Uri) -> Result<Option<String>> {
        if self.tls.is_some() || self.secret.is_some() || way_in.is_local() {
            return Ok(None);
        }
        if self.insecure {
            return Ok(Some(format!(
                "{uri} is open: any host that reaches it can send a guest here, and any host on the path \
                 can read and change it"
            )));
        }
        Err(Error::Usage(format!(
            "{uri} would be open to any host that can reach it: give --tls-creds DIR (certificates on \
             both sides), or --secret-file FILE (a secret that both sides have), or --insecure if \
             you trust every host of the network"
        )))
    }

    /// An accepted lane, with its role.
    pub(crate) fn seat(&self, lane: Lane, role: LaneRole, index: u16) -> Result<Lane> {
        Ok(self.pumps.seat(lane, Fate::unnamed(), role)?.assign(role, index))
    }

    /// Adds the cause of a lost lane to the error, as [`Pumps::explain`] does.
    pub(crate) fn explain(&self, error: Error) -> Error {
        self.pumps.explain(error)
    }

    /// The means of security, for events.
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

/// A destination's entrance, as far as its reachability matters.
pub(crate) enum WayIn<'a> {
    Listener(&'a Listener),
    /// The peer of a TCP connection may be any host: the process that accepted it is unknown.
    Connection(&'a std::os::fd::OwnedFd),
}

impl WayIn<'_> {
    /// Whether only processes of this machine can reach it.
    pub(crate) fn is_local(&self) -> bool {
        match self {
            WayIn::Listener(listener) => is_local(listener),
            WayIn::Connection(socket) => is_local(socket),
        }
    }
}

/// A source's credentials, and its requirements of a destination.
#[derive(Default)]
pub(crate) struct ClientAuth {
    tls: Option<Tls>,
    secret: Option<Secret>,
    pumps: Pumps,
}

struct Tls {
    config: Arc<ClientConfig>,
    /// The name that the destination's certificate must have.
    name: ServerName<'static>,
}

impl ClientAuth {
    /// Reads the files that the options name, for a destination at `uri`.
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

    /// Wraps an unused connection in TLS, if configured.
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

/// The name that the destination's certificate must have: the URI's host, unless the user gives
/// another.
fn expected_name(uri: &Uri, named: Option<&str>) -> Result<ServerName<'static>> {
    let name = match (named, uri) {
        (Some(name), _) => name,
        (None, Uri::Tcp { host, .. }) => host,
        (None, _) => {
            return Err(Error::Usage(format!(
                "{uri} has no host name to check the destination's certificate against: give one with \
                 --tls-hostname"
            )));
        }
    };
    ServerName::try_from(name.to_owned()).map_err(|_| {
        Error::Usage(format!(
            "{name:?} is neither a host name nor an address, so the destination's certificate \
             cannot have it: give one with --tls-hostname"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificate_name_is_the_uri_host_unless_given() {
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
