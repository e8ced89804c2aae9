//! Output of a result: as a page for people, or as one JSON object.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use umem::observe::page::Page;

use crate::error::{Context, Result};
use crate::machine::Machine;
use crate::svg::{self, Plot};

/// One subcommand's result.
pub(crate) struct Report {
    /// The subcommand.
    pub(crate) what: &'static str,
    pub(crate) machine: Machine,
    /// The method, in sentences.
    pub(crate) method: String,
    /// The main results, a line each.
    pub(crate) highlights: Vec<String>,
    pub(crate) tables: Vec<Table>,
    pub(crate) plots: Vec<Plot>,
    /// Further data for `--json`.
    pub(crate) value: Value,
}

/// The output files of a subcommand's options.
pub(crate) struct Output<'a> {
    /// Print one JSON object to stdout.
    pub(crate) json: bool,
    /// A file for a page.
    pub(crate) report: Option<&'a Path>,
    /// A file for the plots.
    pub(crate) svg: Option<&'a Path>,
}

/// A subcommand that measures.
pub(crate) trait Measure {
    fn measure(&self) -> Result<Report>;
    fn output(&self) -> Output<'_>;

    /// Measures, and adds the machine's other activity.
    fn measured(&self) -> Result<Report> {
        let mut report = self.measure()?;
        report.machine.ended();
        Ok(report)
    }

    /// Measures, and writes the result. `command` is the command line.
    fn run(&self, command: &str) -> Result<()> {
        let report = self.measured()?;
        let output = self.output();
        report.print(output.json, command);
        if let Some(path) = output.svg {
            write(path, &svg::svg(&report.plots))?;
        }
        if let Some(path) = output.report {
            write(path, &report.page())?;
        }
        Ok(())
    }
}

pub(crate) fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).context(|| format!("writing {}", path.display()))
}

impl Report {
    /// The same result under another name.
    pub(crate) fn named(self, what: &'static str) -> Report {
        Report { what, ..self }
    }

    fn page(&self) -> String {
        let machine = format!("{}. {}", self.machine.line(), self.machine.else_line());
        let mut page = Page::new(&format!("umem-perf {}", self.what), &machine);
        page.text(&self.method);
        for (index, plot) in self.plots.iter().enumerate() {
            let plot = std::slice::from_ref(plot);
            page.plot(&format!("plot-{}", index + 1), &svg::svg(plot));
        }
        for table in &self.tables {
            page.table("Figures", &table.head, &table.rows);
        }
        page.to_html()
    }

    /// The result as one JSON object: its figures, and the parts that a page of results needs.
    pub(crate) fn object(&self, command: &str) -> Value {
        let mut object = json!({
            "event": "measured",
            "what": self.what,
            "command": command,
            "machine": self.machine,
            "method": self.method,
            "highlights": self.highlights,
            "tables": self.tables,
            "plots": self.plots,
        });
        if let (Value::Object(object), Value::Object(value)) = (&mut object, &self.value) {
            object.extend(value.clone());
        }
        object
    }

    fn print(&self, as_json: bool, command: &str) {
        if as_json {
            println!("{}", self.object(command));
            return;
        }
        let machine = format!("{}. {}", self.machine.line(), self.machine.else_line());
        println!("machine  {}", wrapped(&machine, 9));
        println!("method   {}", wrapped(&self.method, 9));
        for table in &self.tables {
            println!("\n{}", table.text());
        }
    }
}

/// Reports progress on stderr.
pub(crate) fn progress(text: &str) {
    eprintln!("umem-perf: {text}");
}

/// A number for a cell; a dash for NaN.
pub(crate) fn cell(value: f64, digits: usize) -> String {
    if value.is_finite() { format!("{value:.digits$}") } else { "–".into() }
}

/// Rows of cells; the first column is flush left, the others right.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Table {
    pub(crate) head: Vec<String>,
    pub(crate) rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(head: &[&str]) -> Table {
        let head = head.iter().map(|&cell| cell.to_owned()).collect();
        Table { head, rows: Vec::new() }
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    fn text(&self) -> String {
        let all = || std::iter::once(&self.head).chain(&self.rows);
        let columns = all().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = all().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let lines = all().map(|row| {
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
    fn table_columns_are_aligned() {
        let mut table = Table::new(&["µs", "a"]);
        table.row(vec!["long name".into(), "1.00".into()]);
        assert_eq!(table.text(), "µs            a\nlong name  1.00");
    }

    #[test]
    fn long_text_is_wrapped_and_indented() {
        let text = wrapped(&"word ".repeat(40), 4);
        assert!(text.lines().count() > 1 && text.lines().all(|line| line.chars().count() < 100));
    }
}
