//! The contents of a session file.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use umem_wire::Totals;

use crate::error::Result;
use crate::host::monitor::MonitorRecord;
use crate::memory::created::Created;
use crate::memory::staging;
use crate::memory::stamp::Stamp;
use crate::runtime::os_text::{self, absolute};
use crate::transport::secure::Security;

/// The version of the records below. A umem that takes over has to support it.
pub(crate) const VERSION: u32 = 4;

/// The means of securing lanes: files that are read again.
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

/// The state of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum SourceState {
    /// The guest was stopped, or about to be, and may be resumed: no switchover has been sent.
    Stopped,
    /// A switchover may have been sent: the guest may run at the destination, and never again here.
    Committed,
    /// The destination has reported that it has everything: the pages here are not needed any more.
    Completed,
}

/// A RAM file of the source's guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RamRecord {
    pub(crate) name: String,
    #[serde(with = "os_text::path")]
    pub(crate) path: PathBuf,
    /// The region's offset in the file.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    /// These two identify the file.
    pub(crate) device: u64,
    pub(crate) inode: u64,
    /// log2 of the landing unit's size; 0 before the destination has sent it.
    pub(crate) unit_shift: u8,
    /// The file's stamp when the guest had stopped, if the file must not change after that.
    #[serde(default)]
    pub(crate) stamp: Option<Stamp>,
    /// Whether it is a file of umem's own, with unsent contents of the guest's private memory: it is removed with the
    /// session. It has its name from the commit on.
    #[serde(default)]
    pub(crate) is_own: bool,
}

impl SourceRecord {
    /// Removes the files that umem has made for the session, which has ended.
    pub(crate) fn remove_own_files(&self) {
        self.ram.iter().filter(|ram| ram.is_own).for_each(|ram| staging::remove(&ram.path));
    }
}

/// The data that a source needs to resume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SourceRecord {
    pub(crate) version: u32,
    pub(crate) state: SourceState,
    pub(crate) uri: String,
    pub(crate) bulk_lanes: u16,
    /// As in the lanes' hellos.
    pub(crate) capabilities: u64,
    /// The highest epoch of any attempt to open lanes, in this and all earlier processes: it is
    /// written before the attempt.
    pub(crate) epoch: u32,
    pub(crate) ram: Vec<RamRecord>,
    /// The data for the guest's monitor; None for RAM files alone.
    pub(crate) monitor: Option<MonitorRecord>,
    pub(crate) postcopy: bool,
    pub(crate) background: bool,
    pub(crate) max_postcopy_bandwidth: Option<u64>,
    pub(crate) security: SecurityRecord,
    /// The destination has reported that the guest runs there.
    pub(crate) running: bool,
    /// Bytes of the guest's memory at the destination's last report.
    pub(crate) heard_bytes: u64,
    /// When the guest was stopped, and when the switchover was sent, nanoseconds since boot.
    pub(crate) stopped_at: u64,
    pub(crate) switched_at: u64,
    /// Bytes that the RAM files held at the switchover, if they are freed.
    pub(crate) allocated_bytes: u64,
    /// A RAM file was found changed, and that was reported: resuming the session then means that it
    /// has been repaired.
    #[serde(default)]
    pub(crate) file_failed: bool,
}

/// The state of a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum DestinationState {
    /// The guest could run, and must not before the switchover.
    Loaded,
    /// The switchover has come: the guest belongs to this side, and may run.
    Switched,
    /// The guest runs.
    Running,
    /// The guest has all of its memory. The source, and perhaps the guest's side, are still to be
    /// told.
    Complete,
    /// The source has said goodbye: at most the guest's side is still to be told.
    Parted,
}

/// Totals received.
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

/// The process of the guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct GuestRecord {
    pub(crate) pid: u32,
    /// Its start time, in the kernel's ticks: another process with that pid started later.
    pub(crate) began: u64,
    /// The process that owns the memory, if it is another one.
    pub(crate) owner: Option<u32>,
    /// RAM files that umem has made for the guest.
    pub(crate) created: Vec<Created>,
    /// The data for the guest's monitor, which has to start the guest; None for a guest that runs by itself.
    pub(crate) monitor: Option<MonitorRecord>,
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

/// The data that a destination needs to resume; the pages' states are in memory that the guest's
/// side keeps.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct DestinationRecord {
    pub(crate) version: u32,
    pub(crate) state: DestinationState,
    /// The address on which it listened; none for a single connection.
    pub(crate) uri: Option<String>,
    pub(crate) bulk_lanes: u16,
    pub(crate) capabilities: u64,
    /// With TLS: the source's certificate, in hexadecimal digits.
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
    /// Set once the guest is complete.
    pub(crate) totals: TotalsRecord,
}
