//! How a result is printed: as a page for a person, or as one JSON object.

use std::path::Path;

use serde_json::{Value, json};
use umem::observe::page::Page;

use crate::error::{Context, Result};
use crate::machine::Machine;
use crate::svg::Plot;

/// One subcommand's result.
pub(crate) struct Report {
    /// The subcommand.
    pub(crate) what: &'static str,
    pub(crate) machine: Machine,
    /// How it was measured, in sentences.
    pub(crate) method: String,
    pub(crate) tables: Vec<Table>,
    /// What `--json` gives beside machine and method.
    pub(crate) value: Value,
}

impl Report {
    /// Prints it; and writes it with these plots as a page, if there is to be one.
    pub(crate) fn show(&self, as_json: bool, page: Option<&Path>, plots: &[Plot]) -> Result<()> {
        self.print(as_json);
        let Some(path) = page else { return Ok(()) };
        std::fs::write(path, self.page(plots))
            .context(|| format!("writing the report {}", path.display()))
    }

    fn page(&self, plots: &[Plot]) -> String {
        let mut page = Page::new(&format!("umem-perf {}", self.what), &self.machine.line());
        page.text(&self.method);
        for (index, plot) in plots.iter().enumerate() {
            page.plot(&format!("plot-{}", index + 1), plot.markup());
        }
        for table in &self.tables {
            let (head, rows) = table.rows.split_first().expect("a table has a head");
            page.table("Figures", head, rows);
        }
        page.to_html()
    }

    fn print(&self, as_json: bool) {
        if as_json {
            let mut object = json!({
                "event": "measured",
                "what": self.what,
                "machine": self.machine,
                "method": self.method,
            });
            if let (Value::Object(object), Value::Object(value)) = (&mut object, &self.value) {
                object.extend(value.clone());
            }
            println!("{object}");
            return;
        }
        println!("machine  {}", self.machine.line());
        println!("method   {}", wrapped(&self.method, 9));
        for table in &self.tables {
            println!("\n{}", table.text());
        }
    }
}

/// What is going on, for whoever waits.
pub(crate) fn progress(text: &str) {
    eprintln!("umem-perf: {text}");
}

/// A number for a cell; a dash for one that there is none of.
pub(crate) fn cell(value: f64, digits: usize) -> String {
    if value.is_finite() { format!("{value:.digits$}") } else { "–".into() }
}

/// Rows of cells; the first column is flush left, the others right.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(head: &[&str]) -> Table {
        Table { rows: vec![head.iter().map(|&cell| cell.to_owned()).collect()] }
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let lines = self.rows.iter().map(|row| {
            let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
                if column == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
            });
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        });
        lines.collect::<Vec<_>>().join("\n")
    }
}

/// `text` in lines of about 100 columns, all but the first indented.
fn wrapped(text: &str, indent: usize) -> String {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("there is always one");
        if line.is_empty() {
            line.push_str(word);
        } else if indent + line.chars().count() + word.chars().count() < 99 {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines.join(&format!("\n{:indent$}", ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["µs", "a"]);
        table.row(vec!["long name".into(), "1.00".into()]);
        assert_eq!(table.text(), "µs            a\nlong name  1.00");
    }

    #[test]
    fn long_text_is_wrapped() {
        let text = wrapped(&"word ".repeat(40), 4);
        assert!(text.lines().count() > 1 && text.lines().all(|line| line.chars().count() < 100));
    }
}
