//! What umem asks of a QEMU over QMP, and what its configuration must look like.
//!
//! The device state travels by QEMU's own migration with the capability `x-ignore-shared`, which
//! leaves out RAM that is both shared and backed by a named file; that RAM is what umem moves. So
//! every RAM backend must be a `memory-backend-file` with `share=on`: a memfd would be sent whole
//! inside the device state, and private memory cannot be read from outside of QEMU.

mod backends;
mod blocks;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use umem_wire::limits::STATE_BYTES_MAX;

use super::qmp::{Qmp, socket_pair};
use super::{BeforeStop, DestinationHost, SourceHost};
use crate::error::{Context, Error, Result};
use crate::memory::kind::Kind;
use crate::session::Undo;

pub(crate) use backends::{Backend, RamOfQemu, advice};

/// The options that give a guest RAM umem can move; quoted in errors.
pub(crate) const HOW_TO_START: &str = "start QEMU with `-object memory-backend-file,id=ram0,\
    size=SIZE,share=on,mem-path=/dev/shm/FILE -machine memory-backend=ram0`";

/// What `getfd` calls the socket that carries the device state.
const STATE_SOCKET: &str = "umem-state";

/// How often a migration's status is asked for while it ends.
const STATUS_INTERVAL: Duration = Duration::from_millis(1);

/// How long a guest may go on while its device state is being saved: QEMU has a look at the rate every 100 ms
/// only (`BUFFER_DELAY` in its migration/options.h), and what is sent until then is loaded while the guest stands
/// still.
const STOPS_ITSELF_WITHIN: Duration = Duration::from_millis(50);

/// QEMU's default of 128 MiB/s would hold back a guest with video memory; the device state goes
/// through a local socket, so nothing is won by a limit. Bytes a second.
const STATE_BANDWIDTH: u64 = 1 << 40;

/// First byte of what we carry as device state, before QEMU's own stream: whether the guest was
/// running when it was stopped, as one that its user had paused arrives paused.
const GUEST_RUNS: u8 = 1;
const GUEST_IS_PAUSED: u8 = 0;

/// A QEMU with an open QMP connection.
pub(crate) struct Qemu {
    qmp: Qmp,
    was_running: bool,
    saved: Option<Settings>,
    before_stop: Option<BeforeStop>,
    /// Our end of the socket for the device state, whose other end QEMU has.
    state_socket: Option<UnixStream>,
    /// The device state, where it was saved in the act of stopping.
    state: Option<Vec<u8>>,
}

/// What we change in the source's QEMU, as it was.
struct Settings {
    ignore_shared: bool,
    bandwidth: Option<u64>,
}

impl Qemu {
    pub(crate) fn new(qmp: Qmp) -> Qemu {
        Qemu {
            qmp,
            was_running: true,
            saved: None,
            before_stop: None,
            state_socket: None,
            state: None,
        }
    }

    /// One that a process before this has stopped: [`SourceHost::resume`] undoes that.
    pub(crate) fn stopped(qmp: Qmp, undo: &Undo) -> Qemu {
        let &Undo { was_running, ignore_shared, bandwidth } = undo;
        let saved = Some(Settings { ignore_shared, bandwidth });
        Qemu { was_running, saved, ..Qemu::new(qmp) }
    }

    /// One that a process before this has given its device state: [`DestinationHost::run`] lets it run,
    /// if it ran at the source.
    pub(crate) fn loaded(qmp: Qmp, runs: bool) -> Qemu {
        Qemu { was_running: runs, ..Qemu::new(qmp) }
    }

    /// Whether device state is of a guest that ran when it was stopped.
    pub(crate) fn runs_with(state: &[u8]) -> bool {
        state.first() == Some(&GUEST_RUNS)
    }

    /// Checks that this guest can be moved, its RAM mapped as `kind` says, and returns its RAM
    /// backends. Changes nothing.
    pub(crate) fn check(&mut self, kind: Kind) -> Result<Vec<Backend>> {
        let backends = self.backends(kind)?;
        self.check_devices()?;
        Ok(backends)
    }

    /// Devices and network backends are asked for by what they are: a user's names mean nothing.
    fn check_devices(&mut self) -> Result<()> {
        for place in DEVICES {
            for (name, kind) in self.qmp.children(place)? {
                if let Some(why) = unsupported_device(&kind) {
                    return Err(Error::Unsupported(format!("device {name} ({kind}) {why}")));
                }
            }
        }
        let network = json!({ "command-line": "info network" });
        let network = self.qmp.try_execute("human-monitor-command", network)?;
        let network = network.unwrap_or_default();
        let lines = network.as_str().unwrap_or_default().lines();
        for (name, kind) in lines.filter_map(network_client) {
            if let Some(why) = unsupported_device(kind) {
                return Err(Error::Unsupported(format!("{name}, a netdev of type {kind}, {why}")));
            }
        }
        Ok(())
    }

    /// Waits until the running migration has ended; an error tells QEMU's own reason.
    fn wait_migrated(&mut self) -> Result<()> {
        loop {
            let status = self.qmp.execute("query-migrate", json!({}))?;
            match status["status"].as_str().unwrap_or("none") {
                "completed" => return Ok(()),
                "failed" | "cancelled" => {
                    let reason = status["error-desc"].as_str().unwrap_or("no reason given");
                    return Err(Error::Host(format!("its device state: {reason}")));
                }
                _ => std::thread::sleep(STATUS_INTERVAL),
            }
        }
    }

    /// Has QEMU write its device state to the other end of a socket, and returns it: no more than a byte
    /// over what is allowed.
    ///
    /// A guest that runs is stopped by that, sooner or later: QEMU goes on for as long as the guest changes what
    /// belongs to the state, such as video memory. After a while it is told to.
    ///
    /// It is read by a thread of its own, from before the command on: QEMU's migration holds the lock of its
    /// main loop while it writes, so that QEMU can answer the command only after all has been read.
    fn migrate_into(&mut self, ours: UnixStream) -> Result<Vec<u8>> {
        let read = |ours: &UnixStream| -> Result<Vec<u8>> {
            let mut state = Vec::new();
            let count = ours.take(STATE_BYTES_MAX).read_to_end(&mut state);
            count.context(|| "reading QEMU's device state")?;
            Ok(state)
        };
        let (has_ended, ended) = channel::<Infallible>();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let _has_ended = has_ended;
                let state = read(&ours);
                // What is left of too much makes QEMU's migration fail, and not wait.
                let _ = ours.shutdown(Shutdown::Both);
                state
            });
            let uri = json!({ "uri": format!("fd:{STATE_SOCKET}") });
            let asked = self.qmp.execute("migrate", uri).and_then(|_| {
                match ended.recv_timeout(STOPS_ITSELF_WITHIN) {
                    Err(RecvTimeoutError::Timeout) => self.qmp.execute("stop", json!({})),
                    _ => Ok(Value::Null),
                }
            });
            if let Err(error) = asked {
                let _ = ours.shutdown(Shutdown::Both);
                return Err(error);
            }
            reader.join().expect("reading does not panic")
        })
    }

    /// Has QEMU save its device state, and stop its guest if that runs.
    fn save(&mut self) -> Result<Vec<u8>> {
        if self.state_socket.is_none() {
            self.give_state_socket()?;
        }
        let ours = self.state_socket.take().expect("just given");
        let mut state = vec![if self.was_running { GUEST_RUNS } else { GUEST_IS_PAUSED }];
        state.extend(self.migrate_into(ours)?);
        if state.len() as u64 > STATE_BYTES_MAX {
            return Err(Error::Unsupported(format!(
                "QEMU's device state is larger than {} MiB: RAM outside of shared files is part of \
                 it; {HOW_TO_START}",
                STATE_BYTES_MAX >> 20
            )));
        }
        self.wait_migrated()?;
        Ok(state)
    }

    /// Gives QEMU one end of a new socket for its device state.
    fn give_state_socket(&mut self) -> Result<()> {
        let (ours, theirs) = socket_pair()?;
        self.qmp.give_descriptor(STATE_SOCKET, theirs.as_fd())?;
        self.state_socket = Some(ours);
        Ok(())
    }

    fn set_ignore_shared(&mut self, on: bool) -> Result<()> {
        let capability = json!({ "capability": "x-ignore-shared", "state": on });
        self.qmp
            .execute("migrate-set-capabilities", json!({ "capabilities": [capability] }))
            .map(drop)
    }

    fn settings(&mut self) -> Result<Settings> {
        let capabilities = self.qmp.execute("query-migrate-capabilities", json!({}))?;
        let capabilities = capabilities.as_array().cloned().unwrap_or_default();
        let is_on = |name: &str| {
            capabilities.iter().any(|c| c["capability"] == name && c["state"] == json!(true))
        };
        if is_on("postcopy-ram") {
            return Err(Error::Unsupported(
                "QEMU's own postcopy is switched on: switch off its capability postcopy-ram".into(),
            ));
        }
        let ignore_shared = is_on("x-ignore-shared");
        let parameters = self.qmp.execute("query-migrate-parameters", json!({}))?;
        Ok(Settings { ignore_shared, bandwidth: parameters["max-bandwidth"].as_u64() })
    }

    fn restore_settings(&mut self) -> Result<()> {
        let Some(saved) = self.saved.take() else {
            return Ok(());
        };
        self.set_ignore_shared(saved.ignore_shared)?;
        if let Some(bandwidth) = saved.bandwidth {
            self.qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": bandwidth }))?;
        }
        Ok(())
    }

    fn status(&mut self) -> Result<String> {
        let status = self.qmp.execute("query-status", json!({}))?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }

    fn cancel_migration(&mut self) -> Result<()> {
        self.qmp.execute("migrate_cancel", json!({}))?;
        let started = Instant::now();
        loop {
            let status = self.qmp.execute("query-migrate", json!({}))?;
            match status["status"].as_str().unwrap_or("none") {
                "active" | "setup" | "cancelling" | "device" => {}
                _ => return Ok(()),
            }
            if started.elapsed() > Duration::from_secs(10) {
                return Err(Error::Host("its migration does not end when cancelled".into()));
            }
            std::thread::sleep(STATUS_INTERVAL);
        }
    }
}

impl SourceHost for Qemu {
    fn before_stop(&mut self, note: BeforeStop) {
        self.before_stop = Some(note);
    }

    /// With `saves`, QEMU's migration stops the guest: what of it takes time is done by then. It first looks
    /// for what the guest writes, for which TCG goes through every vCPU's address cache (2 ms each, and more than
    /// the rest of the saving), and sends what is not the guest's own memory.
    fn stop(&mut self, saves: bool) -> Result<Option<Instant>> {
        self.was_running = self.status()? == "running";
        let settings = self.settings()?;
        if let Some(note) = &self.before_stop {
            let &Settings { ignore_shared, bandwidth } = &settings;
            note(&Undo { was_running: self.was_running, ignore_shared, bandwidth })?;
        }
        self.saved = Some(settings);
        // Each answer takes a while, during which the guest had better run.
        self.set_ignore_shared(true)?;
        self.qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": STATE_BANDWIDTH }))?;
        self.give_state_socket()?;
        let asked = Instant::now();
        if !saves || !self.was_running {
            self.qmp.execute("stop", json!({}))?;
            return Ok(Some(asked));
        }
        self.qmp.stopped_at();
        let state = self.save()?;
        self.state = Some(state);
        // Its last answer came after the event.
        let stopped = self.qmp.stopped_at().and_then(|at| at.elapsed().ok());
        let stopped = stopped.and_then(|ago| Instant::now().checked_sub(ago));
        Ok(Some(stopped.map_or(asked, |at| at.max(asked))))
    }

    fn save_state(&mut self) -> Result<Vec<u8>> {
        self.state.take().map_or_else(|| self.save(), Ok)
    }

    fn resume(&mut self) -> Result<()> {
        self.state = None;
        self.cancel_migration()?;
        if self.state_socket.take().is_some() {
            // It was not used. One that QEMU has closed already it does not know any more.
            let _ = self.qmp.try_execute("closefd", json!({ "fdname": STATE_SOCKET }))?;
        }
        self.restore_settings()?;
        if self.was_running {
            self.qmp.execute("cont", json!({}))?;
        }
        Ok(())
    }
}

impl DestinationHost for Qemu {
    /// QEMU waits at the socket for its device state, which need not wait for QEMU then. It would let a guest
    /// run that ran at the source as soon as that is loaded, and before the source has given it up; a `stop`
    /// while it waits has it leave that to a `cont` (`qmp_stop` in its monitor/qmp-cmds.c).
    fn prepare(&mut self) -> Result<()> {
        self.qmp.execute("stop", json!({}))?;
        self.set_ignore_shared(true)?;
        self.give_state_socket()?;
        let uri = json!({ "uri": format!("fd:{STATE_SOCKET}") });
        self.qmp.execute("migrate-incoming", uri).map(drop)
    }

    fn load_state(&mut self, state: Vec<u8>) -> Result<()> {
        let Some((&was_running, state)) = state.split_first() else {
            return Err(Error::Host(
                "the source sends no device state: a guest moved by its RAM file alone cannot \
                 become a QEMU; give `umem migrate` the source's QMP socket with --qmp"
                    .into(),
            ));
        };
        self.was_running = was_running == GUEST_RUNS;
        if self.state_socket.is_none() {
            self.prepare()?;
        }
        let mut ours = self.state_socket.take().expect("it has been prepared");
        // QEMU reads in its main loop and may refuse half-way: its own reason comes from the
        // status then, so a broken pipe here is not yet the answer.
        let written = ours.write_all(state);
        drop(ours);
        self.wait_migrated()?;
        written.context(|| "giving QEMU its device state")
    }

    fn run(&mut self) -> Result<()> {
        if !self.was_running {
            return Ok(());
        }
        self.qmp.execute("cont", json!({})).map(drop)
    }

    fn connection(&self) -> Result<Option<OwnedFd>> {
        self.qmp.connection().map(Some)
    }
}

/// Where QEMU has its devices, and what works for them in other processes.
const DEVICES: [&str; 4] =
    ["/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached", "/objects"];

/// Why a device keeps its guest from being moved, judged by its type's name, or that of a network backend.
fn unsupported_device(kind: &str) -> Option<&'static str> {
    let begins = |with: &[&str]| with.iter().any(|with| kind.starts_with(with));
    if begins(&["vhost-user", "cryptodev-vhost-user", "x-remote", "x-pci-proxy"]) {
        Some(
            "lets another process reach the guest's RAM without userfaultfd knowing: take it out before moving \
             the guest",
        )
    } else if begins(&["vfio", "x-vfio", "vhost-vdpa"]) {
        Some(
            "reads and writes the guest's RAM past the kernel's page tables, so that pages cannot \
             be fetched on demand: unplug it before moving the guest",
        )
    } else if begins(&["ivshmem"]) {
        Some(
            "shares memory with programs outside of the guest, which go on reading and writing it where it is: \
             unplug it before moving the guest",
        )
    } else {
        None
    }
}

/// Name and type in a line of `info network`: `n0: index=0,type=user,net=10.0.2.0,…`, which are followed by what the
/// user chose.
fn network_client(line: &str) -> Option<(&str, &str)> {
    let (name, rest) = line.trim_start_matches([' ', '\\']).split_once(": index=")?;
    let (_, kind) = rest.split_once(",type=")?;
    Some((name, kind.split(',').next()?))
}
