//! A guest that moves from one virtual machine of this process to another while it runs: umem is a part of the monitor,
//! and learns of the guest's writes from KVM's dirty log.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use umem::embed::{DestinationSetup, Event, Memory as Ram, SourceSetup};

use crate::Result;
use crate::code::Board;
use crate::machine::{Found, Interrupts, Machine, Running, State};
use crate::memory::{Backing, Memory};
use crate::pattern::Pattern;

const RAM_NAME: &str = "ram0";

/// Passes at most. There is no end before, as the guest writes all the while. Fewer than eighths of its memory.
const PASSES_MAX: u32 = 4;

/// What the guest has found in both machines, and pages that it has written in each pass.
pub(crate) struct Moved {
    pub(crate) found: Found,
    pub(crate) written: Vec<u64>,
}

/// Moves a guest of `mib` MiB from one file, which is filled here, to another.
pub(crate) fn run(
    [from, to]: [&Path; 2],
    mib: u64,
    pattern: &Pattern,
    vcpus: u32,
) -> Result<Moved> {
    pattern.fill(from, mib << 20)?;
    let map = |path: &Path| Memory::map(&Backing::SharedFile(path.into()), mib << 20);
    let (here, there) = (map(from)?, map(to)?);
    let board = Board::new(&here, vcpus, pattern)?;
    let machine = Machine::new(Interrupts::None)?;
    machine.has(&here, &board, true)?;
    let allow = |eighths| board.allow(vcpus, eighths);
    allow(1);
    let running = machine.start(&machine.fresh(vcpus))?;
    let (states, arriving) = channel();
    let pair = || UnixStream::pair().map_err(|error| format!("sockets: {error}"));
    let (demand, bulk) = (pair()?, pair()?);
    let ours = [demand.0, bulk.0].map(OwnedFd::from).into();
    let theirs = [demand.1, bulk.1].map(OwnedFd::from).into();
    let open =
        |path: &Path| File::open(path).map_err(|error| format!("{}: {error}", path.display()));
    let (source_file, file) = (open(from)?, File::options().read(true).write(true).open(to));
    let file = file.map_err(|error| format!("{}: {error}", to.display()))?;
    let (there, board_there, file) = (&there, &board, &file);
    std::thread::scope(|scope| {
        let arrives = move || {
            arrive(there, board_there, file, theirs, &arriving).unwrap_or_else(|error| fail(&error))
        };
        let arrives = scope.spawn(arrives);
        let send = |state| states.send(state).map_err(|_| "the destination has ended".to_owned());
        let written = leave(&machine, &here, running, (&source_file, ours), (allow, send));
        let written = written.unwrap_or_else(|error| fail(&error));
        let found = arrives.join().map_err(|_| "the destination has panicked".to_owned())?;
        Ok(Moved { found, written })
    })
}

/// The other side, or a vCPU, may wait for something that does not come any more.
fn fail(error: &str) -> ! {
    eprintln!("umem-test-kvm-guest: {error}");
    std::process::exit(1);
}

/// The source: returns the number of pages that were written in each pass. The guest writes an eighth of its memory in
/// each, however long it lasts, so that some is left for the destination.
fn leave(
    machine: &Machine,
    ram: &Memory,
    running: Running,
    (file, sockets): (&File, Vec<OwnedFd>),
    (allow, send): (impl Fn(u32), impl Fn(Vec<State>) -> Result<()>),
) -> Result<Vec<u64>> {
    let said = |error: umem::Error| error.to_string();
    let mut setup = SourceSetup::new();
    setup.region(RAM_NAME, file.as_fd()).map_err(said)?;
    setup.connections(sockets).map_err(said)?;
    setup.precopy(PASSES_MAX, Duration::ZERO);
    setup.log(true);
    let source = setup.start().map_err(said)?;
    let (mut running, mut written) = (Some(running), Vec::new());
    while let Some(event) = source.wait(None).map_err(said)? {
        match event {
            Event::ReadLog => {
                let log = log_of(machine, ram, running.as_ref())?;
                written.push(log.iter().map(|word| u64::from(word.count_ones())).sum());
                allow(u32::try_from(written.len()).map_or(u32::MAX, |reads| reads + 1));
                source.written_bitmap(0, &log).map_err(said)?;
                source.log_read().map_err(said)?;
            }
            Event::Stop => {
                let running = running.take().ok_or("it is asked to stop twice")?;
                let states = running.stop()?;
                allow(u32::MAX);
                source.written_bitmap(0, &machine.dirty(ram)?).map_err(said)?;
                source.stopped().map_err(said)?;
                send(states)?;
            }
            Event::SaveState => source.saved(Vec::new()).map_err(said)?,
            Event::Completed(_) => return Ok(written),
            Event::Failed(failure) => return Err(failure.error.to_string()),
            _ => {}
        }
    }
    Err("the source has ended without a word".into())
}

/// What the guest has written since the log was read last, which is something: a pass may be over before a vCPU gets to
/// run on a busy machine.
fn log_of(machine: &Machine, ram: &Memory, running: Option<&Running>) -> Result<Vec<u64>> {
    loop {
        let log = machine.dirty(ram)?;
        if log.iter().any(|&word| word != 0) {
            return Ok(log);
        }
        if running.is_none_or(Running::is_over) {
            return Err("the guest was done before its move".into());
        }
        std::thread::yield_now();
    }
}

/// The destination: runs the guest to its end.
fn arrive(
    ram: &Memory,
    board: &Board,
    file: &File,
    sockets: Vec<OwnedFd>,
    states: &Receiver<Vec<State>>,
) -> Result<Found> {
    let said = |error: umem::Error| error.to_string();
    let machine = Machine::new(Interrupts::None)?;
    machine.has(ram, board, false)?;
    let mut setup = DestinationSetup::new();
    let start = ram.start().cast();
    let memory = Ram { start, bytes: ram.bytes() as u64, file: Some(file.as_fd()) };
    // SAFETY: the mapping stays until the process ends, and no vCPU runs yet.
    unsafe { setup.region(RAM_NAME, &memory) }.map_err(said)?;
    setup.connections(sockets).map_err(said)?;
    let destination = setup.start().map_err(said)?;
    let mut running = None;
    while let Some(event) = destination.wait(None).map_err(said)? {
        match event {
            Event::LoadState(_) => destination.loaded().map_err(said)?,
            Event::Run => {
                let states = states.recv().map_err(|_| "there is no state of the vCPUs")?;
                running = Some(machine.start(&states)?);
                destination.running().map_err(said)?;
            }
            Event::Completed(_) => {
                return running.ok_or("the guest did not run")?.wait();
            }
            Event::Failed(failure) => return Err(failure.error.to_string()),
            _ => {}
        }
    }
    Err("the destination has ended without a word".into())
}
