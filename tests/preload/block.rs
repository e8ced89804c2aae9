//! Memory without a file, which umem names by its address.

use std::os::fd::{AsRawFd, OwnedFd};

use serde_json::{Value, json};

use super::{EVENT_PAGEFAULT, EVENT_REMOVE, LENGTH, PAGE, Program, Ram, uffd};
use crate::support::Scratch;

/// `struct uffdio_copy`.
#[repr(C)]
pub(super) struct Copy {
    to: u64,
    from: u64,
    length: u64,
    mode: u64,
    done: i64,
}

/// Memory of a program without a file, registered.
struct Block {
    address: u64,
    ram: Ram,
}

/// A program that has private memory without a file; the first page has contents.
fn program(scratch: &Scratch) -> (Program, u64, Ram) {
    // The object listens once something has been handed over.
    let (mut program, file) = Program::with_ram(scratch, "shared");
    let address: u64 = program.ask(&format!("anonymous {LENGTH}")).parse().unwrap();
    assert_eq!(program.ask("write 0 7"), "ok");
    assert_eq!(program.ask("read 0"), "7");
    (program, address, file)
}

fn registered(scratch: &Scratch) -> (Program, Block, Ram) {
    let (mut program, address, file) = program(scratch);
    program.command(&format!("register {address} {LENGTH} pc.ram\n"));
    let message = program.message();
    let message = &message[0];
    assert_eq!((&message["name"], &message["kind"]), (&json!("pc.ram"), &json!("anonymous")));
    assert_eq!(
        (&message["base_host_virt_addr"], &message["size"]),
        (&json!(address), &json!(LENGTH))
    );
    assert_eq!((&message["page_size"], &message["umem"]), (&json!(PAGE), &json!(2)));
    let uffd: OwnedFd = program.descriptors.pop_front().expect("the userfaultfd");
    assert!(program.descriptors.is_empty(), "the memory has no file");
    let ram = Ram { address, uffd, file: file.file.try_clone().unwrap() };
    (program, Block { address, ram }, file)
}

impl Block {
    fn copy_in(&self, page: u64, byte: u8) {
        let bytes = [byte; PAGE as usize];
        let from = bytes.as_ptr().expose_provenance() as u64;
        let mut copy =
            Copy { to: self.address + page * PAGE, from, length: PAGE, mode: 0, done: 0 };
        // SAFETY: the structure is the one that the ioctl takes, and the bytes outlive the call.
        unsafe { uffd::copy(self.ram.uffd.as_raw_fd(), &mut copy) }.unwrap();
    }

    /// A read of this page waits for it.
    fn is_missing(&self, program: &mut Program, page: u64, byte: u8) {
        program.send(&format!("read {}", page * PAGE));
        assert_eq!(self.ram.event(), (EVENT_PAGEFAULT, page));
        self.copy_in(page, byte);
        assert_eq!(program.answer(), byte.to_string());
    }
}

fn is_refused(message: &Value, code: &str, text: &str) {
    assert_eq!(message["error"], code, "{message}");
    assert!(message["text"].as_str().unwrap().contains(text), "{message}");
}

#[test]
fn registered_memory_is_emptied_and_waits_for_its_pages() {
    let scratch = Scratch::new();
    let (mut program, block, _file) = registered(&scratch);
    block.is_missing(&mut program, 0, 8);
    // Where umem is gone no child has it.
    assert_eq!(program.ask(&format!("fork {PAGE}")), format!("signal {}", libc::SIGSEGV));
    program.command(&format!("register {} {LENGTH} again\n", block.address));
    is_refused(&program.message(), "block", "memory of another RAM block");
}

#[test]
fn stale_pages_are_missing_again_and_others_stay() {
    let scratch = Scratch::new();
    let (mut program, block, _file) = registered(&scratch);
    (0..8).for_each(|page| block.copy_in(page, 10 + page as u8));
    let at = |page: u64| block.address + page * PAGE;
    program.command(&format!("stale {} {PAGE}\nstale {} {}\n", at(1), at(5), 2 * PAGE));
    program.command(&format!("empty {}\n", block.address));
    assert_eq!(program.message(), json!({ "emptied": block.address, "size": 3 * PAGE }));
    for page in [0, 2, 3, 4, 7] {
        assert_eq!(program.ask(&format!("read {}", page * PAGE)), (10 + page).to_string());
    }
    for page in [1, 5, 6, 8] {
        block.is_missing(&mut program, page, 40 + page as u8);
    }
    for range in [(block.address - PAGE, PAGE), (at(0), LENGTH + PAGE), (at(0) + 1, PAGE)] {
        program.command(&format!("stale {} {}\nempty {}\n", range.0, range.1, block.address));
        is_refused(&program.message(), "block", "not in the guest's memory");
    }
    program.command(&format!("empty {}\n", block.address + PAGE));
    is_refused(&program.message(), "block", "no memory without a file");
    assert_eq!(program.ask(&format!("read {PAGE}")), "41");

    program.command(&format!("keep\nstale {} {PAGE}\nempty {}\n", at(1), block.address));
    is_refused(&program.message(), "block", "the guest may run here");
    assert_eq!(program.ask(&format!("read {PAGE}")), "41");
}

/// A discard by a device during the load of its state is ignored, because the source decides those contents. A discard
/// by the guest is reported.
#[test]
fn discards_count_from_when_the_guest_may_run() {
    let scratch = Scratch::new();
    let (mut program, block, _file) = registered(&scratch);
    block.copy_in(2, 22);
    let discard = format!("advise {} {PAGE} {}", 2 * PAGE, libc::MADV_DONTNEED);
    assert_eq!(program.ask(&discard), "ok");
    assert_eq!(program.ask(&format!("read {}", 2 * PAGE)), "22");
    program.command("keep\n");
    program.pong();
    program.send(&discard);
    assert_eq!(block.ram.event(), (EVENT_REMOVE, 2));
    assert_eq!(program.answer(), "ok");
    block.is_missing(&mut program, 2, 0);
}

#[test]
fn memory_that_cannot_be_emptied_is_refused() {
    let scratch = Scratch::new();
    let (mut program, address, file) = program(&scratch);
    let mut refused = |address: u64, length: u64, code: &str, text: &str| {
        program.command(&format!("register {address} {length} pc.ram\n"));
        is_refused(&program.message(), code, text);
    };
    refused(address + 1, PAGE, "block", "whole pages");
    refused(address, 0, "block", "whole pages");
    refused(u64::MAX - PAGE + 1, PAGE, "block", "whole pages");
    refused(file.address, LENGTH, "block", "memory of another RAM block");
    // The address is not mapped, or maps a file of another program.
    refused(PAGE, PAGE, "block", "neither private memory");
    assert_eq!(program.ask(&format!("lock 0 {PAGE}")), "ok");
    program.command(&format!("register {address} {LENGTH} pc.ram\n"));
    is_refused(&program.message(), "mem-lock", "without mem-lock=on");
}
