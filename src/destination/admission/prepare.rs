//! The guest's process and its memory before any lane is open, and the check that they can receive a guest.

mod adopting;

use std::fs::File;

use crate::destination::Options;
use crate::destination::side::{GuestProcess, GuestSide};
use crate::error::{Error, Result};
use crate::fault::handoff::Handed;
use crate::host::arriving::{Arrived, Wanted};
use crate::host::kind::Listening;
use crate::host::maps;
use crate::host::monitor::Monitor;
use crate::observe::output::Output;

pub(crate) use adopting::Adopted;

/// A guest that waits for its memory.
pub(crate) struct Prepared {
    pub(crate) side: GuestSide,
    pub(crate) monitor: Option<Box<dyn Monitor>>,
    handed: Vec<Handed>,
    /// Space for all of the guest's memory is required from the start.
    wants_room: bool,
    /// Only the guest may have its files mapped.
    wants_alone: bool,
}

/// The user's requirements of the guest's process.
pub(crate) fn wanted(options: &Options) -> Wanted<'_> {
    Wanted {
        ram: &options.ram,
        kind: options.kind,
        handoff: options.handoff.as_deref(),
        monitor: options.monitor.as_ref(),
        listening: options.connect.clone().map(|path| {
            let switchover = options.switchover;
            Listening { path, switchover }
        }),
        preload: options.preload.as_deref(),
        command: &options.command,
    }
}

impl Prepared {
    /// A guest's process that has handed its memory over.
    pub(crate) fn new(options: &Options, arrived: Arrived) -> Result<Prepared> {
        let Arrived { process, handoff, handed, wants_alone, .. } = arrived;
        let process =
            GuestProcess::new(process, handoff, arrived.knows_umem, arrived.keeps_sessions);
        let side = GuestSide::Process(Box::new(process));
        let output = Output::new(options.json);
        arrived.advice.iter().for_each(|what| output.remark(what));
        if wants_alone {
            check_alone(&handed)?.iter().for_each(|what| output.remark(what));
        }
        let (monitor, wants_room) = (arrived.monitor, !options.overcommit);
        Ok(Prepared { side, monitor, handed, wants_room, wants_alone })
    }

    /// Memory of this process.
    pub(crate) fn here(handed: Vec<Handed>) -> Result<Prepared> {
        let side = GuestSide::here()?;
        Ok(Prepared { side, monitor: None, handed, wants_room: true, wants_alone: false })
    }

    /// Memory that was handed over to an earlier umem process. That process has checked the available space, of which a
    /// part is in use now.
    pub(crate) fn again(side: GuestSide, handed: Vec<Handed>) -> Prepared {
        Prepared { side, monitor: None, handed, wants_room: false, wants_alone: false }
    }
}

/// Checks that no other process has a RAM file mapped. A lock does not keep a QEMU that umem has not started from a
/// file that is still empty, so the check uses the kernel's maps: now, and again when the source has connected. Returns
/// a remark if the mappings of some process cannot be read.
///
/// # Errors
/// Another process has one of the files mapped.
fn check_alone(handed: &[Handed]) -> Result<Option<String>> {
    let mut unseen = Vec::new();
    for Handed { name, file, address, .. } in handed {
        let Some(Ok(metadata)) = file.as_ref().map(File::metadata) else { continue };
        let others = maps::others_with(&metadata, *address);
        if let Some(pid) = others.mapping.first() {
            return Err(Error::Unsupported(format!(
                "RAM {}: process {pid} has mapped the same file, which it would write to as the guest has its memory \
                 there: end that process, or name another file",
                name.as_deref().unwrap_or_default()
            )));
        }
        unseen = others.unseen;
    }
    let pids: Vec<String> = unseen.iter().map(u32::to_string).collect();
    Ok((!pids.is_empty()).then(|| {
        format!(
            "whether process {} has the guest's RAM file mapped, too, may not be seen by umem (/proc/PID/maps): \
             if it is a QEMU, make sure that it uses another file",
            pids.join(", ")
        )
    }))
}
