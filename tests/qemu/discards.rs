//! Guests that discard memory while they arrive.

use crate::destination::Destination;
use crate::moving::{Moved, Moving};
use crate::support::{Machine, QemuVersion, Scratch, Side};
use crate::{boot, migrate};

const POSTCOPY: &[&str] = &["-p", "--max-postcopy-bandwidth", "32M"];

#[test]
fn ballooned_pages_read_as_zeroes_with_qemu_7_2() {
    gives_back(QemuVersion::V7_2, false, "zeroes", POSTCOPY);
}

#[test]
fn ballooned_pages_read_as_zeroes_with_qemu_10_0() {
    gives_back(QemuVersion::V10_0, false, "zeroes", POSTCOPY);
}

#[test]
fn ballooned_pages_of_private_memory_read_as_zeroes() {
    gives_back(QemuVersion::V10_0, true, "zeroes", POSTCOPY);
}

/// A guest's pages in its balloon may read as any bytes, as virtio leaves their contents undefined: a page that was
/// given back after a pass had sent it has its old contents. All other pages are as the guest wrote them.
#[test]
fn ballooned_pages_leave_others_whole_in_passes_while_the_guest_runs() {
    let slowly = ["--max-bandwidth", "64M", "--max-postcopy-bandwidth", "32M"];
    let hybrid = [&["--precopy", "-p", "--downtime-limit", "0"][..], &slowly].concat();
    for becomes_private in [false, true] {
        gives_back(QemuVersion::V10_0, becomes_private, "any", &hybrid);
    }
    gives_back(QemuVersion::V10_0, false, "any", &[]);
}

/// The guest puts pages into its balloon, and reports others as free, all the time. It checks that these pages read as
/// zeroes, unless any contents are allowed, and other pages as written.
fn gives_back(version: QemuVersion, becomes_private: bool, given: &str, options: &[&str]) {
    let scratch = Scratch::new();
    let machine = Machine {
        guest: format!("umem.mib=64 umem.balloon=64 umem.given={given}"),
        extra: ["-device", "virtio-balloon-pci,free-page-reporting=on"].map(str::to_owned).into(),
        becomes_private,
        ..Machine::linux(version)
    };
    let mut source = boot(&machine, &scratch);
    source.serial.beat("pages given to the host", |beat| beat.given > 100);
    let kind = if becomes_private { "private" } else { "shared" };
    let destination =
        Destination::start_with(&machine, &scratch, &["--kind", kind], "tcp:127.0.0.1:0");
    // Slowly, so that most pages are discarded before they arrive.
    let umem = migrate(&source, &destination.uri, options);
    let mut moving = Moving { source, umem, destination };
    moving.umem.event("running");
    let before = moving.source.serial.last_beat().given;
    moving.destination.serial.beat("more pages given", |beat| beat.given > before + 300);
    assert!(moving.destination.umem.is_running());
    let mut moved: Moved = moving.complete();
    let then = moved.destination.serial.last_beat().given;
    moved.destination.serial.beat("and still more", |beat| beat.given > then + 100);
    moved.end();
}

#[test]
fn guest_with_virtio_mem_moves_with_qemu_7_2() {
    has_virtio_mem(QemuVersion::V7_2);
}

#[test]
fn guest_with_virtio_mem_moves_with_qemu_10_0() {
    has_virtio_mem(QemuVersion::V10_0);
}

/// The device discards its memory as QEMU starts (7.2), and the unplugged part as its state is loaded.
fn has_virtio_mem(version: QemuVersion) {
    let scratch = Scratch::new();
    let machine = |side| {
        let path = scratch.ram(&format!("vmem-{side:?}"));
        let backend =
            format!("memory-backend-file,id=mem1,size=128M,share=on,mem-path={}", path.display());
        let device = "virtio-mem-pci,id=vmem,memdev=mem1,requested-size=64M";
        let words = ["-m", "256M,maxmem=1G", "-object", &backend, "-device", device];
        let extra = words.map(str::to_owned).into();
        // The pluggable range takes some of its memory.
        Machine { guest: "umem.mib=64".into(), extra, ..Machine::linux(version) }
    };
    let source = boot(&machine(Side::Source), &scratch);
    let destination = Destination::start(&machine(Side::Destination), &scratch);
    let umem = migrate(&source, &destination.uri, &["-p"]);
    let mut moving = Moving { source, umem, destination };
    for umem in [&mut moving.umem, &mut moving.destination.umem] {
        assert_eq!(umem.event("completed")["total_bytes"], 384 << 20);
    }
    moving.is_whole_at_the_destination();
    moving.umem.succeeds();
}
