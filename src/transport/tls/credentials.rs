//! Certificates and keys, in QEMU's and Cloud Hypervisor's files of one directory.
//!
//! | file | where | content |
//! |---|---|---|
//! | `ca-cert.pem` | both sides | the authorities that sign the peer's certificate |
//! | `ca-crl.pem` | both sides, optional | certificates that they have revoked |
//! | `server-cert.pem`, `server-key.pem` | destination | its own |
//! | `client-cert.pem`, `client-key.pem` | source | its own |
//!
//! umem refuses a key that other users can read, and any of these files that a user other than root
//! and umem's own owns or can write: that user could add an authority and be let in. An expired
//! list of revoked certificates refuses every certificate, because later revocations are unknown.
//! Only TLS 1.3 is used, without resumption, early data or renegotiation: each lane shows its
//! certificate.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use nix::sys::prctl::set_dumpable;
use nix::unistd::geteuid;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring as provider};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::explain;
use crate::error::{Error, Result};

/// Most bytes of a file that is read here: bundles of authorities are a few hundred KiB.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// A destination's credentials and requirements.
pub(crate) fn server(directory: &Path) -> Result<Arc<ServerConfig>> {
    check_presence(directory, "server")?;
    let provider = provider();
    let own = Own::load(directory, "server")?;
    let mut verifier = WebPkiClientVerifier::builder_with_provider(
        authorities(directory)?.into(),
        provider.clone(),
    );
    if let Some(revoked) = revoked(directory)? {
        verifier = verifier
            .with_crls(revoked)
            .allow_unknown_revocation_status()
            .enforce_revocation_expiration();
    }
    let verifier = verifier.build().map_err(|error| unusable(directory, &error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has suites of TLS 1.3")
        .with_client_cert_verifier(verifier)
        .with_single_cert(own.chain, own.key)
        .map_err(|error| unusable(&own.path, &explain::pair(&error)))?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.enable_secret_extraction = true;
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// A source's credentials and requirements.
pub(crate) fn client(directory: &Path) -> Result<Arc<ClientConfig>> {
    check_presence(directory, "client")?;
    let provider = provider();
    let own = Own::load(directory, "client")?;
    let mut verifier = WebPkiServerVerifier::builder_with_provider(
        authorities(directory)?.into(),
        provider.clone(),
    );
    if let Some(revoked) = revoked(directory)? {
        verifier = verifier
            .with_crls(revoked)
            .allow_unknown_revocation_status()
            .enforce_revocation_expiration();
    }
    let verifier = verifier.build().map_err(|error| unusable(directory, &error.to_string()))?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has suites of TLS 1.3")
        .with_webpki_verifier(verifier)
        .with_client_auth_cert(own.chain, own.key)
        .map_err(|error| unusable(&own.path, &explain::pair(&error)))?;
    config.resumption = Resumption::disabled();
    config.enable_secret_extraction = true;
    Ok(Arc::new(config))
}

/// Names the first file that is missing, with the option that names its directory.
fn check_presence(directory: &Path, role: &str) -> Result<()> {
    let needed = [format!("{role}-cert.pem"), format!("{role}-key.pem"), "ca-cert.pem".into()];
    for name in &needed {
        let path = directory.join(name);
        if std::fs::metadata(&path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            let (own, key, authority) = (&needed[0], &needed[1], &needed[2]);
            return Err(unusable(
                &path,
                &format!(
                    "No such file; --tls-creds names a directory with {own}, {key} and {authority}, as QEMU's are"
                ),
            ));
        }
    }
    Ok(())
}

/// ring's cryptography: on processors with VAES and without AVX-512 its AES-GCM has 1.5 times the
/// rate of aws-lc-rs's (45 and 30 Gbit/s of 16 KiB records on one core of an AMD EPYC). AES-128
/// comes first as the fastest; both sides have the same list, so the others serve other programs.
fn provider() -> Arc<CryptoProvider> {
    use provider::cipher_suite as suite;
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            suite::TLS13_AES_128_GCM_SHA256,
            suite::TLS13_AES_256_GCM_SHA384,
            suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..provider::default_provider()
    })
}

/// One side's own certificate.
struct Own {
    path: PathBuf,
    /// The own certificate first, then those between it and an authority.
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Own {
    fn load(directory: &Path, role: &str) -> Result<Own> {
        let path = directory.join(format!("{role}-cert.pem"));
        let chain = certificates(&path)?;
        let key_path = directory.join(format!("{role}-key.pem"));
        let key = private_key(&key_path, &read_private(&key_path, FILE_BYTES_MAX)?)?;
        Ok(Own { path, chain, key })
    }
}

fn private_key(path: &Path, pem: &[u8]) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|error| {
        // PKCS #8 says so in its first line, older keys in a header.
        let says = |what: &[u8]| pem.windows(what.len()).any(|bytes| bytes == what);
        if says(b"BEGIN ENCRYPTED PRIVATE KEY") || says(b"Proc-Type: 4,ENCRYPTED") {
            let shown = path.display();
            return unusable(
                path,
                &format!(
                    "the key is encrypted, and umem asks for no passphrase: store it decrypted, with (umask 077; \
                     openssl pkey -in {shown} -out {shown}.new && mv {shown}.new {shown})"
                ),
            );
        }
        match error {
            pem::Error::NoItemsFound => unusable(path, "it has no private key in PEM"),
            error => unusable(path, &format!("its private key is not PEM: {error}")),
        }
    })
}

fn authorities(directory: &Path) -> Result<RootCertStore> {
    let path = directory.join("ca-cert.pem");
    let mut store = RootCertStore::empty();
    for certificate in certificates(&path)? {
        store
            .add(certificate)
            .map_err(|error| unusable(&path, &format!("no authority's certificate: {error}")))?;
    }
    Ok(store)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let bytes = read(path)?;
    let found = CertificateDer::pem_slice_iter(&bytes).collect::<std::result::Result<Vec<_>, _>>();
    match found {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err(unusable(path, "it has no certificate in PEM")),
        Err(error) => Err(unusable(path, &format!("not PEM: {error}"))),
    }
}

/// The authorities' revocations, if there is a list.
fn revoked(directory: &Path) -> Result<Option<Vec<CertificateRevocationListDer<'static>>>> {
    let path = directory.join("ca-crl.pem");
    if !path.try_exists().map_err(|error| cannot_read(&path, &error))? {
        return Ok(None);
    }
    let bytes = read(&path)?;
    let found = CertificateRevocationListDer::pem_slice_iter(&bytes)
        .collect::<std::result::Result<Vec<_>, _>>();
    match found {
        Ok(lists) if !lists.is_empty() => Ok(Some(lists)),
        Ok(_) => Err(unusable(&path, "it has no list of revoked certificates in PEM")),
        Err(error) => Err(unusable(&path, &format!("not PEM: {error}"))),
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let (file, _) = open_trusted(path)?;
    read_all(path, &file, FILE_BYTES_MAX)
}

/// Opens a file that only root and umem's own user can change, and returns its mode.
fn open_trusted(path: &Path) -> Result<(File, u32)> {
    let file = File::open(path).map_err(|error| cannot_read(path, &error))?;
    let metadata = file.metadata().map_err(|error| cannot_read(path, &error))?;
    let own = geteuid().as_raw();
    let (owner, mode) = (metadata.uid(), metadata.permissions().mode() & 0o7777);
    if owner != own && owner != 0 {
        return Err(unusable(
            path,
            &format!(
                "it belongs to user {owner}, who can change it at any time: chown {own} {}",
                path.display()
            ),
        ));
    }
    if mode & 0o022 != 0 {
        return Err(unusable(
            path,
            &format!("others can write it (mode {mode:04o}): chmod go-w {}", path.display()),
        ));
    }
    Ok((file, mode))
}

/// Reads a file of at most `bytes_max` bytes that must be private to its owner.
pub(crate) fn read_private(path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let (file, mode) = open_trusted(path)?;
    if mode & 0o077 != 0 {
        return Err(Error::Environment(format!(
            "{path} is open to others (mode {mode:04o}): chmod 600 {path}",
            path = path.display()
        )));
    }
    if OWNS_PROCESS.load(Relaxed) {
        // Neither a core dump nor another process of this user may get it.
        set_dumpable(false).map_err(|errno| cannot_read(path, &errno.into()))?;
    }
    read_all(path, &file, bytes_max)
}

/// Whether this process is umem, and not a program that embeds it.
static OWNS_PROCESS: AtomicBool = AtomicBool::new(false);

/// Declares that this process is umem: it closes itself to other processes of its user, debuggers
/// and core dumps when it reads a key or a secret (prctl(2), `PR_SET_DUMPABLE`).
pub(crate) fn protect_process() {
    OWNS_PROCESS.store(true, Relaxed);
}

fn read_all(path: &Path, file: &File, bytes_max: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(|error| cannot_read(path, &error))?;
    if bytes.len() as u64 > bytes_max {
        return Err(unusable(path, &format!("it has more than {bytes_max} bytes")));
    }
    Ok(bytes)
}

fn cannot_read(path: &Path, error: &io::Error) -> Error {
    unusable(path, &error.to_string())
}

fn unusable(path: &Path, what: &str) -> Error {
    Error::Environment(format!("{}: {what}", path.display()))
}
