//! What the documents tell people to type is what the command line takes.

use argh::{ArgsInfo, CommandInfoWithArgs, FromArgs};

use super::Arguments;

/// The documents that name commands of umem's.
const DOCUMENTS: [(&str, &str); 5] = [
    ("README.md", include_str!("../../README.md")),
    ("ARCHITECTURE.md", include_str!("../../ARCHITECTURE.md")),
    ("CONTRIBUTING.md", include_str!("../../CONTRIBUTING.md")),
    ("SECURITY.md", include_str!("../../SECURITY.md")),
    ("perf/README.md", include_str!("../../perf/README.md")),
];

/// Options in the text that are other programs'.
const FOREIGN: [&str; 3] = ["--locked", "--output", "--release"];

/// Whatever stands in a block of code can be typed.
#[test]
fn every_command_in_a_block_of_code_is_taken() {
    let mut count = 0;
    for (document, text) in DOCUMENTS {
        for line in code_lines(text) {
            for words in commands(&line) {
                let parsed = Arguments::from_args(&["umem"], &words);
                // Help is a way to end early, too.
                if let Err(exit) = parsed
                    && exit.status.is_err()
                {
                    panic!("{document} has `umem {}`: {}", words.join(" "), exit.output.trim());
                }
                count += 1;
            }
        }
    }
    assert!(count > 12, "only {count} commands were found");
}

/// Inside a sentence a command may be in part: what is there has to be right.
#[test]
fn every_command_in_a_sentence_has_its_options() {
    let umem = Arguments::get_args_info();
    let mut count = 0;
    for (document, text) in DOCUMENTS {
        for span in spans(text) {
            for words in commands(span) {
                check(&umem, &words)
                    .unwrap_or_else(|what| panic!("{document} has `{span}`: {what}"));
                count += 1;
            }
        }
    }
    assert!(count > 40, "only {count} commands were found");
}

/// An option that stands by itself is one of some command.
#[test]
fn every_option_in_a_sentence_of_the_readme_exists() {
    let umem = Arguments::get_args_info();
    let mut count = 0;
    for span in spans(DOCUMENTS[0].1) {
        let Some(option) =
            span.split([' ', '=', '\n']).next().filter(|word| word.starts_with("--"))
        else {
            continue;
        };
        let is_known = option == "--" || FOREIGN.contains(&option) || has(&umem, option);
        assert!(is_known, "README.md has `{span}`, and no command has {option}");
        count += 1;
    }
    assert!(count > 15, "only {count} options were found");
}

/// Lines of the blocks that are indented, those that go on with a backslash joined; not of drawings.
fn code_lines(text: &str) -> Vec<String> {
    let is_code = |paragraph: &&str| paragraph.starts_with("    ");
    let is_drawing = |block: &&str| block.contains("--- ") || block.contains("--+");
    let blocks = text.split("\n\n").filter(is_code).filter(|block| !is_drawing(block));
    let joined = blocks.map(|block| block.replace("\\\n", " "));
    joined.flat_map(|block| block.lines().map(str::to_owned).collect::<Vec<_>>()).collect()
}

/// What stands between backticks in the text beside the blocks, lines joined.
fn spans(text: &str) -> impl Iterator<Item = &str> {
    text.split("\n\n")
        .filter(|paragraph| !paragraph.starts_with("    "))
        .flat_map(|paragraph| paragraph.split('`').skip(1).step_by(2))
}

/// The words behind `umem` in each command of a line. What is left out (`…`) is left out.
fn commands(line: &str) -> Vec<Vec<&str>> {
    let simple = line.split(['|', ';', '&', '(', ')']).map(str::trim);
    let umem = simple.filter_map(|command| {
        command.strip_prefix("umem ").or_else(|| command.strip_prefix("cargo run --release -- "))
    });
    umem.map(|words| words.split_once(" #").map_or(words, |(words, _)| words))
        .map(|words| words.split_whitespace().filter(|&word| word != "…").collect())
        .collect()
}

/// What is wrong with the words of a command that may end early.
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

/// Whether an option is one of this command's own.
fn takes(command: &CommandInfoWithArgs, option: &str) -> bool {
    let is_short = |short: Option<char>| {
        let mut rest = option.chars().skip(1);
        rest.next() == short && short.is_some() && rest.next().is_none()
    };
    option == "--help"
        || option == "-"
        || command.flags.iter().any(|flag| flag.long == option || is_short(flag.short))
}

/// Whether an option is this command's, or one's of its subcommands.
fn has(command: &CommandInfoWithArgs, option: &str) -> bool {
    takes(command, option) || command.commands.iter().any(|sub| has(&sub.command, option))
}
