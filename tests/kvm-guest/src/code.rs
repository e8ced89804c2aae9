//! The guest: its instructions, and the data that it shares with the monitor.
//!
//! # The guest's address space
//!
//! | from | what |
//! |---|---|
//! | 0 | RAM, the demand-paged memory |
//! | [`BOARD`] | the monitor's own memory: a page of code, a page of [`Plan`]s, page tables |
//! | [`Report`] | no memory: a device, which the monitor emulates |
//!
//! A vCPU starts at [`BOARD`] in 64-bit user mode, every address mapped to itself, without a stack or an interrupt
//! table (any exception is a triple fault and ends the guest), with the address of its plan in RBP. It goes through the
//! pages of its plan twice. The first time it compares each word of a page with the monitor's `Pattern` and then writes
//! its own; the second time it compares with those. At the end it writes its counts to [`Report`]; after the last count
//! it is done. The first time it waits before each page that the monitor has not [allowed](Board::allow) it yet.
//!
//! User mode, because a KVM without the processor's virtualization (kvm_pvm, as in some virtual machines) runs only
//! user mode at full speed. It interprets kernel mode and all other modes, at several microseconds an instruction: a
//! minute for each MiB here.

use std::arch::global_asm;
use std::mem::offset_of;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use crate::Result;
use crate::memory::Memory;
use crate::pattern::{FACTORS, Pattern, ZERO_BITS};

/// A page of the guest.
pub(crate) const PAGE_BYTES: u32 = 4096;

/// The address of code and plans: beyond all RAM.
pub(crate) const BOARD: u32 = 0xe000_0000;

/// The addressable size below [`BOARD`], rounded down to a GiB.
pub(crate) const RAM_BYTES_MAX: u64 = 3 << 30;

/// Pages of the board: code, plans, and page tables.
const BOARD_PAGES: usize = 2 + PAGE_TABLES;

/// One table of the fourth level, one of the third, and one of the second for each of 4 GiB.
const PAGE_TABLES: usize = 1 + 1 + 4;

/// Present, writable, for user mode, accessed.
const TABLE: u64 = 0x27;

/// … and dirty, and 2 MiB large.
const LARGE_PAGE: u64 = TABLE | 0x40 | 0x80;

/// The most plans that fit in their page.
pub(crate) const VCPUS_MAX: u32 = PAGE_BYTES / size_of::<Plan>() as u32;

/// The work of one vCPU, and its counts.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// Pages of RAM.
    ram_pages: u32,
    /// The first page; the following ones are each `step` further, modulo `ram_pages`.
    first: u32,
    step: u32,
    /// Pages of this vCPU, at least one.
    count: u32,
    key_first: u32,
    key_second: u32,
    /// The number of pages that the monitor allows it to write.
    allowed: u32,
    /// Counted by the guest, from zero.
    pages: u32,
    wrong_first: u32,
    wrong_second: u32,
}

impl Plan {
    /// The share of one of `vcpus`. All of them together walk through memory in steps of `stride`, taking turns; that
    /// visits every page once because stride and number of pages are coprime.
    fn new(ram_pages: u32, vcpu: u32, vcpus: u32, pattern: &Pattern) -> Plan {
        assert!(vcpu < vcpus && vcpus <= ram_pages);
        let stride = stride(ram_pages);
        let times = |count: u32| {
            let page = u64::from(count) * u64::from(stride) % u64::from(ram_pages);
            u32::try_from(page).expect("smaller than the number of pages")
        };
        Plan {
            ram_pages,
            first: times(vcpu),
            step: times(vcpus),
            count: (ram_pages - vcpu).div_ceil(vcpus),
            key_first: pattern.key_first,
            key_second: pattern.key_second,
            allowed: u32::MAX,
            pages: 0,
            wrong_first: 0,
            wrong_second: 0,
        }
    }
}

/// About 0.38 of all pages (the golden section, which keeps successive pages apart), and coprime to
/// their number.
fn stride(pages: u32) -> u32 {
    let wanted = u64::from(pages) * 382 / 1000;
    let wanted = u32::try_from(wanted).expect("smaller than pages").max(1);
    (wanted..).find(|&stride| gcd(stride, pages) == 1).expect("a coprime stride exists")
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The guest's addresses of a vCPU's reports, 32 bits each, in this order. There is no memory, so KVM passes these
/// writes to the monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Report {
    Pages = 0xf000_0000,
    WrongFirst = 0xf000_0004,
    WrongSecond = 0xf000_0008,
}

impl Report {
    pub(crate) fn of(address: u64) -> Option<Report> {
        [Report::Pages, Report::WrongFirst, Report::WrongSecond]
            .into_iter()
            .find(|&report| report as u64 == address)
    }
}

// RBP  this vCPU's plan        EDI  page        ECX  pages left
// RSI  address of a word       EBX  end of the page
// EDX  all ones, or zero where the page must hold zeroes        EAX  the expected word
//
// Position-independent; `word` below is the Rust function of that name in `pattern`.
global_asm!(
    ".pushsection .rodata.umem_test_kvm_guest, \"a\"",
    // EAX = word(ESI, plan.\key)
    ".macro word key",
    "        imul    eax, esi, {factor_0}",
    "        xor     eax, [rbp + \\key]",
    "        bswap   eax",
    "        imul    eax, eax, {factor_1}",
    ".endm",
    // Starts the walk over the pages.
    ".macro begin",
    "        mov     edi, [rbp + {first}]",
    "        mov     ecx, [rbp + {count}]",
    ".endm",
    // RSI and EBX = start and end of page EDI
    ".macro enter_page",
    "        mov     esi, edi",
    "        shl     esi, 12",
    "        lea     ebx, [rsi + {page_bytes}]",
    ".endm",
    // Continues with the next page, at \again, if there is one.
    ".macro next_page again",
    "        add     edi, [rbp + {step}]",
    "        cmp     edi, [rbp + {ram_pages}]",
    "        jb      99f",
    "        sub     edi, [rbp + {ram_pages}]",
    "99:     dec     ecx",
    "        jnz     \\again",
    ".endm",
    ".macro report where, count",
    "        mov     edx, \\where",
    "        mov     eax, [rbp + \\count]",
    "        mov     [rdx], eax",
    ".endm",
    "umem_test_kvm_guest_start:",
    // First time: compare with the monitor's words …
    "        begin",
    "20:     mov     eax, [rbp + {pages}]",
    "        cmp     eax, [rbp + {allowed}]",
    "        jb      25f",
    "        pause",
    "        jmp     20b",
    "25:     enter_page",
    "        mov     eax, esi",
    "        and     eax, {zero_bits}",
    "        xor     edx, edx",
    "        cmp     eax, {zero_bits}",
    "        je      30f",
    "        dec     edx",
    "30:     word    {key_first}",
    "        and     eax, edx",
    "        cmp     eax, [rsi]",
    "        je      40f",
    "        inc     dword ptr [rbp + {wrong_first}]",
    "40:     add     esi, 4",
    "        cmp     esi, ebx",
    "        jne     30b",
    // … and write the guest's.
    "        enter_page",
    "50:     word    {key_second}",
    "        mov     [rsi], eax",
    "        add     esi, 4",
    "        cmp     esi, ebx",
    "        jne     50b",
    "        inc     dword ptr [rbp + {pages}]",
    "        next_page 20b",
    // Second time: compare with the guest's.
    "        begin",
    "60:     enter_page",
    "70:     word    {key_second}",
    "        cmp     eax, [rsi]",
    "        je      80f",
    "        inc     dword ptr [rbp + {wrong_second}]",
    "80:     add     esi, 4",
    "        cmp     esi, ebx",
    "        jne     70b",
    "        next_page 60b",
    "        report  {report_pages}, {pages}",
    "        report  {report_wrong_first}, {wrong_first}",
    "        report  {report_wrong_second}, {wrong_second}",
    // Not reached: the monitor stops after the last report.
    "        hlt",
    "umem_test_kvm_guest_end:",
    ".purgem word",
    ".purgem begin",
    ".purgem enter_page",
    ".purgem next_page",
    ".purgem report",
    ".popsection",
    factor_0 = const FACTORS[0].cast_signed(),
    factor_1 = const FACTORS[1].cast_signed(),
    page_bytes = const PAGE_BYTES,
    zero_bits = const ZERO_BITS,
    ram_pages = const offset_of!(Plan, ram_pages),
    first = const offset_of!(Plan, first),
    step = const offset_of!(Plan, step),
    count = const offset_of!(Plan, count),
    key_first = const offset_of!(Plan, key_first),
    key_second = const offset_of!(Plan, key_second),
    allowed = const offset_of!(Plan, allowed),
    pages = const offset_of!(Plan, pages),
    wrong_first = const offset_of!(Plan, wrong_first),
    wrong_second = const offset_of!(Plan, wrong_second),
    report_pages = const Report::Pages as u32,
    report_wrong_first = const Report::WrongFirst as u32,
    report_wrong_second = const Report::WrongSecond as u32,
);

unsafe extern "C" {
    static umem_test_kvm_guest_start: u8;
    static umem_test_kvm_guest_end: u8;
}

fn code() -> &'static [u8] {
    // SAFETY: the two symbols enclose the bytes of the assembly above, which are read-only and exist as long as the
    // program.
    unsafe {
        let start = &raw const umem_test_kvm_guest_start;
        let end = &raw const umem_test_kvm_guest_end;
        let bytes = usize::try_from(end.offset_from(start)).expect("the end is behind the start");
        std::slice::from_raw_parts(start, bytes)
    }
}

/// The memory at [`BOARD`].
pub(crate) struct Board {
    memory: Memory,
}

impl Board {
    /// Code and plans for the vCPUs of a guest.
    pub(crate) fn new(ram: &Memory, vcpus: u32, pattern: &Pattern) -> Result<Board> {
        if !(1..=VCPUS_MAX).contains(&vcpus) {
            return Err(format!("{vcpus} vCPUs: 1 to {VCPUS_MAX} are possible"));
        }
        let ram_pages = u32::try_from(ram.bytes() / PAGE_BYTES as usize).expect("checked in map");
        let page = PAGE_BYTES as usize;
        let bytes = NonZeroUsize::new(BOARD_PAGES * page).expect("some pages");
        let board = Board { memory: Memory::private(bytes)? };
        assert!(code().len() <= page);
        // SAFETY: the code fits in the first of our pages, which has no other user yet.
        unsafe {
            board.start().copy_from_nonoverlapping(NonNull::from(code()).cast(), code().len());
        }
        for vcpu in 0..vcpus {
            let plan = Plan::new(ram_pages, vcpu, vcpus, pattern);
            // SAFETY: the plans fit in the second page (VCPUS_MAX), aligned as an array of them.
            unsafe { board.start().add(page).cast::<Plan>().add(vcpu as usize).write(plan) };
        }
        board.map_addresses_to_themselves();
        Ok(board)
    }

    /// Makes page tables for the first 4 GiB.
    fn map_addresses_to_themselves(&self) {
        let address = |table: u64| u64::from(Board::page_tables()) + table * u64::from(PAGE_BYTES);
        let entries = std::iter::once((0, address(1) | TABLE))
            .chain((0..4).map(|gib| (512 + gib, address(2 + gib) | TABLE)))
            .chain((0..4 * 512).map(|index| (2 * 512 + index, index << 21 | LARGE_PAGE)));
        for (index, entry) in entries {
            let index = usize::try_from(index).expect("64-bit Linux");
            assert!(index < PAGE_TABLES * 512);
            // SAFETY: an entry of our page tables, which are the last pages of our own memory.
            unsafe {
                self.start().add(2 * PAGE_BYTES as usize).cast::<u64>().add(index).write(entry);
            };
        }
    }

    /// The guest's address of the table of the fourth level, for CR3.
    pub(crate) fn page_tables() -> u32 {
        BOARD + 2 * PAGE_BYTES
    }

    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The address of a vCPU's plan.
    pub(crate) fn plan_address(vcpu: u32) -> u32 {
        BOARD + PAGE_BYTES + vcpu * size_of::<Plan>() as u32
    }

    /// Allows each of `vcpus` this part of its pages, in eighths, or all from 8 on. Until this is called each may write
    /// all of them. The guest may run.
    pub(crate) fn allow(&self, vcpus: u32, eighths: u32) {
        for vcpu in 0..vcpus {
            let plan = Board::plan_address(vcpu) - BOARD;
            // SAFETY: `new` has written the plans of the vCPUs. The guest only reads `allowed`, and everybody does so
            // by single instructions of 32 bits.
            unsafe {
                let plan = self.start().add(plan as usize).cast::<Plan>();
                let count = (&raw const (*plan.as_ptr()).count).read();
                let pages = (count / 8).saturating_mul(eighths);
                let allowed = if eighths < 8 { pages } else { u32::MAX };
                AtomicU32::from_ptr(&raw mut (*plan.as_ptr()).allowed).store(allowed, SeqCst);
            }
        }
    }

    fn start(&self) -> NonNull<u8> {
        self.memory.start()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_cover_every_page_once() {
        let pattern = Pattern::new(1);
        for ram_pages in [256, 257, 1000, 16 * 256, 3 << 18] {
            for vcpus in [1, 2, 3, 7] {
                let mut seen = vec![false; ram_pages as usize];
                for vcpu in 0..vcpus {
                    let plan = Plan::new(ram_pages, vcpu, vcpus, &pattern);
                    let mut page = plan.first;
                    for _ in 0..plan.count {
                        assert!(!std::mem::replace(&mut seen[page as usize], true));
                        page = (page + plan.step) % ram_pages;
                    }
                }
                assert!(seen.iter().all(|&seen| seen), "{ram_pages} pages, {vcpus} vCPUs");
            }
        }
    }

    #[test]
    fn generated_code_is_complete() {
        // mov edi, [rbp + 4] … hlt
        assert_eq!(code()[..3], [0x8b, 0x7d, 0x04]);
        assert_eq!(code().last(), Some(&0xf4));
    }
}
