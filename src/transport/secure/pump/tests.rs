//! Pumps over real sockets, with certificates of their own.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;

use nix::sys::socket::getsockopt;
use rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256;

use super::*;
use crate::transport::tls::testing::{bytes, shaken};

/// Two lanes with TLS between them, over sockets with small buffers.
fn lanes(pumps: &Pumps, records: u64) -> (Lane, Lane) {
    let (left, right) = UnixStream::pair().unwrap();
    for socket in [&left, &right] {
        setsockopt(socket, sockopt::SndBuf, &8192).unwrap();
    }
    let lane = |socket: UnixStream, name: &str| Lane::new(socket.into(), name.into()).unwrap();
    secured(pumps, records, lane(left, "left"), lane(right, "right"))
}

/// The same over existing connections.
fn secured(pumps: &Pumps, records: u64, left: Lane, right: Lane) -> (Lane, Lane) {
    let ends = (left.socket(), right.socket());
    let (client, server) = shaken(TLS13_AES_128_GCM_SHA256, records, ends);
    let start = |lane: Lane, channel| {
        let fate = Fate::named(lane.name.clone());
        pumps.seat(lane.secured(channel), fate, LaneRole::Demand).unwrap()
    };
    (start(left, client), start(right, server))
}

/// Writes in pieces of many sizes, then ends this direction.
fn write(lane: &Lane, bytes: &[u8]) {
    let mut file = lane.blocking().unwrap();
    let (mut rest, mut size) = (bytes, 1);
    while !rest.is_empty() {
        let (now, later) = rest.split_at(size.min(rest.len()));
        file.write_all(now).unwrap();
        (rest, size) = (later, size * 3 % 300_007 + 1);
    }
}

/// Megabytes each way at once, with keys that are used up repeatedly: a real key lasts for 256 GiB.
#[test]
fn data_arrives_unchanged_while_keys_are_renewed() {
    let pumps = Pumps::default();
    let (left, right) = lanes(&pumps, 40);
    let (to_right, to_left) = (bytes(1, 6 << 20), bytes(2, 3 << 20));
    let read = |lane: &Lane, count: usize| {
        let mut file: File = lane.blocking().unwrap();
        let mut bytes = vec![0; count];
        file.read_exact(&mut bytes).unwrap();
        bytes
    };
    std::thread::scope(|scope| {
        scope.spawn(|| write(&left, &to_right));
        scope.spawn(|| write(&right, &to_left));
        let at_left = scope.spawn(|| read(&left, to_left.len()));
        assert!(read(&right, to_right.len()) == to_right);
        assert!(at_left.join().unwrap() == to_left);
    });
}

/// A lane that closes right after its last byte.
#[test]
fn data_sent_before_the_close_arrives_before_the_end() {
    let pumps = Pumps::default();
    let (left, right) = lanes(&pumps, 1 << 24);
    let sent = bytes(3, 1 << 20);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            write(&left, &sent);
            drop(left);
        });
        let mut got = Vec::new();
        right.blocking().unwrap().read_to_end(&mut got).unwrap();
        assert!(got == sent);
    });
    assert_eq!(right.cause(), None, "the connection was closed in order");
    drop(right);
    // Neither pump has work left.
    drop(pumps);
}

/// Both sides give up at once: no pump waits for a lane that still exists.
#[test]
fn dropped_pumps_end_while_lanes_are_still_held() {
    let pumps = Pumps::default();
    let (left, right) = lanes(&pumps, 1 << 24);
    drop(pumps);
    for lane in [left, right] {
        let result = lane.blocking().unwrap().read(&mut [0; 1]);
        let has_ended = match &result {
            Ok(count) => *count == 0,
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        };
        assert!(has_ended, "{result:?}");
    }
}

/// Data that still comes for a closed lane does not keep the pump alive.
#[test]
fn pump_of_a_closed_lane_ends_while_the_peer_keeps_sending() {
    let linger = Duration::from_millis(300);
    let pumps = Pumps::lingering(linger);
    let (left, right) = lanes(&pumps, 1 << 24);
    drop(right);
    let mut file = left.blocking().unwrap();
    let is_over = || pumps.running.lock().unwrap()[1].thread.is_finished();
    let begun = Instant::now();
    while !is_over() {
        assert!(begun.elapsed() < 100 * linger, "the pump still runs");
        // The write fails once the connection has ended.
        let _ = file.write_all(&[0x5a; 64]);
        std::thread::sleep(linger / 20);
    }
}

#[test]
fn pump_over_the_limit_cuts_the_oldest() {
    let pumps = Pumps::default();
    let all: Vec<_> = (0..RUNNING_MAX).map(|_| lanes(&pumps, 1 << 24)).collect();
    let running = || {
        let pumps = pumps.running.lock().unwrap();
        pumps.iter().filter(|pump| !pump.thread.is_finished()).count()
    };
    let begun = Instant::now();
    while running() > RUNNING_MAX {
        assert!(begun.elapsed() < Duration::from_secs(30), "{} pumps", running());
        std::thread::sleep(Duration::from_millis(1));
    }
    let (left, right) = all.last().unwrap();
    write(left, b"the last");
    let mut got = [0; 8];
    right.blocking().unwrap().read_exact(&mut got).unwrap();
    assert_eq!(&got, b"the last");
}

#[test]
fn explain_adds_the_cause_only_to_its_own_lane() {
    let pumps = Pumps::default();
    let (left, right) = lanes(&pumps, 1 << 24);
    let lost =
        |lane: &str| Error::Lost { side: "source", lane: lane.into(), what: "closed".into() };
    assert!(!pumps.explain(lost("left")).to_string().contains("TLS"));
    pumps.running.lock().unwrap()[0].fate.broke("why".into());
    assert!(pumps.explain(lost("left")).to_string().contains("closed (TLS: why)"));
    assert!(!pumps.explain(lost("right")).to_string().contains("TLS"));
    drop((left, right));
}

/// The timeout of a lane that turns out to be the demand lane is set on its connection, which the
/// lane itself no longer has.
#[test]
fn connection_behind_a_pump_gets_the_demand_lane_timeout() {
    let pumps = Pumps::default();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    let left = Lane::new(dialled.into(), "demand lane".into()).unwrap();
    let right = Lane::new(accepted.into(), "a lane".into()).unwrap();
    let (dialled, accepted) = (left.socket(), right.socket());
    let (_left, right) = secured(&pumps, 1 << 20, left, right);
    let told = |connection: &OwnedFd| {
        let timeout_ms = getsockopt(connection, sockopt::TcpUserTimeout).unwrap();
        (timeout_ms, getsockopt(connection, sockopt::Priority).unwrap())
    };
    assert_ne!(told(&dialled), told(&accepted));
    let _right = right.assign(LaneRole::Demand, 0);
    assert_eq!(told(&dialled), told(&accepted));
}
