//! Certificates of a test, in QEMU's file layout.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SerialNumber, date_time_ymd,
};

use super::Scratch;

/// An authority that signs certificates.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub(crate) fn new(name: &str) -> Authority {
        let mut params = CertificateParams::new([]).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key");
        Authority(CertifiedIssuer::self_signed(params, key).expect("a certificate"))
    }

    /// A directory of both sides' files; the destination's certificate is valid for `name` only.
    pub(crate) fn credentials(&self, scratch: &Scratch, directory: &str, name: &str) -> PathBuf {
        let path = scratch.path(directory);
        fs::create_dir(&path).expect("a directory");
        fs::write(path.join("ca-cert.pem"), self.0.pem()).expect("a file");
        self.write(&path, "server", &[name], |_| {});
        self.write(&path, "client", &["a source"], |_| {});
        path
    }

    /// One side's certificate and key; `change` modifies its parameters.
    pub(crate) fn write(
        &self,
        directory: &Path,
        role: &str,
        names: &[&str],
        change: impl FnOnce(&mut CertificateParams),
    ) {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        let purpose = match role {
            "server" => ExtendedKeyUsagePurpose::ServerAuth,
            _ => ExtendedKeyUsagePurpose::ClientAuth,
        };
        params.extended_key_usages = vec![purpose];
        change(&mut params);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("a certificate");
        fs::write(directory.join(format!("{role}-cert.pem")), certificate.pem()).expect("a file");
        write_private(&directory.join(format!("{role}-key.pem")), &key.serialize_pem());
    }

    /// A list that revokes the certificate of this number.
    pub(crate) fn revoke(&self, directory: &Path, serial: u64) {
        self.revoke_until(directory, serial, 2999);
    }

    /// As above; the list expires at the beginning of a year.
    pub(crate) fn revoke_until(&self, directory: &Path, serial: u64, year: i32) {
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 1),
            next_update: date_time_ymd(year, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: SerialNumber::from(serial),
                revocation_time: date_time_ymd(2020, 1, 1),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.0).expect("a list");
        fs::write(directory.join("ca-crl.pem"), list.pem().expect("PEM")).expect("a file");
    }
}

/// A file with access for its owner only.
pub(crate) fn write_private(path: &Path, text: &str) {
    fs::write(path, text).expect("a file");
    fs::set_permissions(path, Permissions::from_mode(0o600)).expect("the test owns the file");
}
