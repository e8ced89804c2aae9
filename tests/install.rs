//! The files that a package installs: manual pages, completions, units. And SECURITY.md's promises name tests.

mod support;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use support::Scratch;

const UMEM: &str = env!("CARGO_BIN_EXE_umem");

fn umem(arguments: &[&str]) -> String {
    let output = Command::new(UMEM).args(arguments).output().expect("umem starts");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// Runs the program with `input`; None if this machine lacks the program.
fn feed(program: &str, arguments: &[&str], input: &str) -> Option<Output> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{program}: {error}");
            return None;
        }
    };
    let mut stdin = child.stdin.take().expect("a pipe");
    let bytes = input.to_owned().into_bytes();
    // A program that answers before it has read everything must not wait for this one.
    let writer = std::thread::spawn(move || {
        let _ = stdin.write_all(&bytes);
    });
    let output = child.wait_with_output().expect("the program ends");
    writer.join().expect("the thread does not panic");
    Some(output)
}

/// The commands in `umem --help`.
fn commands() -> Vec<String> {
    let help = umem(&["--help"]);
    let (_, list) = help.split_once("Commands:\n").expect("a list of commands");
    let lines = list.lines().take_while(|line| line.starts_with("  "));
    let names = lines.filter(|line| !line.starts_with("   "));
    let names: Vec<String> =
        names.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect();
    for name in ["demo", "incoming", "migrate", "doctor", "man"] {
        assert!(names.iter().any(|found| found == name), "{name} is not among {names:?}");
    }
    names
}

/// The options in `umem COMMAND --help`, such as `--lanes`.
fn options(command: &str) -> Vec<String> {
    let help = umem(&[command, "--help"]);
    let (_, list) = help.split_once("Options:\n").expect("a list of options");
    let lines = list.lines().take_while(|line| line.starts_with("  "));
    let heads = lines.filter(|line| line.starts_with("  -"));
    let options: Vec<String> = heads
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with("--")))
        .map(|word| word.trim_end_matches(',').to_owned())
        .collect();
    assert!(options.contains(&"--help".to_owned()), "{help}");
    options
}

#[test]
fn every_option_is_in_manual_and_completions() {
    let overview = umem(&["man"]);
    let mut count = 0;
    for command in commands() {
        assert!(overview.contains(&format!("umem {command}\\fR")), "{overview}");
        let page = umem(&["man", &command]).replace("\\-", "-");
        let (_, listed) = page.split_once(".SH OPTIONS").expect("a section");
        for option in options(&command) {
            let has = |line: &str| line.contains(&format!("\\fB{option}\\fR"));
            assert!(listed.lines().any(has), "{option} of {command}:\n{page}");
            // As the scripts of all shells ask.
            let answer = umem(&["__complete", &command, &option]);
            let mut words = answer.lines().filter_map(|line| line.split('\t').next());
            let is_nested = ["bench"].contains(&command.as_str());
            assert!(is_nested || words.any(|word| word == option), "{option}: {answer}");
            count += 1;
        }
    }
    assert!(count > 40, "{count} options");
}

#[test]
fn completions_for_an_unknown_shell_are_refused() {
    let wrong = Command::new(UMEM).args(["completions", "csh"]).output().unwrap();
    assert_eq!(wrong.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("bash, zsh and fish"));
}

#[test]
fn manual_pages_format_without_warnings() {
    let wrong = Command::new(UMEM).args(["man", "nonsense"]).output().unwrap();
    assert_eq!(wrong.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("migrate"));
    for command in commands() {
        let page = umem(&["man", &command]);
        for line in page.lines().filter(|line| line.starts_with('.')) {
            let name = line[1..].split(' ').next().unwrap_or_default();
            let known = ["ie", "el", "TH", "SH", "PP", "TP", "nf", "fi", "RS", "RE"];
            assert!(known.contains(&name), "not a macro of umem's pages: {line}");
        }
        let Some(output) = feed("man", &["-l", "--warnings", "-E", "UTF-8", "-"], &page) else {
            continue;
        };
        let (text, stderr) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && stderr.is_empty(), "{command}: {stderr}");
        assert!(text.contains(&format!("UMEM-{}(1)", command.to_uppercase())), "{text}");
    }
}

/// As systemd reads them, with this umem in place of the installed one.
#[test]
fn systemd_verifies_the_units() {
    let scratch = Scratch::new();
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/programs/install");
    let [service, socket] = ["service", "socket"].map(|kind| {
        let text = std::fs::read_to_string(units.join(format!("umem-incoming@.{kind}"))).unwrap();
        let path = scratch.path(&format!("umem-incoming@4444.{kind}"));
        std::fs::write(&path, text.replace("/usr/bin/umem", UMEM)).unwrap();
        path.display().to_string()
    });
    if let Some(output) = feed("systemd-analyze", &["verify", "--man=no", &service, &socket], "") {
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && stderr.is_empty(), "{stderr}");
    }
}

/// Every bullet and every row of a table in SECURITY.md is a promise, except in its last section, and ends with the
/// tests that hold it: `[FILE: TEST, MODULE::TEST; FILE: TEST]`.
#[test]
fn every_promise_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("SECURITY.md")).expect("the file exists");
    let (promises, _) = text.split_once("\n## Not covered\n").expect("its last section");
    let promises = promises_in(promises);
    assert!(promises.len() > 30, "{} promises", promises.len());
    let mut wrong = Vec::new();
    for promise in &promises {
        let tests = tests_named_in(promise);
        if tests.is_empty() {
            wrong.push(format!("no test is named: {promise}"));
        }
        for (file, name) in tests {
            let has = |path: &Path| {
                let source = std::fs::read_to_string(path).unwrap_or_default();
                has_test(&source, name.rsplit("::").next().expect("the last of some"))
            };
            if !places_of(root, &file, &name).iter().any(|path| has(path)) {
                wrong.push(format!("{file} has no test {name}: {promise}"));
            }
        }
    }
    assert!(wrong.is_empty(), "SECURITY.md:\n{}", wrong.join("\n"));
}

#[test]
fn promise_without_a_test_is_reported() {
    let text = "Words.\n\n| head |\n|---|\n| row [tests/a.rs: one] |\n\n- a [link](x) and\n  \
                more [tests/a.rs: one,\n  two; wire/b.rs: three]\n- nothing\n\nMore words.\n";
    let promises = promises_in(text);
    assert_eq!(promises.len(), 3, "{promises:?}");
    let named: Vec<usize> = promises.iter().map(|text| tests_named_in(text).len()).collect();
    assert_eq!(named, [1, 3, 0]);
    assert_eq!(tests_named_in(&promises[1])[2], ("wire/b.rs".into(), "three".into()));
    let source =
        "#[test]\n#[should_panic]\nfn one() {}\nfn two() {}\n#[test]\n#[ignore]\nfn three() {}\n";
    assert_eq!(["one", "two", "three"].map(|name| has_test(source, name)), [true, false, false]);
}

/// The bullets and the rows of tables, each in one line.
fn promises_in(text: &str) -> Vec<String> {
    let mut promises: Vec<String> = Vec::new();
    let mut bullet = false;
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let is_head = lines.peek().is_some_and(|next| next.starts_with("|--"));
        let is_row = line.starts_with("| ") && !is_head;
        if is_row || line.starts_with("- ") {
            promises.push(line.to_owned());
        } else if bullet && line.starts_with(' ') {
            let last = promises.last_mut().expect("the bullet");
            last.push(' ');
            last.push_str(line.trim());
            continue;
        }
        bullet = line.starts_with("- ");
    }
    promises
}

/// File and name of each test in the brackets at the end.
fn tests_named_in(promise: &str) -> Vec<(String, String)> {
    let end = promise.trim_end_matches([' ', '|']);
    let Some((_, list)) = end.strip_suffix(']').and_then(|text| text.rsplit_once('[')) else {
        return Vec::new();
    };
    let files = list.split(';').filter_map(|part| part.split_once(": "));
    files
        .flat_map(|(file, names)| {
            names.split(',').map(|name| (file.trim().to_owned(), name.trim().to_owned()))
        })
        .collect()
}

/// The places of a test: the file itself or, as `MODULE::TEST`, the module's own file.
fn places_of(root: &Path, file: &str, name: &str) -> Vec<PathBuf> {
    let file = root.join(file);
    let Some((module, _)) = name.split_once("::") else { return vec![file] };
    let module = format!("{module}.rs");
    vec![file.with_extension("").join(&module), file.with_file_name(&module), file]
}

/// Whether it has a test of this name that is not ignored.
fn has_test(source: &str, name: &str) -> bool {
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let head = format!("fn {name}(");
    let Some(at) = lines.iter().position(|line| line.starts_with(&head)) else { return false };
    let attributes: Vec<&&str> =
        lines[..at].iter().rev().take_while(|line| line.starts_with(['#', '/'])).collect();
    attributes.iter().any(|line| **line == "#[test]")
        && !attributes.iter().any(|line| line.starts_with("#[ignore"))
}
