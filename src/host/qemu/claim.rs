//! One guest, one mover: the claim that a umem has on a QEMU while it moves its guest away.
//!
//! It is a character device in the QEMU, whose name QEMU gives once. Behind it is a socket whose other end the
//! umem has: when that ends, however it ends, QEMU says that the device is disconnected, and of which claim it
//! was. So it is QEMU that says who may move its guest, and whether a claim is still somebody's; no pid has to
//! mean the same here and there.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::json;

use crate::error::{Context, Error, Result};
use crate::host::qmp::{Qmp, socket_pair};
use crate::session::hex;

/// What the device is called.
const DEVICE: &str = "umem-mover";

/// How long QEMU may take to notice that the umem of a claim has ended, in tries and the time between them.
const NOTICED_WITHIN: u32 = 25;
const NOTICED_INTERVAL: Duration = Duration::from_millis(20);

/// A claim of this process.
pub(super) struct Claim {
    socket: UnixStream,
    pub(super) name: String,
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
            Found::Left(_) => remove(qmp)?,
        }
        let mut number = [0; 8];
        let what = || "reading /dev/urandom";
        File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut number)).context(what)?;
        let name = format!("{DEVICE}-{}", hex(&number));
        let (socket, theirs) = socket_pair()?;
        socket.set_nonblocking(true).context(|| "a socket")?;
        qmp.give_descriptor(&name, theirs.as_fd())?;
        let address = json!({ "type": "fd", "data": { "str": name } });
        let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
        let added = qmp.try_execute("chardev-add", json!({ "id": DEVICE, "backend": backend }))?;
        let Err(refused) = added else { return Ok(Some(Claim { socket, name })) };
        let _ = qmp.try_execute("closefd", json!({ "fdname": name }))?;
        if find(qmp)? != Found::None {
            return Err(is_taken());
        }
        Err(Error::Host(format!("chardev-add {DEVICE}: {refused}")))
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

/// Removes one that was left.
pub(super) fn remove(qmp: &mut Qmp) -> Result<()> {
    qmp.execute("chardev-remove", json!({ "id": DEVICE })).map(drop)
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
    let Ok(list) = qmp.try_execute("query-chardev", json!({}))? else { return Ok(Found::Unknown) };
    let list = list.as_array().map(Vec::as_slice).unwrap_or_default();
    let Some(device) = list.iter().find(|device| device["label"] == DEVICE) else {
        return Ok(Found::None);
    };
    let name = device["filename"].as_str().and_then(|name| name.strip_prefix("disconnected:"));
    Ok(match name {
        Some(name) => Found::Left(name.strip_prefix("fd:").unwrap_or(name).to_owned()),
        None => Found::Held,
    })
}

fn is_taken() -> Error {
    Error::Host(format!(
        "another umem moves this guest (QEMU has its character device {DEVICE}): let it end, or stop that one"
    ))
}
