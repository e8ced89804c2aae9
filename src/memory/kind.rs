//! The kinds of guest memory: how the guest's process maps it, and so how pages get there.

use std::fmt;
use std::str::FromStr;

/// How the destination's guest maps its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// MAP_SHARED of a file: pages land in the file, and a completed block leaves the userfaultfd.
    #[default]
    Shared,
    /// MAP_PRIVATE of a file: pages land in the file, the guest side touches them, which makes copies
    /// of its own, and the file's pages are released.
    Private,
    /// MAP_PRIVATE | MAP_ANONYMOUS: pages are copied in.
    Anonymous,
}

impl Kind {
    /// As the command line, the hand-over message and the report write it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Shared => "shared",
            Kind::Private => "private",
            Kind::Anonymous => "anonymous",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Kind, String> {
        [Kind::Shared, Kind::Private, Kind::Anonymous]
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or_else(|| {
                format!("the memory kinds are shared, private and anonymous, not {text:?}")
            })
    }
}
