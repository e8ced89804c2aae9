//! A QMP client: one JSON object a line, as QEMU's `docs/interop/qmp-spec` describes it.

use std::io::{self, BufRead, BufReader, IoSlice, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{ControlMessage, MsgFlags, getsockopt, sendmsg};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{Context, Error, Result};
use crate::runtime::process::began;

/// A QMP socket greets as soon as it accepts. A socket that another client has in use never greets.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// Characters of a greeting that is none, as an error shows them.
const GREETING_SHOWN_CHARS: usize = 40;

/// Bytes of an answer at most. Answers to umem's commands have a few thousand.
const LINE_BYTES_MAX: usize = 1 << 20;

/// The process that listens on a QMP socket, or has made the socket for a monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    pid: u32,
    /// The time of its start, in the kernel's ticks: a later process with the same pid has another one.
    began: u64,
}

impl Process {
    /// True if it has certainly ended.
    pub(crate) fn has_ended(self) -> bool {
        began(self.pid) != Some(self.began)
    }
}

/// A connected client in command mode.
pub(crate) struct Qmp {
    reader: BufReader<UnixStream>,
    /// The last line that was read.
    line: Vec<u8>,
    /// The time limit of an answer, with all events before it. Without a limit the waiting thread must be
    /// interruptible.
    patience: Option<Duration>,
    /// The time of the last STOP event, unless the guest has been resumed since.
    stopped_at: Option<SystemTime>,
    /// A RESUME event has arrived: the guest has run, started by umem or by another client.
    has_run: bool,
}

impl Qmp {
    /// Connects to the socket that `-qmp unix:PATH,server=on` made.
    pub(crate) fn connect(path: &Path) -> Result<Qmp> {
        let stream =
            UnixStream::connect(path).map_err(|error| Qmp::cannot_connect(path, &error))?;
        Qmp::open(stream, &path.display().to_string())
    }

    /// The meaning of an error of a connect to this socket.
    pub(crate) fn cannot_connect(path: &Path, error: &io::Error) -> Error {
        let shown = path.display();
        let start = format!("start QEMU with `-qmp unix:{shown},server=on,wait=off`");
        let is_socket = std::fs::metadata(path).map(|found| found.file_type().is_socket());
        let why = match (error.kind(), is_socket) {
            (io::ErrorKind::PermissionDenied, _) => format!(
                "this user may not use it; run umem as the user that runs QEMU{}",
                if geteuid().is_root() { "" } else { ", or as root" }
            ),
            (_, Ok(false)) => format!(
                "it is a file and no socket; give the path of QEMU's -qmp option, or {start} with another path"
            ),
            (io::ErrorKind::ConnectionRefused, _) => {
                format!("no process listens there any more, as after the end of QEMU; {start}")
            }
            (io::ErrorKind::NotFound, _) => format!("it does not exist; {start}"),
            _ => format!("{error}; {start}"),
        };
        Error::Host(format!("cannot connect to the QMP socket {shown}: {why}"))
    }

    fn on(stream: UnixStream) -> Qmp {
        Qmp {
            reader: BufReader::new(stream),
            line: Vec::new(),
            patience: None,
            stopped_at: None,
            has_run: false,
        }
    }

    /// Waits for the greeting on a connected socket and enters command mode.
    pub(crate) fn open(stream: UnixStream, name: &str) -> Result<Qmp> {
        let mut qmp = Qmp::on(stream);
        let greeting = qmp.read(Some(Instant::now() + GREETING_TIMEOUT));
        match greeting {
            Ok(object) if object.get("QMP").is_some() => {}
            Ok(object) if object.get("umem").is_some() => {
                return Err(Error::Host(format!(
                    "{name} is the --control socket of a umem, not QEMU's QMP socket; give the socket of QEMU's -qmp \
                     option"
                )));
            }
            _ => return Err(qmp.no_greeting(name)),
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Why no QMP greeting came from the socket `name`, from the bytes of the greeting's line.
    fn no_greeting(&self, name: &str) -> Error {
        let text = String::from_utf8_lossy(&self.line);
        let begins: String = text.trim().chars().take(GREETING_SHOWN_CHARS).collect();
        Error::Host(if begins.starts_with("QEMU ") {
            format!(
                "{name} is a human monitor of QEMU (-monitor), not a QMP socket; give umem a socket of a -qmp option"
            )
        } else if begins.is_empty() {
            format!(
                "{name} does not greet as a QMP socket does; if another program is connected to it, give umem a socket \
                 of its own with another -qmp option"
            )
        } else {
            format!(
                "{name} does not greet as a QMP socket does, but with {begins:?}; give the socket of QEMU's -qmp option"
            )
        })
    }

    /// A socket on which another process was in command mode, and was killed. The answer to that process's last command
    /// may come, in whole or in part, before this client's first answer.
    pub(crate) fn go_on(stream: UnixStream) -> Result<Qmp> {
        let mut qmp = Qmp::on(stream);
        // Differs from the ids of the earlier process, which used none.
        let id = format!("umem-{}", std::process::id());
        let text = format!("{}\n", json!({ "execute": "query-status", "id": id }));
        qmp.reader.get_mut().write_all(text.as_bytes()).map_err(gone)?;
        loop {
            qmp.read_line(None)?;
            // The rest of a line is not JSON.
            match serde_json::from_slice::<Value>(&qmp.line) {
                Ok(answer) if answer["id"] == json!(id) => return Ok(qmp),
                Ok(_) | Err(_) => {}
            }
        }
    }

    /// From now on an answer that takes longer is an error.
    pub(crate) fn answer_within(&mut self, patience: Duration) {
        self.patience = Some(patience);
    }

    /// The process at the other end, if it is visible from here.
    pub(crate) fn process(&self) -> Option<Process> {
        let peer = getsockopt(self.reader.get_ref(), PeerCredentials).ok()?;
        let pid = u32::try_from(peer.pid()).ok()?;
        Some(Process { pid, began: began(pid)? })
    }

    /// The path of its socket, if it has one.
    pub(crate) fn path(&self) -> Option<PathBuf> {
        let peer = self.reader.get_ref().peer_addr().ok()?;
        peer.as_pathname().map(Path::to_owned)
    }

    /// Another descriptor of the socket.
    pub(crate) fn connection(&self) -> Result<OwnedFd> {
        Ok(self.reader.get_ref().try_clone().context(|| "the QMP socket")?.into())
    }

    /// The process that made the listening socket behind this connection: usually the monitor. None if that process has
    /// no number in this pid namespace.
    pub(crate) fn peer(&self) -> Option<u32> {
        let peer = getsockopt(self.reader.get_ref(), PeerCredentials).ok()?;
        u32::try_from(peer.pid()).ok().filter(|&pid| pid != 0)
    }

    /// Runs a command and returns its `return` value.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.try_execute(command, arguments)?
            .map_err(|description| Error::Host(format!("{command}: {description}")))
    }

    /// Like [`Qmp::execute`], with the monitor's own refusal as the inner error.
    pub(crate) fn try_execute(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<std::result::Result<Value, String>> {
        let text = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.reader.get_mut().write_all(text.as_bytes()).map_err(gone)?;
        self.answer()
    }

    /// `getfd`: gives the monitor a descriptor, which later commands name as `fd:NAME`.
    pub(crate) fn give_descriptor(&mut self, name: &str, descriptor: BorrowedFd<'_>) -> Result<()> {
        let text = format!("{}\n", json!({ "execute": "getfd", "arguments": { "fdname": name } }));
        let raw = [descriptor.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&raw)];
        let socket = self.reader.get_ref().as_raw_fd();
        let data = [IoSlice::new(text.as_bytes())];
        let sent = sendmsg::<()>(socket, &data, &rights, MsgFlags::MSG_NOSIGNAL, None)
            .map_err(|errno| gone(errno.into()))?;
        self.reader.get_mut().write_all(&text.as_bytes()[sent..]).map_err(gone)?;
        self.answer()?.map(drop).map_err(|error| Error::Host(format!("getfd: {error}")))
    }

    /// A property of an object in QEMU's object tree; None if the object has no such property.
    pub(crate) fn property(&mut self, path: &str, property: &str) -> Result<Option<Value>> {
        Ok(self.try_execute("qom-get", json!({ "path": path, "property": property }))?.ok())
    }

    /// Name and type of each child of an object; empty if the object does not exist.
    pub(crate) fn children(&mut self, path: &str) -> Result<Vec<(String, String)>> {
        let list = self.try_execute("qom-list", json!({ "path": path }))?.unwrap_or_default();
        let text = |item: &Value, key: &str| item[key].as_str().unwrap_or_default().to_owned();
        let items = list.as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(items
            .iter()
            .filter_map(|item| {
                let kind = text(item, "type");
                let kind = kind.strip_prefix("child<")?.strip_suffix('>')?.to_owned();
                Some((text(item, "name"), kind))
            })
            .collect())
    }

    /// The time of the guest's last stop, from the last STOP event that came before an answer since the previous call;
    /// None if the guest has been resumed since.
    pub(crate) fn stopped_at(&mut self) -> Option<SystemTime> {
        self.stopped_at.take()
    }

    /// Whether a RESUME event came before the last answer, since the previous call.
    pub(crate) fn has_run(&mut self) -> bool {
        std::mem::take(&mut self.has_run)
    }

    /// Events leave only the values of [`Qmp::stopped_at`] and [`Qmp::has_run`]: memory does not grow with their
    /// number.
    fn answer(&mut self) -> Result<std::result::Result<Value, String>> {
        let until = self.patience.map(|patience| Instant::now() + patience);
        loop {
            let mut object = self.read(until)?;
            if let Some(value) = object.get_mut("return") {
                return Ok(Ok(value.take()));
            }
            if let Some(error) = object.get("error") {
                return Ok(Err(error["desc"].as_str().unwrap_or("no reason given").to_owned()));
            }
            // Anything else is an event.
            if object["event"] == "STOP" {
                self.stopped_at = happened(&object["timestamp"]);
            }
            if object["event"] == "RESUME" {
                (self.has_run, self.stopped_at) = (true, None);
            }
        }
    }

    fn read(&mut self, until: Option<Instant>) -> Result<Value> {
        self.read_line(until)?;
        serde_json::from_slice(&self.line)
            .map_err(|error| Error::Host(format!("its QMP answer is not JSON: {error}")))
    }

    /// Reads a line, or the bytes before the end of the stream. The deadline covers the whole line: pieces do not
    /// extend it.
    fn read_line(&mut self, until: Option<Instant>) -> Result<()> {
        self.line.clear();
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(Error::Host("it has not answered in time at its QMP socket".into()));
            }
            self.reader.get_ref().set_read_timeout(left).map_err(gone)?;
            let some = match self.reader.fill_buf() {
                Ok(some) => some,
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => continue,
                    _ => return Err(gone(error)),
                },
            };
            if some.is_empty() {
                return match self.line.is_empty() {
                    true => Err(gone(io::ErrorKind::UnexpectedEof.into())),
                    false => Ok(()),
                };
            }
            let end = some.iter().position(|&byte| byte == b'\n');
            let count = end.map_or(some.len(), |end| end + 1);
            if self.line.len() + count > LINE_BYTES_MAX {
                let text = "its QMP answer has no end: check that the socket belongs to a QEMU";
                return Err(Error::Host(text.into()));
            }
            self.line.extend_from_slice(&some[..count]);
            self.reader.consume(count);
            if end.is_some() {
                return Ok(());
            }
        }
    }
}

/// The time that an event carries; None if the numbers are no valid time.
fn happened(timestamp: &Value) -> Option<SystemTime> {
    let part = |name: &str| timestamp[name].as_u64();
    let since_epoch = Duration::from_secs(part("seconds")?)
        .checked_add(Duration::from_micros(part("microseconds")?))?;
    SystemTime::UNIX_EPOCH.checked_add(since_epoch)
}

fn gone(error: io::Error) -> Error {
    Error::Host(match error.kind() {
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset => {
            "it has exited or closed its QMP socket (its own messages say why)".into()
        }
        _ => format!("its QMP socket: {error}"),
    })
}

/// A connected pair of stream sockets: one end for the monitor, one for umem.
pub(crate) fn socket_pair() -> Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair().context(|| "socketpair")?;
    Ok((ours, theirs.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_may_carry_any_time() {
        let most = u64::MAX;
        for (timestamp, is_a_time) in [
            (json!({ "seconds": 1, "microseconds": 1 }), true),
            (json!({ "seconds": most, "microseconds": most }), false),
            (json!({ "seconds": most, "microseconds": 0 }), false),
            (json!({ "seconds": 1 }), false),
            (json!({ "seconds": -1, "microseconds": 0 }), false),
            (json!("yesterday"), false),
            (json!(null), false),
        ] {
            assert_eq!(happened(&timestamp).is_some(), is_a_time, "{timestamp}");
        }
    }

    /// Greets, answers the first command, and then writes `what` until the client closes the connection.
    fn floods(mut monitor: UnixStream, what: &'static [u8]) -> std::thread::JoinHandle<()> {
        std::thread::spawn(move || {
            monitor.write_all(b"{\"QMP\":{}}\n{\"return\":{}}\n").unwrap();
            while monitor.write_all(what).is_ok() {}
        })
    }

    #[test]
    fn endless_events_do_not_extend_the_limit_of_an_answer() {
        let (monitor, ours) = UnixStream::pair().unwrap();
        let writer = floods(monitor, b"{\"event\":\"RESUME\"}\n");
        let mut qmp = Qmp::open(ours, "it").unwrap();
        qmp.answer_within(Duration::from_millis(50));
        let error = qmp.execute("query-status", json!({})).unwrap_err();
        assert!(error.to_string().contains("has not answered in time"), "{error}");
        assert!(qmp.has_run() && qmp.line.capacity() < 4096);
        drop(qmp);
        writer.join().unwrap();
    }

    #[test]
    fn greeting_in_pieces_has_one_deadline() {
        let (mut monitor, ours) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || while monitor.write_all(b" ").is_ok() {});
        let mut qmp = Qmp::on(ours);
        let until = Instant::now() + Duration::from_millis(50);
        // The read ends by its deadline, or not at all.
        assert!(qmp.read(Some(until)).is_err());
        drop(qmp);
        writer.join().unwrap();
    }

    #[test]
    fn endless_answer_is_an_error_at_the_length_limit() {
        let (monitor, ours) = UnixStream::pair().unwrap();
        let writer = floods(monitor, &[b'x'; 4096]);
        let mut qmp = Qmp::open(ours, "it").unwrap();
        let error = qmp.execute("query-status", json!({})).unwrap_err();
        assert!(error.to_string().contains("has no end"), "{error}");
        drop(qmp);
        writer.join().unwrap();
    }
}
