//! One guest, one mover: the claim that a umem has on a QEMU while it moves its guest away.
//!
//! It is a character device in the QEMU, whose name QEMU gives once. Behind it is a socket whose other end the
//! umem has: when that ends, however it ends, QEMU says that the device is disconnected, and of which claim it
//! was. So it is QEMU that says who may move its guest, and whether a claim is still somebody's; no pid has to
//! mean the same here and there.
//!
//! Beside it, in devices of the same kind whose sockets' names say it, stands what the umem changes in the QEMU: its
//! settings, before they are changed, and that it has the guest stop, before it says so. A umem that is killed leaves
//! that there, for the next one that claims the guest.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::json;

use super::settings::Changes;
use crate::error::{Context, Error, Result};
use crate::host::qmp::{Qmp, socket_pair};
use crate::runtime::hex::hex;

/// What the device is called.
const DEVICE: &str = "umem-mover";

/// Before whose name there are the changed settings, and one that is there once umem stops the guest.
const SETTINGS: &str = "umem-settings";
const STOPS: &str = "umem-stops";

/// Not in the text of the settings.
const SETTINGS_BEFORE: char = '=';

/// How long QEMU may take to notice that the umem of a claim has ended, in tries and the time between them.
const NOTICED_WITHIN: u32 = 25;
const NOTICED_INTERVAL: Duration = Duration::from_millis(20);

/// A claim of this process.
pub(super) struct Claim {
    socket: UnixStream,
    pub(super) name: String,
    /// Of the other devices.
    others: Vec<UnixStream>,
}

/// What a umem has left that has ended before it had put everything back.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Left {
    pub(super) changes: Changes,
    /// It may have stopped the guest, which ran.
    pub(super) stops: bool,
}

/// What a QEMU says of claims.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    /// The monitor has no devices of that kind: it is no QEMU.
    Unknown,
    None,
    /// Of a umem that lives.
    Held,
    /// Of one that has ended, with its name.
    Left(String),
}

/// What a umem has left that has ended; none where everything is as it was.
///
/// # Errors
/// Another one has the guest, and lives.
pub(super) fn look(qmp: &mut Qmp) -> Result<Option<Left>> {
    if find_settled(qmp)? == Found::Held {
        return Err(is_taken());
    }
    let Some(names) = names(qmp)? else { return Ok(None) };
    let of = |device| names.get(device).and_then(|name| name.as_deref());
    let changes = of(SETTINGS).and_then(|name| name.split_once(SETTINGS_BEFORE));
    let changes = changes.and_then(|(_, text)| serde_json::from_str(text).ok());
    let left = Left { changes: changes.unwrap_or_default(), stops: of(STOPS).is_some() };
    Ok([DEVICE, SETTINGS, STOPS].iter().any(|&device| of(device).is_some()).then_some(left))
}

impl Claim {
    /// Claims a QEMU's guest; none where the monitor knows no such thing.
    ///
    /// # Errors
    /// Another umem has it.
    pub(super) fn take(qmp: &mut Qmp) -> Result<Option<Claim>> {
        match find_settled(qmp)? {
            Found::Unknown => return Ok(None),
            Found::Held => return Err(is_taken()),
            Found::None => {}
            Found::Left(_) => remove_one(qmp, DEVICE)?,
        }
        let mut number = [0; 8];
        let what = || "reading /dev/urandom";
        File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut number)).context(what)?;
        let name = format!("{DEVICE}-{}", hex(&number));
        let refused = match add(qmp, DEVICE, &name)? {
            Ok(socket) => return Ok(Some(Claim { socket, name, others: Vec::new() })),
            Err(refused) => refused,
        };
        if find(qmp)? != Found::None {
            return Err(is_taken());
        }
        Err(Error::Host(format!("chardev-add {DEVICE}: {refused}")))
    }

    /// Leaves in QEMU what is about to be changed of its settings.
    pub(super) fn note_settings(&mut self, qmp: &mut Qmp, changes: &Changes) -> Result<()> {
        let text = serde_json::to_string(changes).expect("they are plain data");
        let name = format!("{SETTINGS}{SETTINGS_BEFORE}{text}");
        self.note(qmp, SETTINGS, &name)
    }

    /// Leaves in QEMU that the guest is about to be stopped.
    pub(super) fn note_stop(&mut self, qmp: &mut Qmp) -> Result<()> {
        self.note(qmp, STOPS, STOPS)
    }

    fn note(&mut self, qmp: &mut Qmp, device: &str, name: &str) -> Result<()> {
        let added = add(qmp, device, name)?;
        let socket = added.map_err(|why| Error::Host(format!("chardev-add {device}: {why}")))?;
        self.others.push(socket);
        Ok(())
    }

    /// Whether QEMU still has it.
    pub(super) fn is_held(&self) -> bool {
        let mut byte = [0];
        (&self.socket).read(&mut byte).is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }

    /// Gives it up. One that QEMU has no more is given up already.
    pub(super) fn release(self, qmp: &mut Qmp) -> Result<()> {
        if self.is_held() { remove(qmp) } else { Ok(()) }
    }
}

/// Adds a device, a socket of that name with nobody's bytes in it, and gives its other end, or QEMU's reason.
fn add(qmp: &mut Qmp, device: &str, name: &str) -> Result<std::result::Result<UnixStream, String>> {
    let (socket, theirs) = socket_pair()?;
    socket.set_nonblocking(true).context(|| "a socket")?;
    qmp.give_descriptor(name, theirs.as_fd())?;
    let address = json!({ "type": "fd", "data": { "str": name } });
    let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
    let added = qmp.try_execute("chardev-add", json!({ "id": device, "backend": backend }))?;
    if added.is_err() {
        let _ = qmp.try_execute("closefd", json!({ "fdname": name }))?;
    }
    Ok(added.map(|_| socket))
}

/// Whether the claim of that name is there, and its umem has ended.
pub(super) fn was_left(qmp: &mut Qmp, name: &str) -> Result<bool> {
    Ok(find_settled(qmp)? == Found::Left(name.into()))
}

/// Whether there is a claim, of another name or of a umem that lives.
pub(super) fn is_anothers(qmp: &mut Qmp, name: &str) -> Result<bool> {
    Ok(match find_settled(qmp)? {
        Found::Unknown | Found::None => false,
        Found::Held => true,
        Found::Left(found) => found != name,
    })
}

/// Removes one that is this process's, or was left, and what stands beside it.
pub(super) fn remove(qmp: &mut Qmp) -> Result<()> {
    remove_notes(qmp)?;
    remove_one(qmp, DEVICE)
}

/// Removes what was left beside a claim, which has been undone.
pub(super) fn remove_notes(qmp: &mut Qmp) -> Result<()> {
    let names = names(qmp)?.unwrap_or_default();
    for device in [STOPS, SETTINGS] {
        if names.contains_key(device) {
            remove_one(qmp, device)?;
        }
    }
    Ok(())
}

fn remove_one(qmp: &mut Qmp, device: &str) -> Result<()> {
    qmp.execute("chardev-remove", json!({ "id": device })).map(drop)
}

/// Looks until QEMU has had the time to notice that a umem has just ended.
fn find_settled(qmp: &mut Qmp) -> Result<Found> {
    for _ in 0..NOTICED_WITHIN {
        let found = find(qmp)?;
        if found != Found::Held {
            return Ok(found);
        }
        std::thread::sleep(NOTICED_INTERVAL);
    }
    find(qmp)
}

fn find(qmp: &mut Qmp) -> Result<Found> {
    let Some(mut names) = names(qmp)? else { return Ok(Found::Unknown) };
    Ok(match names.remove(DEVICE) {
        None => Found::None,
        Some(None) => Found::Held,
        Some(Some(name)) => Found::Left(name),
    })
}

/// The devices by what they are called, each with its socket's name if that is disconnected; none where the monitor
/// knows no such thing.
fn names(qmp: &mut Qmp) -> Result<Option<BTreeMap<String, Option<String>>>> {
    let Ok(list) = qmp.try_execute("query-chardev", json!({}))? else { return Ok(None) };
    let list = list.as_array().map(Vec::as_slice).unwrap_or_default();
    let named = list.iter().filter_map(|device| {
        let name = device["filename"].as_str().and_then(|name| name.strip_prefix("disconnected:"));
        let name = name.map(|name| name.strip_prefix("fd:").unwrap_or(name).to_owned());
        Some((device["label"].as_str()?.to_owned(), name))
    });
    Ok(Some(named.collect()))
}

fn is_taken() -> Error {
    Error::Host(format!(
        "another umem moves this guest (QEMU has its character device {DEVICE}): let it end, or stop that one"
    ))
}
