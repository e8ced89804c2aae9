//! What is in a session file.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use umem_wire::Totals;

use crate::error::Result;
use crate::host::Undo;
use crate::memory::created::Created;
use crate::memory::staging;
use crate::memory::stamp::Stamp;
use crate::runtime::os_text::{self, absolute};
use crate::transport::secure::Security;

/// Of the records below. A umem that takes over has to know it.
pub(crate) const VERSION: u32 = 3;

/// How lanes are secured: files that are read again.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct SecurityRecord {
    tls_creds: Option<PathBuf>,
    tls_hostname: Option<String>,
    secret_file: Option<PathBuf>,
    insecure: bool,
}

impl SecurityRecord {
    pub(crate) fn of(security: &Security) -> Result<SecurityRecord> {
        let path = |path: &Option<PathBuf>| path.as_deref().map(absolute).transpose();
        Ok(SecurityRecord {
            tls_creds: path(&security.tls_creds)?,
            tls_hostname: security.tls_hostname.clone(),
            secret_file: path(&security.secret_file)?,
            insecure: security.insecure,
        })
    }

    pub(crate) fn security(&self) -> Security {
        Security {
            tls_creds: self.tls_creds.clone(),
            tls_hostname: self.tls_hostname.clone(),
            secret_file: self.secret_file.clone(),
            insecure: self.insecure,
        }
    }
}

/// How far a source had come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum SourceState {
    /// Its guest stood still, or was about to, and may be resumed: no switchover has left.
    Stopped,
    /// A switchover may have left: the guest may run at the destination, and never again here.
    Committed,
    /// The destination has said that it has everything: nobody needs what is here.
    Completed,
}

/// A RAM file of the source's guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RamRecord {
    pub(crate) name: String,
    #[serde(with = "os_text::path")]
    pub(crate) path: PathBuf,
    /// Where in the file it begins.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    /// By these two it is known to be the same file.
    pub(crate) device: u64,
    pub(crate) inode: u64,
    /// log2 of the landing unit's size; 0 while the destination has not named it.
    pub(crate) unit_shift: u8,
    /// What it was like when the guest had stopped, where it was to change no more.
    #[serde(default)]
    pub(crate) stamp: Option<Stamp>,
    /// It is umem's own, with what its guest's private memory had that was not sent: it goes with the session. It has
    /// its name from the commit on.
    #[serde(default)]
    pub(crate) is_own: bool,
}

impl SourceRecord {
    /// Nobody needs the session any more, nor what umem itself has made for it.
    pub(crate) fn remove_own_files(&self) {
        self.ram.iter().filter(|ram| ram.is_own).for_each(|ram| staging::remove(&ram.path));
    }
}

/// What a source has to know to go on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SourceRecord {
    pub(crate) version: u32,
    pub(crate) state: SourceState,
    pub(crate) uri: String,
    pub(crate) bulk_lanes: u16,
    /// As the lanes' hello has them.
    pub(crate) capabilities: u64,
    /// The highest that any attempt to open lanes has had, and more than any that a process before has
    /// used: it is written before the attempt.
    pub(crate) epoch: u32,
    pub(crate) ram: Vec<RamRecord>,
    pub(crate) qmp: Option<PathBuf>,
    pub(crate) undo: Option<Undo>,
    pub(crate) postcopy: bool,
    pub(crate) background: bool,
    pub(crate) max_postcopy_bandwidth: Option<u64>,
    pub(crate) security: SecurityRecord,
    /// The destination has said that the guest runs there.
    pub(crate) running: bool,
    /// Bytes of the guest's that it had when it said so last.
    pub(crate) heard_bytes: u64,
    /// When the guest was stopped, and when the switchover left, nanoseconds since boot.
    pub(crate) stopped_at: u64,
    pub(crate) switched_at: u64,
    /// Bytes that the RAM files held at the switchover, where they are freed.
    pub(crate) allocated_bytes: u64,
    /// A RAM file was found changed, and it was said so: whoever resumes the session then has put it right.
    #[serde(default)]
    pub(crate) file_failed: bool,
}

/// How far a destination had come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum DestinationState {
    /// The guest could run, and must not before the switchover.
    Loaded,
    /// The switchover has come: the guest is this side's, and may run.
    Switched,
    /// It runs.
    Running,
    /// It has all of its memory. Its side may have to hear of it, and the source has to.
    Complete,
    /// The source has said goodbye: nobody but its side may have to hear of it.
    Parted,
}

/// What has come in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TotalsRecord {
    data_bytes: u64,
    zero_bytes: u64,
    hole_bytes: u64,
    pages_demand: u64,
    pages_background: u64,
}

impl From<Totals> for TotalsRecord {
    fn from(totals: Totals) -> TotalsRecord {
        let Totals { data_bytes, zero_bytes, hole_bytes, pages_demand, pages_background } = totals;
        TotalsRecord { data_bytes, zero_bytes, hole_bytes, pages_demand, pages_background }
    }
}

impl From<TotalsRecord> for Totals {
    fn from(record: TotalsRecord) -> Totals {
        let TotalsRecord { data_bytes, zero_bytes, hole_bytes, pages_demand, pages_background } =
            record;
        Totals { data_bytes, zero_bytes, hole_bytes, pages_demand, pages_background }
    }
}

/// Who runs the guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct GuestRecord {
    pub(crate) pid: u32,
    /// When it began, in the kernel's ticks: another process with that pid began later.
    pub(crate) began: u64,
    /// The process whose memory it is, where that is another one.
    pub(crate) owner: Option<u32>,
    /// RAM files that umem has made for it.
    pub(crate) created: Vec<Created>,
    /// Where it listens for commands, if it was started with a socket of its own for that; otherwise its
    /// side has kept umem's end.
    pub(crate) qmp: Option<PathBuf>,
    /// It has a monitor that has to be told to run.
    pub(crate) has_monitor: bool,
    /// The guest ran at the source.
    pub(crate) runs: bool,
}

/// A region, in the order of the source's table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RegionRecord {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    /// log2 of the landing unit's size.
    pub(crate) unit_shift: u8,
}

/// What a destination has to know to go on; the pages' states are in memory that the guest's side keeps.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct DestinationRecord {
    pub(crate) version: u32,
    pub(crate) state: DestinationState,
    /// Where it listened; none where there was one connection.
    pub(crate) uri: Option<String>,
    pub(crate) bulk_lanes: u16,
    pub(crate) capabilities: u64,
    /// Whose lanes they were, with TLS: the certificate, in hexadecimal digits.
    pub(crate) certificate: Option<String>,
    pub(crate) regions: Vec<RegionRecord>,
    pub(crate) postcopy: bool,
    pub(crate) background: bool,
    /// As in the options.
    pub(crate) touch: bool,
    pub(crate) security: SecurityRecord,
    pub(crate) guest: GuestRecord,
    /// From the source guest's stop to its switchover, µs.
    pub(crate) stopped_us: u64,
    /// When the switchover came and when the guest ran, nanoseconds since boot.
    pub(crate) switched_at: Option<u64>,
    pub(crate) running_at: Option<u64>,
    /// Once it is complete.
    pub(crate) totals: TotalsRecord,
}
