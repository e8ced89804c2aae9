//! Memory that is unplugged at the destination, or plugged in there, while the guest's pages arrive.

use std::fs;
use std::os::unix::fs::FileExt;

use nix::sys::signal::Signal;
use serde_json::json;

use crate::destination::Destination;
use crate::found::mapped;
use crate::moving::Moving;
use crate::support::{self, Machine, QemuVersion, Qmp, Ram, Scratch, Side};
use crate::{boot, migrate};

const DIMM_MIB: u64 = 128;

#[test]
fn dimm_unplugged_during_a_move_does_not_block_it() {
    for options in [&[][..], &["--checksum"]] {
        is_unplugged(QemuVersion::V10_0, false, options);
    }
}

#[test]
fn private_dimm_may_be_unplugged_during_a_move() {
    is_unplugged(QemuVersion::V10_0, true, &[]);
}

/// A DIMM that Linux does not use, so that it agrees to remove it at once, and a backend without a device.
fn machine(version: QemuVersion, becomes_private: bool) -> Machine {
    let ram = vec![Ram { id: "ram0", mib: 256 }, Ram { id: "ram1", mib: DIMM_MIB }];
    let guest = "umem.mib=64 memhp_default_state=offline".into();
    Machine { ram, guest, becomes_private, ..Machine::linux(version) }
}

/// With a memory backend without a device.
fn with_spare(mut machine: Machine, scratch: &Scratch, side: Side) -> Machine {
    let path = scratch.ram(&format!("spare-{side:?}"));
    let share = if machine.becomes_private { "off" } else { "on" };
    let spare =
        format!("memory-backend-file,id=spare,size=8M,share={share},mem-path={}", path.display());
    machine.extra.extend(["-object".to_owned(), spare]);
    machine
}

/// Up to the guest running at the destination. Its pages arrive on demand, until the source is interrupted.
fn switched(machine: &Machine, scratch: &Scratch, options: &[&str]) -> Moving {
    let source = boot(&with_spare(machine.clone(), scratch, Side::Source), scratch);
    let dimm = mapped(source.pid(), &name(machine, scratch, Side::Source, "ram1"));
    dimm.write_all_at(&vec![0xa5; 64 << 20], 0).expect("memory");
    let kind = if machine.becomes_private { "private" } else { "shared" };
    let there = with_spare(machine.clone(), scratch, Side::Destination);
    let destination =
        Destination::start_with(&there, scratch, &["--kind", kind], "tcp:127.0.0.1:0");
    let umem = migrate(&source, &destination.uri, &[&["-p", "-n"], options].concat());
    let mut moving = Moving { source, umem, destination };
    moving.umem.event("running");
    moving.destination.umem.event("running");
    moving
}

fn name(machine: &Machine, scratch: &Scratch, side: Side, id: &str) -> String {
    machine.ram_file(scratch, side, id).display().to_string()
}

fn maps(pid: u32, name: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/maps")).expect("the process exists").contains(name)
}

fn is_unplugged(version: QemuVersion, becomes_private: bool, options: &[&str]) {
    let scratch = Scratch::new();
    let machine = machine(version, becomes_private);
    let mut moving = switched(&machine, &scratch, options);
    let mut qmp = Qmp::connect(&moving.destination.qmp);
    qmp.execute("object-del", json!({ "id": "spare" }));
    qmp.execute("device_del", json!({ "id": "dimm-ram1" }));
    support::wait_for("the guest to release its DIMM", || {
        let devices = qmp.execute("query-memory-devices", json!({}));
        devices.as_array().expect("a list").is_empty().then_some(())
    });
    qmp.execute("object-del", json!({ "id": "ram1" }));
    let name = name(&machine, &scratch, Side::Destination, "ram1");
    let pid = moving.destination.guest_pid;
    support::wait_for("its memory to be unmapped", || (!maps(pid, &name)).then_some(()));
    for umem in [&mut moving.umem, &mut moving.destination.umem] {
        assert!(umem.is_running(), "{}", umem.stderr());
    }
    // From now on also pages without a demand.
    moving.umem.signal(Signal::SIGINT);
    // Its socket takes one client.
    drop(qmp);
    let unmapped = moving.destination.umem.event("unmapped");
    assert_eq!(unmapped["bytes"], DIMM_MIB << 20, "{unmapped}");
    moving.complete().end();
}

/// New memory does not exist at the source: umem leaves it alone.
#[test]
fn dimm_plugged_in_during_a_move_is_left_alone() {
    for version in crate::found::VERSIONS {
        let scratch = Scratch::new();
        let mut machine = machine(version, false);
        machine.guest = "umem.mib=64".into();
        machine.extra = ["-m", "256M,slots=4,maxmem=4G"].map(str::to_owned).into();
        let mut moving = switched(&machine, &scratch, &[]);
        let mut qmp = Qmp::connect(&moving.destination.qmp);
        let path = scratch.ram("plugged");
        let backend = json!({ "qom-type": "memory-backend-file", "id": "new", "size": 128 << 20, "share": true,
            "mem-path": path });
        qmp.execute("object-add", backend);
        qmp.execute(
            "device_add",
            json!({ "driver": "pc-dimm", "id": "dimm-new", "memdev": "new" }),
        );
        drop(qmp);
        moving.umem.signal(Signal::SIGINT);
        moving.complete().end();
    }
}
