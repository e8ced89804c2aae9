//! The RAM backends of a QEMU, as it tells of them itself.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{HOW_TO_START, Qemu};
use crate::error::{Error, Result};
use crate::memory::kind::Kind;

/// A RAM backend of a guest that can be moved.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Backend {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
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
        Ok(Backend { name, path: PathBuf::from(file) })
    }
}
