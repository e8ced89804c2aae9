//! Addresses as QEMU writes them: `tcp:HOST:PORT` and `unix:PATH`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Where a destination listens and a source dials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Uri {
    /// `tcp:HOST:PORT`; an empty host (or `0`) means every address when listening; IPv6 addresses
    /// stand in brackets.
    Tcp {
        /// Name or address, brackets removed.
        host: String,
        /// Port; 0 lets the kernel choose when listening.
        port: u16,
    },
    /// `unix:PATH`.
    Unix {
        /// The socket's path.
        path: PathBuf,
    },
}

const FORMS: &str = "write tcp:HOST:PORT or unix:PATH";

impl FromStr for Uri {
    type Err = String;

    fn from_str(text: &str) -> Result<Uri, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            // sun_path holds 108 bytes with the terminating zero (unix(7)).
            return match path.len() {
                0 => Err(format!("{text:?} names no socket: {FORMS}")),
                1..=107 => Ok(Uri::Unix { path: PathBuf::from(path) }),
                _ => Err(format!("the socket path in {text:?} is longer than 107 bytes")),
            };
        }
        let Some(rest) = text.strip_prefix("tcp:") else {
            return Err(format!("{text:?} is not an address umem knows: {FORMS}"));
        };
        let Some((host, port)) = rest.rsplit_once(':') else {
            return Err(format!("{text:?} has no port: {FORMS}"));
        };
        let port = port
            .parse()
            .map_err(|_| format!("{port:?} in {text:?} is not a port (0 to 65535): {FORMS}"))?;
        let bracketed = host.strip_prefix('[').and_then(|inner| inner.strip_suffix(']'));
        if bracketed.is_none() && host.contains(':') {
            return Err(format!("put the IPv6 address in brackets: tcp:[{host}]:{port}"));
        }
        Ok(Uri::Tcp { host: bracketed.unwrap_or(host).to_owned(), port })
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Uri::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Uri::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Uri::Unix { path } => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_qemu_writes() {
        for text in ["tcp:localhost:4444", "tcp:0:4444", "tcp::0", "tcp:[::1]:4444", "unix:/run/m"]
        {
            assert_eq!(text.parse::<Uri>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn says_what_to_write_instead() {
        let long = format!("unix:/{}", "x".repeat(200));
        for (text, hint) in [
            ("localhost:4444", "tcp:HOST:PORT"),
            ("tcp:localhost", "no port"),
            ("tcp:localhost:http", "not a port"),
            ("tcp:::1:4444", "brackets"),
            ("unix:", "names no socket"),
            ("rdma:x:1", "unix:PATH"),
            (long.as_str(), "107 bytes"),
        ] {
            let error = text.parse::<Uri>().unwrap_err();
            assert!(error.contains(hint), "{text}: {error}");
        }
    }
}
