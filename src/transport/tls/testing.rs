//! Both sides of a handshake, with certificates of their own.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::crypto::{CipherSuiteCommon, CryptoProvider, ring as provider};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig, SupportedCipherSuite, Tls13CipherSuite};

use super::channel::Channel;
use super::session::{Handshake, Session};

/// The same ciphers, whose keys may encrypt this many records.
fn limited(suite: SupportedCipherSuite, records: u64) -> SupportedCipherSuite {
    let SupportedCipherSuite::Tls13(suite) = suite;
    SupportedCipherSuite::Tls13(Box::leak(Box::new(Tls13CipherSuite {
        common: CipherSuiteCommon {
            suite: suite.common.suite,
            hash_provider: suite.common.hash_provider,
            confidentiality_limit: records,
        },
        hkdf_provider: suite.hkdf_provider,
        aead_alg: suite.aead_alg,
        quic: None,
    })))
}

/// The handshake configuration of both sides, and the number of records per key.
pub(crate) struct Certificates {
    roots: Arc<RootCertStore>,
    own: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl Certificates {
    pub(crate) fn new() -> Certificates {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let authority = CertifiedIssuer::self_signed(params, key).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(authority.der().clone()).unwrap();
        let params = CertificateParams::new(["there".to_owned()]).unwrap();
        let key = KeyPair::generate().unwrap();
        let own = params.signed_by(&key, &authority).unwrap().der().clone();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        Certificates { roots: Arc::new(roots), own, key }
    }

    fn provider(suite: SupportedCipherSuite) -> Arc<CryptoProvider> {
        Arc::new(CryptoProvider { cipher_suites: vec![suite], ..provider::default_provider() })
    }

    pub(crate) fn client(&self, suite: SupportedCipherSuite) -> ClientConfig {
        let mut client = ClientConfig::builder_with_provider(Certificates::provider(suite))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(self.roots.clone())
            .with_client_auth_cert(vec![self.own.clone()], self.key.clone_key())
            .unwrap();
        client.enable_secret_extraction = true;
        client
    }

    pub(crate) fn server(&self, suite: SupportedCipherSuite) -> ServerConfig {
        let provider = Certificates::provider(suite);
        let roots = self.roots.clone();
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone());
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier.build().unwrap())
            .with_single_cert(vec![self.own.clone()], self.key.clone_key())
            .unwrap();
        server.enable_secret_extraction = true;
        server.send_tls13_tickets = 0;
        server
    }
}

/// A completed handshake over an existing connection, a client's end and a server's, with keys for
/// `records` records each.
pub(crate) fn shaken(
    suite: SupportedCipherSuite,
    records: u64,
    (client, server): (Arc<OwnedFd>, Arc<OwnedFd>),
) -> (Channel, Channel) {
    let (certificates, suite) = (Certificates::new(), limited(suite, records));
    let name = ServerName::try_from("there").unwrap();
    let of_client = Session::client(Arc::new(certificates.client(suite)), name).unwrap();
    let of_server = Session::server(Arc::new(certificates.server(suite))).unwrap();
    let mut client = Handshake::new(client, of_client);
    let mut server = Handshake::new(server, of_server);
    while !(client.advance().unwrap() & server.advance().unwrap()) {}
    (client.finish().unwrap(), server.finish().unwrap())
}

pub(crate) fn bytes(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(count).collect()
}
