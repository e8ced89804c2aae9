//! Peers that speak another protocol than umem's, told by their first bytes.
//!
//! Such a peer is refused at its first byte: it may never send as many bytes as a hello has.

/// What all first messages of umem begin with (`UMEMLANE`, `UMEMWELC`, `UMEMAUTH`, `UMEMNONC`).
pub(crate) const UMEM: &[u8] = b"UMEM";

/// A handshake's record of TLS, which umem uses where both sides have --tls-creds.
const TLS: &[u8] = b"\x16\x03";

/// How other protocols begin.
const BEGINNINGS: [(&[u8], &str); 14] = [
    (b"SSH-", "SSH"),
    (b"HTTP/", "HTTP"),
    (b"GET ", "HTTP"),
    (b"HEAD ", "HTTP"),
    (b"POST ", "HTTP"),
    (b"PUT ", "HTTP"),
    (b"CONNECT ", "HTTP"),
    (b"PRI * ", "HTTP/2"),
    (b"QEVM", "QEMU's own migration protocol"),
    (b"{\"QMP\"", "QMP"),
    (b"{\"umem\"", "the protocol of umem's --control sockets"),
    (b"NBDMAGIC", "NBD"),
    (b"RFB ", "VNC"),
    (b"220 ", "SMTP or FTP"),
];

/// Why a peer with these first bytes is none of umem's; None while it may be one. "it" in the text is the peer.
pub(crate) fn why(first: &[u8]) -> Option<String> {
    let common = first.len().min(UMEM.len());
    if first[..common] == UMEM[..common] {
        return None;
    }
    Some(match spoken(first) {
        _ if first.starts_with(TLS) => "it uses TLS, and this side has no --tls-creds".into(),
        Some(protocol) => format!("it speaks {protocol}, not umem"),
        None => "it does not speak umem".into(),
    })
}

/// The protocol that begins so, if it is neither umem's nor TLS.
pub(crate) fn spoken(first: &[u8]) -> Option<&'static str> {
    let found = BEGINNINGS.iter().find(|(beginning, _)| first.starts_with(beginning));
    found.map(|&(_, protocol)| protocol)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peer_of_another_protocol_is_told_by_its_first_bytes() {
        for (first, expected) in [
            (&b"SSH-2.0-OpenSSH_9.2p1\r\n"[..], "it speaks SSH, not umem"),
            (b"GET / HTTP/1.1\r\n", "it speaks HTTP, not umem"),
            (b"HTTP/1.1 400 Bad Request\r\n", "it speaks HTTP, not umem"),
            (&[22, 3, 1, 2, 0], "it uses TLS, and this side has no --tls-creds"),
            (b"QEVM\0\0\0\x03", "it speaks QEMU's own migration protocol, not umem"),
            (b"S", "it does not speak umem"),
            (b"UMEX", "it does not speak umem"),
        ] {
            assert_eq!(why(first).as_deref(), Some(expected));
        }
    }

    #[test]
    fn peer_may_be_umem_as_long_as_its_bytes_are() {
        for first in [&b""[..], b"U", b"UMEM", b"UMEMLANE", b"UMEMNONC", b"UMEM of a later version"]
        {
            assert_eq!(why(first), None);
        }
    }
}
