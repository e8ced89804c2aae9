//! tests/lib/alone reports the leftovers of a test run, and ignores other programs.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::tool;

/// A directory whose name is part of the names of everything that a test makes.
fn scratch() -> TempDir {
    tempfile::Builder::new().prefix("umem-test-").tempdir_in("/tmp").unwrap()
}

fn alone(script: &str, directory: &Path) -> Command {
    let mut command = Command::new(tool("alone"));
    command.args(["bash", "-c", script, "test"]).arg(directory);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Possible leftovers of a test: a process that has left its session, its parents and its environment, a RAM file, a
/// session, a name of a network and a mount.
const LEAVES: &str = r#"
    set -e
    cp "$(command -v sleep)" "$1/qemu-system-x86_64"
    (env -i setsid "$1/qemu-system-x86_64" 1000 </dev/null >/dev/null 2>&1 &)
    touch "/dev/shm/$(basename "$1")-ram"
    mkdir -p /run/umem && touch "/run/umem/$(basename "$1")-session"
    ip netns add "$(basename "$1")"
    mkdir "$1/mount" && mount -t tmpfs none "$1/mount"
"#;

/// Whether the command succeeds or fails; afterwards the leftovers are gone.
#[test]
fn leftovers_are_reported() {
    for (end, status) in [("", 3), ("exit 7", 7)] {
        let scratch = scratch();
        let directory = scratch.path();
        let output = alone(&format!("{LEAVES}\n{end}"), directory).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{said}");
        let token = directory.file_name().unwrap().to_str().unwrap();
        let path = directory.display();
        for what in [
            format!("file /dev/shm/{token}-ram\n"),
            format!("session /run/umem/{token}-session\n"),
            format!("network namespace {token}\n"),
            format!("mount {path}/mount\n"),
            format!("qemu-system-x86: {path}/qemu-system-x86_64 1000"),
        ] {
            assert!(said.contains(&what), "{what:?} is not in: {said}");
        }
        assert!(!Path::new("/dev/shm").join(format!("{token}-ram")).exists());
        assert!(!Path::new("/run/umem").join(format!("{token}-session")).exists());
        assert!(!Path::new("/run/netns").join(token).exists());
        assert_eq!(processes_of(directory), Vec::<PathBuf>::new());
    }
}

#[test]
fn clean_run_reports_no_leftovers() {
    let scratch = scratch();
    let script =
        "sleep 0.01 & ip netns add x && ip netns del x; touch /dev/shm/x && rm /dev/shm/x; wait";
    let output = alone(script, scratch.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A QEMU and a umem that start meanwhile, files, sessions and mounts: neither seen nor reported.
#[test]
fn objects_of_other_programs_are_not_reported() {
    let scratch = scratch();
    let token = scratch.path().file_name().unwrap().to_str().unwrap();
    let script =
        "echo ready; read -r; ls /dev/shm; ls -A /run/umem 2>/dev/null; cat /proc/[0-9]*/comm";
    let mut command = alone(script, scratch.path()).spawn().unwrap();
    let mut stdout = BufReader::new(command.stdout.take().unwrap());
    let mut ready = String::new();
    stdout.read_line(&mut ready).unwrap();
    assert_eq!(ready, "ready\n");

    let ram = Removed(Path::new("/dev/shm").join(format!("{token}-ram")));
    let qemu = std::env::var("UMEM_TEST_QEMU_72").expect("tests/run sets this variable");
    let mut qemu = Command::new(Path::new(&qemu).join("qemu-system-x86_64"));
    qemu.args(["-machine", "none", "-nodefaults", "-display", "none", "-S"]);
    let _qemu = Ended(qemu.stdin(Stdio::null()).spawn().expect("a QEMU"));
    let mut umem = Command::new(env!("CARGO_BIN_EXE_umem"));
    umem.args(["incoming", "--json", "--handoff"]).arg(scratch.path().join("handoff"));
    umem.arg("tcp:127.0.0.1:0").env("XDG_RUNTIME_DIR", scratch.path());
    let mut umem = Ended(umem.stdout(Stdio::piped()).spawn().expect("a umem"));
    let mut listening = String::new();
    BufReader::new(umem.0.stdout.take().unwrap()).read_line(&mut listening).unwrap();
    assert!(listening.contains("listening"), "{listening}");
    fs::write(&ram.0, "x").unwrap();
    let mount = Unmounted(scratch.path().join("mount"));
    fs::create_dir(&mount.0).unwrap();
    let made = Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&mount.0).status().unwrap();
    assert!(made.success());

    command.stdin.take().unwrap().write_all(b"\n").unwrap();
    let mut seen = String::new();
    stdout.read_to_string(&mut seen).unwrap();
    let output = command.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{said}");
    assert!(!seen.contains(token) && !seen.contains("qemu") && !seen.contains("umem"), "{seen}");
}

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(i32::try_from(self.0.id()).unwrap()), Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

struct Unmounted(PathBuf);

impl Drop for Unmounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// Running programs of the directory.
fn processes_of(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let programs = entries.filter_map(|entry| fs::read_link(entry.path().join("exe")).ok());
    programs.filter(|program| program.starts_with(directory)).collect()
}
