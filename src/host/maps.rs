//! The mappings of a process, from proc(5): which file is mapped where, and access to that very file.
//!
//! A path does not identify a file: the same path leads to another file in another mount namespace, and after a rename
//! over it the process still maps the earlier file. Device and inode identify the file, and the process's own
//! descriptors open it.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A line of `/proc/PID/maps`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    is_writable: bool,
    is_shared: bool,
    offset: u64,
    device: u64,
    inode: u64,
    path: PathBuf,
}

/// The file behind a range of a process's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MappedFile {
    pub(crate) device: u64,
    pub(crate) inode: u64,
    /// Offset in the file at which the range begins.
    pub(crate) offset: u64,
    pub(crate) is_shared: bool,
    pub(crate) is_writable: bool,
    /// The path in the process's maps, for messages.
    pub(crate) path: PathBuf,
    /// The first mapping of the range, as `map_files` names it.
    first: (u64, u64),
}

/// The mappings of a process.
pub(crate) struct Maps {
    pid: u32,
    mappings: Vec<Mapping>,
}

impl Maps {
    pub(crate) fn of(pid: u32) -> io::Result<Maps> {
        // Paths may contain any bytes.
        Ok(Maps::read(pid, &std::fs::read(format!("/proc/{pid}/maps"))?))
    }

    /// Parses the contents of its maps file in /proc.
    pub(crate) fn read(pid: u32, bytes: &[u8]) -> Maps {
        let text = String::from_utf8_lossy(bytes);
        Maps { pid, mappings: text.lines().filter_map(mapping).collect() }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// The file that the whole range is mapped from, contiguously; None if there is no such file.
    pub(crate) fn file(&self, address: u64, bytes: u64) -> Option<MappedFile> {
        let end = address.checked_add(bytes).filter(|_| bytes > 0)?;
        let first = self.at(address).filter(|mapping| mapping.inode != 0)?;
        let mut reached = first.end;
        let mut is_writable = first.is_writable;
        while reached < end {
            let next = self.at(reached)?;
            let follows = Some(next.offset) == first.offset_of(next.start);
            let is_same = (next.device, next.inode) == (first.device, first.inode);
            if !follows || !is_same || next.is_shared != first.is_shared {
                return None;
            }
            is_writable |= next.is_writable;
            reached = next.end;
        }
        Some(MappedFile {
            device: first.device,
            inode: first.inode,
            offset: first.offset_of(address)?,
            is_shared: first.is_shared,
            is_writable,
            path: first.path.clone(),
            first: (first.start, first.end),
        })
    }

    fn at(&self, address: u64) -> Option<&Mapping> {
        self.mappings.iter().find(|mapping| mapping.start <= address && address < mapping.end)
    }

    /// Opens the file that is mapped, even if its path leads elsewhere by now, and returns a path that leads to the
    /// file for at least as long as the process lives. `told` is the path that the process itself names; it is used
    /// only if it leads to that very file.
    pub(crate) fn open(
        &self,
        file: &MappedFile,
        told: &Path,
        to_write: bool,
    ) -> Result<(File, PathBuf)> {
        let failed = |what: String| {
            Error::Host(format!(
                "the RAM file {} that process {} has mapped {what}",
                file.path.display(),
                self.pid
            ))
        };
        let is_it = |path: &Path| std::fs::metadata(path).is_ok_and(|found| file.is(&found));
        let named = Some(file.path.clone()).filter(|path| is_it(path));
        let descriptors = format!("/proc/{}/fd", self.pid);
        let listed = std::fs::read_dir(&descriptors)
            .map_err(|error| failed(format!("cannot be looked up in {descriptors}: {error}")))?;
        let held = listed.flatten().map(|entry| entry.path()).find(|path| is_it(path));
        let mapped = || {
            let (start, end) = file.first;
            PathBuf::from(format!("/proc/{}/map_files/{start:x}-{end:x}", self.pid))
        };
        let told = || Some(told.to_path_buf()).filter(|path| is_it(path));
        // The last of these needs capabilities that an ordinary user does not have.
        let way = held.or_else(|| named.clone()).or_else(told).unwrap_or_else(mapped);
        let opened = File::options().read(true).write(to_write).open(&way).map_err(|error| {
            failed(match error.kind() {
                io::ErrorKind::PermissionDenied => format!(
                    "cannot be opened by {}: permission denied; run umem as the user that owns the file, or \
                     as root",
                    way.display()
                ),
                _ => format!("cannot be opened by {}: {error}", way.display()),
            })
        })?;
        let found = opened.metadata().map_err(|error| failed(error.to_string()))?;
        if !file.is(&found) {
            return Err(failed(format!("is not the one that {} opens", way.display())));
        }
        Ok((opened, named.unwrap_or(way)))
    }
}

impl Mapping {
    /// The offset of this address in its file.
    fn offset_of(&self, address: u64) -> Option<u64> {
        self.offset.checked_add(address.checked_sub(self.start)?)
    }
}

impl MappedFile {
    pub(crate) fn is(&self, metadata: &std::fs::Metadata) -> bool {
        (metadata.dev(), metadata.ino()) == (self.device, self.inode)
    }
}

/// `START-END PERMISSIONS OFFSET MAJOR:MINOR INODE   PATH`, hexadecimal but for the inode.
fn mapping(line: &str) -> Option<Mapping> {
    let mut fields = line.splitn(6, ' ');
    let hexadecimal = |text: &str| u64::from_str_radix(text, 16).ok();
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?.as_bytes();
    let offset = hexadecimal(fields.next()?)?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let [major, minor] = [major, minor].map(|part| u32::from_str_radix(part, 16));
    let inode = fields.next()?.parse().ok()?;
    Some(Mapping {
        start: hexadecimal(start)?,
        end: hexadecimal(end)?,
        is_writable: permissions.get(1) == Some(&b'w'),
        is_shared: permissions.get(3) == Some(&b's'),
        offset,
        device: libc::makedev(major.ok()?, minor.ok()?),
        inode,
        path: fields.next().unwrap_or_default().trim_start().into(),
    })
}

/// Other processes that have a file mapped.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Others {
    /// Processes that have it mapped.
    pub(crate) mapping: Vec<u32>,
    /// Processes of this user with a QEMU's name whose mappings cannot be read.
    pub(crate) unseen: Vec<u32>,
}

/// Checks whether any process has the file mapped, besides this process and the process that has it mapped at this
/// address. A process of another user could have it only if that user is root or was given the file.
pub(crate) fn others_with(file: &std::fs::Metadata, guests_address: u64) -> Others {
    let (device, inode) = (file.dev(), file.ino());
    let (mut others, mut guests) = (Others::default(), Vec::new());
    for pid in processes().into_iter().filter(|&pid| pid != std::process::id()) {
        match Maps::of(pid) {
            Ok(maps) => {
                let is_it = |mapping: &&Mapping| (mapping.device, mapping.inode) == (device, inode);
                if maps.at(guests_address).filter(is_it).is_some() {
                    guests.push(pid);
                } else if maps.mappings.iter().any(|mapping| is_it(&mapping)) {
                    others.mapping.push(pid);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && may_be_qemu(pid) => {
                others.unseen.push(pid);
            }
            // The process has ended, or belongs to another user.
            Err(_) => {}
        }
    }
    // Without address space randomisation two processes may have it at the same address.
    if guests.len() > 1 {
        others.mapping.extend(guests);
    }
    others
}

/// Whether a process belongs to this user and has a QEMU's name. That is visible even if its mappings are not.
fn may_be_qemu(pid: u32) -> bool {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    if !name.starts_with("qemu") && name.trim_end() != "kvm" {
        return false;
    }
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    // The real uid, then the effective one.
    let effective = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    effective == Some(nix::unistd::geteuid().as_raw())
}

/// The threads of a process, numbered as in its own pid namespace (`NSpid`).
pub(crate) fn own_threads(pid: u32) -> io::Result<Vec<u64>> {
    let number = |task: io::Result<std::fs::DirEntry>| {
        let status = std::fs::read_to_string(task.ok()?.path().join("status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
        line.split_whitespace().last()?.parse().ok()
    };
    Ok(std::fs::read_dir(format!("/proc/{pid}/task"))?.filter_map(number).collect())
}

/// All processes that are visible from here.
pub(crate) fn processes() -> Vec<u32> {
    let listed = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    listed.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_has_a_file_only_if_one_file_backs_all_of_it() {
        let text = "\
            1000-3000 rw-s 00001000 00:1b 16                         /dev/shm/with space (deleted)\n\
            3000-4000 rw-s 00003000 00:1b 16                         /dev/shm/with space (deleted)\n\
            4000-5000 rw-s 00003000 00:1b 16                         /dev/shm/with space (deleted)\n\
            5000-6000 rw-p 00000000 00:00 0 \n\
            7000-8000 r--p 00000000 fe:01 7                          /usr/lib/x";
        let maps = Maps { pid: 1, mappings: text.lines().filter_map(mapping).collect() };
        assert_eq!(maps.mappings.len(), 5);
        let file = maps.file(0x1000, 0x3000).unwrap();
        assert_eq!((file.device, file.inode, file.offset), (libc::makedev(0, 0x1b), 16, 0x1000));
        assert!(file.is_shared && file.is_writable);
        assert_eq!(file.path, Path::new("/dev/shm/with space (deleted)"));
        assert_eq!(maps.file(0x2000, 0x1000).unwrap().offset, 0x2000);
        // The same page again; memory without a file; nothing at all; a private, read-only one.
        assert_eq!(maps.file(0x1000, 0x4000), None);
        assert_eq!(maps.file(0x5000, 0x1000), None);
        assert_eq!(maps.file(0x6000, 0x1000), None);
        assert_eq!(maps.file(0x1000, 0), None);
        let file = maps.file(0x7000, 0x1000).unwrap();
        assert!(!file.is_shared && !file.is_writable);
    }

    #[test]
    fn mapped_file_is_opened_although_its_path_leads_elsewhere() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ram");
        std::fs::write(&path, [0xa5; 4096]).unwrap();
        let held = File::options().read(true).write(true).open(&path).unwrap();
        let ram = crate::memory::region::RamFile::of_source("ram0", held.try_clone().unwrap());
        let ram = ram.unwrap();
        let other = directory.path().join("other");
        std::fs::write(&other, [0x5a; 4096]).unwrap();
        std::fs::rename(&other, &path).unwrap();
        let maps = Maps::of(std::process::id()).unwrap();
        let mapped = maps.file(ram.span(0, 4096).as_ptr() as u64, 4096).unwrap();
        let (found, way) = maps.open(&mapped, Path::new("/nonexistent"), false).unwrap();
        assert!(mapped.is(&found.metadata().unwrap()));
        assert!(way.starts_with("/proc"), "{}", way.display());
        assert_eq!(std::fs::read(way).unwrap(), [0xa5; 4096]);
    }
}
