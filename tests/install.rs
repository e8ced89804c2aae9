//! What a package installs: manual pages, completions, units.

mod support;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use support::Scratch;

const UMEM: &str = env!("CARGO_BIN_EXE_umem");

fn umem(arguments: &[&str]) -> String {
    let output = Command::new(UMEM).args(arguments).output().expect("umem starts");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// The program with `input`; nothing where this machine has no such program.
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
    // A program that answers before it has read everything must not wait for us.
    let writer = std::thread::spawn(move || {
        let _ = stdin.write_all(&bytes);
    });
    let output = child.wait_with_output().expect("it ends");
    writer.join().expect("it does not panic");
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
fn every_option_is_in_the_manual_and_in_the_completions() {
    let [bash, zsh, fish] = ["bash", "zsh", "fish"].map(|shell| umem(&["completions", shell]));
    let overview = umem(&["man"]);
    let mut count = 0;
    for command in commands() {
        assert!(overview.contains(&format!("umem {command}\\fR")), "{overview}");
        let page = umem(&["man", &command]).replace("\\-", "-");
        let (_, listed) = page.split_once(".SH OPTIONS").expect("a section");
        for option in options(&command) {
            let has = |line: &str| line.contains(&format!("\\fB{option}\\fR"));
            assert!(listed.lines().any(has), "{option} of {command}:\n{page}");
            let completed = bash_completes(&bash, &["umem", &command, &option]);
            assert!(completed.contains(&option), "{option} of {command}: {completed:?}");
            assert!(zsh.contains(&format!("{option}[")) || zsh.contains(&format!("{option}}}")));
            let (name, of) = (option.trim_start_matches('-'), format!("command {command}'"));
            let has = |line: &str| line.contains(&of) && line.contains(&format!(" -l {name} "));
            assert!(fish.lines().any(has), "{option} of {command}:\n{fish}");
            count += 1;
        }
    }
    assert!(count > 40, "{count} options");
}

/// What bash offers for the last of the words.
fn bash_completes(script: &str, words: &[&str]) -> Vec<String> {
    let last = words.len() - 1;
    let quoted: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
    let line = format!(
        "COMP_WORDS=({})\nCOMP_CWORD={last}\n_umem\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"\n",
        quoted.join(" ")
    );
    let output = feed("bash", &["--norc"], &format!("{script}\n{line}")).expect("a bash");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.is_empty(), "{stderr}");
    String::from_utf8_lossy(&output.stdout).split_whitespace().map(str::to_owned).collect()
}

#[test]
fn bash_completes_what_has_been_begun() {
    let script = umem(&["completions", "bash"]);
    let of = |words: &[&str]| bash_completes(&script, words);
    assert_eq!(of(&["umem", "mig"]), ["migrate"]);
    assert_eq!(of(&["/usr/bin/umem", "migrate", "--rel"]), ["--release-ram"]);
    assert_eq!(of(&["umem", "incoming", "--post"]), ["--postcopy-flags"]);
    assert_eq!(of(&["umem", "migrate", "--post"]), ["--postcopy"]);
    let files: [&str; 0] = [];
    assert_eq!(of(&["umem", "migrate", "--qmp", ""]), files, "bash offers files then");
}

#[test]
fn the_other_shells_can_read_theirs() {
    for shell in ["zsh", "fish"] {
        let script = umem(&["completions", shell]);
        if let Some(output) = feed(shell, &["-n", "/dev/stdin"], &script) {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    }
    let wrong = Command::new(UMEM).args(["completions", "csh"]).output().unwrap();
    assert_eq!(wrong.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("bash, zsh and fish"));
}

#[test]
fn pages_are_set_without_a_warning() {
    let wrong = Command::new(UMEM).args(["man", "nonsense"]).output().unwrap();
    assert_eq!(wrong.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("migrate"));
    for command in commands() {
        let page = umem(&["man", &command]);
        for line in page.lines().filter(|line| line.starts_with('.')) {
            let name = line[1..].split(' ').next().unwrap_or_default();
            let known = ["ie", "el", "TH", "SH", "PP", "TP", "nf", "fi", "RS", "RE"];
            assert!(known.contains(&name), "no macro of ours: {line}");
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

/// As systemd reads them, with this umem in the place of the installed one.
#[test]
fn systemd_understands_the_units() {
    let scratch = Scratch::new();
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/install");
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
