//! The documents agree with the repository: links and named files exist, events and metrics are listed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Folders of the repository: a name in a document that begins with one is a path.
const FOLDERS: [&str; 8] = ["src", "wire", "ring", "perf", "tests", "docs", "fuzz", ".ci"];

#[test]
fn every_relative_link_and_every_anchor_in_a_document_exists() {
    let (mut count, mut wrong) = (0, Vec::new());
    for document in documents() {
        let text = read(&document);
        for target in links(&text) {
            count += 1;
            if let Err(what) = check_link(&document, target) {
                wrong.push(format!("{}: ({target}) {what}", document.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(count > 150, "only {count} links were found");
}

#[test]
fn every_file_that_a_document_names_exists() {
    let names: BTreeSet<String> =
        sources().iter().filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect();
    let (mut count, mut wrong) = (0, Vec::new());
    for document in documents() {
        let text = read(&document);
        for name in spans(&text).flat_map(alternatives) {
            let exists = match is_path(&name) {
                true => root().join(&name).exists(),
                false if is_file_name(&name) => names.contains(&name),
                false => continue,
            };
            count += 1;
            if !exists {
                wrong.push(format!("{} names {name}", document.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(count > 150, "only {count} names were found");
}

#[test]
fn every_event_and_every_metric_is_listed_for_observers() {
    let listed = read(Path::new("docs/observing.md"));
    let mut missing = Vec::new();
    let mut events = BTreeSet::new();
    for source in sources().iter().filter(|path| path.starts_with("src")) {
        let text = read(source);
        events.extend(events_in(&text));
    }
    events.extend(events_of_control(&read(Path::new("src/events/mod.rs"))));
    assert!(events.len() > 20, "only {events:?} were found");
    events.extend(["completed".to_owned(), "failed".to_owned()]);
    let cells: Vec<&str> =
        listed.lines().filter_map(|line| line.strip_prefix("| ")?.split(" |").next()).collect();
    let is_listed = |name: &&String| cells.iter().any(|cell| cell.contains(&format!("`{name}`")));
    missing.extend(events.iter().filter(|event| !is_listed(event)));
    let metrics = read(Path::new("src/observe/metrics.rs"));
    let metrics: BTreeSet<String> = metrics
        .split('"')
        .filter(|text| text.starts_with("umem_") && text.bytes().all(is_of_name))
        .map(|name| {
            name.trim_end_matches("_bucket").trim_end_matches("_sum").trim_end_matches("_count")
        })
        .map(str::to_owned)
        .collect();
    assert!(metrics.len() > 10, "only {metrics:?} were found");
    missing.extend(metrics.iter().filter(|metric| !is_listed(metric)));
    assert!(missing.is_empty(), "docs/observing.md lacks {missing:?}");
}

/// The package has every page that README.md links to in docs.
#[test]
fn every_document_folder_is_packaged() {
    let manifest = read(Path::new("Cargo.toml"));
    let folders: BTreeSet<PathBuf> = documents()
        .iter()
        .filter_map(|path| path.parent())
        .filter(|folder| folder.starts_with("docs"))
        .map(Path::to_owned)
        .collect();
    assert!(folders.len() >= 3, "{folders:?}");
    for folder in folders.iter().map(|folder| folder.display()) {
        let asset = format!("[\"{folder}/*.md\", \"usr/share/doc/umem/{folder}/\"");
        assert!(manifest.contains(&asset), "Cargo.toml has no asset {asset}");
    }
}

#[test]
fn wrong_link_anchor_and_name_are_reported() {
    let here = Path::new("docs/README.md");
    assert!(check_link(here, "../README.md#install").is_ok());
    assert!(check_link(here, "https://example.org/").is_ok());
    assert!(check_link(here, "nowhere.md").is_err());
    assert!(check_link(here, "../README.md#nowhere").is_err());
    assert!(check_link(here, "#nowhere").is_err());
    let text = "See [one](a.md), `src/{x,y}.rs`.\n\n    [code](b.md) `c`\n\n[two](c.md#d)\n";
    assert_eq!(links(text), ["a.md", "c.md#d"]);
    let names: Vec<String> = spans(text).flat_map(alternatives).collect();
    assert_eq!(names, ["src/x.rs", "src/y.rs"]);
    assert!(
        is_path("src/x.rs") && !is_path("src/x y.rs") && !is_path("/usr/src") && !is_path("src")
    );
    assert_eq!(anchor("What it's *for* (`umem`)"), "what-its-for-umem");
    let events = events_in("o.event(\"one\", x); o.event(\n        \"two\",\n");
    assert_eq!(events, ["one", "two"]);
    let events = events_of_control("Event::One | Event::Two { .. } => \"one\",\n other => none,");
    assert_eq!(events, ["one"]);
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(root().join(path))
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every page in Markdown, by its path from the root, without downloads of tests.
fn documents() -> Vec<PathBuf> {
    let mut found = Vec::new();
    find(Path::new(""), false, "md", &mut found);
    for folder in ["docs", "perf"] {
        find(Path::new(folder), true, "md", &mut found);
    }
    assert!(found.len() > 30, "only {found:?} were found");
    found
}

/// Every source file, by its path from the root.
fn sources() -> Vec<PathBuf> {
    let mut found = Vec::new();
    find(Path::new(""), false, "rs", &mut found);
    for folder in ["src", "wire", "ring", "perf", "tests", "fuzz"] {
        find(Path::new(folder), true, "rs", &mut found);
    }
    found
}

fn find(folder: &Path, is_deep: bool, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(root().join(folder)).expect("a folder of the repository") {
        let entry = entry.expect("an entry");
        let path = folder.join(entry.file_name());
        let is_folder = entry.file_type().expect("a type").is_dir();
        let is_built = ["cache", "target"].iter().any(|name| entry.file_name() == *name);
        if is_folder && is_deep && !is_built {
            find(&path, is_deep, extension, found);
        } else if !is_folder && path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
}

/// The text without code blocks.
fn paragraphs(text: &str) -> impl Iterator<Item = &str> {
    text.split("\n\n").filter(|paragraph| !paragraph.trim_start_matches('\n').starts_with("    "))
}

/// The targets of links.
fn links(text: &str) -> Vec<&str> {
    let parts = paragraphs(text).flat_map(|paragraph| paragraph.split("](").skip(1));
    parts.filter_map(|part| part.split_once(')')).map(|(target, _)| target).collect()
}

/// The text between backticks.
fn spans(text: &str) -> impl Iterator<Item = &str> {
    paragraphs(text).flat_map(|paragraph| paragraph.split('`').skip(1).step_by(2))
}

/// `src/{a,b}.rs` as two names, anything else as one.
fn alternatives(span: &str) -> Vec<String> {
    let Some((before, rest)) = span.split_once('{') else { return vec![span.to_owned()] };
    let Some((list, after)) = rest.split_once('}') else { return vec![span.to_owned()] };
    list.split(',').map(|name| format!("{before}{name}{after}")).collect()
}

/// Whether a span is a path of the repository. Files that tests/run fetches are not.
fn is_path(span: &str) -> bool {
    let is_plain = span.bytes().all(|byte| is_of_name(byte) || b"./@-".contains(&byte));
    let folder = span.split_once('/').map(|(folder, _)| folder);
    is_plain
        && folder.is_some_and(|name| FOLDERS.contains(&name))
        && !span.starts_with("tests/cache")
}

fn is_file_name(span: &str) -> bool {
    let stem = span.strip_suffix(".rs");
    stem.is_some_and(|stem| !stem.is_empty() && stem.bytes().all(is_of_name))
}

fn is_of_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

fn check_link(document: &Path, target: &str) -> Result<(), String> {
    if target.starts_with("https://") {
        return Ok(());
    }
    let (path, fragment) = target.split_once('#').unwrap_or((target, ""));
    let folder = document.parent().expect("a folder");
    let file = match path {
        "" => document.to_owned(),
        path => folder.join(path),
    };
    if !root().join(&file).exists() {
        return Err("does not exist".into());
    }
    let has = |text: &str| {
        text.lines()
            .filter_map(|line| line.strip_prefix('#'))
            .any(|line| anchor(line.trim_start_matches('#').trim()) == fragment)
    };
    match fragment.is_empty() || has(&read(&file)) {
        true => Ok(()),
        false => Err(format!("has no heading for #{fragment}")),
    }
}

/// The anchor of a heading, as forges generate it from Markdown.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|&c| c.is_alphanumeric() || c == ' ' || c == '-' || c == '_');
    kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
}

/// The names of migration events.
fn events_of_control(source: &str) -> Vec<String> {
    let arms = source.split("=> \"").skip(1).filter_map(|arm| arm.split_once('"'));
    arms.map(|(name, _)| name.to_owned()).collect()
}

/// Names in calls of `Output::event`.
fn events_in(source: &str) -> Vec<String> {
    let calls = source.split(".event(").skip(1);
    let names = calls.filter_map(|call| call.trim_start().strip_prefix('"')?.split_once('"'));
    names.map(|(name, _)| name.to_owned()).collect()
}
