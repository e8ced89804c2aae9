//! The command line as people type it, turned into the words that argh takes.
//!
//! | typed | argh takes |
//! |---|---|
//! | `--size=64` | `--size 64` |
//! | `-P2` | `-P 2` |
//! | `-pn` | `-p -n` |
//! | `-h` | `--help` |
//! | `-V`, `--version` | `version` |
//!
//! A command or an option that umem does not have is refused here, with the one that was probably meant. Words behind
//! `--` are the guest's command, and stay as they are.

use argh::{CommandInfoWithArgs, FlagInfo, FlagInfoKind};

/// A command line that is wrong.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wrong {
    /// The command that it is about, such as `umem migrate`.
    pub(super) command: String,
    pub(super) text: String,
}

/// A command line as argh takes it.
#[derive(Debug)]
pub(super) struct Adapted {
    pub(super) words: Vec<String>,
    /// The command, such as `umem bench client`.
    pub(super) command: String,
}

/// Words as argh takes them, from those behind the program's name.
///
/// # Errors
/// A command or an option that does not exist, an option without its value or with one that it does not take, a
/// COMMAND without the `--` before it.
pub(super) fn adapted(umem: &CommandInfoWithArgs, words: &[&str]) -> Result<Adapted, Wrong> {
    let (mut info, mut command, mut left) = (umem, "umem".to_owned(), words);
    let mut adapted = Vec::new();
    // Commands first: each may have commands of its own.
    while let Some((&word, behind)) = left.split_first()
        && !info.commands.is_empty()
    {
        match word {
            "-h" | "--help" | "help" => {
                adapted.push("--help".to_owned());
                return Ok(Adapted { words: adapted, command });
            }
            "-V" | "--version" if adapted.is_empty() => {
                return Ok(Adapted { words: vec!["version".to_owned()], command });
            }
            _ => {}
        }
        let names = info.commands.iter().map(|sub| sub.name);
        let Some(found) = info.commands.iter().find(|sub| sub.name == word) else {
            let text = no_command(&command, word, names.collect());
            return Err(Wrong { command, text });
        };
        command = format!("{command} {word}");
        adapted.push(word.to_owned());
        (info, left) = (&found.command, behind);
    }
    if !info.commands.is_empty() {
        return Ok(Adapted { words: adapted, command });
    }
    let mut adapter = Adapter { name: &command, command: info, adapted };
    match adapter.rest(left) {
        Ok(()) => Ok(Adapted { words: adapter.adapted, command }),
        Err(text) => Err(Wrong { command, text }),
    }
}

fn no_command(command: &str, word: &str, names: Vec<&str>) -> String {
    if word.starts_with('-') {
        return format!(
            "{word} stands where a command belongs: write `{command} COMMAND {word}` (the commands are {})",
            names.join(", ")
        );
    }
    let hint = similar(word, names.iter().copied());
    let hint = hint.map_or_else(String::new, |name| format!("; did you mean `{command} {name}`?"));
    format!("{command} has no command {word}{hint} (the commands are {})", names.join(", "))
}

/// The commands whose last words are a guest's COMMAND.
const STARTS_COMMAND: [&str; 1] = ["umem incoming"];

struct Adapter<'a> {
    name: &'a str,
    command: &'a CommandInfoWithArgs,
    adapted: Vec<String>,
}

impl Adapter<'_> {
    fn rest(&mut self, words: &[&str]) -> Result<(), String> {
        let (mut left, mut positionals) = (words.iter(), 0);
        while let Some(&word) = left.next() {
            if word == "--" {
                self.adapted.push(word.into());
                self.adapted.extend(left.map(|word| (*word).to_owned()));
                return Ok(());
            }
            let value_follows = if let Some(option) = word.strip_prefix("--") {
                self.long(option)?
            } else if word.len() > 1 && word.starts_with('-') {
                self.short(&word[1..])?
            } else {
                positionals += 1;
                if positionals == 2 {
                    self.check_command(word, left.as_slice())?;
                }
                self.adapted.push(word.into());
                None
            };
            if let Some(option) = value_follows {
                let value = left.next().ok_or_else(|| format!("{option} needs a value"))?;
                self.adapted.push((*value).into());
            }
        }
        Ok(())
    }

    /// `--NAME` or `--NAME=VALUE`; the option whose value is the next word.
    fn long(&mut self, word: &str) -> Result<Option<String>, String> {
        let (name, value) = match word.split_once('=') {
            Some((name, value)) => (format!("--{name}"), Some(value)),
            None => (format!("--{word}"), None),
        };
        if name == "--help" {
            self.adapted.push(name);
            return Ok(None);
        }
        let Some(flag) = self.command.flags.iter().find(|flag| flag.long == name) else {
            let all = self.command.flags.iter().map(|flag| flag.long);
            let hint = similar(&name, all)
                .map_or_else(String::new, |name| format!("; did you mean {name}?"));
            return Err(format!("{} has no option {name}{hint}", self.name));
        };
        self.take(flag, value)
    }

    /// `-x`, `-xyz`, or `-xVALUE`, without the hyphen; the option whose value is the next word.
    fn short(&mut self, letters: &str) -> Result<Option<String>, String> {
        for (at, letter) in letters.char_indices() {
            let behind = &letters[at + letter.len_utf8()..];
            let Some(flag) = self.command.flags.iter().find(|flag| flag.short == Some(letter))
            else {
                if letter == 'h' {
                    self.adapted.push("--help".into());
                    continue;
                }
                // Perhaps it is a long one.
                let long = self.command.flags.iter().map(|flag| flag.long);
                let hint = similar(&format!("--{letters}"), long)
                    .filter(|_| letters.len() > 1)
                    .map_or_else(String::new, |name| format!("; did you mean {name}?"));
                return Err(format!("{} has no option -{letter}{hint}", self.name));
            };
            if takes_value(flag) {
                let value = behind.strip_prefix('=').unwrap_or(behind);
                return self.take(flag, (!behind.is_empty()).then_some(value));
            }
            self.take(flag, None)?;
        }
        Ok(None)
    }

    /// The option with its value, if that is there; else the option's name, whose value is the next word.
    fn take(&mut self, flag: &FlagInfo<'_>, value: Option<&str>) -> Result<Option<String>, String> {
        let name = flag.long.to_owned();
        match (takes_value(flag), value) {
            (false, Some(_)) => return Err(format!("{name} takes no value: write {name}")),
            (false, None) => self.adapted.push(name),
            (true, Some(value)) => self.adapted.extend([name, value.to_owned()]),
            (true, None) => {
                self.adapted.push(name.clone());
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// Whether this word, the second one that is no option, may begin COMMAND without `--`: options behind it could
    /// be umem's or its own.
    fn check_command(&self, word: &str, behind: &[&str]) -> Result<(), String> {
        let is_clear = !behind.iter().any(|word| word.starts_with('-'));
        if is_clear || !STARTS_COMMAND.contains(&self.name) {
            return Ok(());
        }
        Err(format!(
            "{word} begins the guest's command, whose options could be meant for umem: write `--` before {word}, \
             and umem's own options before that"
        ))
    }
}

fn takes_value(flag: &FlagInfo<'_>) -> bool {
    matches!(flag.kind, FlagInfoKind::Option { .. })
}

/// The name that was probably meant: the nearest one, where not more than a third of it differs.
fn similar<'a>(given: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let distance = |name: &str| strsim::damerau_levenshtein(given, name);
    let nearest = names.map(|name| (distance(name), name)).min()?;
    // The hyphens are always right.
    let letters = given.trim_start_matches('-').chars().count();
    (nearest.0 <= letters.div_ceil(3)).then_some(nearest.1)
}

#[cfg(test)]
mod tests {
    use argh::ArgsInfo;

    use super::super::Arguments;
    use super::*;

    fn adapt(line: &str) -> Result<String, String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let adapted = adapted(&Arguments::get_args_info(), &words);
        adapted.map(|adapted| adapted.words.join(" ")).map_err(|wrong| wrong.text)
    }

    #[test]
    fn options_as_people_type_them_become_those_that_argh_takes() {
        for (typed, taken) in [
            ("", ""),
            ("demo", "demo"),
            ("demo --size=64", "demo --size 64"),
            ("demo --size 64", "demo --size 64"),
            ("demo --size=", "demo --size "),
            ("bench", "bench"),
            ("bench client -P2 HOST", "bench client --parallel 2 HOST"),
            ("bench client -P=2 HOST", "bench client --parallel 2 HOST"),
            ("bench client -P 2 HOST", "bench client --parallel 2 HOST"),
            ("bench server -1p0", "bench server --one-off --port 0"),
            ("migrate -pn --qmp x tcp:a:1", "migrate --postcopy --no-background --qmp x tcp:a:1"),
            ("migrate -pvq u", "migrate --postcopy --verbose --quiet u"),
            ("-h", "--help"),
            ("help", "--help"),
            ("--help", "--help"),
            ("bench -h", "bench --help"),
            ("bench client -h", "bench client --help"),
            ("migrate -h", "migrate --help"),
            ("migrate --help", "migrate --help"),
            ("-V", "version"),
            ("--version", "version"),
            // A value may look like an option.
            ("migrate --qmp -p u", "migrate --qmp -p u"),
            ("incoming tcp::1 -- qemu -m 2G --foo=1", "incoming tcp::1 -- qemu -m 2G --foo=1"),
            ("incoming tcp::1 true word", "incoming tcp::1 true word"),
            ("incoming --quiet tcp::1", "incoming --quiet tcp::1"),
        ] {
            assert_eq!(adapt(typed).as_deref(), Ok(taken), "{typed}");
        }
    }

    #[test]
    fn wrong_command_lines_are_refused_with_what_was_meant() {
        for (typed, words) in [
            ("migrat", "umem has no command migrat; did you mean `umem migrate`?"),
            ("recieve", "umem has no command recieve (the commands are demo, incoming, migrate"),
            ("bench clinet", "umem bench has no command clinet; did you mean `umem bench client`?"),
            ("--qmp x", "--qmp stands where a command belongs: write `umem COMMAND --qmp`"),
            ("migrate --postcoppy u", "has no option --postcoppy; did you mean --postcopy?"),
            ("migrate --frobnicate=x u", "umem migrate has no option --frobnicate"),
            ("migrate -quiet u", "umem migrate has no option -u; did you mean --quiet?"),
            ("migrate -x u", "umem migrate has no option -x"),
            ("migrate --quiet=yes u", "--quiet takes no value: write --quiet"),
            ("migrate u --qmp", "--qmp needs a value"),
            ("bench client -P", "--parallel needs a value"),
            ("incoming tcp::1 qemu-system-x86_64 -m 2G", "write `--` before qemu-system-x86_64"),
        ] {
            let refused = adapt(typed).expect_err(typed);
            assert!(refused.contains(words), "{typed}: {refused}");
        }
    }

    #[test]
    fn help_that_a_refusal_names_is_that_of_the_command() {
        let command = |line: &str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            adapted(&Arguments::get_args_info(), &words).expect_err(line).command
        };
        assert_eq!(command("nonsense"), "umem");
        assert_eq!(command("migrate --nonsense"), "umem migrate");
        assert_eq!(command("bench client --nonsense"), "umem bench client");
    }
}
