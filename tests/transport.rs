//! Both umem processes with guests and sources made for each test: where pages land, and which pages are not allocated.
//!
//! The answers to a broken or hostile peer are in `peers.rs`.

mod support;

use std::fs::File;
use std::io::{IoSliceMut, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use nix::sys::signal::Signal;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use support::peer::{Peer, range};
use support::waiting::{
    bytes_of, incoming_to_idle_guest, incoming_to_loading_guest, uri_of, write_snapshot,
};
use support::{Authority, HugeFile, Scratch, Umem, wait_for};
use umem_wire::{Event, Frame, HEADER_BYTES, RegionId, transmit};

const PAGE: u64 = 4096;

/// An idle guest of 8 MiB, and its source with this many bulk lanes: the guest is loaded, and waits for page 0.
fn loading(scratch: &Scratch, bulk_lanes: u16) -> (Umem, Peer) {
    let mut incoming = incoming_to_loading_guest(scratch, 8);
    let mut peer = Peer::dial(&uri_of(&mut incoming), bulk_lanes);
    peer.until_stopped(8, true);
    peer.load();
    assert_eq!(peer.event(), Some(Event::Request(vec![(RegionId(0), 0)])));
    (incoming, peer)
}

#[test]
fn sparse_snapshot_arrives_whole_and_stays_sparse() {
    for mode in [&["-p"][..], &[], &["-p", "--lanes", "3"]] {
        let scratch = Scratch::new();
        let source = scratch.ram("source");
        let data_pages = write_snapshot(&source, 24);
        let mut incoming = incoming_to_idle_guest(&scratch, 24);
        let uri = uri_of(&mut incoming);
        let ram = format!("ram0={}", source.display());
        let mut arguments = vec!["migrate", "--json", "--ram", &ram, &uri];
        arguments.extend(mode);
        let mut migrate = Umem::start(arguments);
        let report = migrate.event("completed");
        assert_eq!(report["data_bytes"], data_pages * PAGE);
        let left = report["zero_copy"].as_str();
        assert!(matches!(left, Some("all") | Some("100 %")), "on this machine: {left:?}");
        let landed = incoming.event("completed")["zero_copy"].clone();
        assert_eq!(landed, "none: written from a buffer", "/dev/shm has small pages here");
        migrate.succeeds();
        let destination = scratch.ram("destination");
        let allocated = std::fs::metadata(&destination).unwrap().blocks() * 512;
        assert_eq!(allocated, data_pages * PAGE, "zeroes and holes take no memory");
        assert!(bytes_of(&source) == bytes_of(&destination), "every byte is equal");
        let held = std::fs::metadata(&source).unwrap().blocks() * 512;
        assert!(
            held <= (data_pages * 16 / 15 + 1) * PAGE + (24 << 20) / 24,
            "{held}: no hole read"
        );
    }
}

/// File names are bytes, of any encoding; session files contain them as well.
#[test]
fn ram_path_may_be_other_than_utf_8() {
    use std::ffi::{OsStr, OsString};
    use std::os::unix::ffi::OsStrExt;
    let scratch = Scratch::new();
    let named = |name: &str| {
        let mut path = scratch.ram(name).into_os_string();
        path.push(OsStr::from_bytes(b"-\xff\xc3\x28\xfe"));
        let mut option = OsString::from("ram0=");
        option.push(&path);
        (path, option)
    };
    let (source, source_option) = named("source");
    let (destination, destination_option) = named("destination");
    write_snapshot(source.as_ref(), 8);
    let qmp = scratch.path("guest.qmp").into_os_string();
    let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
    let arguments = [
        words(&["incoming", "--json", "--ram"]),
        vec![destination_option.clone()],
        words(&["tcp:127.0.0.1:0", "--", env!("CARGO_BIN_EXE_umem"), "guest", "--incoming"]),
        words(&["--threads", "0", "--size", "8", "--qmp"]),
        vec![qmp, "--ram".into(), destination_option],
    ];
    let mut incoming = Umem::start(arguments.concat());
    let uri = uri_of(&mut incoming);
    let arguments =
        [words(&["migrate", "-p", "--json", "--ram"]), vec![source_option], words(&[&uri])];
    let mut migrate = Umem::start(arguments.concat());
    migrate.event("completed");
    incoming.event("completed");
    migrate.succeeds();
    assert!(bytes_of(source.as_ref()) == bytes_of(destination.as_ref()));

    // Elsewhere a name other than UTF-8 is refused, and no other file is taken for it.
    let report = [words(&["migrate", "--report"]), vec![source], words(&[&uri])];
    let text = Umem::start(report.concat()).fails_as_misused();
    assert!(text.contains("is not UTF-8"), "{text}");
}

/// For hugetlbfs the kernel reports everything as data. A page without writes is a hole all the same, and reading it
/// takes no huge page.
#[test]
fn holes_of_huge_pages_stay_holes() {
    use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
    use std::os::unix::fs::MetadataExt;
    for mode in [&["-p"][..], &[], &["--checksum"]] {
        let scratch = Scratch::new();
        let huge = HugeFile::with_room(4);
        let file = File::options().read(true).write(true).open(huge.path()).unwrap();
        file.set_len(8 << 20).unwrap();
        let (length, flags) = (std::num::NonZeroUsize::new(8 << 20).unwrap(), MapFlags::MAP_SHARED);
        // SAFETY: a mapping of our own, of which one byte is written while it has no other user.
        unsafe {
            let start = mmap(None, length, ProtFlags::PROT_WRITE, flags, &file, 0).unwrap();
            start.cast::<u8>().add((4 << 20) + 5000).write(7);
            munmap(start, 8 << 20).unwrap();
        }
        let held = file.metadata().unwrap().blocks();
        assert_eq!(held, 4096, "one huge page");

        let mut incoming = incoming_to_idle_guest(&scratch, 8);
        let uri = uri_of(&mut incoming);
        let ram = format!("ram0={}", huge.path().display());
        let arguments = [&["migrate", "--json", "--ram", &ram][..], mode, &[&uri]].concat();
        let mut migrate = Umem::start(arguments);
        let report = migrate.event("completed");
        assert_eq!(report["hole_bytes"], 6 << 20, "{report}");
        incoming.event("completed");
        migrate.succeeds();
        assert_eq!(file.metadata().unwrap().blocks(), held, "no hole was filled");
        let mut there = vec![0; 8 << 20];
        there[(4 << 20) + 5000] = 7;
        assert!(bytes_of(&scratch.ram("destination")) == there);
    }
}

/// The source's file has pages of 4 KiB, most of them beside holes: the landing unit is 2 MiB.
#[test]
fn small_pages_land_in_huge_pages() {
    let tls = ["--tls-creds"];
    // The last two go through a pipe.
    let forbidden = &[libc::SYS_process_vm_writev][..];
    for (mode, security, forbidden) in [
        (&["-p"][..], &[][..], &[][..]),
        (&[], &[], &[]),
        (&["-p", "--lanes", "2"], &[], &[]),
        (&["-p", "--lanes", "2"], &tls, &[]),
        (&["--checksum"], &tls, &[]),
        (&["-p", "--lanes", "2"], &tls, forbidden),
        (&["--checksum"], &tls, forbidden),
    ] {
        let scratch = Scratch::new();
        let creds = Authority::new("ours").credentials(&scratch, "tls", "127.0.0.1");
        let creds = creds.display().to_string();
        let security: Vec<&str> =
            security.iter().flat_map(|option: &&str| [*option, creds.as_str()]).collect();
        let source = scratch.ram("source");
        write_snapshot(&source, 8);
        // The last 2 MiB, except a page of written zeroes, become a hole.
        let file = File::options().write(true).open(&source).unwrap();
        file.set_len(6 << 20).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(&[0; 4096], 7 << 20).unwrap();
        let held = std::fs::metadata(&source).unwrap().blocks();

        let mut huge = HugeFile::with_room(4);
        let ram = format!("ram0={}", huge.path().display());
        let qmp = scratch.path("guest.qmp").display().to_string();
        let mut arguments = vec!["incoming", "--json", "--ram", &ram];
        arguments.extend(&security);
        arguments.extend(["tcp:127.0.0.1:0", "--", env!("CARGO_BIN_EXE_umem"), "guest"]);
        arguments.extend(["--incoming", "--threads", "0"]);
        arguments.extend(["--ram", &ram, "--size", "8", "--qmp", &qmp]);
        let mut incoming = Umem::start_without(forbidden, arguments);
        let uri = uri_of(&mut incoming);
        let ram = format!("ram0={}", source.display());
        let mut arguments = vec!["migrate", "--json", "--ram", &ram, &uri];
        arguments.extend(mode);
        arguments.extend(&security);
        let mut migrate = Umem::start(arguments);
        let report = migrate.event("completed");
        assert_eq!(report["page_size"], 2 << 20);
        assert_eq!(report["data_bytes"], 6 << 20);
        assert_eq!(report["zero_bytes"], 2 << 20);
        let report = incoming.event("completed");
        assert_eq!(report["page_size"], 2 << 20);
        let landed = match security.is_empty() {
            true => "all: received into guest memory",
            false => "none: written from a buffer",
        };
        assert_eq!(report["zero_copy"], landed, "{mode:?} {security:?}");
        migrate.succeeds();
        assert!(huge.bytes() == bytes_of(&source), "every byte is equal");
        assert_eq!(std::fs::metadata(&source).unwrap().blocks(), held, "no hole was filled");
    }
}

#[test]
fn only_demanded_pages_are_sent_without_background_until_an_interrupt() {
    let scratch = Scratch::new();
    let source = scratch.ram("source");
    write_snapshot(&source, 8);
    let mut incoming = incoming_to_idle_guest(&scratch, 8);
    let uri = uri_of(&mut incoming);
    let ram = format!("ram0={}", source.display());
    let mut migrate = Umem::start(["migrate", "-p", "-n", "--json", "--ram", &ram, &uri]);
    migrate.event("running");
    incoming.event("running");
    // No page is touched, so none is allocated; a later check could pass by chance.
    assert_eq!(std::fs::metadata(scratch.ram("destination")).unwrap().blocks(), 0);
    migrate.signal(Signal::SIGINT);
    assert_eq!(migrate.event("completed")["pages_demand"], 0);
    incoming.event("completed");
    assert!(bytes_of(&source) == bytes_of(&scratch.ram("destination")));
}

#[test]
fn interrupt_before_the_switchover_leaves_nothing_behind() {
    let scratch = Scratch::new();
    let mut incoming = incoming_to_idle_guest(&scratch, 8);
    uri_of(&mut incoming);
    assert!(scratch.ram("destination").exists());
    incoming.signal(Signal::SIGINT);
    let error = incoming.fails();
    assert!(error.contains("interrupted"), "{error}");
    assert!(!scratch.ram("destination").exists());
    scratch.wait_until_gone("guest");
}

#[test]
fn guest_death_is_detected() {
    let scratch = Scratch::new();
    let mut incoming = incoming_to_idle_guest(&scratch, 8);
    let pid = incoming.event("listening")["guest_pid"].as_i64().unwrap();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
    let error = incoming.fails();
    assert!(error.contains("exited before the guest arrived"), "{error}");
    assert!(!scratch.ram("destination").exists());
}

/// The demand lane is read ahead: a receive begins and ends anywhere.
#[test]
fn answers_received_in_pieces_land_whole() {
    let scratch = Scratch::new();
    let mut incoming = incoming_to_loading_guest(&scratch, 8);
    let mut peer = Peer::dial(&uri_of(&mut incoming), 1);
    peer.until_stopped(8, true);
    let ram = scratch.ram("destination");
    let page = |seed: u64| -> Vec<u8> { (0..PAGE).map(|at| (at * 7 + seed) as u8 | 1).collect() };
    let mut bytes = Vec::new();
    for first in [3, 9, 20] {
        bytes.extend(transmit::data_header(range(first, 2)));
        bytes.extend([page(first), page(first + 1)].concat());
        bytes.extend(transmit::zero_header(range(first + 2, 1)));
    }
    // Cut in a header, in a page, at its end, near the end of the run, and in the header behind it: whole pages land as
    // they arrive.
    let run = HEADER_BYTES + 2 * 4096;
    let cuts = [(5, 0), (HEADER_BYTES + 100, 0), (HEADER_BYTES + 4096, 1), (run - 40, 1)];
    let mut sent = 0;
    for (end, landed) in cuts.into_iter().chain([(run + 7, 2), (bytes.len(), 2)]) {
        peer.lanes[0].write_all(&bytes[sent..end]).unwrap();
        sent = end;
        wait_for("the sent part of the first run to land", || {
            let mut first = [1; 1];
            let at = (2 + landed) * PAGE;
            File::open(&ram).unwrap().read_exact_at(&mut first, at).unwrap();
            (landed == 0 || first != [0]).then_some(())
        });
    }
    peer.load();
    assert_eq!(peer.event(), Some(Event::Request(vec![(RegionId(0), 0)])));
    peer.send(1, &Frame::Hole(range(0, 3)), &[]);
    assert_eq!(peer.event(), Some(Event::Loaded));
    peer.switch_over();
    for (first, pages) in [(6, 3), (12, 8), (23, 2025)] {
        peer.send(1, &Frame::Hole(range(first, pages)), &[]);
    }
    peer.complete(1);
    incoming.event("completed");
    let landed = bytes_of(&ram);
    for first in [3, 9, 20] {
        let at = (first * PAGE) as usize;
        let expected = [page(first), page(first + 1), vec![0; 4096]].concat();
        assert!(landed[at..at + 3 * 4096] == expected, "pages from {first} on");
    }
}

/// Of a run on the demand lane the last page arrives separately, and a thread waits for it. Then the page before it is
/// visible too.
#[test]
fn run_is_complete_when_its_awaited_last_page_lands() {
    let scratch = Scratch::new();
    let (mut incoming, mut peer) = loading(&scratch, 1);
    peer.send(1, &Frame::Hole(range(0, 8)), &[]);
    assert_eq!(peer.event(), Some(Event::Loaded));
    peer.switch_over();
    let ram = scratch.ram("destination");
    let (guest, address) = guest_of(incoming.pid(), &ram);
    // The thread waits for a page; /proc/PID/mem would return an error for a userfault.
    let read = |page: u64| {
        let (sender, bytes) = std::sync::mpsc::channel();
        let remote = RemoteIoVec { base: address + (page << 12) as usize, len: 4096 };
        std::thread::spawn(move || {
            let mut bytes = vec![0; 4096];
            let result = process_vm_readv(guest, &mut [IoSliceMut::new(&mut bytes)], &[remote]);
            let _ = sender.send(result.map(|_| bytes));
        });
        bytes
    };
    let there = |bytes: std::sync::mpsc::Receiver<nix::Result<Vec<u8>>>, what: &str| {
        wait_for(what, || bytes.try_recv().ok()).unwrap()
    };
    let last = read(9);
    assert_eq!(peer.event(), Some(Event::Request(vec![(RegionId(0), 9)])));
    let [first_page, last_page] = [vec![0x5a; 4096], vec![0xa5; 4096]];
    peer.lanes[0].write_all(&transmit::data_header(range(8, 2))).unwrap();
    peer.lanes[0].write_all(&first_page).unwrap();
    wait_for("the first page of the run to land", || {
        let mut byte = [0];
        File::open(&ram).unwrap().read_exact_at(&mut byte, 8 * PAGE).unwrap();
        (byte == [0x5a]).then_some(())
    });
    peer.lanes[0].write_all(&last_page).unwrap();
    assert!(there(last, "the page that was waited for") == last_page);
    assert!(there(read(8), "the page before it") == first_page);
    peer.send(1, &Frame::Hole(range(10, 2038)), &[]);
    peer.complete(1);
    incoming.event("completed");
}

/// The process that umem has started, and the address of its RAM.
fn guest_of(umem: u32, ram: &Path) -> (Pid, usize) {
    let threads = std::fs::read_dir(format!("/proc/{umem}/task")).unwrap();
    let children = threads.map(|thread| thread.unwrap().path().join("children"));
    let children: String = children.map(|path| std::fs::read_to_string(path).unwrap()).collect();
    let guest = children.split_whitespace().next().expect("umem has started a guest");
    let maps = std::fs::read_to_string(format!("/proc/{guest}/maps")).unwrap();
    let mapping = maps.lines().find(|line| line.ends_with(ram.to_str().unwrap()));
    let (start, _) = mapping.expect("the guest maps its RAM").split_once('-').unwrap();
    (Pid::from_raw(guest.parse().unwrap()), usize::from_str_radix(start, 16).unwrap())
}

/// A vCPU waits for the last page of a lane, so it is still to be woken when the source has closed the lane already.
#[test]
fn lane_may_close_right_after_its_end() {
    let scratch = Scratch::new();
    let (mut incoming, mut peer) = loading(&scratch, 2);
    let mut last = transmit::data_header(range(0, 1)).to_vec();
    last.extend([0; 4096]);
    transmit::encode(&Frame::LaneEnd, &mut last);
    peer.lanes[1].write_all(&last).unwrap();
    peer.lanes[1].shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(peer.event(), Some(Event::Loaded));
    peer.switch_over();
    peer.send(2, &Frame::Hole(range(1, 2047)), &[]);
    peer.complete(2);
    incoming.event("completed");
}

/// Once the destination has reported the guest loaded, the source may give it up at any moment: if both did, the guest
/// would be lost.
#[test]
fn interrupt_does_not_abandon_a_loaded_guest() {
    let scratch = Scratch::new();
    let (mut incoming, mut peer) = loading(&scratch, 1);
    peer.send(1, &Frame::Hole(range(0, 1)), &[]);
    assert_eq!(peer.event(), Some(Event::Loaded));
    incoming.signal(Signal::SIGINT);
    wait_for("its remark that it continues", || {
        incoming.stderr().contains("continuing, because otherwise the guest").then_some(())
    });
    peer.switch_over();
    peer.send(1, &Frame::Hole(range(1, 2047)), &[]);
    peer.complete(1);
    incoming.event("completed");
}

/// The source has sent every page then; that does not mean that they have arrived.
#[test]
fn guest_is_loaded_after_its_last_page_without_postcopy() {
    let scratch = Scratch::new();
    let mut incoming = incoming_to_idle_guest(&scratch, 8);
    let mut peer = Peer::dial(&uri_of(&mut incoming), 1);
    peer.until_stopped(8, false);
    peer.send(1, &Frame::Hole(range(0, 2047)), &[]);
    // No device state, because this guest has no monitor.
    peer.send(0, &Frame::Load { state_bytes: 0 }, &[]);
    // Each goes through the thread that would report "loaded".
    for number in 0..100 {
        peer.send(0, &Frame::Ping(number), &[]);
        assert_eq!(peer.event(), Some(Event::Pong(number)));
    }
    peer.send(1, &Frame::Hole(range(2047, 1)), &[]);
    assert_eq!(peer.event(), Some(Event::Loaded));
    peer.switch_over();
    peer.complete(1);
    incoming.event("completed");
}
