//! Each operation has the effect of its system call.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::time::Duration;

use umem_ring::{Bytes, Fd, Memory, Op, Outcome, Wait};

use crate::util::*;

#[test]
fn nop_completes_with_its_token_and_key() {
    let mut ring = ring();
    let key = ring.submit(Op::nop(), 42).expect("room");
    assert_eq!(ring.in_flight(), 1);
    let completion = one(&mut ring);
    assert_eq!((completion.key, completion.token, completion.last), (key, 42, true));
    assert_eq!(completion.outcome, Outcome::Done(0));
    assert!(completion.memory.is_none());
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn sends_arrive_and_return_their_memory() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    let message = b"from me to you".to_vec();
    for op in [
        Op::send(fd.clone(), message.clone()),
        Op::send(fd.clone(), message.clone()).wait_all(),
        Op::write(fd.clone(), message.clone()),
    ] {
        let name = op.name();
        ring.submit(op, 0).expect("room");
        let completion = one(&mut ring);
        assert_eq!(completion.outcome, Outcome::Done(14), "{name}");
        assert_eq!(bytes(completion), message, "{name}");
        let mut received = vec![0xa5; message.len()];
        peer.read_exact(&mut received).expect("read");
        assert_eq!(received, message, "{name}");
    }
}

#[test]
fn receives_fill_bytes_and_spans() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    let mapping = Mapping::anonymous(4096);
    for op in [
        Op::recv(fd.clone(), Bytes::with_capacity(8)),
        Op::recv(fd.clone(), Bytes::with_capacity(8)).wait_all(),
        Op::read(fd.clone(), Bytes::with_capacity(8)),
        Op::recv(fd.clone(), mapping.span().sub(0, 8).expect("inside")),
    ] {
        let name = op.name();
        ring.submit(op, 0).expect("room");
        assert!(poke(&mut ring).is_empty(), "{name} waits for the peer");
        peer.write_all(b"received").expect("write");
        let completion = one(&mut ring);
        assert_eq!(completion.outcome, Outcome::Done(8), "{name}");
        match completion.memory.expect("memory") {
            Memory::Bytes(bytes) => assert_eq!(bytes.as_slice(), b"received", "{name}"),
            Memory::Span(span) => {
                assert_eq!((span.len(), mapping.read(8)), (8, b"received".into()));
            }
            Memory::Pieces(_) => panic!("no bytes were sent"),
        }
    }
}

#[test]
fn receive_returns_the_bytes_available() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    peer.write_all(b"abc").expect("write");
    ring.submit(Op::recv(fd.clone(), Bytes::with_capacity(8)), 0).expect("room");
    assert_eq!(one(&mut ring).outcome, Outcome::Done(3));
    drop(peer);
    ring.submit(Op::recv(fd.clone(), Bytes::with_capacity(8)), 0).expect("room");
    assert_eq!(one(&mut ring).outcome, Outcome::Done(0), "the end of the stream");
    ring.submit(Op::recv(fd, Bytes::with_capacity(8)).wait_all(), 0).expect("room");
    assert_eq!(one(&mut ring).outcome, Outcome::Short { done: 0, wanted: 8 });
}

#[test]
fn poll_first_receive_returns_the_bytes_available() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    let receive = || Op::recv(fd.clone(), Bytes::with_capacity(8)).poll_first();
    ring.submit(receive(), 0).expect("room");
    assert!(poke(&mut ring).is_empty(), "the receive waits for the peer");
    peer.write_all(b"abc").expect("write");
    assert_eq!(one(&mut ring).outcome, Outcome::Done(3));
    peer.write_all(b"de").expect("write");
    ring.submit(receive(), 0).expect("room");
    assert_eq!(one(&mut ring).outcome, Outcome::Done(2));
    ring.submit(receive().wait_all(), 0).expect("room");
    peer.write_all(b"1234").expect("write");
    assert!(poke(&mut ring).is_empty(), "the receive waits for all of its bytes");
    peer.write_all(b"5678").expect("write");
    assert_eq!(bytes(one(&mut ring)), b"12345678");
    peer.write_all(b"f").expect("write");
    drop(peer);
    ring.submit(receive(), 0).expect("room");
    assert_eq!(one(&mut ring).outcome, Outcome::Done(1));
    ring.submit(receive(), 0).expect("room");
    assert_eq!(one(&mut ring).outcome, Outcome::Done(0), "the end of the stream");
}

/// Its first attempt comes after the kernel has processed the whole queue.
#[test]
fn poll_first_receive_makes_no_attempt_at_submission() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    for (waits, expected) in [(false, [1, 2]), (true, [2, 1])] {
        peer.write_all(b"abc").expect("write");
        let receive = Op::recv(fd.clone(), Bytes::with_capacity(8));
        let receive = if waits { receive.poll_first() } else { receive };
        ring.submit(receive, 1).expect("room");
        ring.submit(Op::nop(), 2).expect("room");
        let completions = collect(&mut ring, 2);
        let tokens: Vec<_> = completions.iter().map(|completion| completion.token).collect();
        assert_eq!(tokens, expected, "waits first: {waits}");
    }
}

#[test]
fn sliced_buffer_is_filled_only_in_its_slice() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    peer.write_all(b"xy").expect("write");
    let buffer = Bytes::from(vec![b'.'; 6]).slice(2..4);
    ring.submit(Op::recv(fd, buffer), 0).expect("room");
    assert_eq!(bytes(one(&mut ring)), b"..xy..");
}

#[test]
fn vectored_send_is_one_message_and_returns_its_pieces() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    let mapping = Mapping::anonymous(4096);
    mapping.fill(b"page");
    let mut pieces: Vec<Memory> = vec![
        Bytes::from(b"head".to_vec()).into(),
        mapping.span().sub(0, 4).expect("inside").into(),
        Bytes::from(b"..tail..".to_vec()).slice(2..6).into(),
    ];
    for _ in 0..3 {
        ring.submit(Op::send_vectored(fd.clone(), pieces).more(), 0).expect("room");
        let completion = one(&mut ring);
        assert_eq!(completion.outcome, Outcome::Done(12));
        pieces = completion.memory.and_then(Memory::into_pieces).expect("pieces");
        assert_eq!(pieces.len(), 3);
        let mut received = [0xa5; 12];
        peer.read_exact(&mut received).expect("read");
        assert_eq!(&received, b"headpagetail");
    }
}

#[test]
fn vectored_send_completes_after_all_bytes() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    let len = 4 << 20;
    let pieces = vec![Bytes::from(vec![7; len]).into(), Bytes::from(vec![8; len]).into()];
    ring.submit(Op::send_vectored(fd, pieces), 0).expect("room");
    ring.enter(Wait::No).expect("enter");
    let reader = std::thread::spawn(move || {
        let mut received = vec![0; 2 * len];
        peer.read_exact(&mut received).expect("read");
        received
    });
    assert_eq!(one(&mut ring).outcome, Outcome::Done(2 * len as u32));
    let received = reader.join().expect("the reader");
    assert!(received[..len].iter().all(|&b| b == 7) && received[len..].iter().all(|&b| b == 8));
}

#[test]
fn file_operations_use_the_offset_or_the_files_position() {
    let mut ring = ring();
    let mut file = memfd(0);
    let fd = Fd::from(OwnedFd::from(file.try_clone().expect("a duplicate")));
    ring.submit(Op::write(fd.clone(), b"0123456789".to_vec()), 0).expect("room");
    assert_eq!(one(&mut ring).outcome, Outcome::Done(10));
    ring.submit(Op::write(fd.clone(), b"ab".to_vec()).at(4), 0).expect("room");
    assert_eq!(one(&mut ring).outcome, Outcome::Done(2));
    ring.submit(Op::read(fd.clone(), Bytes::with_capacity(4)).at(3), 0).expect("room");
    assert_eq!(bytes(one(&mut ring)), b"3ab6");
    file.seek(SeekFrom::Start(8)).expect("seek");
    ring.submit(Op::read(fd, Bytes::with_capacity(4)), 0).expect("room");
    let completion = one(&mut ring);
    assert_eq!(completion.outcome, Outcome::Done(2), "a short read alone is no failure");
    assert_eq!(bytes(completion), b"89\0\0");
}

#[test]
fn read_of_a_nonblocking_descriptor_waits_for_data() {
    let mut ring = ring();
    let file = eventfd();
    let fd = Fd::from(OwnedFd::from(file.try_clone().expect("a duplicate")));
    ring.submit(Op::read(fd, Bytes::with_capacity(32)), 0).expect("room");
    assert!(poke(&mut ring).is_empty());
    (&file).write_all(&5u64.to_ne_bytes()).expect("write");
    let completion = one(&mut ring);
    assert_eq!(completion.outcome, Outcome::Done(8));
    assert_eq!(bytes(completion)[..8], 5u64.to_ne_bytes());
}

#[test]
fn poll_reports_once() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    ring.submit(Op::poll(fd, libc::POLLIN as u32), 0).expect("room");
    assert!(poke(&mut ring).is_empty());
    peer.write_all(b"x").expect("write");
    let completion = one(&mut ring);
    assert_eq!((completion.outcome, completion.last), (Outcome::Done(libc::POLLIN as u32), true));
}

#[test]
fn multishot_poll_reports_until_cancelled() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    let key = ring.submit(Op::poll(fd, libc::POLLIN as u32).multishot(), 9).expect("room");
    ring.enter(Wait::No).expect("enter");
    for _ in 0..3 {
        peer.write_all(b"x").expect("write");
        let completion = one(&mut ring);
        assert_eq!((completion.key, completion.token, completion.last), (key, 9, false));
        assert_eq!(completion.outcome, Outcome::Done(libc::POLLIN as u32));
    }
    ring.cancel(key).expect("cancel");
    let completion = one(&mut ring);
    assert!(completion.last);
    assert!(matches!(completion.outcome, Outcome::Failed(e) if e.raw() == libc::ECANCELED));
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn expired_timeout_is_done() {
    let mut ring = ring();
    ring.submit(Op::timeout(Duration::from_millis(1)), 0).expect("room");
    let completion = one(&mut ring);
    assert_eq!((completion.outcome, completion.last), (Outcome::Done(0), true));
}

#[test]
fn splice_moves_bytes_from_a_socket_through_a_pipe_to_a_file() {
    let mut ring = ring();
    let (socket, mut peer) = pair();
    let (out, into) = pipe();
    let file = memfd(4096);
    let target = Fd::from(OwnedFd::from(file.try_clone().expect("a duplicate")));
    peer.write_all(b"spliced").expect("write");
    let to_file = Op::Splice {
        from: Fd::from(out),
        from_offset: None,
        to: target,
        to_offset: Some(100),
        len: 7,
        flags: 0,
    };
    let chain = ring.chain().then(Op::splice(socket, into, 7), 1).then(to_file, 2);
    ring.submit_chain(chain).expect("room");
    let completions = collect(&mut ring, 2);
    assert_eq!(outcomes(&completions), [Outcome::Done(7), Outcome::Done(7)]);
    assert_eq!(tokens(&completions), [1, 2]);
    let mut landed = [0xa5; 9];
    file.read_exact_at(&mut landed, 99).expect("read");
    assert_eq!(&landed, b"\0spliced\0");
}

#[test]
fn madvise_populates_and_releases_memory() {
    let mut ring = ring();
    let len = 16 * 4096;
    let file = memfd(len as u64);
    let mapping = Mapping::shared(&file, len);
    let blocks = |file: &File| file.metadata().expect("metadata").blocks() * 512;
    ring.submit(Op::madvise(mapping.span(), libc::MADV_POPULATE_WRITE), 0).expect("room");
    let completion = one(&mut ring);
    assert_eq!(completion.outcome, Outcome::Done(0));
    assert_eq!(memory_len(&completion.memory), Some(len));
    assert_eq!(blocks(&file), len as u64);
    let half = mapping.span().sub(0, len / 2).expect("inside");
    ring.submit(Op::madvise(half, libc::MADV_REMOVE), 0).expect("room");
    assert_eq!(one(&mut ring).outcome, Outcome::Done(0));
    assert_eq!(blocks(&file), len as u64 / 2);
}

#[test]
fn fallocate_allocates_and_punches_a_file() {
    let mut ring = ring();
    let file = memfd(0);
    let fd = Fd::from(OwnedFd::from(file.try_clone().expect("a duplicate")));
    ring.submit(Op::fallocate(fd.clone(), 0, 0, 65536), 0).expect("room");
    assert_eq!(one(&mut ring).outcome, Outcome::Done(0));
    let metadata = file.metadata().expect("metadata");
    assert_eq!((metadata.len(), metadata.blocks() * 512), (65536, 65536));
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    ring.submit(Op::fallocate(fd, punch, 4096, 8192), 0).expect("room");
    assert_eq!(one(&mut ring).outcome, Outcome::Done(0));
    assert_eq!(file.metadata().expect("metadata").blocks() * 512, 65536 - 8192);
}

#[test]
fn registered_files_work_by_slot_and_close_with_the_ring() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    let Fd::Owned(socket) = fd else { panic!("a descriptor") };
    let file = Arc::new(OwnedFd::from(memfd(4096)));
    let first = ring.register_files(std::slice::from_ref(&socket)).expect("a slot");
    let second = ring.register_files(std::slice::from_ref(&file)).expect("another slot");
    assert!(matches!((&first[..], &second[..]), ([Fd::Fixed(0)], [Fd::Fixed(1)])));
    drop(socket);
    ring.submit(Op::send(first[0].clone(), b"fixed".to_vec()), 0).expect("room");
    ring.submit(Op::write(second[0].clone(), b"file".to_vec()).at(8), 1).expect("room");
    assert!(collect(&mut ring, 2).iter().all(|c| matches!(c.outcome, Outcome::Done(4 | 5))));
    let mut received = [0; 5];
    peer.read_exact(&mut received).expect("read");
    assert_eq!(&received, b"fixed");
    let mut read = [0; 4];
    File::from(file.try_clone().expect("a duplicate")).read_exact_at(&mut read, 8).expect("read");
    assert_eq!(&read, b"file");
    // A splice takes slots on both sides, or on one.
    let (out, into) = pipe();
    let [from, to] = [&second[0], &Fd::from(into)].map(Clone::clone);
    let splice = Op::Splice { from, from_offset: Some(8), to, to_offset: None, len: 4, flags: 0 };
    ring.submit(splice, 2).expect("room");
    ring.submit(Op::splice(out, first[0].clone(), 4), 3).expect("room");
    assert_eq!(outcomes(&collect(&mut ring, 2)), [Outcome::Done(4); 2]);
    let mut received = [0; 4];
    peer.read_exact(&mut received).expect("read");
    assert_eq!(&received, b"file");
    ring.close(PATIENCE).expect("close");
    peer.set_nonblocking(true).expect("nonblocking");
    let end = peer.read(&mut received).expect("closed already");
    assert_eq!(end, 0, "the ring held the last descriptor");
    assert_eq!(Arc::strong_count(&file), 1);
}

#[test]
fn too_many_registered_files_are_refused() {
    let mut ring = ring();
    let file = Arc::new(OwnedFd::from(memfd(0)));
    let files = vec![file; umem_ring::FILES_MAX as usize];
    ring.register_files(&files).expect("the most files that are allowed");
    assert!(ring.register_files(&files[..1]).is_err());
}

#[test]
fn registered_buffers_are_filled_and_kept_until_the_ring_closes() {
    let mut ring = ring();
    let len = 8 * 4096;
    let mapping = Mapping::anonymous(len);
    ring.register_buffers(vec![mapping.span()]).expect("registered");
    let file = memfd(0);
    (&file).write_all(b"registered").expect("write");
    let part = mapping.span().sub(4096, 10).expect("inside");
    ring.submit(Op::read_fixed(OwnedFd::from(file), 0, part).at(0), 0).expect("room");
    let completion = one(&mut ring);
    assert_eq!(completion.outcome, Outcome::Done(10));
    assert_eq!(memory_len(&completion.memory), Some(10));
    assert_eq!(&mapping.read(4106)[4096..], b"registered");
    drop(completion);
    assert_eq!(Arc::strong_count(&mapping), 2);
    let (fd, _peer) = pair();
    let outside = Mapping::anonymous(4096);
    ring.submit(Op::read_fixed(fd, 0, outside.span()), 0).expect("room");
    let completion = one(&mut ring);
    assert!(matches!(completion.outcome, Outcome::Failed(e) if e.raw() == libc::EFAULT));
    assert!(ring.register_buffers(vec![outside.span()]).is_err(), "only once");
    ring.close(PATIENCE).expect("close");
    assert_eq!(Arc::strong_count(&mapping), 1);
}
