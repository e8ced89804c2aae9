//! The RAM of a QEMU that waits for a guest.
//!
//! It consists of the blocks that QEMU's migration would carry and that belong to a backend, as at the source. QEMU has
//! a backend for a plain `-m SIZE`, too, whose id is the machine's default (`pc.ram`). The other RAM blocks, video
//! memory and firmware, come with the device state.
//!
//! The preload object hands over memory in a file when QEMU maps it. Memory without a file is registered after QEMU has
//! reported its address, so QEMU's command line needs no option for it.

use std::path::PathBuf;

use serde_json::json;

use super::{Backend, Block, Contents, HOW_TO_START, Qemu};
use crate::error::{Error, Result};
use crate::memory::kind::Kind;

impl Backend {
    /// A backend whose memory has no path.
    fn unnamed(name: String, block: &Block, is_shared: bool) -> Backend {
        let (path, &Block { bytes, address, .. }) = (PathBuf::new(), block);
        let (is_streamed, align_bytes) = (false, None);
        Backend { name, path, bytes, address, is_shared, is_streamed, align_bytes }
    }
}

impl Qemu {
    /// Checks that this QEMU can receive a guest, the files of its RAM mapped as `kind` states, and returns the RAM
    /// that a source fills. Changes nothing.
    pub(crate) fn check_arriving(&mut self, kind: Kind) -> Result<Vec<Backend>> {
        let backends = self.arriving(kind)?;
        self.check_devices()?;
        Ok(backends)
    }

    fn arriving(&mut self, kind: Kind) -> Result<Vec<Backend>> {
        let blocks = self.blocks()?;
        let mut backends = Vec::new();
        for (name, of) in self.qmp.children("/objects")? {
            let Some(of) = of.strip_prefix("memory-backend-") else { continue };
            let Some(block) = blocks.iter().find(|block| block.is_of(&name)) else { continue };
            match of {
                "ram" => backends.push(self.without_file(name, block)?),
                "memfd" => backends.push(self.in_memfd(name, block)?),
                _ => backends.extend(self.backend(name, of, block, (kind, Contents::Files))?),
            }
        }
        if let Err(main) = self.has_main_ram(&backends)? {
            return Err(Error::Unsupported(format!(
                "umem finds no RAM backend of the guest's main memory ({main}) among QEMU's objects: {HOW_TO_START}"
            )));
        }
        Ok(backends)
    }

    /// A `memory-backend-memfd`, which the preload object identifies by the name that QEMU gives its file.
    fn in_memfd(&mut self, name: String, block: &Block) -> Result<Backend> {
        if self.qmp.property(&format!("/objects/{name}"), "share")? != Some(json!(true)) {
            return Err(Error::Unsupported(format!(
                "RAM backend {name} is a memory-backend-memfd with share=off: leave out share=off, or use a \
                 memory-backend-ram"
            )));
        }
        Ok(Backend::unnamed(name, block, true))
    }

    /// A `memory-backend-ram`, or the memory of `-m SIZE` alone.
    fn without_file(&mut self, name: String, block: &Block) -> Result<Backend> {
        if self.qmp.property(&format!("/objects/{name}"), "share")? == Some(json!(true)) {
            return Err(Error::Unsupported(format!(
                "RAM backend {name} is a memory-backend-ram with share=on, whose file umem cannot see: leave out \
                 share=on, or use a memory-backend-file with share=on on tmpfs or hugetlbfs"
            )));
        }
        if block.address.is_none() {
            return Err(Error::Unsupported(format!(
                "QEMU does not report where it has mapped RAM backend {name}, which has no guest address now: plug \
                 it in at an address (addr=), or use a memory-backend-file with share=on"
            )));
        }
        Ok(Backend::unnamed(name, block, false))
    }
}
