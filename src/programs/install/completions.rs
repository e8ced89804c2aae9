//! Completion of command lines in bash, zsh and fish.
//!
//! The shells' scripts are small and alike: they ask this executable (`umem __complete WORD…`, with all words up to the
//! one at the cursor) and show what it answers. So all three know the same: commands, options, the values of options,
//! sessions that can be resumed, and the command behind `--`, which the shell completes as a command line of its own.
//!
//! ```text
//! files | none | command N      what else the shell may offer; N words come before the command
//! WORD TAB DESCRIPTION          one candidate a line
//! ```

use argh::{CommandInfoWithArgs, FlagInfo, FlagInfoKind};

use super::Shell;
use crate::memory::kind::Kind;
use crate::runtime::role::Role;
use crate::session;

/// The word with which the scripts ask; it is in no help.
pub(crate) const ASK: &str = "__complete";

/// The script for the shell.
pub(crate) fn script(shell: Shell) -> &'static str {
    match shell {
        Shell::Bash => include_str!("completions/umem.bash"),
        Shell::Zsh => include_str!("completions/_umem"),
        Shell::Fish => include_str!("completions/umem.fish"),
    }
}

/// The answer to a script, for the words behind `umem`, the last of which is being typed.
pub(crate) fn answer(umem: &CommandInfoWithArgs, words: &[&str]) -> String {
    let completion = complete(umem, words);
    let mut lines = vec![match completion.others {
        Others::Files => "files".to_owned(),
        Others::None => "none".to_owned(),
        Others::Command(before) => format!("command {before}"),
    }];
    lines.extend(
        completion.candidates.iter().map(|Candidate { word, about }| {
            format!("{word}\t{}", about.replace(['\n', '\t'], " "))
        }),
    );
    lines.join("\n")
}

/// What the shell offers besides the candidates.
#[derive(Debug, PartialEq, Eq)]
enum Others {
    Files,
    None,
    /// What a command line offers that begins behind so many words.
    Command(usize),
}

#[derive(Debug, PartialEq, Eq)]
struct Candidate {
    word: String,
    about: String,
}

struct Completion {
    others: Others,
    candidates: Vec<Candidate>,
}

impl Completion {
    fn only(others: Others) -> Completion {
        Completion { others, candidates: Vec::new() }
    }

    fn values(words: impl IntoIterator<Item = impl Into<String>>) -> Completion {
        let candidate = |word: String| Candidate { word, about: String::new() };
        let candidates = words.into_iter().map(Into::into).map(candidate).collect();
        Completion { others: Others::None, candidates }
    }

    fn starting_with(mut self, typed: &str) -> Completion {
        self.candidates.retain(|candidate| candidate.word.starts_with(typed));
        self
    }
}

fn complete(umem: &CommandInfoWithArgs, words: &[&str]) -> Completion {
    let Some((&typed, before)) = words.split_last() else { return Completion::only(Others::None) };
    let (mut info, mut path, mut left) = (umem, Vec::new(), before);
    while let Some((&word, behind)) = left.split_first()
        && !info.commands.is_empty()
    {
        let Some(found) = info.commands.iter().find(|sub| sub.name == word) else {
            return Completion::only(Others::None);
        };
        path.push(word);
        (info, left) = (&found.command, behind);
    }
    if !info.commands.is_empty() {
        let command = |sub: &argh::SubCommandInfo| Candidate {
            word: sub.name.to_owned(),
            about: first_sentence(sub.command.description),
        };
        let candidates = info.commands.iter().map(command).collect();
        return Completion { others: Others::None, candidates }.starting_with(typed);
    }
    // The words of a guest's command are not umem's.
    if let Some(at) = left.iter().position(|&word| word == "--") {
        return Completion::only(Others::Command(path.len() + at + 1));
    }
    let mut positionals = Vec::new();
    let mut asks = None;
    for &word in left {
        if asks.take().is_some() {
            continue;
        }
        match word.strip_prefix('-') {
            Some(_) => asks = takes_next(info, word),
            None => positionals.push(word),
        }
    }
    if let Some(flag) = asks {
        return value(&path, flag.long).starting_with(typed);
    }
    if let Some((name, begun)) = typed.split_once('=')
        && name.starts_with("--")
    {
        let mut completion = value(&path, name).starting_with(begun);
        for candidate in &mut completion.candidates {
            candidate.word = format!("{name}={}", candidate.word);
        }
        return completion;
    }
    if typed.starts_with('-') {
        let options = info.flags.iter().filter(|flag| !flag.hidden).map(|flag| Candidate {
            word: flag.long.to_owned(),
            about: first_sentence(flag.description),
        });
        let help = Candidate { word: "--help".into(), about: "show help".into() };
        let candidates = options.chain([help]).collect();
        return Completion { others: Others::None, candidates }.starting_with(typed);
    }
    positional(umem, &path, &positionals).starting_with(typed)
}

/// The option of this word, if the next word is its value.
fn takes_next<'a>(info: &'a CommandInfoWithArgs, word: &str) -> Option<&'a FlagInfo<'static>> {
    let is_meant = |flag: &&FlagInfo<'_>| match word.strip_prefix("--") {
        Some(_) => flag.long == word,
        None => flag.short.is_some_and(|letter| word.ends_with(letter)),
    };
    let flag = info.flags.iter().find(is_meant)?;
    matches!(flag.kind, FlagInfoKind::Option { .. }).then_some(flag)
}

/// Options whose values are names of files, directories included.
const FILES: [&str; 9] = [
    "--control",
    "--handoff",
    "--preload",
    "--qmp",
    "--ram",
    "--report",
    "--secret-file",
    "--session-dir",
    "--tls-creds",
];

/// The values of an option.
fn value(path: &[&str], option: &str) -> Completion {
    match (path, option) {
        // What is not measured is refused by it.
        (["bench", ..], "--kind") => Completion::values(["shared", "anonymous"]),
        (_, "--kind") => Completion::values(Kind::ALL.map(Kind::name)),
        (_, "--order") => Completion::values(["adaptive", "plain"]),
        (_, "--idle-cores") => Completion::values(["poll", "sleep"]),
        (_, "--page-size") => Completion::values(["4K", "2M"]),
        (_, "--switchover") => Completion::values(["umem", "external"]),
        (_, "--listen" | "--connect") => Completion::values(["unix:"]),
        (_, "--postcopy-flags") => Completion::values(["0", "1"]),
        (_, "--congestion") => {
            let allowed = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";
            let allowed = std::fs::read_to_string(allowed).unwrap_or_default();
            Completion::values(allowed.split_whitespace())
        }
        (["migrate"], "--resume") => Completion::values(session::resumable(Role::Source)),
        (["incoming"], "--resume") => Completion::values(session::resumable(Role::Destination)),
        _ if FILES.contains(&option) => Completion::only(Others::Files),
        _ => Completion::only(Others::None),
    }
}

/// What stands where no option does, behind these words.
fn positional(umem: &CommandInfoWithArgs, path: &[&str], before: &[&str]) -> Completion {
    match (path, before) {
        (["completions"], []) => Completion::values(["bash", "zsh", "fish"]),
        (["man"], []) => Completion::values(umem.commands.iter().map(|sub| sub.name)),
        (["control"], []) => Completion::only(Others::Files),
        (["control"], [_]) => {
            Completion::values(["status", "set", "postcopy", "cancel", "pause", "resume"])
        }
        (["control"], [_, "set"]) => {
            Completion::values(["max-postcopy-bandwidth=", "max-bandwidth="])
        }
        (["migrate" | "incoming"], []) | (["control"], [_, "resume"]) => {
            Completion::values(["tcp:", "unix:", "fd:", "exec:"])
        }
        _ => Completion::only(Others::None),
    }
}

/// A text's beginning, as a list has room for.
fn first_sentence(text: &str) -> String {
    let line = text.lines().map(str::trim).collect::<Vec<_>>().join(" ");
    let end = ["; ", ": ", ". ", " ("].iter().filter_map(|end| line.find(end)).min();
    line[..end.unwrap_or(line.len())].trim_end_matches('.').to_owned()
}
