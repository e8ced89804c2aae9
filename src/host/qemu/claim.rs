//! One guest, one mover: the claim that a umem has on a QEMU while it moves its guest away.
//!
//! The claim is a character device in the QEMU; QEMU accepts its name only once. Behind the device is a socket whose
//! other end umem has. When that end closes, for any reason, QEMU reports the device as disconnected, with the name of
//! the claim. So QEMU itself decides which process may move its guest, and reports whether a claim's process still
//! lives; pids need not mean the same in both processes.
//!
//! Devices of the same kind beside it record umem's changes in the QEMU in the names of their sockets: the settings,
//! before they are changed, and the stop of the guest, before umem commands it. A killed umem leaves these devices for
//! the next umem that claims the guest.

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

/// The claim's device.
const DEVICE: &str = "umem-mover";

/// The device whose socket's name holds the changed settings; and the device that exists once umem stops the guest.
const SETTINGS: &str = "umem-settings";
const STOPS: &str = "umem-stops";

/// A character that the settings' text does not contain.
const SETTINGS_BEFORE: char = '=';

/// Time limit for QEMU to notice the end of a claim's umem: number of tries, and the interval between them.
const NOTICED_WITHIN: u32 = 25;
const NOTICED_INTERVAL: Duration = Duration::from_millis(20);

/// A claim of this process.
pub(super) struct Claim {
    socket: UnixStream,
    pub(super) name: String,
    /// The sockets of the other devices.
    others: Vec<UnixStream>,
}

/// The changes of a umem that has ended before it had undone everything.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Left {
    pub(super) changes: Changes,
    /// It may have stopped the guest, which ran.
    pub(super) stops: bool,
}

/// QEMU's report of claims.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    /// The monitor has no devices of that kind: it is not a QEMU.
    Unknown,
    None,
    /// A claim of a umem that lives.
    Held,
    /// A claim of a umem that has ended, with the claim's name.
    Left(String),
}

/// The changes of a umem that has ended; None if no changes are left.
///
/// # Errors
/// Another umem has the guest, and lives.
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
    /// Claims a QEMU's guest; None if the monitor has no claims.
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

    /// Records in QEMU the settings that are about to be changed.
    pub(super) fn note_settings(&mut self, qmp: &mut Qmp, changes: &Changes) -> Result<()> {
        let text = serde_json::to_string(changes).expect("they are plain data");
        let name = format!("{SETTINGS}{SETTINGS_BEFORE}{text}");
        self.note(qmp, SETTINGS, &name)
    }

    /// Records in QEMU that the guest is about to be stopped.
    pub(super) fn note_stop(&mut self, qmp: &mut Qmp) -> Result<()> {
        self.note(qmp, STOPS, STOPS)
    }

    fn note(&mut self, qmp: &mut Qmp, device: &str, name: &str) -> Result<()> {
        let added = add(qmp, device, name)?;
        let socket = added.map_err(|why| Error::Host(format!("chardev-add {device}: {why}")))?;
        self.others.push(socket);
        Ok(())
    }

    /// Whether QEMU still has the claim.
    pub(super) fn is_held(&self) -> bool {
        let mut byte = [0];
        (&self.socket).read(&mut byte).is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }

    /// Gives the claim up. If QEMU does not have it any more, that is success.
    pub(super) fn release(self, qmp: &mut Qmp) -> Result<()> {
        if self.is_held() { remove(qmp) } else { Ok(()) }
    }
}

/// Adds a device with a socket of that name, which carries no data. Returns the socket's other end, or QEMU's reason.
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

/// Whether the claim of that name exists, and its umem has ended.
pub(super) fn was_left(qmp: &mut Qmp, name: &str) -> Result<bool> {
    Ok(find_settled(qmp)? == Found::Left(name.into()))
}

/// Whether a claim exists that has another name, or whose umem lives.
pub(super) fn is_anothers(qmp: &mut Qmp, name: &str) -> Result<bool> {
    Ok(match find_settled(qmp)? {
        Found::Unknown | Found::None => false,
        Found::Held => true,
        Found::Left(found) => found != name,
    })
}

/// Removes a claim that is this process's or was left, and the devices beside it.
pub(super) fn remove(qmp: &mut Qmp) -> Result<()> {
    remove_notes(qmp)?;
    remove_one(qmp, DEVICE)
}

/// Removes the devices beside a claim, after their changes have been undone.
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

/// Repeats the query for as long as QEMU may need to notice that a umem has just ended.
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

/// The devices by label, each with its socket's name if the socket is disconnected; None if the monitor has no such
/// devices.
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
        "another umem moves this guest (QEMU has its character device {DEVICE}): let that umem end, or stop it"
    ))
}
