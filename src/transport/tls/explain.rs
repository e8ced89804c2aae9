//! TLS errors in plain words, with the remedy.

use rustls::{AlertDescription, CertificateError, Error, InconsistentKeys, InvalidMessage};

/// Why the peer is not trusted, or does not trust this side; "it" is the peer.
pub(crate) fn failure(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(error) => format!("its certificate {}", certificate(error)),
        Error::NoCertificatesPresented => "it shows no certificate".into(),
        Error::AlertReceived(alert) => refused(*alert),
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "it does not speak TLS; was it started with --tls-creds?".into()
        }
        Error::PeerIncompatible(what) => {
            format!("it speaks another TLS ({what:?}); umem speaks TLS 1.3")
        }
        Error::DecryptError => "a record does not decrypt: bytes changed in transit".into(),
        other => other.to_string(),
    }
}

fn certificate(error: &CertificateError) -> String {
    match error {
        CertificateError::UnknownIssuer => {
            "is signed by no authority in our ca-cert.pem: both sides need certificates of the same authority".into()
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "has expired: make a new one, or set the clock".into()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "is not valid yet: set the clocks".into()
        }
        CertificateError::Revoked => "has been revoked (ca-crl.pem)".into(),
        CertificateError::ExpiredRevocationList
        | CertificateError::ExpiredRevocationListContext { .. } => {
            "cannot be checked: our ca-crl.pem has expired, so fetch a new one from the authority".into()
        }
        CertificateError::NotValidForNameContext { expected, presented } => {
            let presented = match presented.as_slice() {
                [] => "no name at all (umem looks for alternative names)".into(),
                names => names.join(", "),
            };
            format!(
                "is not for {}, but for {presented}: name one of those with --tls-hostname",
                expected.to_str()
            )
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "has the wrong usage: a destination needs a certificate for servers, a source one for clients".into()
        }
        other => format!("is not valid: {other}"),
    }
}

/// The peer's objection to this side, from its alert.
fn refused(alert: AlertDescription) -> String {
    let why = match alert {
        AlertDescription::UnknownCA => {
            "does not accept our certificate: no authority in its ca-cert.pem has signed it"
        }
        AlertDescription::CertificateExpired => {
            "does not accept our certificate: by its clock the certificate has expired or is not valid yet"
        }
        AlertDescription::CertificateRevoked => "does not accept our certificate: it is revoked",
        AlertDescription::CertificateRequired => "wants a certificate, and we showed none",
        AlertDescription::BadCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::AccessDenied => {
            "does not accept our certificate; its own message says why"
        }
        other => return format!("it ended TLS with an alert ({other:?})"),
    };
    format!("it {why}")
}

/// Why a certificate and its key are not usable.
pub(crate) fn pair(error: &Error) -> String {
    match error {
        Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            "the key beside it belongs to another certificate".into()
        }
        other => other.to_string(),
    }
}
