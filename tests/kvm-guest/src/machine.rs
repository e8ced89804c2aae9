//! A virtual machine that runs the guest.

use std::sync::mpsc::{Sender, channel};
use std::thread;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

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
        self.add_memory(RAM_SLOT, 0, ram)?;
        self.add_memory(BOARD_SLOT, BOARD, board.memory())?;
        // All of them before the first one runs.
        let vcpus = (0..vcpus).map(|index| self.vcpu(index)).collect::<Result<Vec<_>>>()?;
        let running = vcpus.len();
        let (sender, results) = channel();
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            start(index, vcpu, sender.clone())?;
        }
        let mut total = Found::default();
        for _ in 0..running {
            let found = results.recv().expect("a sender is kept here")?;
            total.pages += found.pages;
            total.wrong_first += found.wrong_first;
            total.wrong_second += found.wrong_second;
            total.exits += found.exits;
        }
        Ok(total)
    }

    fn add_memory(&self, slot: u32, guest_address: u32, memory: &Memory) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: guest_address.into(),
            memory_size: memory.bytes() as u64,
            userspace_addr: memory.start().as_ptr() as u64,
        };
        // SAFETY: the mapping is the guest's and has no Rust references; it exists as long as the process, and so the
        // virtual machine.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(|error| format!("memory slot {slot}: {error}"))
    }

    /// A vCPU at the guest's first instruction.
    fn vcpu(&self, index: u32) -> Result<VcpuFd> {
        let what = |error| format!("vCPU {index}: {error}");
        let vcpu = self.vm.create_vcpu(index.into()).map_err(what)?;
        vcpu.set_cpuid2(&self.cpuid).map_err(what)?;
        let mut special = vcpu.get_sregs().map_err(what)?;
        special.cr0 = CR0;
        special.cr3 = Board::page_tables().into();
        special.cr4 = CR4_PAE;
        special.efer = EFER_LME | EFER_LMA;
        special.cs = kvm_segment { l: 1, type_: EXECUTE_READ, selector: 0x33, ..SEGMENT };
        let data = kvm_segment { db: 1, type_: READ_WRITE, selector: 0x2b, ..SEGMENT };
        [special.ds, special.es, special.fs, special.gs, special.ss] = [data; 5];
        vcpu.set_sregs(&special).map_err(what)?;
        vcpu.set_regs(&kvm_regs {
            rip: BOARD.into(),
            rbp: Board::plan_address(index).into(),
            rflags: match self.interrupts {
                Interrupts::None => RFLAGS,
                Interrupts::Some => RFLAGS | RFLAGS_IF,
            },
            ..kvm_regs::default()
        })
        .map_err(what)?;
        if self.interrupts == Interrupts::Some {
            // Beside an interrupt controller all but the first would wait for a start by it.
            vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).map_err(what)?;
        }
        Ok(vcpu)
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

fn start(index: usize, vcpu: VcpuFd, results: Sender<Result<Found>>) -> Result<()> {
    let body = move || {
        let result = run(vcpu).map_err(|error| format!("vCPU {index}: {error}"));
        // The receiver has gone when another vCPU has failed.
        let _ = results.send(result);
    };
    thread::Builder::new()
        .name(format!("vcpu-{index}"))
        .spawn(body)
        .map(drop)
        .map_err(|error| format!("starting a thread: {error}"))
}

/// Runs one vCPU until its last report.
fn run(mut vcpu: VcpuFd) -> Result<Found> {
    let mut found = Found::default();
    loop {
        let exit = match vcpu.run() {
            Ok(exit) => exit,
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
                return Ok(found);
            }
            None => {
                return Err(format!("the guest writes to {address:#x}, where there is nothing"));
            }
        }
    }
}
