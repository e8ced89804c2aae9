//! The saving of a device state, and how QEMU is kept from continuing before umem's acknowledgement.
//!
//! With a return path (a socket has two directions) QEMU's migration is not complete when QEMU has written everything:
//! it waits for the destination's acknowledgement, which umem sends in the destination's place. Until then the guest is
//! in QEMU's state `finish-migrate`, in which QEMU refuses `cont` and a further migration from every client. When the
//! socket closes instead, as it does when umem ends for any reason, the migration has failed, and QEMU itself resumes
//! the guest or restores its earlier run state.
//!
//! ```text
//! umem: migrate            umem: reads to the description      umem: SHUT 0        umem: the end, completed
//! QEMU: ...saves... stops the guest ...saves the rest | waits in finish-migrate | completes: postmigrate
//!                                                       the socket closes: fails: runs
//! ```
//!
//! The stream has no length, and does not end while QEMU waits. Its last part is a description of all others, with its
//! length in front: this marks its end. That no byte follows is known before the guest is given away, because the
//! stream's end must follow.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use umem_wire::limits::STATE_BYTES_MAX;

use crate::error::{Context, Error, Result};

/// The types of a stream's last two parts, `QEMU_VM_EOF` and `QEMU_VM_VMDESCRIPTION` in QEMU's migration/savevm.h.
const END: u8 = 0;
const DESCRIPTION: u8 = 6;

/// The message `MIG_RP_MSG_SHUT` of QEMU's migration/migration.h, four bytes long, with 0: all is well.
pub(super) const SHUT: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];

/// Limit of QEMU's silence while it saves. QEMU may have disks to flush.
const SILENCE_MAX: Duration = Duration::from_secs(120);

/// Time limit for QEMU to end its migration after the acknowledgement.
const END_PATIENCE: Duration = Duration::from_secs(30);

/// The state of a migration that was begun.
#[derive(Debug, Default)]
pub(super) enum Saving {
    /// None was begun, or it is known to have ended.
    #[default]
    Over,
    /// It was begun, and QEMU ends it by itself.
    Begun,
    /// QEMU waits for an acknowledgement on this socket.
    Held(UnixStream),
}

/// Reads a stream: to its end, or with a return path to its description. The flag is true if the stream has ended.
/// Reads at most one byte beyond the limit.
pub(super) fn read(mut socket: &UnixStream, is_held: bool) -> Result<(Vec<u8>, bool)> {
    let what = || "reading QEMU's device state";
    socket.set_read_timeout(Some(SILENCE_MAX)).context(what)?;
    let mut state = Vec::new();
    let mut piece = vec![0; 64 << 10];
    loop {
        let count = match socket.read(&mut piece) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                return Err(Error::Host(format!(
                    "it has saved no device state for {} s",
                    SILENCE_MAX.as_secs()
                )));
            }
            other => other.context(what)?,
        };
        state.extend_from_slice(&piece[..count]);
        if count == 0 || state.len() as u64 >= STATE_BYTES_MAX {
            return Ok((state, true));
        }
        if is_held && ends_with_description(&state) {
            return Ok((state, false));
        }
    }
}

/// Whether the last part of a stream is whole: `END DESCRIPTION length {…}`.
pub(super) fn ends_with_description(state: &[u8]) -> bool {
    const BEFORE_TEXT: usize = 6;
    if state.last() != Some(&b'}') {
        return false;
    }
    (BEFORE_TEXT..state.len()).rev().any(|text| {
        state[text] == b'{'
            && state[text - BEFORE_TEXT..text - 4] == [END, DESCRIPTION]
            && u32::from_be_bytes(std::array::from_fn(|at| state[text - 4 + at])) as usize
                == state.len() - text
    })
}

/// Sends QEMU the acknowledgement, and waits for the stream's end.
pub(super) fn finish(mut socket: &UnixStream) -> Result<()> {
    let what = || "ending QEMU's migration";
    socket.set_read_timeout(Some(END_PATIENCE)).context(what)?;
    socket.write_all(&SHUT).context(what)?;
    let mut rest = [0; 1];
    loop {
        return match socket.read(&mut rest) {
            Ok(0) => Ok(()),
            Ok(_) => Err(Error::Host("its device state continues after its description".into())),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => Err(error).context(what),
        };
    }
}

/// Makes QEMU's migration fail, if it has not ended.
pub(super) fn abandon(socket: &UnixStream) {
    let _ = socket.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(text: &str) -> Vec<u8> {
        let length = u32::try_from(text.len()).unwrap().to_be_bytes();
        [&[1, 2, 3, END, DESCRIPTION][..], &length, text.as_bytes()].concat()
    }

    #[test]
    fn stream_ends_only_with_its_whole_description() {
        let whole = stream("{\"devices\": [{\"name\": \"{}\"}]}");
        assert!(ends_with_description(&whole));
        for end in 0..whole.len() {
            assert!(!ends_with_description(&whole[..end]), "{end}");
        }
        assert!(!ends_with_description(&[&whole[..], b"}"].concat()));
        assert!(!ends_with_description(b"}"));
        let mut other = whole.clone();
        other[3] = 1;
        assert!(!ends_with_description(&other));
    }

    #[test]
    fn bytes_after_the_description_are_an_error() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&stream("{}")).unwrap();
        let (state, has_ended) = read(&ours, true).unwrap();
        assert_eq!((state, has_ended), (stream("{}"), false));
        theirs.write_all(b"x").unwrap();
        let error = finish(&ours).unwrap_err().to_string();
        assert!(error.contains("continues after"), "{error}");
        let mut told = [0; 8];
        theirs.read_exact(&mut told).unwrap();
        assert_eq!(told, SHUT);
    }

    #[test]
    fn stream_ends_after_the_acknowledgement() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let qemu = std::thread::spawn(move || {
            let mut told = [0; 8];
            theirs.read_exact(&mut told).unwrap();
            told
        });
        finish(&ours).unwrap();
        assert_eq!(qemu.join().unwrap(), SHUT);
    }
}
