//! One guest, one mover: other clients that move the guest, let it run or have set up its QEMU's migration. umem
//! restores the settings that it found, and does not hand a guest over in an uncertain state.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::destination::Destination;
use crate::halted::Halted;
use crate::moving::Moved;
use crate::support::{Machine, Qemu, QemuVersion, Qmp, Scratch, Umem, wait_for};
use crate::{NOBODY, boot, migrate, says};

const VERSIONS: [QemuVersion; 2] = [QemuVersion::V7_2, QemuVersion::V10_0];

/// A machine without a system to boot and with a third QMP socket, for another client.
fn machine(version: QemuVersion, scratch: &Scratch) -> (Machine, PathBuf) {
    let other = scratch.path("other.qmp");
    let mut machine = Machine::bare(version);
    machine.extra = vec!["-qmp".into(), format!("unix:{},server=on,wait=off", other.display())];
    (machine, other)
}

/// The machine of its destination, without such a socket.
fn bare(version: QemuVersion) -> Machine {
    Machine::bare(version)
}

/// Every setting that a umem might change in a QEMU.
fn set_up(qmp: &mut Qmp) -> [Value; 3] {
    let devices = qmp.execute("query-chardev", json!({}));
    let labels = devices.as_array().expect("a list").iter().map(|device| device["label"].clone());
    let is_ours = |label: &Value| label.as_str().expect("text").starts_with("umem-");
    let mut labels: Vec<Value> = labels.filter(is_ours).collect();
    labels.sort_by_key(Value::to_string);
    let [capabilities, parameters] = ["query-migrate-capabilities", "query-migrate-parameters"]
        .map(|query| qmp.execute(query, json!({})));
    [capabilities, parameters, labels.into()]
}

/// The memory that QEMU leaves out of its stream must be the memory that umem moves; umem checks that before.
#[test]
fn memory_added_during_a_move_ends_the_move() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let mut machine = Machine::bare(version);
        machine.extra = ["-m", "256M,slots=1,maxmem=1G"].map(str::to_owned).to_vec();
        let mut source = machine.start(&scratch);
        let halted = Halted::when_connected(&machine, &scratch, &mut source);
        let backend = json!({ "qom-type": "memory-backend-file", "id": "ram1", "size": 128 << 20,
            "share": true, "mem-path": scratch.ram("dimm") });
        source.qmp.execute("object-add", backend);
        let dimm = json!({ "driver": "pc-dimm", "id": "d", "memdev": "ram1" });
        source.qmp.execute("device_add", dimm);
        halted.tap.release();
        says(&halted.umem.fails(), "(RAM block ram1) was plugged in");
        halted.destination.umem.fails();
        wait_for("the guest to continue", || (source.qmp.status() == "running").then_some(()));
    }
}

/// The default directory of session files may be on a read-only file system; the option was not given.
#[test]
fn guest_moves_without_a_writable_session_directory() {
    let scratch = Scratch::new();
    let machine = Machine::bare(QemuVersion::V10_0);
    let source = machine.start(&scratch);
    let mut destination = Destination::start(&machine, &scratch);
    let runtime = scratch.path("runtime");
    let script = format!(
        "mkdir -p {0}/umem && chmod 700 {0} {0}/umem && mount --bind {0} {0} && mount -o remount,ro,bind {0} && \
         XDG_RUNTIME_DIR={0} exec \"$@\"",
        runtime.display()
    );
    let wrapper = ["unshare", "-m", "--propagation", "private", "sh", "-c", &script, "sh"];
    let qmp = source.socket.to_str().expect("the path is UTF-8");
    let words = ["migrate", "--json", "--qmp", qmp, "-p", &destination.uri];
    let mut umem = Umem::start_under(&wrapper, words);
    assert_eq!(umem.event("stopped")["session"], Value::Null, "there is no session to resume");
    destination.umem.event("completed");
    umem.succeeds();
    Qmp::connect(&destination.qmp).quit();
    destination.umem.succeeds();
}

/// `cont` makes a waiting QEMU run its guest as soon as it is loaded, while the source may still continue it.
#[test]
fn early_cont_at_the_destination_leaves_the_guest_at_the_source() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let machine = Machine::bare(version);
        let mut source = machine.start(&scratch);
        let halted = Halted::when_connected(&machine, &scratch, &mut source);
        let mut guest = Qmp::connect(&halted.destination.qmp);
        wait_for("umem's stop, and then its x-ignore-shared", || {
            let list = guest.execute("query-migrate-capabilities", json!({}));
            let is_on = |item: &Value| {
                item["capability"] == "x-ignore-shared" && item["state"] == json!(true)
            };
            list.as_array().expect("a list").iter().any(is_on).then_some(())
        });
        guest.execute("cont", json!({}));
        halted.tap.release();
        says(&halted.umem.fails(), "another client resumed the guest here (cont)");
        halted.destination.umem.fails();
        wait_for("the guest to continue", || (source.qmp.status() == "running").then_some(()));
    }
}

/// A killed umem has restored nothing. Its session may be lost, or another user's.
#[test]
fn settings_of_a_killed_umem_are_not_taken_for_the_users() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let machine = Machine::bare(version);
        let mut source = machine.start(&scratch);
        set_capability(&mut source.qmp, "events");
        set_capability(&mut source.qmp, "pause-before-switchover");
        source.qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": 12345678 }));
        let before = set_up(&mut source.qmp);
        for is_fresh_moved in [false, true] {
            let mut halted = Halted::when_stopped(&machine, &scratch, &mut source);
            halted.umem.kill();
            halted.tap.cut();
            halted.destination.umem.fails();
            ends_by_itself(&mut source);
            assert_ne!(set_up(&mut source.qmp), before, "no setting is left");
            for path in scratch.ram_files() {
                let is_the_destinations = path.to_string_lossy().contains("destination");
                let _ = is_the_destinations.then(|| std::fs::remove_file(path));
            }
            if !is_fresh_moved {
                says(&migrate(&source, NOBODY, &["-p"]).fails(), "cannot connect to");
                assert_eq!(source.qmp.status(), "running");
                assert_eq!(set_up(&mut source.qmp), before);
            }
        }
        let mut destination = Destination::start(&machine, &scratch);
        let umem = migrate(&source, &destination.uri, &["-p"]);
        destination.umem.event("completed");
        umem.succeeds();
        assert_eq!(source.qmp.status(), "postmigrate");
        assert_eq!(set_up(&mut source.qmp), before);
        let mut guest = Qmp::connect(&destination.qmp);
        assert_eq!(guest.status(), "running");
        guest.quit();
        destination.umem.succeeds();
    }
}

fn set_capability(qmp: &mut Qmp, name: &str) {
    let list = json!([{ "capability": name, "state": true }]);
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": list }));
}

/// QEMU's report on its own migration.
fn migration(qmp: &mut Qmp) -> String {
    let migration = qmp.execute("query-migrate", json!({}));
    migration["status"].as_str().unwrap_or("none").to_owned()
}

#[test]
fn second_umem_is_refused_during_a_move() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let (machine, other) = machine(version, &scratch);
        let mut source = machine.start(&scratch);
        let before = set_up(&mut source.qmp);
        let other = other.to_str().expect("the path is UTF-8");
        let second = || {
            let words = ["migrate", "--json", "-p", "--qmp", other, NOBODY];
            says(&Umem::start(words).fails(), "another umem moves this guest");
        };

        let bare = bare(version);
        let halted = Halted::when_connected(&bare, &scratch, &mut source);
        second();
        assert_eq!(source.qmp.status(), "running");
        halted.ends_at_the_source();
        assert_eq!(set_up(&mut source.qmp), before);

        let mut halted = Halted::when_stopped(&bare, &scratch, &mut source);
        second();
        assert_eq!(source.qmp.status(), "finish-migrate");
        // A stale claim has no owner.
        halted.umem.kill();
        halted.tap.cut();
        halted.destination.umem.fails();
        ends_by_itself(&mut source);
        let words = ["migrate", "--json", "-p", "--qmp", other, NOBODY];
        says(&Umem::start(words).fails(), "cannot connect to");
    }
}

#[test]
fn commands_of_other_clients_are_refused_before_the_switchover() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let machine = Machine::linux(version);
        let mut source = boot(&machine, &scratch);
        let before = set_up(&mut source.qmp);
        let mut halted = Halted::when_loaded(&machine, &scratch, &source);
        for (command, arguments) in [
            ("cont", json!({})),
            ("migrate", json!({ "uri": "exec:cat >/dev/null" })),
            ("migrate-set-capabilities", json!({ "capabilities": [] })),
        ] {
            let refused = source.qmp.refuses(command, arguments);
            assert!(refused.contains("migration") || refused.contains("Migration"), "{refused}");
        }
        assert_eq!(source.qmp.status(), "finish-migrate");
        // The destination is unchanged, whichever umem takes over there.
        let mut guest = Qmp::connect(&halted.destination.qmp);
        wait_for("the destination's capabilities to be put back", || {
            let list = guest.execute("query-migrate-capabilities", json!({}));
            let is_off = |item: &Value| item["state"] == json!(false);
            list.as_array().expect("a list").iter().all(is_off).then_some(())
        });

        // Its end lets the guest continue: QEMU does that itself, unless umem had stopped the guest.
        let stopped = halted.umem.event("stopped");
        let session = stopped["session"].as_str().expect("text");
        halted.umem.kill();
        ends_by_itself(&mut source);
        halted.tap.cut();
        let words = ["migrate", "--json", "--resume", session, &halted.destination.uri];
        Umem::start(words).succeeds();
        halted.destination.umem.fails();
        source.serial.goes_on();
        assert_eq!(source.qmp.status(), "running");
        assert_eq!(set_up(&mut source.qmp), before);
        let destination = Destination::start(&machine, &scratch);
        let mut moved = Moved::start(source, destination, &["-p"]).complete();
        assert_eq!(set_up(&mut moved.source.qmp), before);
        moved.end();
    }
}

/// QEMU ends its migration when the umem that it waits for ends.
fn ends_by_itself(source: &mut Qemu) {
    wait_for("QEMU to cancel its migration", || {
        (migration(&mut source.qmp) == "failed").then_some(())
    });
    wait_for("QEMU to restore its earlier state", || {
        ["running", "paused"].contains(&source.qmp.status().as_str()).then_some(())
    });
}

#[test]
fn qemus_own_migration_is_not_disturbed() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let machine = Machine::bare(version);
        let mut source = machine.start(&scratch);
        let begin = |source: &mut Qemu| {
            source.qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": 4096 }));
            source.qmp.execute("migrate", json!({ "uri": "exec:cat >/dev/null" }));
            wait_for("the migration to begin", || {
                (migration(&mut source.qmp) == "active").then_some(())
            });
        };
        let goes_on = |source: &mut Qemu| {
            assert_eq!(migration(&mut source.qmp), "active");
            assert_eq!(source.qmp.status(), "running");
            source.qmp.execute("migrate_cancel", json!({}));
            wait_for("its end", || (migration(&mut source.qmp) == "cancelled").then_some(()));
        };

        begin(&mut source);
        let before = set_up(&mut source.qmp);
        let text = migrate(&source, NOBODY, &["-p"]).fails();
        says(&text, "a migration of this guest is in progress");
        assert_eq!(set_up(&mut source.qmp), before);
        goes_on(&mut source);

        // A migration that begins after umem's check.
        let halted = Halted::when_connected(&machine, &scratch, &mut source);
        begin(&mut source);
        let before = set_up(&mut source.qmp);
        halted.tap.release();
        says(&halted.umem.fails(), "a migration of this guest is in progress");
        halted.destination.umem.fails();
        assert_eq!(set_up(&mut source.qmp)[..2], before[..2]);
        goes_on(&mut source);
    }
}

/// Parameters that QEMU sets together.
#[test]
fn source_capabilities_and_parameters_are_restored_after_the_move() {
    for (version, sets) in [
        (
            QemuVersion::V7_2,
            &[
                &["pause-before-switchover", "events", "auto-converge", "dirty-bitmaps"][..],
                &["multifd", "validate-uuid"],
                &["compress", "return-path"],
                &["background-snapshot"],
                &["x-colo"],
                &["xbzrle", "release-ram", "late-block-activate"],
                &["postcopy-ram"],
            ][..],
        ),
        (
            QemuVersion::V10_0,
            &[
                &["pause-before-switchover", "events", "auto-converge", "dirty-bitmaps"][..],
                &["multifd", "zero-copy-send"],
                &["mapped-ram"],
                &["return-path", "switchover-ack"],
                &["background-snapshot"],
                &["x-colo"],
                &["xbzrle", "release-ram", "late-block-activate"],
                &["postcopy-ram", "postcopy-preempt"],
            ],
        ),
    ] {
        for set in sets {
            let scratch = Scratch::new();
            let machine = Machine::bare(version);
            let mut source = machine.start(&scratch);
            set.iter().for_each(|name| set_capability(&mut source.qmp, name));
            if version == QemuVersion::V10_0 {
                source.qmp.execute("migrate-set-parameters", json!({ "mode": "cpr-reboot" }));
            }
            // QEMU itself refuses the combination of these two.
            let credentials = if set.contains(&"zero-copy-send") { "" } else { "tls0" };
            let parameters = json!({ "tls-creds": credentials, "max-bandwidth": 12345 });
            source.qmp.execute("migrate-set-parameters", parameters);
            let before = set_up(&mut source.qmp);

            let text = migrate(&source, NOBODY, &["-p"]).fails();
            says(&text, "cannot connect to");
            let halted = Halted::when_stopped(&machine, &scratch, &mut source);
            halted.ends_at_the_source();
            assert_eq!(source.qmp.status(), "running", "{set:?}");
            assert_eq!(set_up(&mut source.qmp), before, "{set:?}");

            let mut destination = Destination::start(&machine, &scratch);
            let umem = migrate(&source, &destination.uri, &["-p"]);
            destination.umem.event("completed");
            umem.succeeds();
            assert_eq!(source.qmp.status(), "postmigrate", "{set:?}");
            assert_eq!(set_up(&mut source.qmp), before, "{set:?}");
            let mut guest = Qmp::connect(&destination.qmp);
            assert_eq!(guest.status(), "running", "{set:?}");
            guest.quit();
            destination.umem.succeeds();
        }
    }
}

/// Capabilities left on would make the next migration, or `virsh save`, leave out the guest's memory.
#[test]
fn destination_settings_are_restored_after_the_move() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let machine = Machine::bare(version);
        let mut source = machine.start(&scratch);
        let [capabilities, parameters, _] = set_up(&mut source.qmp);
        let mut destination = Destination::start(&machine, &scratch);
        let umem = migrate(&source, &destination.uri, &["-p"]);
        destination.umem.event("completed");
        umem.succeeds();
        let mut guest = Qmp::connect(&destination.qmp);
        // The character device of the monitor that umem has QEMU make stays as long as QEMU does.
        let [now_capabilities, now_parameters, _] = set_up(&mut guest);
        assert_eq!(now_capabilities, capabilities, "{version:?}");
        assert_eq!(now_parameters, parameters, "{version:?}");
        guest.quit();
        destination.umem.succeeds();
    }
}

#[test]
fn unmovable_settings_are_refused_by_name() {
    let scratch = Scratch::new();
    let mut source = Machine::bare(QemuVersion::V7_2).start(&scratch);
    set_capability(&mut source.qmp, "block");
    let before = set_up(&mut source.qmp);
    says(&migrate(&source, NOBODY, &["-p"]).fails(), "QEMU's capability block is on");
    assert_eq!(source.qmp.status(), "running");
    assert_eq!(set_up(&mut source.qmp), before);
}

#[test]
fn moved_guest_is_not_moved_again() {
    let scratch = Scratch::new();
    let machine = Machine::bare(QemuVersion::V10_0);
    let source = machine.start(&scratch);
    let mut destination = Destination::start(&machine, &scratch);
    let umem = migrate(&source, &destination.uri, &["-p"]);
    destination.umem.event("completed");
    umem.succeeds();
    says(
        &migrate(&source, NOBODY, &["-p"]).fails(),
        "its guest was migrated (query-status reports postmigrate)",
    );
    Qmp::connect(&destination.qmp).quit();
    destination.umem.succeeds();
}

/// The commands that bring a guest into a state, and the options.
struct State {
    name: &'static str,
    options: &'static [&'static str],
    /// For the human monitor; `stop` is QMP's.
    lines: &'static [&'static str],
}

/// Writes to a panic device, and to the register that suspends a machine or switches it off.
const STATES: [State; 5] = [
    State { name: "paused", options: &[], lines: &["stop"] },
    State { name: "prelaunch", options: &["-S"], lines: &[] },
    State {
        name: "guest-panicked",
        options: &["-device", "pvpanic", "-action", "panic=pause"],
        lines: &["o /b 0x505 1"],
    },
    State { name: "shutdown", options: &["-no-shutdown"], lines: &["system_powerdown_by_guest"] },
    State {
        name: "io-error",
        options: &[
            "-blockdev",
            "driver=blkdebug,node-name=disk,image.driver=null-co,image.size=1048576,\
             inject-error.0.event=none,inject-error.0.iotype=read,\
             inject-error.0.errno=5",
            "-device",
            "virtio-blk-pci,drive=disk,rerror=stop,werror=stop",
        ],
        lines: &[],
    },
];

impl State {
    fn machine(&self, version: QemuVersion) -> Machine {
        let mut machine = Machine::bare(version);
        machine.extra = self.options.iter().map(|&word| word.to_owned()).collect();
        machine
    }

    fn bring_about(&self, source: &mut Qemu) {
        let line = |source: &mut Qemu, line: &str| {
            let line = json!({ "command-line": line });
            source.qmp.execute("human-monitor-command", line);
        };
        match self.lines {
            ["system_powerdown_by_guest"] => sleep_type(source, 0),
            lines => lines.iter().for_each(|text| line(source, text)),
        }
        wait_for(format!("the guest to be {}", self.name), || {
            (source.qmp.status() == self.name).then_some(())
        });
    }
}

/// Suspends the machine, as its firmware or a guest does: a write to the power management's control register, which the
/// firmware has placed there.
fn sleep_type(source: &mut Qemu, kind: u32) {
    wait_for("the firmware to have set up power management", || {
        let line = json!({ "command-line": format!("o /w 0x604 {}", 0x2000 | kind << 10) });
        source.qmp.execute("human-monitor-command", line);
        (source.qmp.status() != "running").then_some(())
    });
}

#[test]
fn run_state_is_carried_and_restored_after_a_failure() {
    for version in VERSIONS {
        for state in STATES {
            let scratch = Scratch::new();
            let machine = state.machine(version);
            let mut source = machine.start(&scratch);
            state.bring_about(&mut source);
            let halted = Halted::when_stopped(&machine, &scratch, &mut source);
            halted.ends_at_the_source();
            // QEMU 7.2 cannot return to this state after a failed migration.
            let name = if version == QemuVersion::V7_2 { "postmigrate" } else { state.name };
            assert_eq!(source.qmp.status(), name, "{version:?} after a failure");
            drop(source);

            let scratch = Scratch::new();
            let mut source = machine.start(&scratch);
            state.bring_about(&mut source);
            let mut destination = Destination::start(&machine, &scratch);
            let umem = migrate(&source, &destination.uri, &["-p"]);
            destination.umem.event("completed");
            umem.succeeds();
            let mut guest = Qmp::connect(&destination.qmp);
            assert_eq!(guest.status(), state.name, "{version:?}");
            guest.quit();
            destination.umem.succeeds();
        }
    }
}

/// Asleep (S3), from which a guest is woken.
#[test]
fn suspended_guest_stays_suspended_if_qemu_supports_it() {
    let scratch = Scratch::new();
    let machine = Machine::bare(QemuVersion::V10_0);
    let mut source = machine.start(&scratch);
    sleep_type(&mut source, 1);
    assert_eq!(source.qmp.status(), "suspended");
    let halted = Halted::when_stopped(&machine, &scratch, &mut source);
    halted.ends_at_the_source();
    assert_eq!(source.qmp.status(), "suspended");
    drop(source);
    for options in [&["-p"][..], &["--stop-first"]] {
        let scratch = Scratch::new();
        let mut source = machine.start(&scratch);
        sleep_type(&mut source, 1);
        let mut destination = Destination::start(&machine, &scratch);
        let umem = migrate(&source, &destination.uri, options);
        destination.umem.event("completed");
        umem.succeeds();
        let mut guest = Qmp::connect(&destination.qmp);
        assert_eq!(guest.status(), "suspended");
        guest.execute("system_wakeup", json!({}));
        wait_for("the guest to wake", || (guest.status() == "running").then_some(()));
        guest.quit();
        destination.umem.succeeds();
    }

    let other = Scratch::new();
    let mut source = Machine::bare(QemuVersion::V7_2).start(&other);
    sleep_type(&mut source, 1);
    assert_eq!(source.qmp.status(), "suspended");
    let text = migrate(&source, NOBODY, &["-p"]).fails();
    says(&text, "its guest is suspended");
    says(&text, "system_wakeup");
    assert_eq!(source.qmp.status(), "suspended");
}
