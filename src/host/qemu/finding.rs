//! How a QEMU's guests are found, by either side and by a process that takes over.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::connecting::Connected;
use super::left::{Departed, Waiting};
use super::record::Record;
use super::stream::log::SharedQemu;
use super::{Backend, Qemu, RamOfQemu, advice};
use crate::error::{Error, Result};
use crate::events::Undone;
use crate::host::command::RamPath;
use crate::host::kind::{
    Arriving, ArrivingGuest, Connection, GuestRam, Leaving, LeavingGuest, MonitorKind,
    check_ram_name,
};
use crate::host::monitor::Monitor;
use crate::host::qmp::Qmp;
use crate::memory::region::RamFile;
use crate::memory::staging::{StagedFile, Staging};
use crate::runtime::os_text::absolute;

/// QEMU, and other monitors with the same QMP commands, such as the demo's guest.
#[derive(Debug)]
pub(crate) struct QemuKind;

/// The one value of the kind.
pub(crate) const QEMU: QemuKind = QemuKind;

/// The name of the monitor that umem adds to a QEMU which it starts.
const OWN_SOCKET: &str = "QEMU's monitor";

impl MonitorKind for QemuKind {
    fn name(&self) -> &'static str {
        super::record::KIND
    }

    fn leaving(&self, socket: &Path, wanted: &Leaving<'_>) -> Result<LeavingGuest> {
        let mut qemu = Qemu::new(Qmp::connect(socket)?).at(absolute(socket)?);
        qemu.claim()?;
        let found = qemu.check_source(wanted.has_rounds)?;
        let (streamed, found): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|backend| backend.is_streamed);
        let names = found.iter().chain(&streamed).map(|backend| backend.name.clone());
        let names: Vec<String> = names.collect();
        let mut remarks = Vec::new();
        if wanted.has_rounds {
            let contents: Vec<_> = streamed.iter().map(|backend| backend.name.clone()).collect();
            for number in qemu.check_stream(&names, &contents, wanted.follows)? {
                remarks.push(format!(
                    "RAM backend {}: QEMU without KVM loses writes to it in its log of dirty pages, so no pass sends \
                     it, and all of it is sent after the guest has stopped",
                    names[number]
                ));
            }
        }
        let (mut ram, mut files) = (Vec::new(), Vec::new());
        if !found.is_empty() {
            for opened in qemu.open_ram(&found, wanted.ram, wanted.releases)? {
                let RamOfQemu { name, part, file, path } = opened;
                files.push(RamFile::of_opened(&name, &path, file, Some(part), wanted.releases)?);
                ram.push(RamPath { name, path });
            }
        }
        remarks.extend(advice(&found, "destination"));
        let staging = stage(wanted, &streamed, &mut ram, &mut files)?;
        let monitor = SharedQemu::new(qemu, names).staged(staging.clone()).followed(wanted.follows);
        Ok(LeavingGuest { monitor: Box::new(monitor), ram, files, staging, remarks })
    }

    fn departed(&self, state: &Value) -> Result<Box<dyn Monitor>> {
        Ok(Box::new(Departed::new(Record::read(state)?)))
    }

    fn undo(&self, state: &Value) -> Result<Undone> {
        let Record { socket: Some(socket), undo: Some(undo) } = Record::read(state)? else {
            return Ok(Undone::GoesOn);
        };
        let mut qemu = Qemu::left(Qmp::connect(&socket)?, &undo);
        if !qemu.is_ours()? {
            return Ok(Undone::NothingLeft);
        }
        qemu.resume().map(|()| Undone::GoesOn)
    }

    fn arriving(&self, connection: Connection, wanted: Arriving) -> Result<ArrivingGuest> {
        let Connection { stream, path } = connection;
        let name = path.as_ref().map_or(OWN_SOCKET.to_owned(), |path| path.display().to_string());
        let qmp = Qmp::open(stream, &name)?;
        let pid = qmp.peer();
        let mut qemu = Qemu::new(qmp);
        if let Some(path) = path {
            qemu = qemu.at(absolute(&path)?);
        }
        qemu.awaits_a_guest()?;
        let found = match wanted.hands_over {
            true => qemu.check(wanted.kind)?,
            false => qemu.check_arriving(wanted.kind)?,
        };
        // Memory that becomes QEMU's own is copied there in small pages.
        let advice = wanted.kind.is_mapped_shared().then(|| advice(&found, "source")).flatten();
        let ram = found.into_iter().map(GuestRam::from).collect();
        let monitor: Box<dyn Monitor> = match wanted.listening {
            Some(listening) => Box::new(Connected::new(qemu, listening)),
            None => Box::new(qemu),
        };
        Ok(ArrivingGuest { monitor, ram, pid, advice })
    }

    fn loaded(
        &self,
        state: &Value,
        kept: Option<UnixStream>,
        runs: bool,
    ) -> Result<Box<dyn Monitor>> {
        Ok(Box::new(Waiting { path: Record::read(state)?.socket, kept, runs }))
    }

    fn cannot_connect(&self, socket: &Path, error: &io::Error) -> Error {
        Qmp::cannot_connect(socket, error)
    }
}

impl From<Backend> for GuestRam {
    fn from(backend: Backend) -> GuestRam {
        let Backend { name, path, bytes, address, is_shared, .. } = backend;
        GuestRam { name, path, bytes, address, is_shared }
    }
}

/// Adds a file of umem's own for each of the guest's RAM backends without a file.
fn stage(
    wanted: &Leaving<'_>,
    streamed: &[Backend],
    ram: &mut Vec<RamPath>,
    files: &mut Vec<RamFile>,
) -> Result<Option<Arc<Staging>>> {
    let Some(first) = streamed.first().map(|backend| &backend.name) else { return Ok(None) };
    if wanted.releases {
        return Err(Error::Unsupported(format!(
            "--release-ram frees RAM files, and RAM backend {first} has no file that umem can free: leave out \
             --release-ram"
        )));
    }
    if ram.is_empty()
        && let Some(named) = wanted.ram.first()
    {
        return Err(Error::Unsupported(format!(
            "--ram names the file {}, and RAM backend {first} has no file: leave out --ram, and umem uses all RAM \
             that QEMU has",
            named.path.display()
        )));
    }
    let mut staged: Vec<_> = files.iter().map(|_| None).collect();
    for backend in streamed {
        check_ram_name(&backend.name)?;
        let file = StagedFile::create(&backend.name, backend.bytes)?;
        files.push(file.ram_file()?);
        ram.push(RamPath { name: backend.name.clone(), path: file.path().to_owned() });
        staged.push(Some(file));
    }
    Ok(Some(Arc::new(Staging::new(staged, wanted.is_checked))))
}

impl Qemu {
    /// Sets the path of its socket, by which another process finds the QEMU again.
    pub(super) fn at(mut self, socket: PathBuf) -> Qemu {
        self.socket = Some(socket);
        self
    }
}
