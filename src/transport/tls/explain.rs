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
            format!("it speaks another TLS ({}); umem speaks TLS 1.3", words(&format!("{what:?}")))
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
                names => names.iter().map(|name| plain_name(name)).collect::<Vec<_>>().join(", "),
            };
            format!(
                "is not for {}, but for {presented}: name one of those with --tls-hostname",
                expected.to_str()
            )
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "has the wrong usage: a destination needs a certificate for servers, a source one for clients".into()
        }
        CertificateError::BadEncoding => "is damaged: it is no X.509 certificate".into(),
        CertificateError::BadSignature => {
            "has a signature that is wrong: it was not signed by the authority that it names".into()
        }
        CertificateError::NotValidForName => {
            "is not for this host: name one that it has with --tls-hostname".into()
        }
        other => format!("is not valid: {}", words(&other.to_string())),
    }
}

/// A certificate's name, from rustls's debug form of it: `DnsName("a.example")`, `IpAddress(10.0.0.1)`.
fn plain_name(name: &str) -> &str {
    let inner = |kind: &str| name.strip_prefix(kind)?.strip_prefix('(')?.strip_suffix(')');
    let found =
        ["DnsName", "IpAddress", "UniformResourceIdentifier"].iter().find_map(|kind| inner(kind));
    found.unwrap_or(name).trim_matches('"')
}

/// The words of a name that Rust prints for debugging: `BadRecordMac` becomes `bad record mac`.
fn words(name: &str) -> String {
    if !name.chars().all(char::is_alphanumeric) {
        return name.to_owned();
    }
    let mut words = String::new();
    for letter in name.chars() {
        if letter.is_uppercase() && !words.is_empty() {
            words.push(' ');
        }
        words.extend(letter.to_lowercase());
    }
    words
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
        other => {
            return format!("it ended TLS with an alert ({})", words(&format!("{other:?}")));
        }
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

#[cfg(test)]
mod tests {
    use rustls::pki_types::ServerName;

    use super::*;

    #[test]
    fn names_of_a_certificate_are_shown_as_people_write_them() {
        let names = ["DnsName(\"a.example\")", "IpAddress(10.0.0.1)", "DirectoryName"];
        let error = CertificateError::NotValidForNameContext {
            expected: ServerName::try_from("b.example").unwrap(),
            presented: names.map(str::to_owned).to_vec(),
        };
        let text = failure(&Error::InvalidCertificate(error));
        assert!(
            text.contains("not for b.example, but for a.example, 10.0.0.1, DirectoryName"),
            "{text}"
        );
    }

    #[test]
    fn no_error_has_a_name_of_rust() {
        for error in [
            Error::AlertReceived(AlertDescription::BadRecordMac),
            Error::PeerIncompatible(rustls::PeerIncompatible::NoCipherSuitesInCommon),
            Error::InvalidCertificate(CertificateError::BadEncoding),
            Error::InvalidCertificate(CertificateError::UnhandledCriticalExtension),
        ] {
            let text = failure(&error);
            let is_rust =
                |word: &str| word.chars().filter(|letter| letter.is_uppercase()).count() > 1;
            let found = text
                .split(|letter: char| !letter.is_alphabetic())
                .find(|word| is_rust(word) && word.chars().any(char::is_lowercase));
            assert_eq!(found, None, "{text}");
        }
    }
}
