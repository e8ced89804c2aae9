//! A virtual machine that runs the guest.

use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, KVM_MP_STATE_RUNNABLE, kvm_mp_state,
    kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::Result;
use crate::code::{BOARD, Board, Report};
use crate::memory::Memory;
use crate::pattern::Pattern;

/// Three pages that KVM needs for itself on some Intel processors, at an address that the guest does not use.
const TSS: usize = 0xfffb_d000;

const RAM_SLOT: u32 = 0;
const BOARD_SLOT: u32 = 1;

/// Whether vCPUs have interrupts, which decides how KVM waits for a page (no interrupt ever arrives).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interrupts {
    /// The vCPU's own thread waits in the fault.
    None,
    /// With an interrupt controller and interrupts enabled, KVM may halt the vCPU and let a kernel worker take the
    /// fault: asynchronous page faults.
    Some,
}

/// The guest's results.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Found {
    pub(crate) pages: u64,
    pub(crate) wrong_first: u64,
    pub(crate) wrong_second: u64,
    /// How often KVM returned to the monitor.
    pub(crate) exits: u64,
}

/// A vCPU that stands still, and what it has reported so far.
#[derive(Clone, Debug)]
pub(crate) struct State {
    registers: kvm_regs,
    /// None before the guest's first instruction.
    special: Option<kvm_sregs>,
    found: Found,
}

/// How a vCPU has ended.
enum End {
    Done(Found),
    Stopped(Box<State>),
}

/// vCPUs that run. After an error some may go on running: the process has to end.
pub(crate) struct Running {
    threads: Vec<JoinHandle<Result<End>>>,
    is_to_stop: Arc<AtomicBool>,
}

impl Running {
    /// Waits for the guest's last report.
    pub(crate) fn wait(self) -> Result<Found> {
        let mut total = Found::default();
        for end in self.ends()? {
            let End::Done(found) = end else { return Err("a vCPU was stopped".into()) };
            total.pages += found.pages;
            total.wrong_first += found.wrong_first;
            total.wrong_second += found.wrong_second;
            total.exits += found.exits;
        }
        Ok(total)
    }

    /// Stops every vCPU, each of which is still at work.
    pub(crate) fn stop(self) -> Result<Vec<State>> {
        self.is_to_stop.store(true, Ordering::SeqCst);
        // A signal that comes right before KVM_RUN interrupts nothing, so it comes again.
        while !self.threads.iter().all(JoinHandle::is_finished) {
            self.threads.iter().for_each(kick);
            thread::sleep(Duration::from_millis(1));
        }
        let stopped = |end| match end {
            End::Stopped(state) => Ok(*state),
            End::Done(_) => Err("the guest was done before it was to stop".into()),
        };
        self.ends()?.into_iter().map(stopped).collect()
    }

    /// Whether a vCPU has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }

    fn ends(self) -> Result<Vec<End>> {
        let end = |thread: JoinHandle<Result<End>>| {
            thread.join().unwrap_or_else(|_| Err("a vCPU's thread has panicked".into()))
        };
        self.threads.into_iter().map(end).collect()
    }
}

fn kick(thread: &JoinHandle<Result<End>>) {
    // SAFETY: the thread has not been joined, so its number is its own.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), KICK as libc::c_int) };
}

/// Interrupts KVM_RUN.
const KICK: Signal = Signal::SIGUSR1;

fn take_kicks() -> Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing.
    unsafe { sigaction(KICK, &action) }.map(drop).map_err(|errno| format!("sigaction: {errno}"))
}

/// A virtual machine without memory and vCPUs.
pub(crate) struct Machine {
    vm: VmFd,
    interrupts: Interrupts,
    cpuid: CpuId,
}

impl Machine {
    pub(crate) fn new(interrupts: Interrupts) -> Result<Machine> {
        let kvm = Kvm::new().map_err(|error| {
            format!("/dev/kvm cannot be opened: {error}; this needs KVM and access to it")
        })?;
        let vm = kvm.create_vm().map_err(|error| format!("creating a virtual machine: {error}"))?;
        vm.set_tss_address(TSS).map_err(|error| format!("KVM_SET_TSS_ADDR: {error}"))?;
        if interrupts == Interrupts::Some {
            vm.create_irq_chip().map_err(|error| format!("KVM_CREATE_IRQCHIP: {error}"))?;
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| format!("KVM_GET_SUPPORTED_CPUID: {error}"))?;
        Ok(Machine { vm, interrupts, cpuid })
    }

    /// Runs the guest to its end. After an error vCPUs may still be running: the process has to end.
    pub(crate) fn run(self, ram: &Memory, pattern: &Pattern, vcpus: u32) -> Result<Found> {
        let board = Board::new(ram, vcpus, pattern)?;
        self.has(ram, &board, false)?;
        self.start(&self.fresh(vcpus))?.wait()
    }

    /// Gives it its memory. With `is_logged` KVM notes which pages of RAM are written.
    pub(crate) fn has(&self, ram: &Memory, board: &Board, is_logged: bool) -> Result<()> {
        self.add_memory(RAM_SLOT, 0, ram, if is_logged { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })?;
        self.add_memory(BOARD_SLOT, BOARD, board.memory(), 0)
    }

    /// Pages of RAM that have been written since the last call, a bit each.
    pub(crate) fn dirty(&self, ram: &Memory) -> Result<Vec<u64>> {
        let log = self.vm.get_dirty_log(RAM_SLOT, ram.bytes());
        log.map_err(|error| format!("KVM_GET_DIRTY_LOG: {error}"))
    }

    /// The states of vCPUs before the guest's first instruction.
    pub(crate) fn fresh(&self, vcpus: u32) -> Vec<State> {
        (0..vcpus).map(|index| self.first_state(index)).collect()
    }

    /// Runs vCPUs, all of which are made before the first one runs.
    pub(crate) fn start(&self, states: &[State]) -> Result<Running> {
        let vcpus = (0..).zip(states).map(|(index, state)| self.vcpu(index, state));
        let vcpus = vcpus.collect::<Result<Vec<_>>>()?;
        take_kicks()?;
        let is_to_stop = Arc::new(AtomicBool::new(false));
        let threads = vcpus
            .into_iter()
            .zip(states)
            .enumerate()
            .map(|(index, (vcpu, state))| start(index, vcpu, state.found, is_to_stop.clone()));
        Ok(Running { threads: threads.collect::<Result<Vec<_>>>()?, is_to_stop })
    }

    fn add_memory(&self, slot: u32, guest_address: u32, memory: &Memory, flags: u32) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: guest_address.into(),
            memory_size: memory.bytes() as u64,
            userspace_addr: memory.start().as_ptr() as u64,
        };
        // SAFETY: the mapping is the guest's and has no Rust references; it exists as long as the process, and so the
        // virtual machine.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(|error| format!("memory slot {slot}: {error}"))
    }

    /// At the guest's first instruction.
    fn first_state(&self, index: u32) -> State {
        let registers = kvm_regs {
            rip: BOARD.into(),
            rbp: Board::plan_address(index).into(),
            rflags: match self.interrupts {
                Interrupts::None => RFLAGS,
                Interrupts::Some => RFLAGS | RFLAGS_IF,
            },
            ..kvm_regs::default()
        };
        State { registers, special: None, found: Found::default() }
    }

    fn vcpu(&self, index: u32, state: &State) -> Result<VcpuFd> {
        let what = |error| format!("vCPU {index}: {error}");
        let vcpu = self.vm.create_vcpu(index.into()).map_err(what)?;
        vcpu.set_cpuid2(&self.cpuid).map_err(what)?;
        let special = match state.special {
            Some(special) => special,
            None => first_special(vcpu.get_sregs().map_err(what)?),
        };
        vcpu.set_sregs(&special).map_err(what)?;
        vcpu.set_regs(&state.registers).map_err(what)?;
        if self.interrupts == Interrupts::Some {
            // Beside an interrupt controller all but the first would wait for a start by it.
            vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).map_err(what)?;
        }
        Ok(vcpu)
    }
}

/// Of a vCPU as KVM makes it: those with which the guest begins.
fn first_special(special: kvm_sregs) -> kvm_sregs {
    let data = kvm_segment { db: 1, type_: READ_WRITE, selector: 0x2b, ..SEGMENT };
    kvm_sregs {
        cr0: CR0,
        cr3: Board::page_tables().into(),
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
        cs: kvm_segment { l: 1, type_: EXECUTE_READ, selector: 0x33, ..SEGMENT },
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        ..special
    }
}

/// Protected mode with paging; write protection, the processor's own errors (NE) and ET as usual.
const CR0: u64 = 1 << 31 | 1 << 16 | 1 << 5 | 1 << 4 | 1;
const CR4_PAE: u64 = 1 << 5;
/// 64-bit mode enabled, and active.
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit that is always set, and interrupts enabled.
const RFLAGS: u64 = 1 << 1;
const RFLAGS_IF: u64 = 1 << 9;

/// Types of segments, both accessed.
const EXECUTE_READ: u8 = 11;
const READ_WRITE: u8 = 3;

/// Common to the segments: all of memory, for user mode.
const SEGMENT: kvm_segment = kvm_segment {
    base: 0,
    limit: u32::MAX,
    selector: 0,
    type_: 0,
    present: 1,
    dpl: 3,
    db: 0,
    s: 1,
    l: 0,
    g: 1,
    avl: 0,
    unusable: 0,
    padding: 0,
};

fn start(
    index: usize,
    vcpu: VcpuFd,
    found: Found,
    is_to_stop: Arc<AtomicBool>,
) -> Result<JoinHandle<Result<End>>> {
    let body =
        move || run(vcpu, found, &is_to_stop).map_err(|error| format!("vCPU {index}: {error}"));
    let thread = thread::Builder::new().name(format!("vcpu-{index}")).spawn(body);
    thread.map_err(|error| format!("starting a thread: {error}"))
}

/// Runs one vCPU until its last report, or until it is to stop.
fn run(mut vcpu: VcpuFd, mut found: Found, is_to_stop: &AtomicBool) -> Result<End> {
    loop {
        let exit = match vcpu.run() {
            Ok(exit) => exit,
            // KVM has carried out what it had begun.
            Err(error) if error.errno() == libc::EINTR && is_to_stop.load(Ordering::SeqCst) => {
                let what = |error| format!("its registers: {error}");
                let registers = vcpu.get_regs().map_err(what)?;
                let special = Some(vcpu.get_sregs().map_err(what)?);
                return Ok(End::Stopped(Box::new(State { registers, special, found })));
            }
            Err(error) if error.errno() == libc::EINTR => continue,
            Err(error) if error.errno() == libc::EFAULT => {
                return Err("KVM cannot reach the guest's memory (EFAULT): does its userfaultfd \
                            catch faults of the kernel?"
                    .into());
            }
            Err(error) => return Err(format!("KVM_RUN: {error}")),
        };
        found.exits += 1;
        let (address, data) = match exit {
            VcpuExit::MmioWrite(address, data) => (address, data),
            other => return Err(format!("the guest has ended by {other:?}")),
        };
        let count = data.try_into().map(u32::from_le_bytes);
        let count = u64::from(count.map_err(|_| format!("{} bytes in a report", data.len()))?);
        match Report::of(address) {
            Some(Report::Pages) => found.pages = count,
            Some(Report::WrongFirst) => found.wrong_first = count,
            Some(Report::WrongSecond) => {
                found.wrong_second = count;
                return Ok(End::Done(found));
            }
            None => {
                return Err(format!("the guest writes to {address:#x}, where there is nothing"));
            }
        }
    }
}
