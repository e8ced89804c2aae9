//! Manual pages in roff, with man(7)'s macros, from argh's description of a command.

use argh::{CommandInfoWithArgs, FlagInfo, FlagInfoKind, Optionality, PositionalInfo};
use roff::{Inline, Roff, bold, italic, roman};

/// The page of `umem` (no command) or of `umem COMMAND`; None for an unknown command.
pub(crate) fn page(umem: &CommandInfoWithArgs, command: Option<&str>) -> Option<String> {
    let Some(name) = command else {
        return Some(write(umem, "umem", umem));
    };
    let found = umem.commands.iter().find(|sub| sub.name == name)?;
    Some(write(&found.command, &format!("umem {name}"), umem))
}

fn write(command: &CommandInfoWithArgs, words: &str, umem: &CommandInfoWithArgs) -> String {
    let title = words.replace(' ', "-");
    let version = concat!("umem ", env!("CARGO_PKG_VERSION"));
    let mut page = Roff::new();
    // A blank date; an empty one would be dropped.
    page.control("TH", [title.to_uppercase().as_str(), "1", " ", version, "User Commands"]);
    let description = one_line(command.description);
    let summary = description.split_once(". ").map_or(description.as_str(), |(first, _)| first);
    section(&mut page, "NAME");
    page.text([roman(format!("{title} - {}", summary.trim_end_matches('.')))]);
    section(&mut page, "SYNOPSIS");
    page.text(synopsis(command, words));
    section(&mut page, "DESCRIPTION");
    page.text([roman(description)]);
    for note in command.notes {
        paragraph(&mut page, &one_line(note));
    }
    arguments(&mut page, command);
    section(&mut page, "OPTIONS");
    for flag in command.flags.iter().filter(|flag| !flag.hidden) {
        item(&mut page, option(flag), flag.description);
    }
    if !command.commands.is_empty() {
        section(&mut page, "COMMANDS");
        for sub in &command.commands {
            let name = format!("{words} {}", sub.name);
            item(&mut page, vec![bold(name)], sub.command.description);
        }
        // Commands of a command have no pages of their own.
        for sub in command.commands.iter().filter(|_| words != "umem") {
            section(&mut page, &format!("OPTIONS OF {}", sub.name.to_uppercase()));
            page.text(synopsis(&sub.command, &format!("{words} {}", sub.name)));
            for flag in sub.command.flags.iter().filter(|flag| !flag.hidden) {
                item(&mut page, option(flag), flag.description);
            }
            for note in sub.command.notes {
                paragraph(&mut page, &one_line(note));
            }
        }
    }
    if !command.examples.is_empty() {
        section(&mut page, "EXAMPLES");
        command.examples.iter().for_each(|text| example(&mut page, text, words));
    }
    if !command.error_codes.is_empty() {
        section(&mut page, "EXIT STATUS");
        for status in command.error_codes {
            item(&mut page, vec![bold(status.code.to_string())], status.description);
        }
    }
    section(&mut page, "SEE ALSO");
    page.text(see_also(umem, &title));
    page.render()
}

fn section(page: &mut Roff, name: &str) {
    page.control("SH", [name]);
}

fn paragraph(page: &mut Roff, text: &str) {
    page.control("PP", []);
    page.text([roman(text)]);
}

fn item(page: &mut Roff, head: Vec<Inline>, text: &str) {
    page.control("TP", []);
    page.text(head);
    page.text([roman(one_line(text))]);
}

/// `umem demo [--size SIZE] …`
fn synopsis(command: &CommandInfoWithArgs, words: &str) -> Vec<Inline> {
    let mut line = vec![bold(words)];
    for flag in command.flags.iter().filter(|flag| !flag.hidden) {
        let is_needed = flag.optionality == Optionality::Required;
        line.push(roman(if is_needed { " " } else { " [" }));
        line.extend(option(flag));
        let repeats = matches!(flag.optionality, Optionality::Repeating);
        line.push(roman(match (is_needed, repeats) {
            (true, _) => "",
            (_, true) => "]…",
            (_, false) => "]",
        }));
    }
    for positional in command.positionals.iter().filter(|positional| !positional.hidden) {
        line.push(roman(" "));
        line.extend(placeholder(positional));
    }
    if !command.commands.is_empty() {
        line.extend([roman(" "), italic("COMMAND"), roman(" …")]);
    }
    line
}

/// `-p, --postcopy`, `--size SIZE`
fn option(flag: &FlagInfo<'_>) -> Vec<Inline> {
    let mut words = Vec::new();
    if let Some(short) = flag.short {
        words.extend([bold(format!("-{short}")), roman(", ")]);
    }
    words.push(bold(flag.long));
    if let FlagInfoKind::Option { arg_name } = flag.kind {
        words.extend([roman(" "), italic(arg_name.to_uppercase())]);
    }
    words
}

fn placeholder(positional: &PositionalInfo<'_>) -> Vec<Inline> {
    let name = italic(positional.name.to_uppercase());
    match positional.optionality {
        Optionality::Required => vec![name],
        Optionality::Optional => vec![roman("["), name, roman("]")],
        Optionality::Repeating => vec![roman("["), name, roman("]…")],
        Optionality::Greedy => vec![roman("["), bold("--"), roman(" "), name, roman("…]")],
    }
}

fn arguments(page: &mut Roff, command: &CommandInfoWithArgs) {
    let mut shown = command.positionals.iter().filter(|positional| !positional.hidden).peekable();
    if shown.peek().is_some() {
        section(page, "ARGUMENTS");
    }
    for positional in shown {
        item(page, vec![italic(positional.name.to_uppercase())], positional.description);
    }
}

/// A sentence, followed by the command, whose lines are indented there.
fn example(page: &mut Roff, text: &str, words: &str) {
    let text = text.replace("{command_name}", words);
    let (sentence, commands) = match text.split_once("\n") {
        Some((sentence, commands)) => (Some(sentence), commands.to_owned()),
        None => (None, text.clone()),
    };
    if let Some(sentence) = sentence {
        paragraph(page, sentence);
    }
    page.control("PP", []);
    page.control("nf", []);
    page.control("RS", ["4"]);
    for line in commands.lines() {
        page.text([roman(line.strip_prefix("  ").unwrap_or(line))]);
    }
    page.control("RE", []);
    page.control("fi", []);
}

/// The other pages.
fn see_also(umem: &CommandInfoWithArgs, title: &str) -> Vec<Inline> {
    let pages = umem.commands.iter().map(|sub| format!("umem-{}", sub.name));
    let mut line = Vec::new();
    for page in std::iter::once("umem".to_owned()).chain(pages).filter(|page| page != title) {
        if !line.is_empty() {
            line.push(roman(", "));
        }
        line.extend([bold(page), roman("(1)")]);
    }
    line
}

/// Doc comments and notes have the source's line breaks.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
