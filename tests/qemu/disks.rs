//! Guests that read a slow disk past QEMU's page cache (cache=none) all the time: QEMU, or the kernel, writes into
//! guest pages that were chosen long before.

use crate::boot;
use crate::destination::Destination;
use crate::moving::Moved;
use crate::support::{Machine, QemuVersion, Scratch, SlowDisk};

/// The guest has sixteen reads under way at any moment, in every pass and when it is stopped.
fn reads_a_slow_disk(aio: &str, options: &[&str]) {
    let scratch = Scratch::new();
    let disk = SlowDisk::start(&scratch, 32);
    let drive = format!(
        "file={},if=none,id=slow,format=raw,readonly=on,cache=none,aio={aio}",
        disk.path().display()
    );
    let extra = ["-drive", &drive, "-device", "virtio-blk-pci,drive=slow,queue-size=128"];
    let guest = "umem.mib=64 umem.disk=32".into();
    let extra = extra.map(str::to_owned).into();
    let machine = Machine { guest, extra, ..Machine::linux(QemuVersion::V10_0) };
    let mut source = boot(&machine, &scratch);
    source.serial.beat("reads of its disk", |beat| beat.disk > 50);
    let destination = Destination::start(&machine, &scratch);
    let mut moving = Moved::start(source, destination, &[options, &["--checksum"]].concat());
    moving.umem.event("pass");
    let mut moved = moving.complete();
    let before = moved.destination.serial.last_beat().disk;
    moved.destination.serial.beat("more reads of its disk", |beat| beat.disk > before + 200);
    moved.end();
}

const HYBRID: [&str; 4] = ["--precopy", "-p", "--downtime-limit", "0"];

#[test]
fn guest_reading_a_slow_disk_by_threads_moves_in_rounds() {
    reads_a_slow_disk("threads", &HYBRID);
}

#[test]
fn guest_reading_a_slow_disk_by_native_aio_moves_in_rounds() {
    reads_a_slow_disk("native", &HYBRID);
}

#[test]
fn guest_reading_a_slow_disk_by_io_uring_moves_in_rounds() {
    reads_a_slow_disk("io_uring", &HYBRID);
    reads_a_slow_disk("io_uring", &["--downtime-limit", "0"]);
}
