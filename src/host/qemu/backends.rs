//! The RAM backends of a QEMU, as it tells of them itself.
//!
//! It maps a file of tmpfs at a multiple of 4 KiB, unless its property `align` asks for more; of hugetlbfs it
//! knows the size of the pages (`qemu_fd_getpagesize` in its util/mmap-alloc.c). The kernel makes and maps a huge
//! page only where offset and address agree (`thp_vma_suitable_order`), so that without `align` a source's file
//! comes to consist of small pages, and a destination's is mapped with them.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{HOW_TO_START, Qemu};
use crate::error::{Error, Result};
use crate::memory::BLOCK_BYTES;
use crate::memory::kind::Kind;
use crate::memory::region::is_in_huge_tmpfs;

/// A RAM backend of a guest that can be moved.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Backend {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    /// What its address is a multiple of, bytes; 0 where that is left to QEMU, None where the monitor does not
    /// tell.
    align_bytes: Option<u64>,
}

/// What has a guest use the huge pages that its RAM could have, if QEMU keeps it from them: a sentence for whoever
/// started it. `elsewhere` is the other side.
pub(crate) fn advice(backends: &[Backend], elsewhere: &str) -> Option<String> {
    let names: Vec<_> =
        backends.iter().filter(|b| b.misses_huge_pages()).map(|b| b.name.as_str()).collect();
    let which = match names[..] {
        [] => return None,
        [name] => format!("RAM backend {name}"),
        _ => format!("RAM backends {}", names.join(", ")),
    };
    Some(format!(
        "{which} could have huge pages, for which QEMU has to align its memory: add align=2M to the -object \
         option, here and at the {elsewhere}, and the guest moves faster"
    ))
}

impl Backend {
    fn misses_huge_pages(&self) -> bool {
        self.align_bytes.is_some_and(|bytes| bytes < BLOCK_BYTES) && is_in_huge_tmpfs(&self.path)
    }
}

impl Qemu {
    /// Its RAM backends, if each of them can be moved.
    pub(super) fn backends(&mut self, wanted: Kind) -> Result<Vec<Backend>> {
        let mut backends = Vec::new();
        for (name, kind) in self.qmp.children("/objects")? {
            if let Some(kind) = kind.strip_prefix("memory-backend-") {
                backends.push(self.backend(name, kind, wanted)?);
            }
        }
        let main = self.qmp.property("/machine", "memory-backend")?;
        // QEMU gives the backend's path in its object tree.
        let main = main.as_ref().and_then(Value::as_str).unwrap_or_default();
        let main = main.strip_prefix("/objects/").unwrap_or(main);
        if !backends.iter().any(|backend| backend.name == main) {
            return Err(Error::Unsupported(format!(
                "the guest's RAM is QEMU's private memory, which nobody else can read: \
                 {HOW_TO_START}"
            )));
        }
        Ok(backends)
    }

    fn backend(&mut self, name: String, kind: &str, wanted: Kind) -> Result<Backend> {
        let path = format!("/objects/{name}");
        let mut get = |property: &str| -> Result<Value> {
            Ok(self.qmp.property(&path, property)?.unwrap_or_default())
        };
        match kind {
            "file" => {}
            "memfd" => {
                return Err(Error::Unsupported(format!(
                    "RAM backend {name} is a memory-backend-memfd, which QEMU would send whole \
                     while the guest stands still: {HOW_TO_START}"
                )));
            }
            _ => {
                return Err(Error::Unsupported(format!(
                    "RAM backend {name} is a memory-backend-{kind}, which has no file: \
                     {HOW_TO_START}"
                )));
            }
        }
        // Of private memory the preload object has seen that it is mapped so.
        if wanted == Kind::Shared && get("share")? != json!(true) {
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
        Ok(Backend { name, path: PathBuf::from(file), align_bytes })
    }
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

    /// A file in a tmpfs with huge pages, where it can be opened as long as this is there.
    fn huge_file() -> (std::os::fd::OwnedFd, PathBuf) {
        let file = crate::demo::huge_tmpfs_file(4).expect("a tmpfs; run the tests as root");
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        (file, path)
    }

    #[test]
    fn whose_pages_could_be_huge_and_are_not_is_named() {
        let (_file, path) = huge_file();
        let backend = |name: &str, path: &Path, align_bytes| Backend {
            name: name.into(),
            path: path.into(),
            align_bytes,
        };
        for (align_bytes, is_advised) in [
            (Some(0), true),
            (Some(4096), true),
            (Some(HUGE), false),
            (Some(1 << 30), false),
            // An old QEMU has no such property, and who is no QEMU need not.
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
    fn the_alignment_is_what_the_monitor_tells() {
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
            let expected = Backend { name: "ram0".into(), path, align_bytes };
            assert_eq!(qemu.backends(Kind::Shared).unwrap(), [expected], "{answer:?}");
            drop(qemu);
            monitor.join().unwrap();
        }
    }

    /// The monitor of a guest with one backend, whose `align` is this, or is not known.
    fn tell_of_ram(monitor: &UnixStream, align: Option<&Value>) {
        let mut out = monitor;
        out.write_all(b"{\"QMP\":{}}\n").unwrap();
        for line in BufReader::new(monitor).lines() {
            let request: Value = serde_json::from_str(&line.unwrap()).unwrap();
            let value = match (&request["execute"], &request["arguments"]["property"]) {
                (command, _) if command == "qom-list" => {
                    Some(json!([{ "name": "ram0", "type": "child<memory-backend-file>" }]))
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
