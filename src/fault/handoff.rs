//! The hand-over of the guest's memory by the guest side: messages on a unix stream socket.
//!
//! A message is Firecracker's: a JSON array of `base_host_virt_addr`, `size`, `offset` and
//! `page_size` (or `page_size_kib`, which is in bytes too), with one descriptor in SCM_RIGHTS, the
//! userfaultfd of that anonymous memory. Guest sides that know umem add `name` and `kind`,
//! `"umem":1` if they understand umem's commands, and `"more":true` if another message follows; for
//! memory that is a file (kinds shared and private) two descriptors come with each region, the
//! userfaultfd and the file. Such a guest side discards shared memory only with MADV_REMOVE until
//! it is complete: the kernel reports no hole that is punched in the file, and reports
//! MADV_DONTNEED as if it were a discard.
//!
//! The preload object also sends `{"preload":1,…}` when it has been loaded,
//! `{"qemu":1,"monitor":true}` in a QEMU, with umem's end of a socket for its monitor (and
//! `"registers":true` if the object has the command `register`), `{"made":PATH,…}` for each RAM
//! file that it makes, `{"error":CODE,…}` when it fails, and `{"released":N}` when it has closed its
//! descriptors at the end.
//!
//! A guest side with `"umem":2` can keep a *session* for umem ([`HandoffSocket::entrust`]): a
//! listening socket, the state of the guest's pages, umem's end of the monitor's socket. A umem
//! that takes over connects there, and gets every message again, then `{"session":N}` with the
//! rest.

mod blocks;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, getsockopt, recvmsg, sendmsg, sockopt,
};
use serde::Deserialize;

use super::uffd::Uffd;
use crate::error::{Context, Error, Result};
use crate::memory::created::Created;
use crate::memory::kind::Kind;
use crate::runtime::accepting::Accepted;
use crate::runtime::private_socket::{bind_private_anew, is_socket};
use crate::runtime::process;

/// A piece of the guest's memory as it was handed over.
pub(crate) struct Handed {
    /// None for Firecracker's pieces, which all belong to one region.
    pub(crate) name: Option<String>,
    pub(crate) kind: Kind,
    /// The address of its mapping in the guest side's address space.
    pub(crate) address: u64,
    pub(crate) bytes: u64,
    /// The piece's offset in its region.
    pub(crate) offset: u64,
    /// The region's offset in its file.
    pub(crate) file_offset: u64,
    /// log2 of the guest's page size there.
    pub(crate) page_shift: u8,
    /// Several pieces may share one.
    pub(crate) uffd: Uffd,
    /// None for anonymous memory.
    pub(crate) file: Option<File>,
}

/// A message on the hand-over socket.
pub(crate) enum Message {
    /// The preload object runs inside the guest's process.
    Loaded,
    /// The process is a QEMU with the options that it needs; umem's end of its monitor, if
    /// requested.
    Monitor(Option<UnixStream>),
    /// Memory.
    Memory {
        pieces: Vec<Handed>,
        /// Another such message follows.
        more: bool,
        /// The guest side keeps its own duplicate of the userfaultfds, and understands umem's
        /// commands.
        knows_umem: bool,
        /// The guest side can keep a session.
        keeps_sessions: bool,
    },
    /// The guest side has closed its copies of the userfaultfd.
    Released,
    /// After all memory: the session that an earlier umem entrusted.
    Session(Entrusted),
}

impl Message {
    pub(crate) fn is_released(&self) -> bool {
        matches!(self, Message::Released)
    }
}

/// The data that the guest side keeps for a takeover.
pub(crate) struct Entrusted {
    /// The state of the guest's pages.
    pub(crate) state: File,
    /// umem's end of the monitor's socket, if there is one.
    pub(crate) qmp: Option<UnixStream>,
}

#[derive(Deserialize)]
struct PieceMessage {
    base_host_virt_addr: u64,
    size: u64,
    #[serde(default)]
    offset: u64,
    #[serde(default)]
    file_offset: u64,
    page_size: Option<u64>,
    /// Bytes, despite the name.
    page_size_kib: Option<u64>,
    name: Option<String>,
    kind: Option<String>,
    umem: Option<u64>,
    #[serde(default)]
    more: bool,
}

#[derive(Deserialize)]
struct MadeMessage {
    made: PathBuf,
    device: u64,
    inode: u64,
}

#[derive(Deserialize)]
struct ErrorMessage {
    error: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    text: String,
    /// The RAM file, for errors about one.
    #[serde(default)]
    path: PathBuf,
}

/// A longer message is not valid.
const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// Most descriptors of one read (the kernel's SCM_MAX_FD): with less room, a stranger that sends
/// more would leave descriptors open here without an owner.
const DESCRIPTORS_MAX: usize = 253;

/// Most files that a guest's process may make for its memory: one a backend, of which a guest has a
/// few.
const CREATED_MAX: usize = 1024;

/// Most descriptors that may wait for their message.
const DESCRIPTORS_QUEUED_MAX: usize = 256;

/// umem's end of the hand-over socket.
pub(crate) struct HandoffSocket {
    stream: UnixStream,
    bytes: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
    /// Files that the guest's process has made, also if an error followed.
    created: Vec<Created>,
    registers: bool,
    /// The memory whose pages the guest side dropped last: its start address, and the bytes dropped.
    emptied: Option<(u64, u64)>,
}

impl HandoffSocket {
    pub(crate) fn new(stream: UnixStream) -> HandoffSocket {
        HandoffSocket {
            stream,
            bytes: Vec::new(),
            descriptors: VecDeque::new(),
            created: Vec::new(),
            registers: false,
            emptied: None,
        }
    }

    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Reads once (the socket is readable) and returns the messages that are now complete; `None`
    /// when the guest side has closed the socket.
    pub(crate) fn read(&mut self) -> Result<Option<Vec<Message>>> {
        match self.receive() {
            Ok(0) => return Ok(None),
            // The guest side ended with unread data of umem's.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            received => received.context(|| "the hand-over socket")?,
        };
        if self.descriptors.len() > DESCRIPTORS_QUEUED_MAX {
            let count = self.descriptors.len();
            return Err(Error::Preload(format!("{count} descriptors arrived without a message")));
        }
        let mut messages = Vec::new();
        while let Some((value, end)) = self.next_value()? {
            // A message may arrive before its descriptors.
            if !self.message(value, &mut messages)? {
                break;
            }
            self.bytes.drain(..end);
        }
        if self.bytes.len() > MESSAGE_BYTES_MAX {
            return Err(Error::Preload("the hand-over message has no end".into()));
        }
        Ok(Some(messages))
    }

    /// Whether the guest side has sent more than any message has: it is not a guest side of umem.
    pub(crate) fn is_flooded(&self) -> bool {
        self.descriptors.len() > DESCRIPTORS_QUEUED_MAX || self.bytes.len() > MESSAGE_BYTES_MAX
    }

    /// The first complete value, and its end.
    fn next_value(&self) -> Result<Option<(serde_json::Value, usize)>> {
        let mut values = serde_json::Deserializer::from_slice(&self.bytes).into_iter();
        match values.next() {
            Some(Ok(value)) => Ok(Some((value, values.byte_offset()))),
            None => Ok(None),
            Some(Err(error)) if error.is_eof() => Ok(None),
            Some(Err(_)) => Err(self.strange("it is no JSON")),
        }
    }

    fn strange(&self, why: &str) -> Error {
        let text = String::from_utf8_lossy(&self.bytes);
        let text: String = text.trim().chars().take(200).collect();
        Error::Preload(format!("the hand-over message is not understood ({why}): {text}"))
    }

    /// The guest side has closed the socket: an error if a message lacks only its descriptors.
    pub(crate) fn explain_end(&self) -> Result<()> {
        if self.bytes.trim_ascii().is_empty() {
            return Ok(());
        }
        Err(self.strange("it ended before its descriptors or its last bracket came"))
    }

    /// Tells the guest side that the guest may run there from now on: it outlives umem.
    pub(crate) fn keep(&mut self) -> Result<()> {
        self.command(b"keep\n")
    }

    /// Tells the guest side that every page has arrived: it closes its userfaultfds.
    pub(crate) fn release(&mut self) -> Result<()> {
        self.command(b"release\n")
    }

    /// The files that the guest's process has made for its memory.
    pub(crate) fn created(&self) -> &[Created] {
        &self.created
    }

    /// Tells the preload object the name of the RAM that is mapped at `address`, for a takeover.
    pub(crate) fn name(&mut self, address: u64, name: &str) -> Result<()> {
        self.command(format!("name {address} {name}\n").as_bytes())
    }

    /// Tells the preload object that no RAM is mapped at `address`.
    pub(crate) fn forget(&mut self, address: u64) -> Result<()> {
        self.command(format!("forget {address}\n").as_bytes())
    }

    /// Tells the preload object that all of the guest's memory has been handed over.
    pub(crate) fn settled(&mut self) -> Result<()> {
        self.command(b"settled\n")
    }

    /// A guest side that has ended needs no command; its end is noticed elsewhere.
    fn command(&mut self, line: &[u8]) -> Result<()> {
        match self.stream.write_all(line) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            written => written.context(|| "the hand-over socket"),
        }
    }

    /// Makes the guest side keep the data of a takeover.
    pub(crate) fn entrust(
        &mut self,
        listener: UnixListener,
        state: &File,
        qmp: Option<OwnedFd>,
    ) -> Result<()> {
        let mut descriptors = vec![listener.as_raw_fd(), state.as_raw_fd()];
        descriptors.extend(qmp.as_ref().map(AsRawFd::as_raw_fd));
        let (rights, line) = ([ControlMessage::ScmRights(&descriptors)], b"session\n");
        let (socket, flags) = (self.stream.as_raw_fd(), MsgFlags::MSG_NOSIGNAL);
        match sendmsg::<()>(socket, &[IoSlice::new(line)], &rights, flags, None) {
            Ok(sent) => self.command(&line[sent..]),
            // The guest side has ended, which is noticed elsewhere.
            Err(Errno::EPIPE) => Ok(()),
            Err(errno) => Err(errno).context(|| "the hand-over socket"),
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
                // SAFETY: the descriptors are new and have no other owner.
                let owned = descriptors.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
                self.descriptors.extend(owned);
            }
        }
        self.bytes.extend_from_slice(&buffer[..count]);
        Ok(count)
    }

    /// Returns false while descriptors of the message are missing.
    fn message(&mut self, value: serde_json::Value, messages: &mut Vec<Message>) -> Result<bool> {
        if value.is_array() {
            let pieces: Vec<PieceMessage> =
                serde_json::from_value(value).map_err(|error| self.strange(&error.to_string()))?;
            let Some(message) = self.memory(&pieces)? else { return Ok(false) };
            messages.push(message);
        } else if value.get("error").is_some() {
            let error: ErrorMessage =
                serde_json::from_value(value).map_err(|error| self.strange(&error.to_string()))?;
            return Err(explain(&error));
        } else if value.get("preload").is_some() {
            messages.push(Message::Loaded);
        } else if value.get("qemu").is_some() {
            let has_monitor = value["monitor"] == serde_json::Value::Bool(true);
            if has_monitor && self.descriptors.is_empty() {
                return Ok(false);
            }
            self.registers = value["registers"] == serde_json::Value::Bool(true);
            messages.push(Message::Monitor(has_monitor.then(|| self.descriptor().into())));
        } else if value.get("made").is_some() {
            let made: MadeMessage =
                serde_json::from_value(value).map_err(|error| self.strange(&error.to_string()))?;
            if let Some(file) = made.file().filter(|file| !self.created.contains(file)) {
                if self.created.len() == CREATED_MAX {
                    return Err(self.strange("it makes files without an end"));
                }
                self.created.push(file);
            }
        } else if let Some(block) = value.get("emptied").and_then(serde_json::Value::as_u64) {
            self.emptied = value["size"].as_u64().map(|bytes| (block, bytes));
        } else if value.get("released").is_some() {
            messages.push(Message::Released);
        } else if let Some(count) = value.get("session").and_then(serde_json::Value::as_u64) {
            if !(1..=2).contains(&count) {
                return Err(self.strange("no session is kept so"));
            }
            if (self.descriptors.len() as u64) < count {
                return Ok(false);
            }
            let state = File::from(self.descriptor());
            let qmp = (count == 2).then(|| UnixStream::from(self.descriptor()));
            messages.push(Message::Session(Entrusted { state, qmp }));
        } else if value.get("pong").is_none() {
            return Err(self.strange("umem knows no such message"));
        }
        Ok(true)
    }

    fn memory(&mut self, pieces: &[PieceMessage]) -> Result<Option<Message>> {
        let Some(first) = pieces.first() else {
            return Err(self.strange("it hands nothing over"));
        };
        let kind = match &first.kind {
            None => Kind::Anonymous,
            Some(kind) => kind.parse().map_err(|error: String| self.strange(&error))?,
        };
        let descriptors = if kind.lands_in_file() { 2 * pieces.len() } else { 1 };
        if self.descriptors.len() < descriptors {
            return Ok(None);
        }
        let shared = (!kind.lands_in_file()).then(|| self.uffd()).transpose()?;
        let mut handed = Vec::new();
        for piece in pieces {
            let page_shift = piece.page_shift().map_err(|error| self.strange(error))?;
            let (uffd, file) = match &shared {
                Some(uffd) => (uffd.clone(), None),
                None => (self.uffd()?, Some(File::from(self.descriptor()))),
            };
            handed.push(Handed {
                name: piece.name.clone(),
                kind,
                address: piece.base_host_virt_addr,
                bytes: piece.size,
                offset: piece.offset,
                file_offset: piece.file_offset,
                page_shift,
                uffd,
                file,
            });
        }
        let more = pieces.iter().any(|piece| piece.more);
        // The preload object, which hands over files, always does.
        let knows = |version| pieces.iter().all(|piece| piece.umem >= Some(version));
        let knows_umem = kind.lands_in_file() || knows(1);
        let keeps_sessions = knows(2);
        Ok(Some(Message::Memory { pieces: handed, more, knows_umem, keeps_sessions }))
    }

    fn uffd(&mut self) -> Result<Uffd> {
        let uffd = Uffd::new(self.descriptor());
        uffd.set_nonblocking().context(|| "the userfaultfd that was handed over")?;
        Ok(uffd)
    }

    fn descriptor(&mut self) -> OwnedFd {
        self.descriptors.pop_front().expect("counted before")
    }
}

impl MadeMessage {
    /// The file, if its name still leads to it.
    fn file(self) -> Option<Created> {
        let file = Created::new(self.made, self.device, self.inode);
        file.is_in_place().then_some(file)
    }
}

impl PieceMessage {
    fn page_shift(&self) -> std::result::Result<u8, &'static str> {
        let bytes = match (self.page_size, self.page_size_kib) {
            (Some(bytes), Some(other)) if bytes != other => return Err("two page sizes"),
            (Some(bytes), _) | (None, Some(bytes)) => bytes,
            (None, None) => crate::memory::small_page_bytes(),
        };
        let page_size = umem_wire::PageSize::from_bytes(bytes).ok_or("no page has that size")?;
        let is_whole = |number: u64| number.is_multiple_of(bytes);
        let end = self.base_host_virt_addr.checked_add(self.size);
        if self.size == 0
            || end.is_none()
            || self
                .offset
                .checked_add(self.size)
                .is_none_or(|end| self.file_offset.checked_add(end).is_none())
            || ![self.base_host_virt_addr, self.size, self.offset, self.file_offset]
                .into_iter()
                .all(is_whole)
        {
            return Err("a piece is not of whole pages");
        }
        Ok(page_size.shift())
    }
}

/// The socket where a guest's process that umem has not started hands over its memory.
pub(crate) struct HandoffListener {
    listener: UnixListener,
    path: PathBuf,
}

impl HandoffListener {
    /// Makes the socket, private to this user.
    pub(crate) fn bind(path: &Path) -> Result<HandoffListener> {
        let listener = bind_private_anew(path).map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse if !is_socket(path) => Error::Usage(format!(
                "{} exists and is no socket: choose another path for the hand-over socket",
                path.display()
            )),
            io::ErrorKind::AddrInUse => Error::Usage(format!(
                "{} is in use: another umem waits there for a guest's process; choose another path",
                path.display()
            )),
            _ => Error::System {
                what: format!("making the hand-over socket {}", path.display()),
                source: error,
            },
        })?;
        Ok(HandoffListener { listener, path: path.into() })
    }

    /// The next waiting connection, for [`who`](HandoffListener::who).
    pub(crate) fn accept(&self) -> Result<Accepted<UnixStream>> {
        let accepted = self.listener.accept().map(|(stream, _)| stream);
        Accepted::of(accepted).context(|| "accepting the guest's process")
    }

    /// The guest's process with its pid, or the reason why it is refused: it must run as this user,
    /// unless umem is root.
    pub(crate) fn who(
        stream: UnixStream,
    ) -> Result<std::result::Result<(HandoffSocket, u32), String>> {
        let peer = getsockopt(&stream, sockopt::PeerCredentials)
            .context(|| "asking who hands memory over")?;
        let own = nix::unistd::geteuid();
        if !own.is_root() && peer.uid() != own.as_raw() {
            return Ok(Err(format!("process {} is of user {}", peer.pid(), peer.uid())));
        }
        let pid = u32::try_from(peer.pid()).unwrap_or_default();
        Ok(Ok((HandoffSocket::new(stream), pid)))
    }
}

impl AsFd for HandoffListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for HandoffListener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The preload object's error codes, with the remedy for each.
fn explain(error: &ErrorMessage) -> Error {
    let ErrorMessage { error: code, name, text, path } = error;
    Error::Preload(match code.as_str() {
        "userfaultfd-permission" => "no permission for userfaultfd in the guest's process: allow \
            its user to open /dev/userfaultfd (`setfacl -m u:USER:rw /dev/userfaultfd`), or set \
            `sysctl vm.unprivileged_userfaultfd=1`"
            .into(),
        "userfaultfd-features" => format!(
            "this kernel's userfaultfd cannot serve shared memory ({text}): umem needs Linux 5.14 \
             or later"
        ),
        "share-on" => format!(
            "RAM {name} is mapped shared, and --kind private is for private mappings: give its \
             backend share=off"
        ),
        "ram-in-use" => in_use(name, path),
        "ram-locked" => format!("RAM {name}: {text}: name another file"),
        // Errors that concern no RAM.
        "options" => text.clone(),
        _ => format!("RAM {name}: {text} ({code})"),
    })
}

/// A RAM file with contents: the memory of a guest that runs, or left from an earlier one.
fn in_use(name: &str, path: &Path) -> String {
    match process::mapper(path) {
        Some((pid, program)) => format!(
            "RAM {name}: its file holds data already, and process {pid} ({program}) has it mapped, so it is another \
             guest's memory: name another file"
        ),
        None => format!(
            "RAM {name}: its file holds data already, and no process that umem can see has it mapped, so an earlier \
             guest has left it: name another file, or remove this one (rm {})",
            path.display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (UnixStream, HandoffSocket) {
        let (guest, daemon) = UnixStream::pair().unwrap();
        (guest, HandoffSocket::new(daemon))
    }

    #[test]
    fn region_message_carries_two_descriptors() {
        let (guest, mut daemon) = pair();
        let files = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
        let text = b"{\"preload\":1,\"pid\":7}\n[{\"name\":\"ram0\",\"base_host_virt_addr\":4096,\
            \"size\":8192,\"offset\":0,\"page_size\":4096,\"kind\":\"shared\",\"later\":1}]\n";
        let fds = [files[0].as_raw_fd(), files[1].as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(guest.as_raw_fd(), &[IoSlice::new(text)], &rights, MsgFlags::empty(), None)
            .unwrap();
        let messages = daemon.read().unwrap().unwrap();
        let [Message::Loaded, Message::Memory { pieces, more: false, knows_umem: true, .. }] =
            &messages[..]
        else {
            panic!()
        };
        let piece = &pieces[0];
        assert_eq!((piece.name.as_deref(), piece.kind), (Some("ram0"), Kind::Shared));
        assert_eq!((piece.address, piece.bytes, piece.page_shift), (4096, 8192, 12));
        assert!(piece.file.is_some());
        drop(guest);
        assert!(daemon.read().unwrap().is_none());
        daemon.release().unwrap();
    }

    #[test]
    fn guest_exit_with_an_unread_command_is_detected() {
        let (guest, mut daemon) = pair();
        daemon.release().unwrap();
        drop(guest);
        assert!(daemon.read().unwrap().is_none());
    }

    #[test]
    fn failure_of_the_preload_object_is_explained() {
        for (code, hint) in [
            ("userfaultfd-permission", "setfacl"),
            ("userfaultfd-features", "Linux 5.14"),
            ("ram-in-use", "an earlier guest has left it"),
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
    fn firecracker_message_is_accepted_in_pieces_and_before_its_descriptor() {
        let (mut guest, mut daemon) = pair();
        let text = br#"[{"base_host_virt_addr":8192,"size":4194304,"offset":0,"page_size":2097152,
            "page_size_kib":2097152,"later":[]},{"base_host_virt_addr":8388608,"size":2097152,
            "offset":4194304,"page_size_kib":2097152}]"#;
        let text = String::from_utf8_lossy(text).replace("8192", "2097152").into_bytes();
        guest.write_all(&text[..40]).unwrap();
        assert!(daemon.read().unwrap().unwrap().is_empty());
        guest.write_all(&text[40..]).unwrap();
        assert!(daemon.read().unwrap().unwrap().is_empty());
        assert!(daemon.explain_end().is_err());
        let file = tempfile::tempfile().unwrap();
        let fds = [file.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(guest.as_raw_fd(), &[IoSlice::new(b"\n")], &rights, MsgFlags::empty(), None)
            .unwrap();
        let messages = daemon.read().unwrap().unwrap();
        let [Message::Memory { pieces, more: false, knows_umem: false, .. }] = &messages[..] else {
            panic!()
        };
        let found: Vec<_> =
            pieces.iter().map(|p| (p.address, p.bytes, p.offset, p.page_shift, p.kind)).collect();
        let kind = Kind::Anonymous;
        assert_eq!(found, [(2 << 20, 4 << 20, 0, 21, kind), (8 << 20, 2 << 20, 4 << 20, 21, kind)]);
    }

    #[test]
    fn trailing_newline_is_not_a_message() {
        let (mut guest, mut daemon) = pair();
        guest.write_all(b"{\"preload\":1}\n").unwrap();
        assert_eq!(daemon.read().unwrap().unwrap().len(), 1);
        drop(guest);
        assert!(daemon.read().unwrap().is_none());
        daemon.explain_end().unwrap();
    }

    #[test]
    fn garbage_is_an_error() {
        for text in [
            "nonsense\n",
            "{}\n",
            "[]\n",
            "[{\"size\":1}]\n",
            "[{\"base_host_virt_addr\":0,\"size\":4097}]",
            "[{\"base_host_virt_addr\":0,\"size\":4096,\"page_size\":3}]",
            "[{\"base_host_virt_addr\":0,\"size\":4096,\"page_size\":4096,\"page_size_kib\":4}]",
            "[{\"base_host_virt_addr\":18446744073709547520,\"size\":8192}]",
            "[{\"base_host_virt_addr\":0,\"size\":4096,\"kind\":\"other\"}]",
        ] {
            let (guest, mut daemon) = pair();
            let file = tempfile::tempfile().unwrap();
            let fds = [file.as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&fds)];
            let text = [IoSlice::new(text.as_bytes())];
            sendmsg::<()>(guest.as_raw_fd(), &text, &rights, MsgFlags::empty(), None).unwrap();
            assert!(matches!(daemon.read(), Err(Error::Preload(_))), "{text:?}");
        }
    }
}
