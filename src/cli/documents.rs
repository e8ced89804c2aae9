//! The commands and options in the documents exist.

use std::path::{Path, PathBuf};

use argh::{ArgsInfo, CommandInfoWithArgs, FromArgs};

use super::Arguments;

/// A document in Markdown: its path from the root of the repository, and its text.
struct Document {
    path: PathBuf,
    text: String,
}

impl Document {
    /// Whether the document is README.md or a page of the guide: those are for users.
    fn is_guide(&self) -> bool {
        self.path == Path::new("README.md") || self.path.parent() == Some(Path::new("docs"))
    }
}

/// The documents that describe umem as it is. The changelog describes umem as it was.
fn documents() -> Vec<Document> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut documents = Vec::new();
    for folder in ["", "docs", "docs/design", "docs/decisions", "perf"] {
        for entry in std::fs::read_dir(root.join(folder)).expect("a folder of documents") {
            let name = entry.expect("an entry").file_name();
            let path = Path::new(folder).join(name);
            let is_current =
                !["CHANGELOG.md", "perf/RESULTS.md"].iter().any(|other| path == Path::new(other));
            if path.extension().is_some_and(|extension| extension == "md") && is_current {
                let text = std::fs::read_to_string(root.join(&path)).expect("a document");
                documents.push(Document { path, text });
            }
        }
    }
    assert!(documents.len() > 30, "only {} documents were found", documents.len());
    documents
}

/// Options in the text that belong to other programs.
const FOREIGN: [&str; 3] = ["--locked", "--output", "--release"];

/// The user can type every command of a code block.
#[test]
fn command_line_accepts_every_command_in_a_code_block() {
    let mut count = 0;
    for Document { path, text } in documents() {
        for line in code_lines(&text) {
            for words in commands(&line) {
                let parsed = Arguments::from_args(&["umem"], &words);
                // Help ends early without an error.
                if let Err(exit) = parsed
                    && exit.status.is_err()
                {
                    let (path, output) = (path.display(), exit.output.trim());
                    panic!("{path} has `umem {}`: {output}", words.join(" "));
                }
                count += 1;
            }
        }
    }
    assert!(count > 12, "only {count} commands were found");
}

/// A command in a sentence may be incomplete; its words must be right.
#[test]
fn command_line_has_every_option_of_a_command_in_a_sentence() {
    let umem = Arguments::get_args_info();
    let mut count = 0;
    for Document { path, text } in documents() {
        for span in spans(&text) {
            for words in commands(span) {
                check(&umem, &words)
                    .unwrap_or_else(|what| panic!("{} has `{span}`: {what}", path.display()));
                count += 1;
            }
        }
    }
    assert!(count > 40, "only {count} commands were found");
}

/// An option without its command belongs to some command.
#[test]
fn some_command_has_every_option_that_the_guide_names_alone() {
    let umem = Arguments::get_args_info();
    let mut count = 0;
    for Document { path, text } in documents().iter().filter(|document| document.is_guide()) {
        for span in spans(text) {
            let Some(option) =
                span.split([' ', '=', '\n']).next().filter(|word| word.starts_with("--"))
            else {
                continue;
            };
            let is_known = option == "--" || FOREIGN.contains(&option) || has(&umem, option);
            assert!(is_known, "{} has `{span}`, and no command has {option}", path.display());
            count += 1;
        }
    }
    assert!(count > 60, "only {count} options were found");
}

/// The lines of the indented blocks, except drawings. Lines that a backslash continues are joined.
fn code_lines(text: &str) -> Vec<String> {
    let is_code = |paragraph: &&str| paragraph.starts_with("    ");
    let is_drawing = |block: &&str| block.contains("--- ") || block.contains("--+");
    let blocks = text.split("\n\n").filter(is_code).filter(|block| !is_drawing(block));
    let joined = blocks.map(|block| block.replace("\\\n", " "));
    joined.flat_map(|block| block.lines().map(str::to_owned).collect::<Vec<_>>()).collect()
}

/// The spans between backticks, outside of the indented blocks.
fn spans(text: &str) -> impl Iterator<Item = &str> {
    text.split("\n\n")
        .filter(|paragraph| !paragraph.starts_with("    "))
        .flat_map(|paragraph| paragraph.split('`').skip(1).step_by(2))
}

/// The words after `umem` in each command of a line, without `…`.
fn commands(line: &str) -> Vec<Vec<&str>> {
    let simple = line.split(['|', ';', '&', '(', ')']).map(str::trim);
    let umem = simple.filter_map(|command| {
        command.strip_prefix("umem ").or_else(|| command.strip_prefix("cargo run --release -- "))
    });
    umem.map(|words| words.split_once(" #").map_or(words, |(words, _)| words))
        .map(|words| words.split_whitespace().filter(|&word| word != "…").collect())
        .collect()
}

/// Checks the words of a possibly incomplete command; the error names the wrong word.
fn check(umem: &CommandInfoWithArgs, words: &[&str]) -> Result<(), String> {
    let mut command = umem;
    for word in words.iter().take_while(|&&word| word != "--") {
        if let Some(sub) = command.commands.iter().find(|sub| sub.name == *word) {
            command = &sub.command;
        } else if std::ptr::eq(command, umem) && !word.starts_with('-') && *word != "COMMAND" {
            return Err(format!("there is no command {word}"));
        } else if word.starts_with('-') && !takes(command, word) {
            let all = has(command, word);
            return if all { Ok(()) } else { Err(format!("{} has no {word}", command.name)) };
        }
    }
    Ok(())
}

/// Whether this command, without its subcommands, has the option.
fn takes(command: &CommandInfoWithArgs, option: &str) -> bool {
    let is_short = |short: Option<char>| {
        let mut rest = option.chars().skip(1);
        rest.next() == short && short.is_some() && rest.next().is_none()
    };
    option == "--help"
        || option == "-"
        || command.flags.iter().any(|flag| flag.long == option || is_short(flag.short))
}

/// Whether this command or one of its subcommands has the option.
fn has(command: &CommandInfoWithArgs, option: &str) -> bool {
    takes(command, option) || command.commands.iter().any(|sub| has(&sub.command, option))
}
