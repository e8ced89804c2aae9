//! Figures of a move that tables compare.

use serde_json::{Map, Value, json};

use crate::report::{Table, cell};
use crate::statistics::Spread;

use super::moving::Move;

/// A compared quantity: its name in JSON, its head in the table, its digits there, its source.
#[derive(Clone, Copy)]
pub(super) struct Quantity {
    pub(super) name: &'static str,
    pub(super) head: &'static str,
    digits: usize,
    pub(super) get: fn(&Move) -> f64,
}

const fn quantity(
    name: &'static str,
    head: &'static str,
    digits: usize,
    get: fn(&Move) -> f64,
) -> Quantity {
    Quantity { name, head, digits, get }
}

const MIB: f64 = (1 << 20) as f64;

pub(super) const TOTAL: Quantity = quantity("total_s", "total s", 2, |m| m.total_s);
pub(super) const DRAIN: Quantity =
    quantity("stopped_to_complete_s", "stop→end s", 2, |m| m.drain_s);
pub(super) const DOWNTIME: Quantity = quantity("downtime_ms", "downtime ms", 1, |m| m.downtime_ms);
pub(super) const P50: Quantity = quantity("latency_p50_us", "p50 µs", 0, |m| m.latency.p50_us);
pub(super) const P99: Quantity = quantity("latency_p99_us", "p99 µs", 0, |m| m.latency.p99_us);
pub(super) const WORST_P99: Quantity =
    quantity("latency_p99_worst_us", "worst p99", 0, |m| m.latency.p99_worst_us);
pub(super) const MAX: Quantity = quantity("latency_max_us", "max µs", 0, |m| m.latency.max_us);
pub(super) const LOST: Quantity =
    quantity("work_lost_s", "work lost s", 2, |m| m.work_lost.since_stop_s);
pub(super) const LOST_IN_ALL: Quantity =
    quantity("work_lost_in_all_s", "in all s", 2, |m| m.work_lost.in_all_s);
pub(super) const FAULTS: Quantity = quantity("faults", "faults", 0, |m| m.faults as f64);
pub(super) const SENT: Quantity = quantity("sent_mib", "sent MiB", 0, |m| m.sent_bytes / MIB);
pub(super) const LINK: Quantity =
    quantity("link_gbps", "link Gbit/s", 2, |m| m.traffic.map_or(f64::NAN, |traffic| traffic.gbps));
pub(super) const LINK_SHARE: Quantity = quantity("link_share", "of the link", 2, |m| {
    m.traffic.map_or(f64::NAN, |traffic| traffic.share)
});
pub(super) const CPU: Quantity = quantity("cpu_s", "CPU s", 2, |m| m.cpu.all_s);
pub(super) const CPU_WITHOUT_VCPUS: Quantity =
    quantity("cpu_without_vcpus_s", "without vCPUs", 2, |m| m.cpu.without_vcpus_s());

impl Quantity {
    pub(super) fn spread(&self, moves: &[Move]) -> Spread {
        Spread::of(moves.iter().map(self.get).collect())
    }

    pub(super) fn cell(&self, moves: &[Move]) -> String {
        cell(self.spread(moves).median, self.digits)
    }
}

/// An empty table of these, behind a column with this head.
pub(super) fn table(first: &str, quantities: &[Quantity]) -> Table {
    let heads = quantities.iter().map(|quantity| quantity.head);
    Table::new(&std::iter::once(first).chain(heads).collect::<Vec<_>>())
}

/// The spreads of all of these, by their names.
pub(super) fn spreads(quantities: &[Quantity], moves: &[Move]) -> Map<String, Value> {
    let spread = |quantity: &Quantity| (quantity.name.into(), json!(quantity.spread(moves)));
    quantities.iter().map(spread).collect()
}
