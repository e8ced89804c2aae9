//! If the guest's RAM could use huge pages and QEMU's options prevent them, both sides print the remedy.

use crate::support::{Machine, Qemu, QemuVersion, Scratch, Side, Umem};
use crate::{NOBODY, incoming, says};

/// /dev/shm as `umem doctor` recommends it, for one program alone.
const IN_HUGE_TMPFS: [&str; 6] = [
    "unshare",
    "--mount",
    "sh",
    "-c",
    "mount -t tmpfs -o huge=always,size=512m none /dev/shm && exec \"$@\"",
    "sh",
];

const ADVICE: &str = "RAM backend ram0 could use huge pages";

/// The backend's further options, and whether they prevent huge pages. QEMU accepts a size in each of these forms.
const ALIGNED: [(&str, bool); 5] = [
    ("", true),
    (",align=4K", true),
    (",align=2M", false),
    (",align=0x200000", false),
    (",align=1G", false),
];

#[test]
fn destination_prints_huge_page_advice() {
    for version in [QemuVersion::V7_2, QemuVersion::V10_0] {
        for (align, is_advised) in ALIGNED {
            let scratch = Scratch::new();
            let words = aligned(version, &scratch, Side::Destination, align);
            let arguments = incoming(&words, &[], "tcp:127.0.0.1:0");
            let mut umem = Umem::start_under(&IN_HUGE_TMPFS, arguments);
            umem.event("listening");
            judge(&umem.stderr(), is_advised.then_some("here and at the source"));
        }
    }
    // As JSON, on a machine without huge pages.
    let scratch = Scratch::new();
    let path = Machine::bare(QemuVersion::V10_0).ram_file(&scratch, Side::Destination, "ram0");
    let json = |align: &str| {
        let words = aligned(QemuVersion::V10_0, &scratch, Side::Destination, "");
        let object = format!(
            "{{\"qom-type\":\"memory-backend-file\",\"id\":\"ram0\",\"size\":{},\"share\":true,\
             \"mem-path\":\"{}\"{align}}}",
            256 << 20,
            path.display()
        );
        let object = |word: String| match word.starts_with("memory-backend-file,") {
            true => object.clone(),
            false => word,
        };
        incoming(&words.into_iter().map(object).collect::<Vec<_>>(), &[], "tcp:127.0.0.1:0")
    };
    let small = IN_HUGE_TMPFS.map(|word| word.replace("huge=always", "huge=never"));
    let small = small.each_ref().map(String::as_str);
    for (wrapper, align, is_advised) in [
        (IN_HUGE_TMPFS, "", true),
        (IN_HUGE_TMPFS, ",\"align\":2097152", false),
        (small, "", false),
    ] {
        let mut umem = Umem::start_under(&wrapper, json(align));
        umem.event("listening");
        judge(&umem.stderr(), is_advised.then_some("here and at the source"));
    }
}

#[test]
fn source_prints_huge_page_advice() {
    for version in [QemuVersion::V7_2, QemuVersion::V10_0] {
        for (align, is_advised) in ALIGNED {
            let scratch = Scratch::new();
            let words = aligned(version, &scratch, Side::Source, align);
            let words: Vec<_> = IN_HUGE_TMPFS.map(str::to_owned).into_iter().chain(words).collect();
            let machine = Machine::bare(version);
            let [umem, test] =
                ["umem", "test"].map(|name| machine.socket(&scratch, Side::Source, name));
            let serial = machine.serial(&scratch, Side::Source);
            let source = Qemu::start(&words, &test, umem, serial);

            let qmp = source.socket.display().to_string();
            let arguments = ["migrate", "--json", "-p", "--qmp", &qmp, NOBODY];
            let pid = source.pid().to_string();
            let mut umem = Umem::start_under(&["nsenter", "--target", &pid, "--mount"], arguments);
            assert_eq!(umem.wait().code(), Some(1), "no destination listens at the address");
            let text = umem.stderr();
            says(&text, "tcp:127.0.0.1:1");
            judge(&text, is_advised.then_some("here and at the destination"));
        }
    }
}

/// A machine's command line with these words behind its backend.
fn aligned(version: QemuVersion, scratch: &Scratch, side: Side, align: &str) -> Vec<String> {
    let mut words = Machine::bare(version).command_line(scratch, side);
    words.push("-S".into());
    let backend = words.iter_mut().find(|word| word.starts_with("memory-backend-file,"));
    backend.expect("the command line has a backend").push_str(align);
    words
}

/// The advice is printed once and with these words, or not at all.
fn judge(stderr: &str, expected: Option<&str>) {
    let advice: Vec<_> = stderr.lines().filter(|line| line.contains("huge pages")).collect();
    match (&advice[..], expected) {
        ([], None) => {}
        ([advice], Some(words)) => {
            says(advice, &format!("umem: {ADVICE}"));
            says(advice, "add align=2M to the -object option");
            says(advice, words);
        }
        _ => panic!("expected {expected:?}, not: {stderr}"),
    }
}
