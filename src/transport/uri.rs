//! Addresses as QEMU writes them: `tcp:HOST:PORT`, `unix:PATH`, `fd:N` and `exec:COMMAND`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The address of a migration. At the first two kinds a destination listens and each lane is a
/// connection of its own; each of the others is one connection, which all lanes share.
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
    /// `fd:N`: a connected stream socket that this process has inherited; or, for a destination, one
    /// that listens.
    Fd {
        /// Its descriptor, which this process takes over.
        number: i32,
    },
    /// `exec:COMMAND`: a command whose standard input and output lead to the other side.
    Exec {
        /// The command line for `/bin/sh -c`.
        command: String,
    },
}

const FORMS: &str = "write tcp:HOST:PORT, unix:PATH, fd:N or exec:COMMAND";

impl Uri {
    /// Whether this is one connection, shared by all lanes, without a listener.
    pub fn is_one_connection(&self) -> bool {
        matches!(self, Uri::Fd { .. } | Uri::Exec { .. })
    }
}

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
        if let Some(number) = text.strip_prefix("fd:") {
            return match number.parse() {
                Ok(number) if number >= 0 => Ok(Uri::Fd { number }),
                _ => Err(format!("{number:?} in {text:?} is not a descriptor number: {FORMS}")),
            };
        }
        if let Some(command) = text.strip_prefix("exec:") {
            return match command.trim() {
                "" => Err(format!("{text:?} names no command: {FORMS}")),
                _ => Ok(Uri::Exec { command: command.into() }),
            };
        }
        let Some(rest) = text.strip_prefix("tcp:") else {
            return Err(format!("{text:?} is not an address that umem supports: {FORMS}"));
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
        let host = bracketed.unwrap_or(host);
        if host.contains(['[', ']']) {
            return Err(format!("{host:?} in {text:?} is not a host name or address: {FORMS}"));
        }
        Ok(Uri::Tcp { host: host.to_owned(), port })
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Uri::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Uri::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Uri::Unix { path } => write!(f, "unix:{}", path.display()),
            Uri::Fd { number } => write!(f, "fd:{number}"),
            Uri::Exec { command } => write!(f, "exec:{command}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_in_qemu_syntax_are_parsed() {
        for text in [
            "tcp:localhost:4444",
            "tcp:0:4444",
            "tcp::0",
            "tcp:[::1]:4444",
            "unix:/run/m",
            "fd:0",
            "fd:17",
            "exec:ssh there umem incoming fd:0 -- qemu",
        ] {
            assert_eq!(text.parse::<Uri>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn error_of_an_invalid_address_names_the_fault_and_the_forms() {
        let long = format!("unix:/{}", "x".repeat(200));
        for (text, hint) in [
            ("localhost:4444", "tcp:HOST:PORT"),
            ("tcp:localhost", "no port"),
            ("tcp:localhost:http", "not a port"),
            ("tcp:::1:4444", "brackets"),
            ("tcp:[[]]:4444", "not a host name"),
            ("tcp:a]:4444", "not a host name"),
            ("unix:", "names no socket"),
            ("fd:", "not a descriptor number"),
            ("fd:-1", "not a descriptor number"),
            ("fd:99999999999", "not a descriptor number"),
            ("exec: ", "names no command"),
            ("rdma:x:1", "unix:PATH"),
            (long.as_str(), "107 bytes"),
        ] {
            let error = text.parse::<Uri>().unwrap_err();
            assert!(error.contains(hint), "{text}: {error}");
        }
    }
}
