//! For the fuzz targets (`tests/fuzz`): parsers outside the public interface, over real sockets.

use crate::runtime::hex;
use std::fs::File;
use std::io::{IoSlice, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::destination::session::takeover::landing;
use crate::fault::handoff::{HandoffSocket, Message};
use crate::host::maps::Maps;
use crate::host::qmp::Qmp;
use crate::observe::watch::Watch;
use crate::observe::{control, metrics};
use crate::runtime::bandwidth::Bandwidth;
use crate::runtime::role::Role;
use crate::session::{self, DestinationRecord, SourceRecord};

/// Sends these pieces, descriptors with the first, and closes the socket. Returns the parsed messages in words.
///
/// # Errors
/// The error that umem would report.
pub fn handoff<'a>(
    descriptors: usize,
    pieces: impl Iterator<Item = &'a [u8]>,
) -> Result<Vec<String>, String> {
    let (guest, daemon) = UnixStream::pair().expect("a socket pair");
    let mut daemon = HandoffSocket::new(daemon);
    let file = File::open("/dev/null").expect("/dev/null");
    let mut raw = vec![file.as_raw_fd(); descriptors];
    let mut understood = Vec::new();
    for piece in pieces.filter(|piece| !piece.is_empty()) {
        let rights = [ControlMessage::ScmRights(&raw)];
        let rights = if raw.is_empty() { &[][..] } else { &rights };
        let text = [IoSlice::new(piece)];
        sendmsg::<()>(guest.as_raw_fd(), &text, rights, MsgFlags::empty(), None).expect("sendmsg");
        raw.clear();
        let messages = daemon.read().map_err(|error| error.to_string())?;
        understood.extend(messages.expect("the socket is open").iter().map(in_words));
    }
    drop(guest);
    assert!(daemon.read().expect("an end is no error").is_none());
    daemon.explain_end().map_err(|error| error.to_string())?;
    Ok(understood)
}

fn in_words(message: &Message) -> String {
    match message {
        Message::Loaded => "loaded".into(),
        Message::Monitor(monitor) => format!("QEMU, monitor {}", monitor.is_some()),
        Message::Released => "released".into(),
        Message::Session(entrusted) => format!("session, monitor {}", entrusted.qmp.is_some()),
        Message::Memory { pieces, more, knows_umem, .. } => {
            let pieces: Vec<_> = pieces
                .iter()
                .map(|piece| {
                    // Other code relies on this.
                    assert!(piece.bytes > 0 && piece.bytes.is_multiple_of(1 << piece.page_shift));
                    assert!(piece.address.checked_add(piece.bytes).is_some());
                    assert!(piece.offset.checked_add(piece.bytes).is_some());
                    let (name, kind, shift) = (&piece.name, piece.kind, piece.page_shift);
                    (name, kind, piece.address, piece.bytes, piece.offset, shift)
                })
                .collect();
            format!("{pieces:?} {more} {knows_umem}")
        }
    }
}

/// Opens a monitor that sends `replies` to every command, and sends it a few commands.
pub fn qmp(replies: &[u8]) {
    let (mut monitor, ours) = UnixStream::pair().expect("a socket pair");
    // Surplus replies are dropped: nothing reads them meanwhile.
    monitor.set_nonblocking(true).expect("a socket");
    let _ = monitor.write(replies);
    monitor.shutdown(std::net::Shutdown::Write).expect("a socket");
    let Ok(mut qmp) = Qmp::open(ours, "the monitor") else { return };
    let _ = qmp.property("/machine", "type");
    let _ = qmp.children("/objects");
    let _ = qmp.execute("query-status", serde_json::json!({}));
}

/// Looks for a range of memory in the text of a process's `maps`.
pub fn maps(text: &[u8], address: u64, bytes: u64) {
    let maps = Maps::read(1, text);
    if let Some(file) = maps.file(address, bytes) {
        assert!(bytes > 0 && file.inode > 0);
    }
}

/// Reads a session file as a takeover of either side does.
pub fn session(text: &[u8]) {
    if let Ok(record) = serde_json::from_slice::<SourceRecord>(text) {
        let _ = session::check(&record);
        let _ = record.uri.parse::<crate::Uri>();
    }
    if let Ok(record) = serde_json::from_slice::<DestinationRecord>(text)
        && session::check(&record).is_ok()
    {
        let _ = landing(&record);
        let _ = record.certificate.as_deref().map(hex::unhex);
    }
}

/// Sends this to a control socket, and reads the answer.
pub fn control(input: &[u8]) {
    control::fuzz(input, watch());
}

/// Requests metrics with this text.
pub fn metrics(request: &[u8]) {
    let answer = metrics::answer(request, &watch());
    assert!(answer.starts_with(b"HTTP/1.0 "));
}

/// Seals, damages and opens TLS records as directed by the input.
pub fn records(input: &[u8]) {
    crate::transport::tls::fuzz_records(input);
}

fn watch() -> std::sync::Arc<Watch> {
    let watch = Watch::new(Role::Source, false, Some(std::sync::Arc::new(Bandwidth::new(None))));
    // A `cancel` would be a signal to this process.
    watch.commit("").expect("no cancel has arrived");
    watch
}
