//! `umem bench client --report FILE`: the page of a test, from its JSON document.

use std::path::Path;

use serde_json::Value;

use super::page::Page;
use super::pictures;
use crate::error::{Context, Result};

/// Writes the report of a test: the document that `-J` prints, or a page.
pub(crate) fn write(path: &Path, document: &Value) -> Result<()> {
    let is_json = path.extension().is_some_and(|extension| extension == "json");
    let text = if is_json { document.to_string() } else { page(document) };
    std::fs::write(path, text).context(|| format!("--report {}", path.display()))
}

fn page(document: &Value) -> String {
    let end = &document["end"];
    let gbps = |sum: &Value| sum["bits_per_second"].as_f64().unwrap_or(0.0) / 1e9;
    let seconds = end["sum_received"]["seconds"].as_f64().unwrap_or(0.0);
    let title = format!("{:.2} Gbit/s of pages in {seconds:.1} s", gbps(&end["sum_received"]));
    let mut page = Page::new(&title, end["umem"]["verdict"].as_str().unwrap_or_default());
    let intervals = document["intervals"].as_array().map_or(&[][..], Vec::as_slice);
    for (name, title) in
        [("sum", "Throughput"), ("sum_bidir_reverse", "Throughput in the other direction")]
    {
        let sums: Vec<&Value> =
            intervals.iter().filter_map(|interval| interval.get(name)).collect();
        if name == "sum" || !sums.is_empty() {
            direction(&mut page, name, title, &sums);
        }
    }
    let mut numbers = Vec::new();
    flatten("", &document["start"]["test_start"], &mut numbers);
    flatten("", end, &mut numbers);
    page.table("Numbers", &["".into(), "".into()], &numbers);
    page.to_html()
}

/// One direction: the curve, and the intervals in numbers.
fn direction(page: &mut Page, id: &str, title: &str, sums: &[&Value]) {
    let gbps = |sum: &Value| number(sum, "bits_per_second") / 1e9;
    let steps: Vec<[f64; 3]> =
        sums.iter().map(|sum| [number(sum, "start"), number(sum, "end"), gbps(sum)]).collect();
    let caption = "Pages that moved in each interval.";
    page.figure(id, title, caption, &pictures::steps(&steps));
    let row = |sum: &&Value| {
        vec![
            format!("{:.2} to {:.2} s", number(sum, "start"), number(sum, "end")),
            format!("{:.2}", number(sum, "bytes") / 1e9),
            format!("{:.2}", gbps(sum)),
            sum["retransmits"].as_u64().map_or("–".into(), |count| count.to_string()),
            format!("{:.0}", number(sum, "pages_per_second")),
            if sum["omitted"] == true { "omitted".into() } else { String::new() },
        ]
    };
    let rows: Vec<Vec<String>> = sums.iter().map(row).collect();
    let head = ["interval", "GB", "Gbit/s", "retransmits", "pages/s", ""].map(str::to_owned);
    page.table("Intervals", &head, &rows);
}

fn number(object: &Value, name: &str) -> f64 {
    object[name].as_f64().unwrap_or(0.0)
}

/// Dotted names, as `jq` writes them, and their values.
fn flatten(prefix: &str, value: &Value, rows: &mut Vec<Vec<String>>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                flatten(&format!("{prefix}.{name}"), value, rows);
            }
        }
        Value::Null => {}
        Value::String(text) => rows.push(vec![prefix.to_owned(), text.clone()]),
        other => rows.push(vec![prefix.to_owned(), other.to_string()]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn page_of_a_test_shows_each_interval() {
        let sum = |start: f64| {
            json!({ "sum": { "start": start, "end": start + 1.0, "bytes": 1e9,
                "bits_per_second": 8e9, "pages_per_second": 244_140.6, "omitted": false } })
        };
        let document = json!({
            "start": { "test_start": { "num_streams": 2 } },
            "intervals": [sum(0.0), sum(1.0)],
            "end": {
                "sum_received": { "bits_per_second": 8e9, "seconds": 2.0 },
                "umem": { "verdict": "limited by <b>", "limit": "link" },
            },
        });
        let html = page(&document);
        assert!(html.contains("8.00 Gbit/s of pages in 2.0 s"), "{html}");
        assert!(html.contains("limited by &lt;b&gt;") && html.contains(".umem.limit"), "{html}");
        assert_eq!(html.matches("<td>8.00</td>").count(), 2);
        assert!(page(&json!({})).contains("<figure id=\"sum\""));
    }
}
