//! How the guest side hands over its memory: one message a region on a unix stream socket.
//!
//! The message is Firecracker's: a JSON array of `base_host_virt_addr`, `size`, `offset`,
//! `page_size`, with descriptors in SCM_RIGHTS. Our preload object adds `name`, `path` and `kind`
//! and sends two descriptors, the userfaultfd and the RAM file. Beside that it sends lines of its
//! own: `{"preload":1,…}` when it has been loaded, `{"error":CODE,…}` when it could not do its work
//! and `{"released":N}` when it has closed its descriptors at the end.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSliceMut, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde::Deserialize;

use super::uffd::Uffd;
use crate::error::{Context, Error, Result};

/// A guest side's region as it was handed over.
pub(crate) struct Handed {
    pub(crate) name: String,
    /// Where the guest side has mapped it, in its own address space.
    pub(crate) address: u64,
    pub(crate) bytes: u64,
    pub(crate) uffd: Uffd,
    pub(crate) file: File,
}

/// What arrived on the hand-over socket.
pub(crate) enum Message {
    /// The preload object runs inside the guest's process.
    Loaded,
    /// A region.
    Region(Handed),
    /// The guest side has closed its copies of the userfaultfd.
    Released,
}

#[derive(Deserialize)]
struct RegionMessage {
    base_host_virt_addr: u64,
    size: u64,
    name: String,
}

#[derive(Deserialize)]
struct ErrorMessage {
    error: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    text: String,
}

/// A message longer than this is not one of ours.
const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// Descriptors that may come with one read: two for each of a few regions.
const DESCRIPTORS_MAX: usize = 16;

/// The daemon's end of the hand-over socket.
pub(crate) struct HandoffSocket {
    stream: UnixStream,
    bytes: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
}

impl HandoffSocket {
    pub(crate) fn new(stream: UnixStream) -> HandoffSocket {
        HandoffSocket { stream, bytes: Vec::new(), descriptors: VecDeque::new() }
    }

    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Reads once (the socket is readable) and returns the messages that are complete by now;
    /// `None` when the guest side has closed the socket.
    pub(crate) fn read(&mut self) -> Result<Option<Vec<Message>>> {
        match self.receive() {
            Ok(0) => return Ok(None),
            // It ended with something of ours unread.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            received => received.context(|| "the hand-over socket")?,
        };
        let mut messages = Vec::new();
        while let Some(end) = self.bytes.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.bytes.drain(..=end).collect();
            self.message(&line, &mut messages)?;
        }
        if self.bytes.len() > MESSAGE_BYTES_MAX {
            return Err(Error::Preload("the hand-over message has no end".into()));
        }
        Ok(Some(messages))
    }

    /// Tells the guest side that the guest may run there from now on: it outlives us.
    pub(crate) fn keep(&mut self) -> Result<()> {
        self.command(b"keep\n")
    }

    /// Tells the guest side that every page is its own: it closes its userfaultfds.
    pub(crate) fn release(&mut self) -> Result<()> {
        self.command(b"release\n")
    }

    /// A guest side that has ended needs no command; its end is noticed elsewhere.
    fn command(&mut self, line: &[u8]) -> Result<()> {
        match self.stream.write_all(line) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            written => written.context(|| "the hand-over socket"),
        }
    }

    fn receive(&mut self) -> io::Result<usize> {
        let mut buffer = [0u8; 4096];
        let mut control = nix::cmsg_space!([i32; DESCRIPTORS_MAX]);
        let mut iov = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received = recvmsg::<()>(self.stream.as_raw_fd(), &mut iov, Some(&mut control), flags)?;
        let count = received.bytes;
        for message in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(descriptors) = message {
                // SAFETY: the kernel has just made these descriptors for us; nobody else owns them.
                let owned = descriptors.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
                self.descriptors.extend(owned);
            }
        }
        self.bytes.extend_from_slice(&buffer[..count]);
        Ok(count)
    }

    fn message(&mut self, line: &[u8], messages: &mut Vec<Message>) -> Result<()> {
        let text = || String::from_utf8_lossy(line).trim().to_owned();
        let strange =
            || Error::Preload(format!("the hand-over message is not understood: {}", text()));
        let value: serde_json::Value = serde_json::from_slice(line).map_err(|_| strange())?;
        if value.is_array() {
            let regions: Vec<RegionMessage> =
                serde_json::from_value(value).map_err(|_| strange())?;
            for region in regions {
                messages.push(Message::Region(self.region(region).ok_or_else(strange)?));
            }
        } else if value.get("error").is_some() {
            let error: ErrorMessage = serde_json::from_value(value).map_err(|_| strange())?;
            return Err(explain(&error));
        } else if value.get("preload").is_some() {
            messages.push(Message::Loaded);
        } else if value.get("released").is_some() {
            messages.push(Message::Released);
        } else {
            return Err(strange());
        }
        Ok(())
    }

    fn region(&mut self, message: RegionMessage) -> Option<Handed> {
        let uffd = Uffd::new(self.descriptors.pop_front()?);
        let file = File::from(self.descriptors.pop_front()?);
        Some(Handed {
            name: message.name,
            address: message.base_host_virt_addr,
            bytes: message.size,
            uffd,
            file,
        })
    }
}

/// The preload object's error codes, with what to do about each.
fn explain(error: &ErrorMessage) -> Error {
    let ErrorMessage { error: code, name, text } = error;
    Error::Preload(match code.as_str() {
        "userfaultfd-permission" => "no permission for userfaultfd in the guest's process: allow \
            its user to open /dev/userfaultfd (`setfacl -m u:USER:rw /dev/userfaultfd`), or set \
            `sysctl vm.unprivileged_userfaultfd=1`"
            .into(),
        "userfaultfd-features" => format!(
            "this kernel's userfaultfd cannot serve shared memory ({text}): umem needs Linux 5.14 \
             or later"
        ),
        "ram-in-use" => format!(
            "RAM {name}: its file holds data already ({text}): it belongs to another guest or is \
             left from an earlier one; name a new file, or remove it if nobody uses it"
        ),
        _ => format!("RAM {name}: {text} ({code})"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{ControlMessage, sendmsg};
    use std::io::IoSlice;

    fn pair() -> (UnixStream, HandoffSocket) {
        let (guest, daemon) = UnixStream::pair().unwrap();
        (guest, HandoffSocket::new(daemon))
    }

    #[test]
    fn a_region_comes_with_its_two_descriptors() {
        let (guest, mut daemon) = pair();
        let files = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
        let text = b"{\"preload\":1,\"pid\":7}\n[{\"name\":\"ram0\",\"base_host_virt_addr\":4096,\
            \"size\":8192,\"offset\":0,\"page_size\":4096,\"kind\":\"shared\",\"later\":1}]\n";
        let fds = [files[0].as_raw_fd(), files[1].as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(guest.as_raw_fd(), &[IoSlice::new(text)], &rights, MsgFlags::empty(), None)
            .unwrap();
        let messages = daemon.read().unwrap().unwrap();
        let [Message::Loaded, Message::Region(region)] = &messages[..] else { panic!() };
        assert_eq!((region.name.as_str(), region.address, region.bytes), ("ram0", 4096, 8192));
        drop(guest);
        assert!(daemon.read().unwrap().is_none());
        daemon.release().unwrap();
    }

    #[test]
    fn a_guest_that_ends_with_a_command_unread_has_ended() {
        let (guest, mut daemon) = pair();
        daemon.release().unwrap();
        drop(guest);
        assert!(daemon.read().unwrap().is_none());
    }

    #[test]
    fn what_the_preload_object_could_not_do_is_explained() {
        for (code, hint) in [
            ("userfaultfd-permission", "setfacl"),
            ("userfaultfd-features", "Linux 5.14"),
            ("ram-in-use", "another guest"),
            ("register", "t (register)"),
        ] {
            let (mut guest, mut daemon) = pair();
            writeln!(
                guest,
                "{{\"error\":\"{code}\",\"name\":\"ram0\",\"errno\":1,\"text\":\"t\"}}"
            )
            .unwrap();
            let error = daemon.read().err().unwrap().to_string();
            assert!(error.contains(hint), "{error}");
            assert!(!error.contains('\n'), "one line: {error}");
        }
    }

    #[test]
    fn garbage_and_missing_descriptors_are_errors() {
        for text in ["nonsense\n", "{}\n", "[{\"size\":1}]\n"] {
            let (mut guest, mut daemon) = pair();
            guest.write_all(text.as_bytes()).unwrap();
            assert!(matches!(daemon.read(), Err(Error::Preload(_))), "{text}");
        }
        let (mut guest, mut daemon) = pair();
        writeln!(guest, "[{{\"name\":\"r\",\"base_host_virt_addr\":1,\"size\":1}}]").unwrap();
        assert!(matches!(daemon.read(), Err(Error::Preload(_))));
    }
}
