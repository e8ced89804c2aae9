//! The kinds of monitors that umem knows.

use std::path::PathBuf;

use super::kind::{MonitorKind, MonitorSocket};
use super::monitor::MonitorRecord;
use super::qemu::QEMU;
use crate::error::{Error, Result};

/// Every kind of monitor.
const KINDS: [&dyn MonitorKind; 1] = [&QEMU];

/// The kind of monitor that the preload object finds in a process and gives what it needs.
pub(super) const PRELOADED: &dyn MonitorKind = &QEMU;

impl MonitorSocket {
    /// The socket of a monitor with QMP.
    #[must_use]
    pub fn qmp(path: PathBuf) -> MonitorSocket {
        MonitorSocket { kind: &QEMU, path }
    }
}

/// The kind that has written a record.
///
/// # Errors
/// This umem does not know the kind.
pub(super) fn kind_of(record: &MonitorRecord) -> Result<&'static dyn MonitorKind> {
    let known = KINDS.into_iter().find(|kind| kind.name() == record.kind);
    known.ok_or_else(|| {
        Error::Environment(format!(
            "the session file: its guest's monitor is a {}, which this umem does not know: resume the session with \
             the umem that began it",
            record.kind
        ))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn kind_is_found_by_its_record_and_an_unknown_kind_is_refused_by_name() {
        let record =
            |kind: &str| MonitorRecord { kind: kind.into(), state: serde_json::Value::Null };
        for kind in KINDS {
            assert_eq!(kind_of(&record(kind.name())).unwrap().name(), kind.name());
        }
        let names: BTreeSet<_> = KINDS.iter().map(|kind| kind.name()).collect();
        assert_eq!(names.len(), KINDS.len());
        let says = kind_of(&record("abacus")).unwrap_err().to_string();
        assert!(says.contains("abacus"), "{says}");
    }
}
