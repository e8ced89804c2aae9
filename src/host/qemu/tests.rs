//! The commands that umem sends to a QEMU, recorded by a fake QEMU.

use super::*;
use std::collections::BTreeMap;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::SystemTime;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// Larger than the buffers of a socket.
const STATE: usize = 4 << 20;

/// As with a QEMU whose migration has the main loop's lock before the command has been answered.
#[test]
fn device_state_is_read_before_the_command_is_answered() {
    let (monitor, ours) = UnixStream::pair().unwrap();
    let qemu = std::thread::spawn(move || answer_late(&monitor));
    let mut qmp = Qemu::new(Qmp::open(ours, "it").unwrap());
    Monitor::stop(&mut qmp).unwrap();
    let state = qmp.save_state().unwrap();
    assert_eq!(state.len(), 1 + STATE);
    assert!(state[1..].iter().all(|&byte| byte == 0x5a));
    drop(qmp);
    qemu.join().unwrap();
}

/// The guest stands still only for the steps that need it, and has its earlier settings afterwards.
#[test]
fn queries_are_made_before_the_guest_stops() {
    let (monitor, ours) = UnixStream::pair().unwrap();
    let qemu = std::thread::spawn(move || answer_late(&monitor));
    let mut qmp = Qemu::new(Qmp::open(ours, "it").unwrap());
    assert!(Monitor::stop(&mut qmp).unwrap().is_some());
    Monitor::resume(&mut qmp).unwrap();
    drop(qmp);
    let asked = qemu.join().unwrap();
    let migrated = asked.iter().position(|command| command == "migrate").unwrap();
    for command in ["getfd", "migrate-set-capabilities"] {
        assert!(asked[..migrated].contains(&command.to_owned()), "{command}: {asked:?}");
    }
    assert_eq!(asked[migrated + 1..migrated + 3], ["query-migrate", "query-status"], "{asked:?}");
    for command in ["migrate-set-capabilities", "cont"] {
        assert!(asked[migrated + 1..].contains(&command.to_owned()), "{command}: {asked:?}");
    }
}

/// The steps before the device state are made while the guest still runs.
#[test]
fn guest_is_stopped_by_the_saving_of_its_state() {
    let (monitor, ours) = UnixStream::pair().unwrap();
    let qemu = std::thread::spawn(move || answer_late(&monitor));
    let mut qmp = Qemu::new(Qmp::open(ours, "it").unwrap());
    let before = Instant::now();
    let stopped = Monitor::stop(&mut qmp).unwrap().unwrap();
    assert!(before < stopped && stopped < Instant::now());
    assert_eq!(qmp.save_state().unwrap().len(), 1 + STATE);
    drop(qmp);
    let asked = qemu.join().unwrap();
    let last = ["getfd", "migrate", "query-migrate", "query-status"];
    assert_eq!(asked[asked.len() - 4..], last, "{asked:?}");
    assert!(!asked.contains(&"stop".to_owned()), "{asked:?}");
}

/// As with a guest that changes its video memory all the time.
#[test]
fn guest_is_stopped_by_umem_when_qemu_does_not_stop_it() {
    let (monitor, ours) = UnixStream::pair().unwrap();
    let qemu = std::thread::spawn(move || answer(&monitor, "stop"));
    let mut qmp = Qemu::new(Qmp::open(ours, "it").unwrap());
    Monitor::stop(&mut qmp).unwrap();
    assert_eq!(qmp.save_state().unwrap().len(), 1 + STATE);
    drop(qmp);
    let asked = qemu.join().unwrap();
    let last = ["migrate", "stop", "query-migrate", "query-status"];
    assert_eq!(asked[asked.len() - 4..], last, "{asked:?}");
}

/// Otherwise the guest would run as soon as it is loaded, and the source might continue with it as well.
#[test]
fn destination_is_stopped_before_its_state_comes() {
    let (monitor, ours) = UnixStream::pair().unwrap();
    let qemu = std::thread::spawn(move || answer_late(&monitor));
    let mut qmp = Qemu::new(Qmp::open(ours, "it").unwrap());
    qmp.prepare().unwrap();
    qmp.load_state(vec![GUEST_RUNS, 1, 2, 3]).unwrap();
    qmp.run().unwrap();
    drop(qmp);
    let asked = qemu.join().unwrap();
    let at = |command: &str| asked.iter().position(|asked| asked == command).unwrap();
    assert!(at("stop") < at("migrate-incoming") && at("migrate-incoming") < at("cont"));
}

/// The event of a guest between the end of its migration and the last check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meanwhile {
    Nothing,
    /// Another client starts it.
    Runs,
    /// And stops it again, so that its state alone does not show that.
    RanAndMovedAgain,
    /// The migration is not completed.
    Fails,
    /// Bytes come after the apparent end of the state.
    GoesOn,
    /// Another client takes the claim away.
    LosesClaim,
}

#[test]
fn guest_started_by_another_client_is_not_given_away() {
    use Meanwhile::*;
    for meanwhile in [Nothing, Runs, RanAndMovedAgain, Fails, GoesOn, LosesClaim] {
        let (monitor, ours) = UnixStream::pair().unwrap();
        let qemu = std::thread::spawn(move || hold(&monitor, meanwhile, true));
        let mut qmp = Qemu::new(Qmp::open(ours, "it").unwrap());
        qmp.claim().unwrap();
        Monitor::stop(&mut qmp).unwrap();
        assert_eq!(qmp.save_state().unwrap()[1..], DESCRIBED);
        let answer = qmp.stands_still();
        match meanwhile {
            Nothing => {
                answer.unwrap();
                // And once more, for a switchover that has not arrived.
                qmp.stands_still().unwrap();
                Monitor::put_back(&mut qmp).unwrap();
            }
            _ => {
                assert!(answer.is_err(), "{meanwhile:?}");
                Monitor::resume(&mut qmp).unwrap();
            }
        }
        drop(qmp);
        let asked = qemu.join().unwrap();
        let conts = asked.iter().filter(|command| *command == "cont").count();
        // A guest that runs already, or continues by itself, gets no `cont`.
        let told = matches!(meanwhile, RanAndMovedAgain | GoesOn);
        assert_eq!(conts, usize::from(told), "{meanwhile:?}: {asked:?}");
        assert!(!asked.contains(&"migrate_cancel".to_owned()));
    }
}

/// A time that cannot be added to another one.
#[test]
fn event_with_an_invalid_time_is_ignored() {
    let (monitor, ours) = UnixStream::pair().unwrap();
    let qemu = std::thread::spawn(move || hold(&monitor, Meanwhile::Nothing, false));
    let mut qmp = Qemu::new(Qmp::open(ours, "it").unwrap());
    assert!(Monitor::stop(&mut qmp).unwrap().is_some());
    qmp.stands_still().unwrap();
    drop(qmp);
    qemu.join().unwrap();
}

/// A device state with its description.
const DESCRIBED: [u8; 10] = [1, 2, 0, 6, 0, 0, 0, 2, b'{', b'}'];

/// As a QEMU that waits for an acknowledgement before its migration is completed.
fn hold(monitor: &UnixStream, meanwhile: Meanwhile, is_sane: bool) -> Vec<String> {
    let mut asked = Vec::new();
    let mut out = monitor;
    out.write_all(b"{\"QMP\":{}}\n").unwrap();
    let mut line = Vec::new();
    let (mut given, mut state, mut devices) = (None, None, BTreeMap::new());
    let (mut status, mut migration) = ("running", "none");
    let mut capabilities = BTreeMap::from([("return-path".to_owned(), false)]);
    while let Some(descriptor) = next_line(monitor, &mut line) {
        given = descriptor.or(given);
        let command: Value = serde_json::from_slice(&line).unwrap();
        let arguments = &command["arguments"];
        let command = command["execute"].as_str().unwrap();
        asked.push(command.to_owned());
        let value = match command {
            "query-migrate-capabilities" => {
                let list = capabilities.iter();
                let list = list.map(|(name, on)| json!({ "capability": name, "state": on }));
                json!(list.collect::<Vec<_>>())
            }
            "migrate-set-capabilities" => {
                for item in arguments["capabilities"].as_array().unwrap() {
                    let name = item["capability"].as_str().unwrap().to_owned();
                    capabilities.insert(name, item["state"].as_bool().unwrap());
                }
                json!({})
            }
            "query-chardev" => {
                let device = |label| json!({ "label": label, "filename": "unix:" });
                json!(devices.keys().map(device).collect::<Vec<_>>())
            }
            "chardev-add" => {
                devices.insert(arguments["id"].as_str().unwrap().to_owned(), given.take());
                json!({})
            }
            "chardev-remove" => {
                devices.remove(arguments["id"].as_str().unwrap()).expect("it is there");
                json!({})
            }
            "query-status" => json!({ "status": status }),
            "query-migrate" => json!({ "status": migration }),
            "cont" => {
                status = "running";
                json!({})
            }
            "migrate" => {
                match is_sane {
                    true => say_stop(out),
                    false => {
                        let timestamp = json!({ "seconds": u64::MAX, "microseconds": u64::MAX });
                        let event = json!({ "event": "STOP", "timestamp": timestamp });
                        writeln!(out, "{event}").unwrap();
                    }
                }
                let mut socket = UnixStream::from(given.take().unwrap());
                socket.write_all(&DESCRIBED).unwrap();
                (status, migration) = ("finish-migrate", "active");
                state = Some(socket);
                if meanwhile == Meanwhile::LosesClaim {
                    devices.remove("umem-mover");
                }
                json!({})
            }
            _ => json!({}),
        };
        writeln!(out, "{}", json!({ "return": value })).unwrap();
        // From here on QEMU waits for the acknowledgement, which is not a QMP command.
        if command == "query-status" && state.is_some() && migration == "active" {
            let mut socket: UnixStream = state.take().unwrap();
            let mut word = [0; 8];
            let is_well = socket.read_exact(&mut word).is_ok() && meanwhile != Meanwhile::Fails;
            if meanwhile == Meanwhile::GoesOn {
                let _ = socket.write_all(&[0]);
            }
            (status, migration) =
                if is_well { ("postmigrate", "completed") } else { ("running", "failed") };
            match meanwhile {
                Meanwhile::Runs => status = "running",
                Meanwhile::RanAndMovedAgain => {
                    writeln!(out, "{}", json!({ "event": "RESUME", "timestamp": {} })).unwrap();
                }
                _ => {}
            }
        }
    }
    asked
}

fn answer_late(monitor: &UnixStream) -> Vec<String> {
    answer(monitor, "migrate")
}

/// Stops its guest and writes its device state at the command `saves_at`. Returns the commands that it received.
fn answer(monitor: &UnixStream, saves_at: &str) -> Vec<String> {
    let mut asked = Vec::new();
    let mut out = monitor;
    out.write_all(b"{\"QMP\":{}}\n").unwrap();
    let mut line = Vec::new();
    let mut socket = None;
    let mut status = "running";
    let mut migration = "none";
    while let Some(descriptor) = next_line(monitor, &mut line) {
        socket = descriptor.or(socket);
        let command: Value = serde_json::from_slice(&line).unwrap();
        let command = command["execute"].as_str().unwrap();
        asked.push(command.to_owned());
        let value = match command {
            "query-migrate-capabilities" => json!([]),
            "query-status" => json!({ "status": status }),
            "query-migrate" => json!({ "status": migration }),
            "migrate-incoming" => {
                // All bytes that come are its state.
                let mut socket = UnixStream::from(socket.take().unwrap());
                std::thread::spawn(move || std::io::copy(&mut socket, &mut std::io::sink()));
                migration = "completed";
                json!({})
            }
            "migrate" | "stop" if command == saves_at => {
                say_stop(out);
                UnixStream::from(socket.take().unwrap()).write_all(&[0x5a; STATE]).unwrap();
                (status, migration) = ("postmigrate", "completed");
                json!({})
            }
            _ => json!({}),
        };
        writeln!(out, "{}", json!({ "return": value })).unwrap();
    }
    asked
}

fn say_stop(mut out: &UnixStream) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let timestamp = json!({ "seconds": now.as_secs(), "microseconds": now.subsec_micros() });
    writeln!(out, "{}", json!({ "event": "STOP", "timestamp": timestamp })).unwrap();
}

/// The next line, and its descriptor if one came with it; None at the end.
fn next_line(monitor: &UnixStream, line: &mut Vec<u8>) -> Option<Option<OwnedFd>> {
    line.clear();
    let mut descriptor = None;
    while !line.ends_with(b"\n") {
        let mut byte = [0];
        let mut pieces = [std::io::IoSliceMut::new(&mut byte)];
        let mut space = nix::cmsg_space!(i32);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let fd = monitor.as_raw_fd();
        let message = recvmsg::<()>(fd, &mut pieces, Some(&mut space), flags).unwrap();
        for control in message.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(rights) = control {
                // SAFETY: the kernel has just made it for this process.
                descriptor = rights.first().map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
        if message.bytes == 0 {
            return None;
        }
        line.push(byte[0]);
    }
    Some(descriptor)
}
