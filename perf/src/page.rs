//! `page`: a page, in Markdown, of results saved as JSON, with a drawing of their plots.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use argh::FromArgs;
use serde::Deserialize;

use crate::error::{Context, Result, failure, usage};
use crate::machine::Machine;
use crate::report::{Table, write};
use crate::svg::{self, Plot};

/// Writes a page of results that `--json` has printed, and a drawing of their plots.
#[derive(FromArgs)]
#[argh(
    subcommand,
    name = "page",
    example = "A page of the results that `umem-perf all` has saved:\n  {command_name} \
               target/release/perf-results/*.json --out RESULTS.md"
)]
pub(crate) struct Options {
    /// the page; a drawing of the same name with the extension .svg is written beside it (default
    /// RESULTS.md)
    #[argh(option, default = "PathBuf::from(\"RESULTS.md\")")]
    out: PathBuf,
    /// files with a JSON object each, in the order of the page
    #[argh(positional)]
    files: Vec<PathBuf>,
}

/// The parts of a result that a page shows.
#[derive(Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Saved {
    Measured(Box<Measured>),
    Failed { what: String, command: String, error: String },
}

#[derive(Deserialize)]
struct Measured {
    what: String,
    command: String,
    machine: Machine,
    method: String,
    highlights: Vec<String>,
    tables: Vec<Table>,
    plots: Vec<Plot>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    if options.files.is_empty() {
        return usage("give the files of the results, as printed by `umem-perf WHAT --json`");
    }
    make(&options.files, &options.out, None)
}

/// Fails now if the page cannot be written, instead of after the measurement. Leaves no file
/// behind.
pub(crate) fn check_writable(out: &Path) -> Result<()> {
    for path in [out, &drawing_of(out)] {
        let is_new = !path.exists();
        let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
        file.context(|| format!("writing {}", path.display()))?;
        if is_new {
            std::fs::remove_file(path).context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

/// Makes the page of these files, and its drawing. `command` measured all of them.
pub(crate) fn make(files: &[PathBuf], out: &Path, command: Option<&str>) -> Result<()> {
    let saved = files.iter().map(|file| read(file)).collect::<Result<Vec<Saved>>>()?;
    let drawing = drawing_of(out);
    let plots: Vec<Plot> = measured(&saved).flat_map(|result| result.plots.clone()).collect();
    let name = drawing.file_name().filter(|_| !plots.is_empty());
    let name = name.map(|name| name.to_string_lossy().into_owned());
    write(out, &page(&saved, name.as_deref(), command))?;
    if name.is_some() { write(&drawing, &svg::svg(&plots)) } else { Ok(()) }
}

fn drawing_of(page: &Path) -> PathBuf {
    page.with_extension("svg")
}

fn read(file: &Path) -> Result<Saved> {
    let text = std::fs::read_to_string(file).context(|| file.display())?;
    serde_json::from_str(&text).or_else(|error| {
        failure(format!("{} is not a result of umem-perf: {error}", file.display()))
    })
}

fn measured(saved: &[Saved]) -> impl Iterator<Item = &Measured> {
    saved.iter().filter_map(|saved| match saved {
        Saved::Measured(result) => Some(&**result),
        Saved::Failed { .. } => None,
    })
}

fn page(saved: &[Saved], drawing: Option<&str>, command: Option<&str>) -> String {
    let mut page = String::from("# Results\n\n");
    let by = command.map_or_else(|| "`umem-perf page`".into(), |command| format!("`{command}`"));
    let _ = writeln!(
        page,
        "Written by {by} of umem {}. The method of each subject, and how to read it, stand in \
         umem's perf/README.md. Trust the ratios of one run.\n",
        env!("CARGO_PKG_VERSION")
    );
    let mut machines: Vec<String> = measured(saved).map(|one| one.machine.line()).collect();
    machines.dedup();
    machines.iter().for_each(|machine| page += &format!("Machine: {machine}.\n\n"));
    for result in measured(saved) {
        for highlight in &result.highlights {
            let _ = writeln!(page, "- **{}**: {highlight}", result.what);
        }
    }
    if let Some(drawing) = drawing {
        let _ = writeln!(page, "\n![Latencies and throughputs]({drawing})");
    }
    for saved in saved {
        match saved {
            Saved::Measured(result) => section(&mut page, result),
            Saved::Failed { what, command, error } => {
                let _ = writeln!(page, "\n## {what}\n\n    {command}\n\nNot measured: {error}.");
            }
        }
    }
    page
}

fn section(page: &mut String, result: &Measured) {
    let _ = writeln!(page, "\n## {}\n\n    {}\n\n{}", result.what, result.command, result.method);
    let _ = writeln!(page, "{}", result.machine.else_line());
    for table in &result.tables {
        page.push('\n');
        row(page, &table.head);
        row(page, &table.head.iter().map(|_| "---".into()).collect::<Vec<String>>());
        table.rows.iter().for_each(|cells| row(page, cells));
    }
}

fn row(page: &mut String, cells: &[String]) {
    for cell in cells {
        let _ = write!(page, "| {} ", cell.replace('|', "\\|"));
    }
    page.push_str("|\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Report;
    use crate::scratch::Scratch;
    use crate::svg::Bar;

    #[test]
    fn page_shows_results_and_failed_subjects() {
        let scratch = Scratch::new().unwrap();
        let mut table = Table::new(&["a|b", "Gbit/s"]);
        table.row(vec!["first".into(), "1.0".into()]);
        let bar = Bar { name: "first".into(), value: Some(1.0), mark: None };
        let report = Report {
            what: "land",
            machine: Machine::describe(),
            method: "The method.".into(),
            highlights: vec!["much".into()],
            tables: vec![table],
            plots: vec![Plot::bars("Title", "Gbit/s", vec![bar])],
            value: serde_json::json!({ "rounds": 1 }),
        };
        let failed =
            r#"{"event":"failed","what":"qemu","command":"umem-perf qemu","error":"no QEMU"}"#;
        let files = ["land.json", "qemu.json"].map(|name| scratch.file(name));
        std::fs::write(&files[0], report.object("umem-perf land").to_string()).unwrap();
        std::fs::write(&files[1], failed).unwrap();
        let out = scratch.file("page.md");
        check_writable(&out).unwrap();
        assert!(!out.exists());
        assert!(check_writable(&scratch.file("nowhere/page.md")).is_err());
        make(&files, &out, Some("umem-perf all")).unwrap();
        let page = std::fs::read_to_string(&out).unwrap();
        for text in [
            "`umem-perf all`",
            "- **land**: much",
            "![Latencies and throughputs](page.svg)",
            "## land\n\n    umem-perf land\n\nThe method.",
            "| a\\|b | Gbit/s |\n| --- | --- |\n| first | 1.0 |",
            "## qemu\n\n    umem-perf qemu\n\nNot measured: no QEMU.",
        ] {
            assert!(page.contains(text), "{text:?} is not in\n{page}");
        }
        assert!(std::fs::read_to_string(scratch.file("page.svg")).unwrap().contains("Title"));
        std::fs::write(&files[1], "{}").unwrap();
        let error = make(&files, &out, None).unwrap_err().to_string();
        assert!(error.contains("qemu.json is not a result"), "{error}");
    }
}
