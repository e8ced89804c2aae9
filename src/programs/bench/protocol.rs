//! Messages between client and server: lines of JSON, of limited length.
//!
//! The first line of every connection carries a magic word and a version, so that a foreign peer is refused before any
//! other byte is parsed.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, setsockopt, sockopt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::fault_limits::{self, Faults};
use super::pages::{MemoryKind, PageKind, Place, REGION_BYTES_MAX};
use crate::error::{Error, Result};
use crate::runtime::role::Role;
use crate::statistics::Latency;

/// The most bytes of a line, its newline included.
pub(super) const LINE_BYTES_MAX: usize = 4096;

const MAGIC: &str = "umem-bench";

/// A peer that is silent for this long is probed by TCP keepalive, as many times as the system's setting: a vanished
/// peer does not keep a server busy forever.
const SILENCE_SECONDS: u32 = 10;

/// Both sides must be of the same version.
const VERSION: u32 = 2;

/// The most bytes of a congestion control's name (TCP_CA_NAME_MAX, with its terminating zero).
const CONGESTION_BYTES_MAX: usize = 15;

/// The most bytes of a test, 1 PiB: a larger number is a mistaken unit.
pub(crate) const TEST_BYTES_MAX: u64 = 1 << 50;

/// How long a client may take to open its lanes by default; it fills the memory that it will send before. Also the
/// longest time without progress.
pub(crate) const JOIN_TIMEOUT: Duration = Duration::from_secs(60);

/// The parameters of a test.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Test {
    /// In each direction.
    pub(crate) lanes: u16,
    /// Move this many bytes in each direction, whole pages, and end; None: the client ends the test.
    pub(crate) bytes: Option<u64>,
    /// The server sends.
    pub(crate) reverse: bool,
    /// Both send.
    pub(crate) bidir: bool,
    /// Pages do not land.
    pub(crate) discard: bool,
    pub(crate) kind: MemoryKind,
    pub(crate) pages: PageKind,
    /// Demand faults a second in each direction during the stream, and their limit in total.
    pub(crate) fault_rate: u32,
    pub(crate) faults: u64,
    pub(crate) zero_percent: u32,
    /// Compare every page with its expected contents after its pass.
    pub(crate) verify: bool,
    /// None leaves the lanes' own choice.
    pub(crate) congestion: Option<String>,
    /// The most bytes of a pass, whole blocks of 2 MiB. The server may lower it.
    pub(crate) region_bytes: u64,
}

impl Test {
    /// Checks the parameters; the error is one line that names a valid value.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        let lanes_max = umem_wire::limits::LANES_MAX;
        if self.lanes == 0 || self.lanes > lanes_max {
            return Err(format!("-P is 1 to {lanes_max} lanes, not {}", self.lanes));
        }
        if let Some(bytes) = self.bytes
            && (bytes == 0 || bytes > TEST_BYTES_MAX)
        {
            return Err(format!("-n is 1 byte to {} TiB, not {bytes} bytes", TEST_BYTES_MAX >> 40));
        }
        if self.zero_percent > 100 {
            return Err(format!("--zero-percent is 0 to 100 percent, not {}", self.zero_percent));
        }
        if self.bidir && self.reverse {
            return Err("-R and --bidir: with --bidir both send already; leave out -R".into());
        }
        let faults = Faults { rate: self.fault_rate, count: self.faults, discard: self.discard };
        fault_limits::check(&faults, self.place())?;
        if self.discard && (self.verify || self.zero_percent > 0) {
            return Err("--discard moves no pages: leave out --verify and --zero-percent".into());
        }
        if let Some(name) = &self.congestion {
            let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
            if name.is_empty() || name.len() > CONGESTION_BYTES_MAX || !name.bytes().all(is_plain) {
                return Err(format!("-C is a name such as cubic, not {name:?}"));
            }
        }
        let region_is_whole = self.region_bytes.is_multiple_of(crate::memory::BLOCK_BYTES);
        if self.region_bytes == 0 || self.region_bytes > REGION_BYTES_MAX || !region_is_whole {
            return Err(format!(
                "--pass-size is whole blocks of 2 MiB, {} MiB at most, not {} bytes",
                REGION_BYTES_MAX >> 20,
                self.region_bytes
            ));
        }
        Ok(())
    }

    /// The memory that pages land in.
    pub(super) fn place(&self) -> Place {
        Place { kind: self.kind, pages: self.pages }
    }

    /// The bytes to move, whole landing units unless pages are discarded.
    pub(super) fn whole_bytes(&self) -> Option<u64> {
        let unit = self.place().unit().bytes();
        self.bytes.map(|bytes| bytes.next_multiple_of(unit))
    }

    /// In the order of results and connections.
    pub(super) fn directions(&self) -> &'static [Direction] {
        match (self.bidir, self.reverse) {
            (true, _) => &[Direction::Forward, Direction::Reverse],
            (false, false) => &[Direction::Forward],
            (false, true) => &[Direction::Reverse],
        }
    }

    /// Connections of one direction: its lanes, then the fault lane if there is one.
    pub(super) fn connections_each(&self) -> u16 {
        self.lanes + u16::from(self.fault_rate > 0)
    }

    /// Connections besides the control connection.
    pub(super) fn connections(&self) -> u16 {
        self.connections_each() * self.directions().len() as u16
    }
}

/// The direction of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the client to the server.
    Forward,
    /// From the server to the client.
    Reverse,
}

/// One of the two programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Client,
    Server,
}

impl End {
    /// The role of this end in a direction.
    pub(super) fn role(self, direction: Direction) -> Role {
        match (self, direction) {
            (End::Client, Direction::Forward) | (End::Server, Direction::Reverse) => Role::Source,
            _ => Role::Destination,
        }
    }
}

/// The first line of a connection.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    magic: String,
    version: u32,
    request: Request,
}

/// The purpose of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Request {
    /// Control of a test.
    Test(Test),
    /// One of the connections ([`Test::connections`]) of the test that was accepted with this cookie, counted from 0.
    Join { cookie: String, lane: u16 },
}

/// Writes a connection's first line.
pub(super) fn hello(request: Request) -> String {
    line(&Hello { magic: MAGIC.into(), version: VERSION, request })
}

/// Parses a connection's first line, without its newline.
pub(super) fn read_hello(line: &[u8]) -> std::result::Result<Request, String> {
    #[derive(Deserialize)]
    struct Opening {
        magic: String,
        version: u32,
    }
    let stranger = || "only `umem bench client` is served here".to_owned();
    let opening: Opening = serde_json::from_slice(line).map_err(|_| stranger())?;
    if opening.magic != MAGIC {
        return Err(stranger());
    }
    if opening.version != VERSION {
        return Err(format!(
            "the bench here has version {VERSION}, the other side's {}: use the same umem on both",
            opening.version
        ));
    }
    let hello: Hello = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    Ok(hello.request)
}

/// Messages on the control connection after the hello.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Message {
    /// The test is accepted: lanes are expected with this cookie.
    Accepted { cookie: String, region_bytes: u64 },
    /// The test is refused, with the reason.
    Refused(String),
    /// All lanes are open.
    Started,
    /// Count from here.
    Measure,
    /// Count until here, and cut the stream off.
    Stop,
    /// All bytes have been sent or received; answer when that is true on the other side too.
    Finish,
    /// Request for the server's fault latencies since the last request.
    AskFaults,
    /// The answer.
    Faults(Latency),
    /// The server's counters, for each direction.
    Result(Vec<Measured>),
    /// The sender cannot continue, with the reason.
    Failed(String),
}

/// The measurements of one side, between two moments.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Measured {
    pub(crate) seconds: f64,
    pub(crate) counts: Counts,
    /// Retransmitted TCP segments; None on unix sockets.
    pub(crate) retransmits: Option<u64>,
    /// Processor time of the process, seconds: the same in each direction.
    pub(crate) user_s: f64,
    pub(crate) system_s: f64,
    /// The busiest lane's thread: its processor time as a share of the time.
    pub(crate) busy: f64,
    /// The same share, of time running or runnable without a core; None if the kernel does not report it.
    pub(crate) pressed: Option<f64>,
    /// The receiver: the cost of placing a GiB in fresh memory without other work, processor seconds.
    pub(crate) placing_s_per_gib: Option<f64>,
    /// The receiver, with `--verify`.
    pub(crate) verified_pages: u64,
    /// The receiver, with `--fault-rate`: from an access to its return, µs.
    pub(crate) faults: Option<Latency>,
    pub(crate) congestion: String,
}

/// Counters of moved bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counts {
    /// Bytes of page contents, or any bytes with `--discard`.
    pub(crate) bytes: u64,
    /// Bytes of zero pages, which are sent as a header.
    pub(crate) zero_bytes: u64,
    /// The sender: of `bytes`, those not copied on the path to the network, and those copied.
    pub(crate) zero_copied_bytes: u64,
    pub(crate) copied_bytes: u64,
}

impl Counts {
    pub(super) fn pages(&self) -> u64 {
        self.bytes.saturating_add(self.zero_bytes) / super::pages::PAGE_BYTES
    }
}

impl std::ops::Add for Counts {
    type Output = Counts;

    /// The other side may send any numbers.
    fn add(self, other: Counts) -> Counts {
        Counts {
            bytes: self.bytes.saturating_add(other.bytes),
            zero_bytes: self.zero_bytes.saturating_add(other.zero_bytes),
            zero_copied_bytes: self.zero_copied_bytes.saturating_add(other.zero_copied_bytes),
            copied_bytes: self.copied_bytes.saturating_add(other.copied_bytes),
        }
    }
}

impl std::ops::Sub for Counts {
    type Output = Counts;

    /// The difference since `earlier`. A zero-copy send that turns out to have been copied moves bytes from one counter
    /// to the other, also those counted earlier.
    fn sub(self, earlier: Counts) -> Counts {
        Counts {
            bytes: self.bytes.saturating_sub(earlier.bytes),
            zero_bytes: self.zero_bytes.saturating_sub(earlier.zero_bytes),
            zero_copied_bytes: self.zero_copied_bytes.saturating_sub(earlier.zero_copied_bytes),
            copied_bytes: self.copied_bytes.saturating_sub(earlier.copied_bytes),
        }
    }
}

fn line(value: &impl Serialize) -> String {
    let mut line = serde_json::to_string(value).expect("plain numbers and strings");
    line.push('\n');
    line
}

/// Bytes of a line that arrives in any number of pieces. Never reads beyond the newline: the bytes after it belong to
/// the stream.
#[derive(Default)]
pub(super) struct Line {
    bytes: Vec<u8>,
}

/// The result of a read without waiting.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// A whole line, without its newline.
    Whole(Vec<u8>),
    /// The line is incomplete.
    Partial,
    /// The other side has closed the connection, or it broke.
    Closed,
    /// More than [`LINE_BYTES_MAX`] without a newline.
    TooLong,
}

impl Line {
    pub(super) fn read(&mut self, socket: BorrowedFd<'_>) -> Read {
        loop {
            let mut ahead = [0; LINE_BYTES_MAX];
            let room = LINE_BYTES_MAX - self.bytes.len();
            if room == 0 {
                return Read::TooLong;
            }
            let peek = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
            let seen = match nix::sys::socket::recv(socket.as_raw_fd(), &mut ahead[..room], peek) {
                Ok(0) => return Read::Closed,
                Ok(seen) => &ahead[..seen],
                Err(Errno::EAGAIN) => return Read::Partial,
                Err(Errno::EINTR) => continue,
                Err(_) => return Read::Closed,
            };
            let end = seen.iter().position(|&byte| byte == b'\n');
            let wanted = end.map_or(seen.len(), |end| end + 1);
            // The peeked bytes are there, and have no other reader.
            let flags = MsgFlags::MSG_DONTWAIT;
            match nix::sys::socket::recv(socket.as_raw_fd(), &mut ahead[..wanted], flags) {
                Ok(count) => self.bytes.extend_from_slice(&ahead[..count]),
                Err(Errno::EINTR) => continue,
                Err(_) => return Read::Closed,
            }
            if self.bytes.last() == Some(&b'\n') {
                self.bytes.pop();
                return Read::Whole(std::mem::take(&mut self.bytes));
            }
        }
    }
}

/// The control connection.
pub(super) struct Control {
    socket: OwnedFd,
    line: Line,
    /// `client` or `server`: the peer.
    peer: &'static str,
}

impl Control {
    pub(super) fn new(socket: OwnedFd, peer: &'static str) -> Control {
        // Fails for a socket other than TCP, whose end is always reported.
        let _ = setsockopt(&socket, sockopt::KeepAlive, &true);
        let _ = setsockopt(&socket, sockopt::TcpKeepIdle, &SILENCE_SECONDS);
        let _ = setsockopt(&socket, sockopt::TcpKeepInterval, &SILENCE_SECONDS);
        Control { socket, line: Line::default(), peer }
    }

    /// For a connection that becomes a lane.
    pub(super) fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Writes a line. Lines are few and short, so a full socket means a peer that does not read.
    pub(super) fn send(&self, message: &Message) -> Result<()> {
        self.write(&line(message))
    }

    pub(super) fn write(&self, line: &str) -> Result<()> {
        send_line(self.socket.as_fd(), line).map_err(|errno| self.lost(errno.desc()))
    }

    /// The next message, if it is complete.
    pub(super) fn receive(&mut self) -> Result<Option<Message>> {
        match self.line.read(self.socket.as_fd()) {
            Read::Whole(line) => parse(&line).map(Some).map_err(|what| self.lost(&what)),
            Read::Partial => Ok(None),
            Read::Closed => Err(self.lost("it closed the connection")),
            Read::TooLong => Err(self.lost("it sent a line without a newline")),
        }
    }

    fn lost(&self, what: &str) -> Error {
        Error::Bench(format!("lost the {} of the test: {what}", self.peer))
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn parse<T: DeserializeOwned>(line: &[u8]) -> std::result::Result<T, String> {
    serde_json::from_slice(line).map_err(|error| format!("it sent an invalid message: {error}"))
}

/// Writes a line without waiting.
pub(super) fn send_line(socket: BorrowedFd<'_>, line: &str) -> nix::Result<()> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    match nix::sys::socket::send(socket.as_raw_fd(), line.as_bytes(), flags) {
        Ok(count) if count == line.len() => Ok(()),
        Ok(_) => Err(Errno::EAGAIN),
        Err(errno) => Err(errno),
    }
}

/// The line that rejects a connection.
pub(super) fn refusal(text: &str) -> String {
    line(&Message::Refused(text.chars().take(LINE_BYTES_MAX / 8).collect()))
}

/// Bytes of a pass that this end has the memory for.
pub(super) fn region_bytes(test: &Test, end: End) -> Result<u64> {
    let directions = test.directions();
    let lands = |direction: &Direction| !test.discard && end.role(*direction) == Role::Destination;
    test.place().region_bytes(directions.len() as u64, directions.iter().any(lands))
}

/// The other side has sent a message in the wrong phase.
pub(super) fn unexpected(message: &Message) -> Error {
    Error::Bench(format!("the other side sent {message:?} in the wrong phase"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    pub(in crate::programs::bench) fn test() -> Test {
        Test {
            lanes: 1,
            bytes: None,
            reverse: false,
            bidir: false,
            discard: false,
            kind: MemoryKind::Shared,
            pages: PageKind::Small,
            fault_rate: 0,
            faults: 0,
            zero_percent: 0,
            verify: false,
            congestion: None,
            region_bytes: 64 << 20,
        }
    }

    #[test]
    fn bench_hello_round_trips() {
        let line = hello(Request::Test(test()));
        assert_eq!(read_hello(line.trim_end().as_bytes()), Ok(Request::Test(test())));
    }

    #[test]
    fn foreign_protocol_and_other_version_give_different_errors() {
        for line in ["GET / HTTP/1.1\r", "", "{}", r#"{"magic":"iperf","version":1}"#] {
            assert!(
                read_hello(line.as_bytes()).unwrap_err().contains("umem bench client"),
                "{line}"
            );
        }
        let error = read_hello(br#"{"magic":"umem-bench","version":9,"new":true}"#).unwrap_err();
        let ours = format!("version {VERSION}");
        assert!(error.contains(&ours) && error.contains('9'), "{error}");
    }

    #[test]
    fn test_beyond_a_limit_is_refused() {
        let refused = |change: fn(&mut Test), hint: &str| {
            let mut test = test();
            change(&mut test);
            let error = test.check().unwrap_err();
            assert!(error.contains(hint), "{error}");
        };
        assert_eq!(test().check(), Ok(()));
        refused(|test| test.lanes = 65, "1 to 64");
        refused(|test| test.lanes = 0, "1 to 64");
        refused(|test| test.bytes = Some(0), "-n");
        refused(|test| test.bytes = Some(u64::MAX), "-n");
        refused(|test| test.region_bytes = u64::MAX - 1, "2 MiB");
        refused(|test| test.region_bytes = 4096, "2 MiB");
        refused(|test| test.congestion = Some("x".repeat(16)), "cubic");
        refused(|test| test.congestion = Some("../x".into()), "cubic");
        refused(|test| test.zero_percent = 101, "100");
        refused(|test| (test.discard, test.verify) = (true, true), "--verify");
        refused(|test| (test.bidir, test.reverse) = (true, true), "-R");
        refused(|test| test.faults = 1, "--fault-rate");
        refused(|test| (test.fault_rate, test.faults) = (1, 0), "shorter -t");
        refused(
            |test| (test.fault_rate, test.faults) = (1, fault_limits::FAULTS_MAX + 1),
            "shorter -t",
        );
        refused(|test| (test.fault_rate, test.faults) = (1 << 20, 1), "userfaultfd");
        refused(|test| (test.fault_rate, test.faults, test.discard) = (1, 1, true), "--discard");
    }

    #[test]
    fn line_reader_stops_at_the_newline() {
        let (mut here, there) = UnixStream::pair().unwrap();
        let mut line = Line::default();
        assert_eq!(line.read(there.as_fd()), Read::Partial);
        here.write_all(b"one").unwrap();
        assert_eq!(line.read(there.as_fd()), Read::Partial);
        here.write_all(b" line\nand more").unwrap();
        assert_eq!(line.read(there.as_fd()), Read::Whole(b"one line".to_vec()));
        let mut rest = [0; 16];
        let count = nix::sys::socket::recv(there.as_raw_fd(), &mut rest, MsgFlags::empty());
        assert_eq!(&rest[..count.unwrap()], b"and more");
        here.write_all(&[b'x'; LINE_BYTES_MAX + 1]).unwrap();
        assert_eq!(line.read(there.as_fd()), Read::TooLong);
        drop(here);
        assert_eq!(Line::default().read(there.as_fd()), Read::Closed);
    }
}
