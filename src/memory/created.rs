//! RAM files that umem has made, and that are removed if no guest arrives.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::runtime::os_text::{self, absolute};

/// A file that umem made, under the name it had then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Created {
    #[serde(with = "os_text::path")]
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Created {
    pub(crate) fn new(path: PathBuf, device: u64, inode: u64) -> Created {
        Created { path, device, inode }
    }

    pub(crate) fn of(path: &Path, metadata: &Metadata) -> Created {
        Created::new(path.to_owned(), metadata.dev(), metadata.ino())
    }

    /// With an absolute path.
    pub(crate) fn absolute(&self) -> Result<Created> {
        Ok(Created { path: absolute(&self.path)?, ..*self })
    }

    /// Whether the name still leads to that file.
    pub(crate) fn is_in_place(&self) -> bool {
        let there = fs::symlink_metadata(&self.path);
        there.is_ok_and(|there| (there.dev(), there.ino()) == (self.device, self.inode))
    }

    /// Removes the file, unless another file has taken its name.
    pub(crate) fn remove(&self) {
        if self.is_in_place() {
            let _ = fs::remove_file(&self.path);
        }
    }
}
