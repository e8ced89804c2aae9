//! `umem doctor` on this kernel, for root, for an unprivileged user, and under low limits; and umem's own behaviour
//! under those limits.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;
use support::{Scratch, Umem};

const UMEM: &str = env!("CARGO_BIN_EXE_umem");

/// A user whose only capability is to read this repository.
const NOBODY: &str = "setpriv --reuid=65534 --regid=65534 --clear-groups \
                      --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search \
                      --bounding-set=-all,+dac_read_search";

/// The same as another user. The kernel counts locked memory by user, and frees that of a ring only after its process has
/// ended: a test that relies on what is left of a limit has a user of its own.
fn user(number: u32) -> String {
    NOBODY.replace("65534", &number.to_string())
}

/// One run with `--json`.
struct Diagnosis {
    works: bool,
    checks: Vec<Value>,
}

impl Diagnosis {
    /// `WRAPPER umem doctor --json`.
    fn new(wrapper: &str) -> Diagnosis {
        Diagnosis::after(wrapper, "true")
    }

    /// The same in a shell in which `command` was run before.
    fn after(wrapper: &str, command: &str) -> Diagnosis {
        let mut words: Vec<&str> = wrapper.split_ascii_whitespace().collect();
        let line = format!("{command} && exec {UMEM} doctor --json");
        words.extend(["bash", "-c", &line]);
        let output = run(&words);
        let lines = String::from_utf8(output.stdout).expect("text");
        let mut events: Vec<Value> =
            lines.lines().map(|line| serde_json::from_str(line).expect("an object")).collect();
        let verdict = events.pop().expect("a verdict");
        assert_eq!(verdict["event"], "diagnosed");
        for event in &events {
            assert_eq!(event["event"], "checked", "{event}");
            for field in ["name", "status", "found", "purpose"] {
                assert_ne!(event[field].as_str().expect("a text"), "", "{field} of {event}");
            }
            let is_well = event["status"] == "ok";
            assert_eq!(
                event["remedy"].is_null(),
                is_well,
                "a remedy exactly for a failed check: {event}"
            );
        }
        let count = |status| events.iter().filter(|event| event["status"] == status).count();
        assert_eq!(verdict["missing"], count("missing"));
        assert_eq!(verdict["warnings"], count("warning"));
        let works = verdict["works"].as_bool().expect("yes or no");
        assert_eq!(works, count("missing") == 0);
        assert_eq!(output.status.code(), Some(if works { 0 } else { 1 }));
        Diagnosis { works, checks: events }
    }

    fn check(&self, name: &str) -> &Value {
        let found = self.checks.iter().find(|check| check["name"] == name);
        found.unwrap_or_else(|| panic!("{name} is not among {:?}", self.checks))
    }

    fn status(&self, name: &str) -> &str {
        self.check(name)["status"].as_str().expect("a text")
    }

    fn remedy(&self, name: &str) -> &str {
        self.check(name)["remedy"].as_str().unwrap_or_default()
    }
}

fn run(words: &[&str]) -> Output {
    Command::new(words[0]).args(&words[1..]).output().expect("the program starts")
}

#[test]
fn root_passes_every_check() {
    let diagnosis = Diagnosis::new("env");
    assert!(diagnosis.works);
    for name in ["kernel", "io_uring", "userfaultfd", "userfaultfd features", "open files"] {
        assert_eq!(diagnosis.status(name), "ok", "{}", diagnosis.check(name));
    }
    let features = diagnosis.check("userfaultfd features")["found"].as_str().unwrap();
    for name in ["MISSING_SHMEM", "MINOR_SHMEM", "MINOR_HUGETLBFS", "EVENT_REMOVE"] {
        assert!(features.contains(name), "{features}");
    }
    let release = run(&["uname", "-r"]).stdout;
    let kernel = diagnosis.check("kernel")["found"].as_str().unwrap();
    assert_eq!(kernel, format!("Linux {}", String::from_utf8_lossy(&release).trim()));
}

/// Replaces the C library's function, so that the kernel seems to have pages of 64 KiB.
const LARGE_PAGES: &str = "
    #include <dlfcn.h>
    #include <unistd.h>
    long sysconf(int name) {
        if (name == _SC_PAGESIZE) return 65536;
        return ((long (*)(int))dlsym(RTLD_NEXT, \"sysconf\"))(name);
    }
";

/// Code for 4 KiB pages would be wrong there: umem refuses to start and prints the reason.
#[test]
fn kernel_with_larger_pages_is_refused() {
    let moving = Move::new();
    let [code, object] = ["pages.c", "pages.so"].map(|name| moving.scratch.path(name));
    std::fs::write(&code, LARGE_PAGES).unwrap();
    let [code, object] = [code, object].map(|path| path.display().to_string());
    let made = run(&["gcc", "-D_GNU_SOURCE", "-shared", "-fPIC", "-o", &object, &code, "-ldl"]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let there = format!("env LD_PRELOAD={object}");
    let diagnosis = Diagnosis::new(&there);
    assert!(!diagnosis.works);
    assert_eq!(diagnosis.status("pages"), "missing");
    assert_eq!(Diagnosis::new("env").status("pages"), "ok");
    let why = "this kernel has pages of 65536 bytes";
    let source = moving.migrate(&there, "1", "tcp:127.0.0.1:1").fails();
    assert!(source.contains(why), "{source}");
    let words = ["incoming", "--json", "tcp:127.0.0.1:0", "--", "/bin/false"];
    let wrapper: Vec<&str> = there.split(' ').collect();
    let destination = Umem::start_under(&wrapper, words).fails();
    assert!(destination.contains(why), "{destination}");
}

#[test]
fn doctor_prints_one_line_a_check() {
    let diagnosis = Diagnosis::new("env");
    let text = String::from_utf8(run(&[UMEM, "doctor"]).stdout).unwrap();
    for check in &diagnosis.checks {
        let [status, name] = ["status", "name"].map(|field| check[field].as_str().unwrap());
        assert!(text.contains(&format!("{status:<8} {name}: ")), "{name}:\n{text}");
    }
    assert!(text.lines().last().unwrap().contains("can work here"), "{text}");
}

#[test]
fn unprivileged_user_gets_the_commands_to_type() {
    let nobody = Diagnosis::new(NOBODY);
    assert!(!nobody.works);
    assert_eq!(nobody.status("userfaultfd"), "missing");
    let remedy = nobody.remedy("userfaultfd");
    assert!(remedy.contains("setfacl -m u:nobody:rw /dev/userfaultfd"), "{remedy}");
    assert_eq!(nobody.status("userfaultfd features"), "ok", "every user sees the features");
    assert_eq!(nobody.status("io_uring"), "ok");

    let remedy = nobody.remedy("real-time priority");
    assert!(remedy.contains("prlimit --pid $$ --rtprio=1:1"), "{remedy}");
    let remedy = nobody.remedy("nice value");
    assert!(remedy.contains("prlimit --pid $$ --nice=30:30"), "{remedy}");
    let nice = Diagnosis::new(&NOBODY.replace("+dac_read_search", "+dac_read_search,+sys_nice"));
    assert_eq!(nice.status("real-time priority"), "ok");
    assert_eq!(nice.status("nice value"), "ok");

    // Without the device the remedy is another.
    let remedy = nobody.remedy("idle cores");
    assert!(
        remedy.contains("setfacl -m u:nobody:w /dev/cpu_dma_latency")
            || remedy.contains("give the container that device"),
        "{remedy}"
    );
}

/// The printed remedies help.
#[test]
fn printed_remedies_raise_low_limits() {
    let user = user(65531);
    let none = Diagnosis::new(&format!("prlimit --memlock=0 {user}"));
    assert_ne!(none.status("locked memory"), "ok");
    let remedy = none.remedy("locked memory");
    assert!(remedy.contains("prlimit --pid $$ --memlock=4194304:4194304"), "{remedy}");
    let soft = format!("prlimit --memlock=0:4194304 {user}");
    let remedy = Diagnosis::new(&soft).remedy("locked memory").to_owned();
    assert_eq!(Diagnosis::after(&soft, &remedy).status("locked memory"), "ok");

    let few = "prlimit --nofile=40:4096";
    let diagnosis = Diagnosis::new(few);
    assert_eq!(diagnosis.status("open files"), "missing");
    let raised = Diagnosis::after(few, diagnosis.remedy("open files"));
    assert_eq!(raised.status("open files"), "ok");
    let some = Diagnosis::new("prlimit --nofile=300:4096");
    assert_eq!(some.status("open files"), "warning");
}

const MIB: u64 = 16;

/// A snapshot that any user may read, and an `umem incoming` for it.
struct Move {
    scratch: Scratch,
}

impl Move {
    fn new() -> Move {
        let scratch = Scratch::new();
        let bytes: Vec<u8> = (0..MIB << 20).map(|at| (at >> 8) as u8 | 1).collect();
        let path = scratch.ram("source");
        std::fs::write(&path, bytes).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        Move { scratch }
    }

    fn ram(&self, name: &str) -> PathBuf {
        self.scratch.ram(name)
    }

    /// Listens on the loopback address; returns the port.
    fn incoming(&self, wrapper: &str, lanes: &str) -> (Umem, String) {
        let ram = format!("ram0={}", self.ram("destination").display());
        let qmp = self.scratch.path("guest.qmp").display().to_string();
        let mib = MIB.to_string();
        let mut arguments = vec!["incoming", "--json", "--lanes", lanes, "--ram", &ram];
        arguments.extend(["tcp:127.0.0.1:0", "--", UMEM, "guest", "--incoming", "--threads", "0"]);
        arguments.extend(["--ram", &ram, "--size", &mib, "--qmp", &qmp]);
        let wrapper: Vec<&str> = wrapper.split_ascii_whitespace().collect();
        let mut incoming = Umem::start_under(&wrapper, arguments);
        let uri = incoming.event("listening")["uri"].as_str().unwrap().to_owned();
        (incoming, uri.rsplit_once(':').unwrap().1.to_owned())
    }

    fn migrate(&self, wrapper: &str, lanes: &str, uri: &str) -> Umem {
        let ram = format!("ram0={}", self.ram("source").display());
        let wrapper: Vec<&str> = wrapper.split_ascii_whitespace().collect();
        let arguments = ["migrate", "-p", "--json", "--lanes", lanes, "--ram", &ram, uri];
        Umem::start_under(&wrapper, arguments)
    }
}

/// Pages of a zero-copy send count as locked: without the limit they are copied.
#[test]
fn pages_are_copied_without_locked_memory() {
    let moving = Move::new();
    let (mut incoming, port) = moving.incoming("env", "1");
    // A path not known to be loopback, over which sends are always copied.
    let uri = format!("tcp:0.0.0.0:{port}");
    // Room for the rings, and for no send.
    let wrapper = format!("prlimit --memlock=131072 {}", user(65532));
    let mut migrate = moving.migrate(&wrapper, "1", &uri);
    let report = migrate.event("completed");
    assert_eq!(report["zero_copy"], "none: copied by the kernel");
    incoming.event("completed");
    migrate.succeeds();
    let bytes = |name| std::fs::read(moving.ram(name)).unwrap();
    assert!(bytes("source") == bytes("destination"), "every byte is equal");
}

/// An unprivileged user with access to the device alone: in every kind of memory the faults of system calls are served
/// too, and every word is right.
#[test]
fn user_with_access_to_the_device_passes() {
    // A copy of the device, visible only in this namespace.
    let device = "mount -t tmpfs none /mnt && cp -a /dev/userfaultfd /mnt/ && chmod 666 \
                  /mnt/userfaultfd && mount --bind /mnt/userfaultfd /dev/userfaultfd";
    let user = user(65533);
    for kind in ["shared", "private", "anonymous"] {
        let demo = |prepare: &str| {
            let line =
                format!("{prepare} && exec {user} {UMEM} demo --json --size 64 --kind {kind}");
            run(&["unshare", "--mount", "bash", "-c", &line])
        };
        let output = demo(device);
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), &output.stderr);
        assert!(output.status.success(), "{stdout}\n{}", String::from_utf8_lossy(stderr));
        let report: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
        assert_eq!(report["verified_pages"], 64 * 256, "{report}");
        assert_eq!(report["bad_pages"], 0, "{report}");

        let output = demo("true");
        assert!(!output.status.success());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            stderr.contains("/dev/userfaultfd"),
            "what is missing, and how to grant it: {stderr}"
        );
    }
}

/// Before the guest is stopped, on either side; the source gets the destination's reason.
#[test]
fn lanes_beyond_the_limits_are_refused_before_the_move() {
    let moving = Move::new();
    let nowhere = "tcp:127.0.0.1:1";
    let text = moving.migrate("prlimit --nofile=90:4096", "8", nowhere).fails();
    assert!(text.contains("8 bulk lane(s)") && text.contains("`ulimit -n 136`"), "{text}");
    let text = moving.migrate("prlimit --nofile=90:91", "8", nowhere).fails();
    assert!(text.contains("--nofile=136:136"), "{text}");
    // Up to the connection.
    let text = moving.migrate("prlimit --nofile=136", "8", nowhere).fails();
    assert!(text.contains("cannot connect"), "{text}");

    let (incoming, port) = moving.incoming("prlimit --nofile=90:4096", "16");
    let mut migrate = moving.migrate("env", "8", &format!("tcp:127.0.0.1:{port}"));
    assert!(migrate.connects());
    let text = migrate.fails();
    assert!(text.contains("the destination gave up") && text.contains("ulimit -n 136"), "{text}");
    let text = incoming.fails();
    assert!(text.contains("`ulimit -n 136`"), "{text}");
    assert!(!moving.ram("destination").exists(), "the directory is empty");
}
