//! Completion of command lines in the real shells: bash, zsh and fish.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::{Scratch, provided};

const UMEM: &str = env!("CARGO_BIN_EXE_umem");

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Zsh, Shell::Fish];

/// A directory to complete in, with the scripts of all shells.
struct Room {
    scratch: Scratch,
}

impl Room {
    fn new() -> Room {
        let scratch = Scratch::new();
        for shell in ["bash", "zsh", "fish"] {
            let script = Command::new(UMEM).args(["completions", shell]).output().unwrap();
            assert!(script.status.success() && script.stderr.is_empty(), "{script:?}");
            fs::write(scratch.path(shell), script.stdout).unwrap();
        }
        fs::create_dir(scratch.path("here")).unwrap();
        fs::write(scratch.path("here/monitor.sock"), "").unwrap();
        Room { scratch }
    }

    /// What the shell offers behind a line, sorted: whole words.
    fn offers(&self, shell: Shell, line: &str) -> Vec<String> {
        let (program, script) = match shell {
            Shell::Bash => (PathBuf::from("bash"), self.bash(line)),
            Shell::Zsh => (tools().join("zsh"), self.zsh(line)),
            Shell::Fish => (tools().join("fish"), self.fish(line)),
        };
        let file = self.scratch.path("script");
        fs::write(&file, script).unwrap();
        let options: &[&str] = match shell {
            Shell::Bash => &["--norc", "--noprofile"],
            Shell::Zsh => &["-f"],
            Shell::Fish => &["--no-config"],
        };
        let directory = Path::new(UMEM).parent().unwrap();
        let path = format!("{}:{}", directory.display(), std::env::var("PATH").unwrap());
        let output = Command::new(program)
            .args(options)
            .arg(&file)
            .current_dir(self.scratch.path("here"))
            .env("PATH", path)
            .env("HOME", self.scratch.path(""))
            .env("XDG_RUNTIME_DIR", self.scratch.path("run"))
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && stderr.is_empty(), "{shell:?}, {line}: {stderr}");
        let mut words: Vec<String> =
            String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
        words.sort();
        words
    }

    fn bash(&self, line: &str) -> String {
        format!(
            "source '{script}'\nCOMP_LINE='{line}'\nCOMP_POINT=${{#COMP_LINE}}\n_umem\n\
             for word in \"${{COMPREPLY[@]}}\"; do printf '%s\\n' \"$cut$word\"; done\n",
            script = self.scratch.path("bash").display(),
        )
    }

    /// With its own functions in the place of those that draw the list: these need a terminal.
    fn zsh(&self, line: &str) -> String {
        format!(
            "module_path=('{modules}' $module_path)\n\
             compdef() {{ :; }}\n\
             _describe() {{ local item; for item in \"${{(@P)@[-1]}}\"; do item=${{item//\\\\:/%}}; \
             item=${{item%%:*}}; print -r -- \"${{item//\\%/:}}\"; done; }}\n\
             _files() {{ print -rl -- *(N); }}\n\
             _normal() {{ print -r -- \"command line: ${{(@)words[1,CURRENT]}}\"; }}\n\
             source '{script}'\n\
             words=(${{(s: :):-'{line}'}})\n\
             [[ '{line}' == *' ' ]] && words+=('')\n\
             CURRENT=${{#words}}\n_umem\n",
            modules = modules().display(),
            script = self.scratch.path("zsh").display(),
        )
    }

    fn fish(&self, line: &str) -> String {
        format!(
            "source '{script}'\ncomplete -C '{line}' | string replace -r '\\t.*' ''\ntrue\n",
            script = self.scratch.path("fish").display(),
        )
    }

    fn check(&self, line: &str, expected: &[&str]) {
        let mut expected = expected.to_vec();
        expected.sort_unstable();
        for shell in SHELLS {
            assert_eq!(self.offers(shell, line), expected, "{shell:?} completes {line:?}");
        }
    }
}

fn tools() -> PathBuf {
    provided("UMEM_TEST_TOOLS", "tools")
}

/// The directory of zsh's modules, which has its version's name.
fn modules() -> PathBuf {
    let mut versions = fs::read_dir(tools().join("zsh-modules")).unwrap();
    versions.next().expect("a version").unwrap().path()
}

#[test]
fn commands_and_options_are_completed_in_every_shell() {
    let room = Room::new();
    room.check("umem mig", &["migrate"]);
    room.check("umem migrate --rel", &["--release-ram"]);
    room.check("umem migrate --postcopy --precopy-", &["--precopy-passes"]);
    room.check("umem bench cl", &["client"]);
    room.check("umem bench client --fault", &["--fault-rate"]);
    room.check("umem nonsense --x", &[]);
}

#[test]
fn values_are_completed_in_every_shell() {
    let room = Room::new();
    room.check("umem demo --kind ", &["shared", "private", "anonymous"]);
    room.check("umem bench client --kind ", &["shared", "anonymous"]);
    room.check("umem migrate --order a", &["adaptive"]);
    room.check("umem incoming --idle-cores ", &["poll", "sleep"]);
    room.check("umem completions ", &["bash", "zsh", "fish"]);
    room.check("umem man mig", &["migrate"]);
    room.check("umem control /run/umem.sock po", &["postcopy"]);
    room.check("umem migrate u", &["unix:"]);
    // A number, and a word behind all that there can be: not even files.
    room.check("umem migrate --lanes ", &[]);
    room.check("umem man migrate ", &[]);
}

#[test]
fn files_are_completed_where_an_option_takes_one() {
    let room = Room::new();
    room.check("umem migrate --qmp mon", &["monitor.sock"]);
    room.check("umem control mon", &["monitor.sock"]);
}

#[test]
fn sessions_that_can_be_resumed_are_completed_for_their_side() {
    use std::os::unix::fs::DirBuilderExt;
    let room = Room::new();
    for directory in ["run", "run/umem"] {
        fs::DirBuilder::new().mode(0o700).create(room.scratch.path(directory)).unwrap();
    }
    for name in ["aaaa.source", "bbbb.destination", "cccc.source.lock"] {
        fs::write(room.scratch.path(&format!("run/umem/{name}")), "").unwrap();
    }
    room.check("umem migrate --resume ", &["aaaa"]);
    room.check("umem incoming --resume ", &["bbbb"]);
}

#[test]
fn command_behind_two_hyphens_is_completed_as_a_command_line() {
    let room = Room::new();
    let line = "umem incoming tcp::4444 -- umem migrate --rel";
    // fish completes the inner line by the same script, zsh and bash-completion by their own means.
    assert_eq!(room.offers(Shell::Fish, line), ["--release-ram"]);
    assert_eq!(room.offers(Shell::Zsh, line), ["command line: umem migrate --rel"]);
    let bash = room.offers(Shell::Bash, "umem incoming tcp::4444 -- ume");
    assert!(bash.contains(&"umem".to_owned()), "{bash:?}");
    assert_eq!(room.offers(Shell::Bash, "umem incoming tcp::4444 -- cat mon"), ["monitor.sock"]);
}

/// An option whose value nothing is known of offers nothing: one that takes a file must be known.
#[test]
fn each_option_that_takes_a_path_completes_files() {
    let room = Room::new();
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli");
    let mut count = 0;
    for command in ["incoming", "migrate", "demo"] {
        let source = fs::read_to_string(sources.join(format!("{command}.rs"))).unwrap();
        let fields = source.lines().map(str::trim).filter_map(|line| line.split_once(": "));
        let paths = fields.filter(|(_, kind)| kind.contains("PathBuf") || kind.contains("RamPath"));
        for (name, _) in paths.filter(|(name, _)| !name.contains(['/', ' ', '('])) {
            let option = format!("--{}", name.replace('_', "-"));
            let help = Command::new(UMEM).args([command, "--help"]).output().unwrap();
            if !String::from_utf8_lossy(&help.stdout).contains(&format!("{option} ")) {
                continue;
            }
            let line = format!("umem {command} {option} mon");
            assert_eq!(room.offers(Shell::Bash, &line), ["monitor.sock"], "{line}");
            count += 1;
        }
    }
    assert!(count > 10, "{count} options");
}
