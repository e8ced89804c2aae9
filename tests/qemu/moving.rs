//! A guest during its move, and the checks after its arrival.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::destination::Destination;
use crate::migrate;
use crate::support::{Qemu, Qmp, Tap, Umem};

/// A migration in progress.
pub(super) struct Moving {
    pub(super) source: Qemu,
    pub(super) umem: Umem,
    pub(super) destination: Destination,
}

impl Moving {
    /// Waits until the guest has checked all of its memory at the destination.
    pub(super) fn is_whole_at_the_destination(&mut self) {
        let last = self.source.serial.last_beat();
        let serial = &mut self.destination.serial;
        let first = serial.beat("a number after the source's last", |_| true);
        assert!(first.number > last.number, "{first:?} at the destination after {last:?}");
        // One sweep was in progress when the guest was moved; the next one runs at the destination alone.
        serial.beat("two more sweeps", |beat| beat.passes >= first.passes + 2);
        serial.beat("further reads and writes", |beat| {
            beat.reads > first.reads && beat.writes > first.writes
        });
        assert_eq!(self.source.serial.last_beat().number, last.number, "both guests run");
    }

    /// Waits for both reports and checks them, and the guest.
    pub(super) fn complete(mut self) -> Moved {
        let ours = self.umem.event("completed");
        let report = self.destination.umem.event("completed");
        check_reports(&ours, &report);
        self.is_whole_at_the_destination();
        assert_eq!(self.source.qmp.status(), "postmigrate");
        let total: u64 = self.destination.ram_files.iter().map(|path| bytes_of(path)).sum();
        assert_eq!(report["total_bytes"], total);
        is_free_of_userfaultfd(self.destination.guest_pid);
        self.umem.succeeds();
        Moved { source: self.source, destination: self.destination, report }
    }
}

/// An arrived guest, with the destination's report.
pub(super) struct Moved {
    pub(super) source: Qemu,
    pub(super) destination: Destination,
    pub(super) report: Value,
}

impl Moved {
    /// Starts a migration with these options.
    pub(super) fn start(source: Qemu, destination: Destination, options: &[&str]) -> Moving {
        let umem = migrate(&source, &destination.uri, options);
        Moving { source, umem, destination }
    }

    pub(super) fn start_through(
        tap: &Tap,
        source: Qemu,
        destination: Destination,
        options: &[&str],
    ) -> Moving {
        let umem = migrate(&source, tap.uri(), options);
        Moving { source, umem, destination }
    }

    /// Its QEMU quits; `umem incoming`, which has waited for it, ends as well.
    pub(super) fn end(mut self) {
        assert!(self.destination.umem.is_running());
        Qmp::connect(&self.destination.qmp).quit();
        self.destination.umem.succeeds();
        self.source.qmp.quit();
    }
}

fn bytes_of(path: &Path) -> u64 {
    fs::metadata(path).expect("the guest has the file").len()
}

/// Checks the two reports of one migration, each for itself and against each other.
fn check_reports(source: &Value, destination: &Value) {
    let kind = destination["kind"].as_str().expect("a kind");
    let kinds = ["shared", "private", "anonymous", "anonymous,shared"];
    assert!(kinds.contains(&kind), "{destination}");
    for (report, role) in [(source, "source"), (destination, "destination")] {
        let number = |name: &str| {
            report[name].as_u64().unwrap_or_else(|| panic!("{name} is not a count: {report}"))
        };
        let seconds = |name: &str| {
            report[name].as_f64().unwrap_or_else(|| panic!("{name} is not a number: {report}"))
        };
        assert_eq!(report["role"], role);
        assert_eq!(report["kind"].as_str(), Some(if role == "source" { "shared" } else { kind }));
        assert_eq!(report["page_size"], 4096);
        assert!(number("lanes") > 0, "{report}");
        let total = number("total_bytes");
        let parts = ["data_bytes", "zero_bytes", "hole_bytes"].map(number);
        assert_eq!(parts.iter().sum::<u64>(), total, "{report}");
        assert!(parts[0] > 0, "{report}");
        assert_eq!(number("pages_demand") + number("pages_background"), total / 4096, "{report}");
        assert!(seconds("downtime_ms") > 0.0, "{report}");
        assert!(seconds("total_s") > 0.0 && seconds("gbps") > 0.0, "{report}");
        assert!(seconds("drain_s") <= seconds("total_s"), "{report}");
        let is_released = report["kind"] == "private";
        assert_eq!(number("release_bytes"), if is_released { parts[0] } else { 0 }, "{report}");
        let cpu = &report["cpu_s"];
        assert!(cpu["user"].is_f64() && cpu["system"].is_f64(), "{report}");
        assert!(report["zero_copy"].is_string(), "{report}");
    }
    for name in ["total_bytes", "data_bytes", "zero_bytes", "hole_bytes", "lanes"] {
        assert_eq!(source[name], destination[name], "{name}");
    }
    let latency = &destination["fault_latency_us"];
    let quantiles =
        ["p50", "p90", "p99", "p999", "max"].map(|name| latency[name].as_u64().expect(name));
    assert!(quantiles.is_sorted(), "{latency}");
    // If pages were demanded, a vCPU waited. It may also wait for pages that are on the way.
    let count = latency["count"].as_u64().expect("count");
    let asked = destination["pages_demand"].as_u64().expect("pages_demand");
    assert!(count > 0 || asked == 0, "{destination}");
}

/// The guest's process shows no trace of having been a destination.
fn is_free_of_userfaultfd(pid: u32) {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("the guest runs");
    let registered = |line: &&str| {
        line.strip_prefix("VmFlags:")
            .is_some_and(|flags| flags.split(' ').any(|flag| flag == "um" || flag == "ui"))
    };
    assert_eq!(maps.lines().find(registered), None);
    assert!(maps.contains("VmFlags:"), "this kernel reports no flags");
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).expect("the guest runs");
    let open = descriptors.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    let userfaultfds: Vec<PathBuf> =
        open.filter(|target| target.to_string_lossy().contains("userfaultfd")).collect();
    assert_eq!(userfaultfds, Vec::<PathBuf>::new());
}
