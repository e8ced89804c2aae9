//! The migration settings of a QEMU that umem changes for the time of a move, and restores afterwards.
//!
//! QEMU's capabilities and parameters determine its migration. Some of them would change the stream, make it wait for a
//! client, or let the guest continue. For the time of the move those have the value that the stream needs. A setting is
//! restored only if it still has the value that umem gave it: another client's later changes stay.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::host::qmp::Qmp;

/// QEMU's default of 128 MiB/s would slow down a guest with video memory. The device state goes through a local socket,
/// so a limit has no use. Bytes a second.
const STATE_BANDWIDTH: u64 = 1 << 40;

/// Leaves RAM that is shared and in a file out of the stream.
const IGNORE_SHARED: &str = "x-ignore-shared";

/// The source waits for the destination's acknowledgement before its migration is completed.
pub(super) const RETURN_PATH: &str = "return-path";

/// The source waits for the destination's acknowledgement before it stops the guest.
pub(super) const SWITCHOVER_ACK: &str = "switchover-ack";

/// QEMU's estimate of the remaining milliseconds at which it stops the guest by itself. QEMU also syncs whenever no
/// more than that is left: with a higher value it syncs more often than a pass is done, with a lower one it never stops
/// a busy guest by itself.
const DOWNTIME_LIMIT_MS: u64 = 50;

/// The same for a QEMU without `switchover-ack`: it is to continue for as long as possible.
const DOWNTIME_LIMIT_MIN_MS: u64 = 1;

/// Off for the time of a move: these change the stream or its protocol, wait for an answer or a command, or do not stop
/// the guest.
const OFF: &[&str] = &[
    "background-snapshot",
    "compress",
    "mapped-ram",
    "multifd",
    "pause-before-switchover",
    "postcopy-preempt",
    "postcopy-ram",
    "release-ram",
    SWITCHOVER_ACK,
    "x-colo",
    "xbzrle",
    "zero-copy-send",
];

/// Left unchanged: these do not affect a stream over a socket without the guest's RAM, or affect it as their user
/// intends.
const LEFT: &[&str] = &[
    "auto-converge",
    "dirty-bitmaps",
    "dirty-limit",
    "events",
    "late-block-activate",
    "postcopy-blocktime",
    "rdma-pin-all",
    "validate-uuid",
    "zero-blocks",
];

/// Also off while QEMU's stream is read as a log: these slow the guest down when QEMU makes no progress, and QEMU's
/// progress depends on umem's reading.
const OFF_WHILE_LOGGING: &[&str] = &["auto-converge", "dirty-limit"];

/// A QEMU's role in a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// With or without a return path.
    Source {
        holds: bool,
    },
    /// The source, whose whole stream is read.
    Stream,
    Destination,
}

/// A setting that is changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Change<T> {
    name: String,
    was: T,
    is: T,
}

/// A move's changes of a QEMU's settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Changes {
    capabilities: Vec<Change<bool>>,
    parameters: Vec<Change<Value>>,
}

/// The capabilities of a monitor, and whether each is on.
pub(super) fn capabilities(qmp: &mut Qmp) -> Result<BTreeMap<String, bool>> {
    let answer = qmp.execute("query-migrate-capabilities", json!({}))?;
    let list = answer.as_array().map(Vec::as_slice).unwrap_or_default();
    let known = list.iter().filter_map(|item| {
        Some((item["capability"].as_str()?.to_owned(), item["state"].as_bool()?))
    });
    Ok(known.collect())
}

impl Changes {
    /// Determines the changes that a move needs. Changes nothing.
    ///
    /// # Errors
    /// A capability that umem may neither switch off nor leave on.
    pub(super) fn needed(qmp: &mut Qmp, role: Role) -> Result<Changes> {
        let mut capabilities = capabilities(qmp)?;
        capabilities.entry(IGNORE_SHARED.into()).or_insert(false);
        let waits = capabilities.contains_key(SWITCHOVER_ACK);
        let mut changes = Changes::default();
        for (name, was) in capabilities {
            if let Some(is) = wanted(&name, was, role)?.filter(|is| *is != was) {
                changes.capabilities.push(Change { name, was, is });
            }
        }
        let parameters = qmp.execute("query-migrate-parameters", json!({}))?;
        let mut want = |name: &str, is: Value| {
            // A parameter that does not exist, or whose value is not text where text is needed, needs no change.
            let was = parameters.get(name).filter(|was| !was.is_null() && **was != is);
            let change = was.map(|was| Change { name: name.into(), was: was.clone(), is });
            changes.parameters.extend(change);
        };
        want("mode", json!("normal"));
        want("tls-creds", json!(""));
        if role != Role::Destination {
            want("max-bandwidth", json!(STATE_BANDWIDTH));
        }
        if role == Role::Stream {
            let limit = if waits { DOWNTIME_LIMIT_MS } else { DOWNTIME_LIMIT_MIN_MS };
            want("downtime-limit", json!(limit));
            want("avail-switchover-bandwidth", json!(0));
        }
        Ok(changes)
    }

    /// Capabilities are first in both directions: with some of them on, QEMU accepts no parameters while it has TLS.
    pub(super) fn make(&self, qmp: &mut Qmp) -> Result<()> {
        set_capabilities(qmp, self.capabilities.iter().map(|change| (&change.name, change.is)))?;
        set_parameters(qmp, self.parameters.iter().map(|change| (&change.name, &change.is)))
    }

    /// Has a destination leave shared RAM out or not, to match the stream that arrives.
    pub(super) fn ignore_shared(&mut self, qmp: &mut Qmp, is: bool) -> Result<()> {
        let name = IGNORE_SHARED.to_owned();
        let made = self.capabilities.iter_mut().find(|change| change.name == name);
        // A capability without a change was on.
        if made.as_ref().is_none_or(|change| change.is) == is {
            return Ok(());
        }
        set_capabilities(qmp, std::iter::once((&name, is)))?;
        match made {
            Some(change) => change.is = is,
            None => self.capabilities.push(Change { name, was: true, is }),
        }
        Ok(())
    }

    /// Undoes the changes that still stand.
    pub(super) fn put_back(&self, qmp: &mut Qmp) -> Result<()> {
        if !self.capabilities.is_empty() {
            let now = capabilities(qmp)?;
            let stands = |change: &&Change<bool>| {
                // A monitor that does not list its capabilities may still have them.
                now.get(&change.name).is_none_or(|state| *state == change.is)
            };
            let ours = self.capabilities.iter().filter(stands);
            set_capabilities(qmp, ours.map(|change| (&change.name, change.was)))?;
        }
        if !self.parameters.is_empty() {
            let now = qmp.execute("query-migrate-parameters", json!({}))?;
            let ours = self.parameters.iter().filter(|change| now[&change.name] == change.is);
            set_parameters(qmp, ours.map(|change| (&change.name, &change.was)))?;
        }
        Ok(())
    }
}

/// The required value of a capability; None if it may stay unchanged.
fn wanted(name: &str, is_on: bool, role: Role) -> Result<Option<bool>> {
    match (name, role) {
        (IGNORE_SHARED, _) => Ok(Some(role != Role::Stream)),
        (RETURN_PATH | SWITCHOVER_ACK, Role::Stream) => Ok(Some(true)),
        ("dirty-bitmaps", Role::Stream) if is_on => Err(Error::Unsupported(
            "QEMU's capability dirty-bitmaps is on, which sends the dirty bitmaps of disks in parts: switch it off \
             with migrate-set-capabilities, or move the guest without rounds before the switchover"
                .into(),
        )),
        (name, Role::Stream) if OFF_WHILE_LOGGING.contains(&name) => Ok(Some(false)),
        (RETURN_PATH, Role::Source { holds }) => Ok(Some(holds)),
        (RETURN_PATH, Role::Destination) => Ok(None),
        _ if OFF.contains(&name) => Ok(Some(false)),
        _ if LEFT.contains(&name) || !is_on => Ok(None),
        ("block", _) => Err(Error::Unsupported(
            "QEMU's capability block is on, which sends disks as part of the device state: switch it off with \
             migrate-set-capabilities, and copy disks beside the move (drive-mirror)"
                .into(),
        )),
        _ => Err(Error::Unsupported(format!(
            "QEMU's capability {name} is on, and umem does not know its effect on the migration: switch it off with \
             migrate-set-capabilities"
        ))),
    }
}

/// All in one command, as some need each other.
fn set_capabilities<'a>(
    qmp: &mut Qmp,
    states: impl Iterator<Item = (&'a String, bool)>,
) -> Result<()> {
    let list: Vec<Value> =
        states.map(|(name, state)| json!({ "capability": name, "state": state })).collect();
    if list.is_empty() {
        return Ok(());
    }
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": list })).map(drop)
}

fn set_parameters<'a>(
    qmp: &mut Qmp,
    values: impl Iterator<Item = (&'a String, &'a Value)>,
) -> Result<()> {
    let parameters: serde_json::Map<String, Value> =
        values.map(|(name, value)| (name.clone(), value.clone())).collect();
    if parameters.is_empty() {
        return Ok(());
    }
    qmp.execute("migrate-set-parameters", Value::Object(parameters)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_capability_is_refused_only_when_it_is_on() {
        for role in [Role::Source { holds: true }, Role::Stream, Role::Destination] {
            assert_eq!(wanted("x-next-year", false, role).unwrap(), None);
            let error = wanted("x-next-year", true, role).unwrap_err().to_string();
            assert!(error.contains("capability x-next-year is on"), "{error}");
            assert!(wanted("block", true, role).is_err());
            assert_eq!(wanted("multifd", true, role).unwrap(), Some(false));
            assert_eq!(wanted("events", true, role).unwrap(), None);
        }
    }

    #[test]
    fn stream_read_as_a_log_has_all_ram_and_waits_for_an_acknowledgement() {
        let stream = |name| wanted(name, true, Role::Stream).unwrap();
        assert_eq!(stream("x-ignore-shared"), Some(false));
        assert_eq!(stream("switchover-ack"), Some(true));
        assert_eq!(stream("auto-converge"), Some(false));
        let error = wanted("dirty-bitmaps", true, Role::Stream).unwrap_err().to_string();
        assert!(error.contains("dirty-bitmaps is on"), "{error}");
        let source = Role::Source { holds: true };
        assert_eq!(wanted("switchover-ack", true, source).unwrap(), Some(false));
        assert_eq!(wanted("auto-converge", true, source).unwrap(), None);
    }
}
