//! The RAM backends of a QEMU, as QEMU reports them, and the files that it has mapped for them.
//!
//! QEMU reports block by block whether its migration carries a block. A backend whose block has no name is used by no
//! device, and is not migrated. QEMU reports the path with which it opened a file; that path may lead elsewhere by now,
//! so the kernel's maps identify the file ([`crate::host::maps`]).
//!
//! QEMU maps a tmpfs file at a multiple of 4 KiB, unless its property `align` asks for more. For hugetlbfs it uses the
//! page size (`qemu_fd_getpagesize` in its util/mmap-alloc.c). The kernel makes and maps a huge page only where offset
//! and address agree (`thp_vma_suitable_order`). So without `align` a source's file consists of small pages, and a
//! destination's file is mapped with them.

mod arriving;

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::blocks::Block;
use super::{HOW_TO_START, Qemu};
use crate::error::{Context, Error, Result};
use crate::host::command::RamPath;
use crate::host::kind::check_ram_name;
use crate::host::maps::{self, MappedFile, Maps};
use crate::memory::BLOCK_BYTES;
use crate::memory::kind::Kind;
use crate::memory::region::{is_in_huge_tmpfs, is_memory};

/// A RAM backend of a guest that can be moved.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Backend {
    pub(crate) name: String,
    /// The path that QEMU was given to open: for messages and advice.
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
    /// Its address in QEMU's own address space. None if QEMU does not report it.
    pub(crate) address: Option<u64>,
    pub(crate) is_shared: bool,
    /// It has no file that umem could map: its contents come with QEMU's stream.
    pub(crate) is_streamed: bool,
    /// The alignment of its address, bytes; 0 if QEMU chooses, None if the monitor does not report it.
    align_bytes: Option<u64>,
}

/// The advice for a guest whose RAM could have huge pages, if QEMU's alignment prevents them: a sentence for the user
/// who started the guest. `elsewhere` is the other side.
pub(crate) fn advice(backends: &[Backend], elsewhere: &str) -> Option<String> {
    let names: Vec<_> =
        backends.iter().filter(|b| b.misses_huge_pages()).map(|b| b.name.as_str()).collect();
    let which = match names[..] {
        [] => return None,
        [name] => format!("RAM backend {name}"),
        _ => format!("RAM backends {}", names.join(", ")),
    };
    Some(format!(
        "{which} could use huge pages, for which QEMU has to align the memory: to move the guest faster, add \
         align=2M to the -object option, here and at the {elsewhere}"
    ))
}

/// The places from which the contents of a guest's RAM can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contents {
    /// In files alone: at a destination.
    Files,
    /// In files, as the source sends no page while the guest runs.
    FilesUnstreamed,
    /// In QEMU's stream as well.
    Streamed,
}

impl Backend {
    /// A backend without a file.
    fn streamed(name: String, bytes: u64) -> Backend {
        Backend {
            name,
            path: PathBuf::new(),
            bytes,
            address: None,
            is_shared: false,
            is_streamed: true,
            align_bytes: None,
        }
    }

    fn misses_huge_pages(&self) -> bool {
        self.align_bytes.is_some_and(|bytes| bytes < BLOCK_BYTES) && is_in_huge_tmpfs(&self.path)
    }
}

/// The open file of a guest's RAM, as its QEMU has mapped it.
pub(crate) struct RamOfQemu {
    pub(crate) name: String,
    /// The part of the file that is this RAM.
    pub(crate) part: Range<u64>,
    /// One open file for all RAM in the same file.
    pub(crate) file: File,
    /// A path to the same file, valid for at least as long as QEMU lives.
    pub(crate) path: PathBuf,
}

impl Qemu {
    /// The RAM backends that a migration fills, if each of them can be moved.
    pub(super) fn backends(&mut self, wanted: Kind, contents: Contents) -> Result<Vec<Backend>> {
        let blocks = self.blocks()?;
        let mut backends = Vec::new();
        for (name, kind) in self.qmp.children("/objects")? {
            let Some(kind) = kind.strip_prefix("memory-backend-") else { continue };
            if let Some(block) = blocks.iter().find(|block| block.is_of(&name)) {
                backends.extend(self.backend(name, kind, block, (wanted, contents))?);
            }
        }
        if self.has_main_ram(&backends)?.is_err() {
            return Err(Error::Unsupported(format!(
                "the guest's RAM is QEMU's private memory, which no other process can read: {HOW_TO_START}"
            )));
        }
        Ok(backends)
    }

    /// Whether the guest's main memory is among these backends (at least one); if not, the main memory's backend.
    fn has_main_ram(&mut self, backends: &[Backend]) -> Result<std::result::Result<(), String>> {
        let main = self.qmp.property("/machine", "memory-backend")?;
        // QEMU reports the backend's path in its object tree; nothing for a machine whose nodes have a backend each.
        let main = main.as_ref().and_then(Value::as_str).unwrap_or_default();
        let main = main.strip_prefix("/objects/").unwrap_or(main);
        let has_main = main.is_empty() || backends.iter().any(|backend| backend.name == main);
        Ok(if backends.is_empty() || !has_main { Err(main.to_owned()) } else { Ok(()) })
    }

    /// Checks that QEMU was started for an incoming guest.
    pub(crate) fn awaits_a_guest(&mut self) -> Result<()> {
        let status = self.qmp.execute("query-status", json!({}))?;
        match status["status"].as_str() {
            Some("inmigrate") => Ok(()),
            other => Err(Error::Host(format!(
                "it is in the state {}, and does not wait for a guest: start it with `-incoming defer`, which umem \
                 adds to a QEMU that it starts under a name such as qemu-system-x86_64",
                other.unwrap_or("unknown")
            ))),
        }
    }

    /// None for a backend with the same contents on both sides.
    fn backend(
        &mut self,
        name: String,
        kind: &str,
        block: &Block,
        (wanted, contents): (Kind, Contents),
    ) -> Result<Option<Backend>> {
        let path = format!("/objects/{name}");
        let mut get = |property: &str| -> Result<Value> {
            Ok(self.qmp.property(&path, property)?.unwrap_or_default())
        };
        let streamed = |name: String, why: &str, instead: &str| match contents {
            Contents::Streamed => Ok(Some(Backend::streamed(name, block.bytes))),
            Contents::FilesUnstreamed | Contents::Files => Err(Error::Unsupported(format!(
                "RAM backend {name} {why}: add --precopy, with -p or without it, and its contents come with QEMU's \
                 migration stream while the guest runs; or {instead}"
            ))),
        };
        match kind {
            "file" => {}
            "ram" | "memfd" | "shm" if contents != Contents::Files => {
                let why = format!("is a memory-backend-{kind}, without a file that umem can open");
                return streamed(name, &why, HOW_TO_START);
            }
            "memfd" => {
                return Err(Error::Unsupported(format!(
                    "RAM backend {name} is a memory-backend-memfd, which QEMU would send whole \
                     while the guest stands still, or, an older one, not at all: {HOW_TO_START}"
                )));
            }
            _ => {
                return Err(Error::Unsupported(format!(
                    "RAM backend {name} is a memory-backend-{kind}, which has no file: \
                     {HOW_TO_START}"
                )));
            }
        }
        let is_shared = get("share")? == json!(true);
        if get("readonly")? == json!(true) {
            if is_shared {
                return Ok(None);
            }
            return Err(Error::Unsupported(format!(
                "RAM backend {name} has readonly=on and share=off: QEMU would send it with its device state, and \
                 could not write it where it arrives; add share=on to its -object option, on both sides, and the \
                 file is left as it is there"
            )));
        }
        if !is_shared && contents != Contents::Files {
            let why = "has share=off, so that its file does not hold what the guest writes";
            return streamed(name, why, "add share=on to its -object option");
        }
        // For private memory the preload object has checked the mapping.
        if wanted.is_mapped_shared() && !is_shared {
            return Err(Error::Unsupported(format!(
                "RAM backend {name} has share=off: its file does not hold what the guest writes; \
                 add share=on to its -object option"
            )));
        }
        let file = get("mem-path")?;
        let file = file.as_str().unwrap_or_default();
        if std::fs::metadata(file).is_ok_and(|metadata| metadata.is_dir()) {
            return Err(Error::Unsupported(format!(
                "RAM backend {name} has a directory as its mem-path, in which its file has no \
                 name: let mem-path name a file, such as {file}/{name}"
            )));
        }
        let align_bytes = get("align")?.as_u64();
        let &Block { bytes, address, .. } = block;
        let path = PathBuf::from(file);
        let is_streamed = false;
        Ok(Some(Backend { name, path, bytes, address, is_shared, is_streamed, align_bytes }))
    }

    /// Opens the files that QEMU has mapped for these backends; QEMU must run on this host. The files that the user has
    /// named must be the same ones, and name their regions. All of these backends have files.
    pub(crate) fn open_ram(
        &mut self,
        backends: &[Backend],
        named: &[RamPath],
        to_free: bool,
    ) -> Result<Vec<RamOfQemu>> {
        let disks = self.disks()?;
        let (maps, files) = self.mapped_files(backends)?;
        let mut opened: Vec<RamOfQemu> = Vec::new();
        let mut seen: Vec<MappedFile> = Vec::new();
        for (backend, mapped) in backends.iter().zip(files) {
            let name = &backend.name;
            let part = mapped.offset..mapped.offset.saturating_add(backend.bytes);
            let is_same =
                |other: &MappedFile| (other.device, other.inode) == (mapped.device, mapped.inode);
            let others = || opened.iter().zip(&seen).filter(|(_, seen)| is_same(seen));
            let overlaps =
                |other: &RamOfQemu| other.part.start < part.end && part.start < other.part.end;
            if let Some((other, _)) = others().find(|(other, _)| overlaps(other)) {
                return Err(Error::Unsupported(format!(
                    "RAM backends {} and {name} share memory in the file {}: give each a mem-path of its own, or an \
                     offset= behind the other's end",
                    other.name,
                    mapped.path.display()
                )));
            }
            let (file, path) = match others().next() {
                Some((other, _)) => {
                    let what = || format!("the RAM file {}", other.path.display());
                    (other.file.try_clone().context(what)?, other.path.clone())
                }
                None => maps.open(&mapped, &backend.path, to_free)?,
            };
            mapped.check(backend, &file, disks.contains(name))?;
            opened.push(RamOfQemu { name: name.clone(), part, file, path });
            seen.push(mapped);
        }
        match named {
            [] => backends.iter().try_for_each(|backend| check_ram_name(&backend.name))?,
            named => rename(&mut opened, named)?,
        }
        Ok(opened)
    }

    /// The backends that are a disk's contents for the guest.
    fn disks(&mut self) -> Result<Vec<String>> {
        let devices = self.qmp.try_execute("query-memory-devices", json!({}))?.unwrap_or_default();
        let devices = devices.as_array().map(Vec::as_slice).unwrap_or_default();
        let is_disk =
            |device: &&Value| matches!(device["type"].as_str(), Some("nvdimm" | "virtio-pmem"));
        let backend = |device: &Value| {
            let path = device["data"]["memdev"].as_str()?;
            path.rsplit('/').next().map(str::to_owned)
        };
        Ok(devices.iter().filter(is_disk).filter_map(backend).collect())
    }

    /// The process that has the guest's memory, and its mapping for each backend.
    fn mapped_files(&mut self, backends: &[Backend]) -> Result<(Maps, Vec<MappedFile>)> {
        let mut ranges = Vec::new();
        for backend in backends {
            let address = backend.address.ok_or_else(|| {
                Error::Unsupported(format!(
                    "QEMU does not report where it has mapped RAM backend {}, which has no guest address now",
                    backend.name
                ))
            })?;
            ranges.push((address, backend.bytes));
        }
        let threads = self.vcpu_threads()?;
        let search = Search { ranges, threads };
        let peer = self.qmp.peer();
        if let Some(maps) = peer.and_then(|pid| search.maps(pid)) {
            let files = search.files(&maps).expect("they have just been found");
            return Ok((maps, files));
        }
        search.anywhere(peer)
    }

    /// The vCPUs' threads, by QEMU's numbers; empty if QEMU does not report them.
    fn vcpu_threads(&mut self) -> Result<Vec<u64>> {
        let answer = self.qmp.try_execute("query-cpus-fast", json!({}))?.unwrap_or_default();
        let cpus = answer.as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(cpus.iter().filter_map(|cpu| cpu["thread-id"].as_u64()).collect())
    }
}

/// The search for the process behind a QMP socket: the one with the memory and threads that QEMU reports. The search
/// begins at the process that the kernel names as the listener, which may be a proxy or a parent that made the socket
/// for QEMU.
struct Search {
    /// The guest's memory: addresses and bytes.
    ranges: Vec<(u64, u64)>,
    threads: Vec<u64>,
}

impl Search {
    /// The mappings of this process, if it is the QEMU.
    fn maps(&self, pid: u32) -> Option<Maps> {
        let maps = Maps::of(pid).ok()?;
        self.files(&maps)?;
        let own = maps::own_threads(pid).ok()?;
        self.threads.iter().all(|thread| own.contains(thread)).then_some(maps)
    }

    fn files(&self, maps: &Maps) -> Option<Vec<MappedFile>> {
        self.ranges.iter().map(|&(address, bytes)| maps.file(address, bytes)).collect()
    }

    /// Searches all processes for the only match.
    fn anywhere(&self, peer: Option<u32>) -> Result<(Maps, Vec<MappedFile>)> {
        let mut found: Vec<Maps> =
            maps::processes().into_iter().filter_map(|pid| self.maps(pid)).collect();
        if let (Some(maps), true) = (found.pop(), found.is_empty()) {
            let files = self.files(&maps).expect("they have just been found");
            return Ok((maps, files));
        }
        if let Some(other) = found.first() {
            return Err(Error::Unsupported(format!(
                "several processes here could be the QEMU behind the QMP socket, {} among them: give umem a socket \
                 at which QEMU itself listens, without a proxy",
                other.pid()
            )));
        }
        Err(Error::Host(match peer {
            Some(pid) => match Maps::of(pid) {
                Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => format!(
                    "umem has no permission to read which files QEMU, process {pid}, has mapped (/proc/{pid}/maps: \
                     {error}): run umem as root, or as QEMU's user if that user may trace the process"
                ),
                _ => format!(
                    "no process visible to umem has the guest's memory where the monitor reports it; process {pid} \
                     listens at its QMP socket: run umem on QEMU's host, in QEMU's pid namespace or one that \
                     contains it, as root or as QEMU's user"
                ),
            },
            None => "no process visible to umem has the guest's memory where the monitor reports it, and the process \
                that listens at its QMP socket is in another pid namespace: run umem on QEMU's host, in QEMU's pid \
                namespace or one that contains it"
                .into(),
        }))
    }
}

impl MappedFile {
    /// Checks that umem can use this file as the guest's memory.
    fn check(&self, backend: &Backend, file: &File, is_disk: bool) -> Result<()> {
        let refuse = |what: String| {
            let path = self.path.display();
            Err(Error::Unsupported(format!("RAM backend {}, file {path}, {what}", backend.name)))
        };
        if !self.is_shared {
            return refuse(
                "is mapped privately: its file does not hold what the guest writes; add share=on to its -object \
                 option"
                    .into(),
            );
        }
        let Ok(metadata) = file.metadata() else {
            return refuse("cannot be examined".into());
        };
        let end = self.offset.saturating_add(backend.bytes);
        if metadata.size() < end {
            return refuse(format!(
                "has {} bytes, and the guest's memory reaches to its byte {end}: the file was truncated after QEMU \
                 had mapped it, or was too short before",
                metadata.size()
            ));
        }
        if is_disk && !is_memory(file).unwrap_or(false) {
            return refuse(
                "is a disk to the guest (nvdimm or virtio-pmem) and lies on a disk: umem moves memory; unplug the \
                 device before moving the guest, or give it readonly=on on both sides"
                    .into(),
            );
        }
        Ok(())
    }
}

/// Names the regions as the user names their files.
fn rename(opened: &mut [RamOfQemu], named: &[RamPath]) -> Result<()> {
    let is_same = |path: &Path, ram: &RamOfQemu| {
        let (Ok(there), Ok(here)) = (std::fs::metadata(path), ram.file.metadata()) else {
            return false;
        };
        (there.dev(), there.ino()) == (here.dev(), here.ino())
    };
    let mut names: Vec<Option<&str>> = vec![None; opened.len()];
    let is_of_file = |path: &Path| opened.iter().filter(|ram| is_same(path, ram)).count();
    if let Some(shared) = named.iter().find(|ram| is_of_file(&ram.path) > 1) {
        let RamPath { name, path } = shared;
        let what = "contains several RAM backends of the guest, which one --ram cannot name: leave out --ram, and \
            umem uses each under its own name";
        return Err(Error::Ram { name: name.clone(), path: path.clone(), what: what.into() });
    }
    for RamPath { name, path } in named {
        let found = opened.iter().position(|ram| is_same(path, ram));
        let Some(index) = found.filter(|&index| names[index].is_none()) else {
            let what = match (std::fs::metadata(path), found) {
                (Err(error), _) => format!("cannot be examined: {error}"),
                (Ok(_), Some(_)) => "is named twice".into(),
                (Ok(_), None) => format!(
                    "is not the file that the guest's QEMU has mapped, which is {}: the file may have been replaced, \
                     or lie in another mount namespace; leave out --ram, and umem uses the files that QEMU has",
                    opened.iter().map(described).collect::<Vec<_>>().join(" and ")
                ),
            };
            return Err(Error::Ram { name: name.clone(), path: path.clone(), what });
        };
        names[index] = Some(name);
    }
    for (ram, name) in opened.iter_mut().zip(names) {
        let Some(name) = name else {
            return Err(Error::Unsupported(format!(
                "the guest also has RAM {}, which no --ram names: leave out --ram, and umem uses all RAM that QEMU \
                 has",
                described(ram)
            )));
        };
        ram.name = name.to_owned();
    }
    Ok(())
}

fn described(ram: &RamOfQemu) -> String {
    format!("{} ({})", ram.name, ram.path.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use std::path::Path;

    use crate::host::qmp::Qmp;

    const HUGE: u64 = 2 << 20;

    /// A file in a tmpfs with huge pages; its path is valid while the descriptor is open.
    fn huge_file() -> (std::os::fd::OwnedFd, PathBuf) {
        let file =
            crate::programs::demo::huge_tmpfs_file(4).expect("a tmpfs; run the tests as root");
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        (file, path)
    }

    #[test]
    fn backend_whose_alignment_prevents_huge_pages_is_named() {
        let (_file, path) = huge_file();
        let backend = |name: &str, path: &Path, align_bytes| Backend {
            name: name.into(),
            path: path.into(),
            bytes: 4096,
            address: None,
            is_shared: true,
            is_streamed: false,
            align_bytes,
        };
        for (align_bytes, is_advised) in [
            (Some(0), true),
            (Some(4096), true),
            (Some(HUGE), false),
            (Some(1 << 30), false),
            // An old QEMU, or a monitor that is not a QEMU, has no such property.
            (None, false),
        ] {
            let advice = advice(&[backend("ram0", &path, align_bytes)], "source");
            assert_eq!(advice.is_some(), is_advised, "{align_bytes:?}: {advice:?}");
        }
        let small = backend("small", Path::new("/proc/self/status"), Some(0));
        let missing = backend("missing", Path::new("/nonexistent/ram"), Some(0));
        assert_eq!(advice(&[small, missing], "source"), None);

        let two = [("ram0", Some(0)), ("ram1", Some(HUGE)), ("ram2", Some(4096))];
        let two = two.map(|(name, align_bytes)| backend(name, &path, align_bytes));
        let text = advice(&two, "destination").unwrap();
        assert!(text.starts_with("RAM backends ram0, ram2 "), "{text}");
        assert!(text.contains("align=2M") && text.contains("at the destination"), "{text}");
    }

    #[test]
    fn alignment_is_read_from_the_monitor() {
        for (answer, align_bytes) in [
            (Some(json!(0)), Some(0)),
            (Some(json!(HUGE)), Some(HUGE)),
            (Some(json!("2M")), None),
            (None, None),
        ] {
            let (monitor, ours) = UnixStream::pair().unwrap();
            let told = answer.clone();
            let monitor = std::thread::spawn(move || tell_of_ram(&monitor, told.as_ref()));
            let mut qemu = Qemu::new(Qmp::open(ours, "it").unwrap());
            let path = "/nonexistent/ram".into();
            let expected = Backend {
                name: "ram0".into(),
                path,
                bytes: 4096,
                address: Some(0x7000),
                is_shared: true,
                is_streamed: false,
                align_bytes,
            };
            assert_eq!(
                qemu.backends(Kind::Shared, Contents::Files).unwrap(),
                [expected],
                "{answer:?}"
            );
            drop(qemu);
            monitor.join().unwrap();
        }
    }

    /// The monitor of a guest with one backend, with this `align`, or with an unknown one.
    fn tell_of_ram(monitor: &UnixStream, align: Option<&Value>) {
        let mut out = monitor;
        out.write_all(b"{\"QMP\":{}}\n").unwrap();
        for line in BufReader::new(monitor).lines() {
            let request: Value = serde_json::from_str(&line.unwrap()).unwrap();
            let value = match (&request["execute"], &request["arguments"]["property"]) {
                (command, _) if command == "qom-list" => {
                    Some(json!([{ "name": "ram0", "type": "child<memory-backend-file>" }]))
                }
                (command, _) if command == "x-query-ramblock" => {
                    let table = "Block Name PSize Offset Used Total HVA RO\n\
                                 ram0 4 KiB 0x0 0x1000 0x1000 0x7000 rw\n\
                                 4 KiB 0x1000 0x1000 0x1000 0x9000 rw\n";
                    Some(json!({ "human-readable-text": table }))
                }
                (_, property) if property == "share" => Some(json!(true)),
                (_, property) if property == "mem-path" => Some(json!("/nonexistent/ram")),
                (_, property) if property == "memory-backend" => Some(json!("/objects/ram0")),
                (_, property) if property == "align" => align.cloned(),
                _ => Some(json!({})),
            };
            let answer = match value {
                Some(value) => json!({ "return": value }),
                None => json!({ "error": { "class": "GenericError", "desc": "no such property" } }),
            };
            writeln!(out, "{answer}").unwrap();
        }
    }
}
