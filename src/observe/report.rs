//! `--report FILE`: recordings as figures or as a page.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::page::Page;
use super::pictures::{self, Timed};
use super::recording::Recording;
use crate::error::{Context, Error, Result};
use crate::statistics::Completed;

/// Checks before the migration that the report can be written.
pub(crate) fn check_writable(path: &Path) -> Result<()> {
    let context = || format!("--report {}", path.display());
    // Opening a FIFO would block until it has a reader.
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).custom_flags(libc::O_NONBLOCK);
    let kind = options.open(path).and_then(|file| file.metadata()).context(context)?.file_type();
    if kind.is_fifo() {
        return Err(Error::Usage(format!("{} is a FIFO: choose a file for the report", context())));
    }
    Ok(())
}

/// Writes the recordings of a migration's sides.
pub(crate) fn write(path: &Path, recordings: &[Recording]) -> Result<()> {
    let is_json = path.extension().is_some_and(|extension| extension == "json");
    let text = match (is_json, recordings) {
        (true, [recording]) => serde_json::to_string(recording).expect("plain numbers and strings"),
        (true, several) => serde_json::to_string(several).expect("plain numbers and strings"),
        (false, recordings) => page(recordings),
    };
    std::fs::write(path, text).context(|| format!("--report {}", path.display()))
}

/// The page of these recordings. Throughput, faults and the map are the destination's, if its recording is present.
fn page(recordings: &[Recording]) -> String {
    let sides = pictures::align(recordings);
    let Some(main) =
        sides.iter().find(|side| side.recording.role == "destination").or(sides.first())
    else {
        return Page::new("umem", "nothing was recorded").to_html();
    };
    let mut page = Page::new(&title(main.recording), &line(main.recording));
    if let Some(completed) = &main.recording.completed {
        page.highlights(&highlights(completed));
    }
    figures(&mut page, main, &sides);
    losses(&mut page, recordings);
    let completed: Vec<&Completed> =
        recordings.iter().filter_map(|recording| recording.completed.as_ref()).collect();
    if !completed.is_empty() {
        numbers(&mut page, &completed);
    }
    phases(&mut page, recordings);
    page.to_html()
}

fn title(recording: &Recording) -> String {
    let gib = recording.total_bytes as f64 / f64::from(1 << 30);
    match (&recording.completed, &recording.error) {
        (Some(completed), _) => {
            format!("A guest of {gib:.2} GiB moved in {:.2} s", completed.total_s)
        }
        (None, Some(error)) => format!("A guest did not move: {error}"),
        (None, None) => "A guest did not move".into(),
    }
}

fn line(recording: &Recording) -> String {
    let at = SystemTime::UNIX_EPOCH + Duration::from_millis(recording.began_unix_ms);
    let at = humantime::format_rfc3339_seconds(at);
    format!("umem {}, recorded at the {}, begun {at}", recording.version, recording.role)
}

fn highlights(completed: &Completed) -> Vec<(&'static str, String)> {
    let mut highlights = vec![
        ("downtime", format!("{:.1} ms", completed.downtime_ms)),
        ("throughput", format!("{:.2} Gbit/s", completed.gbps)),
        ("pages on demand", completed.pages_demand.to_string()),
    ];
    if let Some(latency) = completed.fault_latency_us.as_ref().filter(|latency| latency.count > 0) {
        highlights.push(("a fault, median", pictures::time(latency.p50 as f64)));
        highlights.push(("a fault, p99", pictures::time(latency.p99 as f64)));
    }
    highlights
}

/// Lost connections, if there were any.
fn losses(page: &mut Page, recordings: &[Recording]) {
    if recordings.iter().all(|side| side.connection_losses == 0) {
        return;
    }
    let head = ["side", "losses", "time without connections"].map(str::to_owned);
    let row = |side: &Recording| {
        let losses = format!("{} ×", side.connection_losses);
        vec![side.role.clone(), losses, format!("{:.3} s", side.disconnected_s)]
    };
    let rows: Vec<_> = recordings.iter().map(row).collect();
    page.table("Lost connections", &head, &rows);
}

fn figures(page: &mut Page, main: &Timed<'_>, sides: &[Timed<'_>]) {
    page.figure(
        "throughput",
        "Throughput",
        "Pages over time, and the faults that waited for them.",
        &pictures::throughput(main),
    );
    let latency =
        main.recording.completed.as_ref().and_then(|completed| completed.fault_latency_us.as_ref());
    page.figure(
        "latency",
        "Fault latency",
        "Time from reading a fault to waking the guest.",
        &pictures::latencies(&main.recording.faults, latency),
    );
    let mib = main.recording.map.cell_bytes as f64 / f64::from(1 << 20);
    page.figure(
        "map",
        "The guest's memory",
        &format!("Addresses in rows from the top left, {mib} MiB a cell."),
        &pictures::map(main),
    );
    page.figure(
        "timeline",
        "Phases",
        "The phases of each side. The table below names the phases that are too short for a label.",
        &pictures::timeline(sides),
    );
}

/// The report in numbers, a column for each side.
fn numbers(page: &mut Page, sides: &[&Completed]) {
    let mut head = vec![String::new()];
    head.extend(sides.iter().map(|side| side.role.clone()));
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut row = |name: &str, value: &dyn Fn(&Completed) -> String| {
        let mut cells = vec![name.to_owned()];
        cells.extend(sides.iter().map(|side| value(side)));
        rows.push(cells);
    };
    row("memory kind", &|c| c.kind.clone());
    row("page size", &|c| format!("{} KiB", c.page_size >> 10));
    row("bulk lanes", &|c| c.lanes.to_string());
    row("guest RAM", &|c| mib(c.total_bytes));
    row("page contents", &|c| mib(c.data_bytes));
    row("zeroes", &|c| mib(c.zero_bytes));
    row("holes", &|c| mib(c.hole_bytes));
    row("pages on demand", &|c| c.pages_demand.to_string());
    row("pages in the background", &|c| c.pages_background.to_string());
    row("downtime", &|c| format!("{:.2} ms", c.downtime_ms));
    row("from running to the last page", &|c| format!("{:.3} s", c.drain_s));
    row("from the stop to the last page", &|c| format!("{:.3} s", c.total_s));
    row("throughput", &|c| format!("{:.2} Gbit/s", c.gbps));
    if sides.iter().any(|side| side.precopy_bytes > 0) {
        row("page contents while the guest ran at the source", &|c| mib(c.precopy_bytes));
        row("passes", &|c| if c.passes == 0 { "–".into() } else { c.passes.to_string() });
        row("written by the guest in the last whole pass", &|c| {
            c.dirty_bytes_per_s.map_or("–".into(), |rate| format!("{}/s", mib(rate)))
        });
        row("expected downtime", &|c| {
            c.expected_downtime_ms.map_or("–".into(), |ms| format!("{ms:.2} ms"))
        });
    }
    row("processor time, user", &|c| format!("{:.3} s", c.cpu_s.user));
    row("processor time, kernel", &|c| format!("{:.3} s", c.cpu_s.system));
    row("sent without a copy", &|c| c.zero_copy.clone());
    row("freed", &|c| mib(c.release_bytes));
    row("congestion control", &|c| c.congestion.clone());
    if sides.iter().any(|side| side.checksum) {
        row("wrong checksums", &|c| c.checksum_errors.to_string());
        row("digests", &|c| {
            let digests =
                c.digests.iter().map(|region| format!("{} {}", region.region, region.digest));
            digests.collect::<Vec<_>>().join(", ")
        });
    }
    for (name, value) in [
        ("faults", (|l| l.count) as fn(&crate::statistics::Latency) -> u64),
        ("fault p50, µs", |l| l.p50),
        ("fault p90, µs", |l| l.p90),
        ("fault p99, µs", |l| l.p99),
        ("fault p99.9, µs", |l| l.p999),
        ("fault max, µs", |l| l.max),
    ] {
        row(name, &|c| c.fault_latency_us.as_ref().map_or("–".into(), |l| value(l).to_string()));
    }
    page.table("Numbers", &head, &rows);
}

fn phases(page: &mut Page, recordings: &[Recording]) {
    let head = ["phase", "side", "begins", "takes"].map(str::to_owned);
    let mut rows = Vec::new();
    for side in pictures::align(recordings) {
        for span in &side.recording.phases {
            rows.push(vec![
                span.name.clone(),
                side.recording.role.clone(),
                format!("{:.4} s", side.at(span.begin_s)),
                format!("{:.4} s", span.end_s - span.begin_s),
            ]);
        }
    }
    page.table("Phases in numbers", &head, &rows);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_has_a_table_of_lost_connections_only_after_losses() {
        let whole = Recording { role: "source".into(), ..Recording::default() };
        let cut = Recording { connection_losses: 3, disconnected_s: 1.25, ..whole.clone() };
        assert!(!page(&[whole]).contains("Lost connections"));
        let html = page(&[cut]);
        assert!(html.contains("<td>source</td><td>3 ×</td><td>1.250 s</td>"), "{html}");
    }

    #[test]
    fn page_of_a_failed_migration_states_the_reason() {
        let recording = Recording {
            role: "source".into(),
            error: Some("<b>the destination</b> gave up".into()),
            ..Recording::default()
        };
        let html = page(&[recording]);
        assert!(html.contains("&lt;b&gt;the destination&lt;/b&gt; gave up"), "{html}");
        for id in ["throughput", "latency", "map", "timeline"] {
            assert!(html.contains(&format!("<figure id=\"{id}\" ")), "{id}");
        }
        assert!(page(&[]).contains("nothing was recorded"));
    }
}
