//! `--control SOCKET`: commands to a running migration, in the manner of QMP.
//!
//! One JSON object a line, in both directions. umem begins with a greeting. Then each command has one answer, in the
//! order of the commands, with the command's `id` if it has one:
//!
//! ```text
//! ← {"umem": {"version": "0.1.0", "role": "source", "pid": 4711}}
//! → {"execute": "status", "id": 1}
//! ← {"return": {"role": "source", "phase": "serving pages", …}, "id": 1}
//! → {"execute": "set", "arguments": {"max-postcopy-bandwidth": 104857600}}
//! ← {"return": {}}
//! → {"execute": "cancel"}
//! ← {"error": {"class": "GenericError", "desc": "too late: the guest runs at …"}}
//! ```
//!
//! The socket belongs to the user who runs umem, with mode 0600, and is removed when umem ends. umem replaces the
//! socket of a killed umem, but not a socket in use.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use serde_json::{Value, json};

use super::visitors::{self, Entrance, Visitor};
use super::watch::{LinkOrder, Watch};
use crate::error::{Error, Result};
use crate::runtime::private_socket::{bind_private_anew, is_socket};
use crate::transport::uri::Uri;

/// Connections at a time. A further connection replaces the one that has sent nothing for the longest time.
const CLIENTS_MAX: usize = 16;

/// The most bytes of a command.
const LINE_BYTES_MAX: usize = 64 << 10;

/// How long a client may take to read an answer before its connection is closed.
const PATIENCE: Duration = Duration::from_secs(10);

/// The commands and their help.
const COMMANDS: [(&str, &str); 7] = [
    ("status", "show the state of the migration"),
    (
        "set",
        "change a limit: {\"max-postcopy-bandwidth\": bytes a second, 0 for none} of the background after the \
         switchover, {\"max-bandwidth\": …} of the passes while the guest runs",
    ),
    (
        "postcopy",
        "end the passes while the guest runs, and switch over; the rest follows the guest",
    ),
    (
        "cancel",
        "end the migration before the switchover, as Ctrl-C does; the guest continues at the source",
    ),
    (
        "pause",
        "give up the connections, after the switchover; the guest runs on with the pages that it has",
    ),
    (
        "resume",
        "open the connections again: {\"uri\": another address}, or no arguments for the same address",
    ),
    ("help", "list the commands"),
];

/// Answers commands until it is dropped; then removes the socket.
pub(crate) struct Server {
    path: PathBuf,
    visitors: Option<visitors::Server>,
}

impl Server {
    pub(crate) fn start(path: &Path, watch: Arc<Watch>) -> Result<Server> {
        let listener = bind(path)?;
        // From here on umem must remove the socket.
        let mut server = Server { path: path.into(), visitors: None };
        let socket = Socket { listener, watch };
        server.visitors = Some(visitors::Server::start("umem-control", socket)?);
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The thread ends before the socket is removed.
        drop(self.visitors.take());
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Makes the socket; replaces a socket without a listener.
fn bind(path: &Path) -> Result<UnixListener> {
    let failed = |source: io::Error, hint| Error::Listen {
        uri: format!("--control {}", path.display()),
        source,
        hint,
    };
    let listener = bind_private_anew(path).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => failed(
            error,
            "; another process uses the socket, or the file is not a socket: choose another path",
        ),
        io::ErrorKind::NotFound => failed(error, "; its directory does not exist"),
        _ => failed(error, ""),
    })?;
    listener.set_nonblocking(true).map_err(|error| failed(error, ""))?;
    Ok(listener)
}

struct Socket {
    listener: UnixListener,
    watch: Arc<Watch>,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Entrance for Socket {
    type Visitor = Client;
    const VISITORS_MAX: usize = CLIENTS_MAX;

    /// A new client, with its greeting.
    fn accept(&self) -> io::Result<Option<Client>> {
        let (stream, _) = self.listener.accept()?;
        Ok(Client::greeted(stream, self.watch.clone()).ok())
    }
}

struct Client {
    stream: UnixStream,
    watch: Arc<Watch>,
    /// Received bytes without an answer: part of a line, or several lines.
    input: Vec<u8>,
    /// Bytes that have not been sent.
    output: Vec<u8>,
    /// The deadline for sending them.
    deadline: Option<Instant>,
    /// The time of its last command.
    heard: Instant,
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Visitor for Client {
    /// Commands are read only after all answers have been sent.
    fn flags(&self) -> PollFlags {
        if self.output.is_empty() { PollFlags::POLLIN } else { PollFlags::POLLOUT }
    }

    fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The client that has sent nothing for the longest time is dropped first.
    fn rank(&self) -> Instant {
        self.heard
    }

    fn go_on(&mut self) -> bool {
        self.serve().is_ok()
    }
}

impl Client {
    /// Sends the greeting; an error if the client has closed its connection.
    fn greeted(stream: UnixStream, watch: Arc<Watch>) -> io::Result<Client> {
        stream.set_nonblocking(true)?;
        let (input, output, heard) = (Vec::new(), Vec::new(), Instant::now());
        let greeting = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "role": watch.role().name(),
            "pid": std::process::id(),
        });
        let mut client = Client { stream, watch, input, output, deadline: None, heard };
        client.say(&json!({ "umem": greeting }));
        client.send()?;
        Ok(client)
    }

    fn say(&mut self, object: &Value) {
        self.output.extend_from_slice(format!("{object}\n").as_bytes());
    }

    /// Receives commands, or sends answers; an error ends the connection.
    fn serve(&mut self) -> io::Result<()> {
        if self.output.is_empty() {
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.input.extend_from_slice(&buffer[..count]),
                Err(error) => may_wait(error)?,
            }
        }
        self.send()?;
        while self.output.is_empty() && self.answer_next()? {
            self.send()?;
        }
        Ok(())
    }

    /// Answers the next whole line, if there is one.
    fn answer_next(&mut self) -> io::Result<bool> {
        let Some(end) = self.input.iter().position(|&byte| byte == b'\n') else {
            if self.input.len() > LINE_BYTES_MAX {
                self.say(&failure(&format!("a command has at most {LINE_BYTES_MAX} bytes")));
                self.send()?;
                return Err(io::ErrorKind::InvalidData.into());
            }
            return Ok(false);
        };
        let line: Vec<u8> = self.input.drain(..=end).collect();
        if !line.trim_ascii().is_empty() {
            self.heard = Instant::now();
            self.say(&answer(&line, &self.watch));
        }
        Ok(true)
    }

    /// Sends as many bytes as possible without waiting.
    fn send(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) => {
                    self.deadline.get_or_insert(Instant::now() + PATIENCE);
                    return may_wait(error);
                }
            }
        }
        self.deadline = None;
        Ok(())
    }
}

/// Has a client send this and read the answers; checks that at most one command is buffered.
#[cfg(feature = "fuzz")]
pub(crate) fn fuzz(input: &[u8], watch: Arc<Watch>) {
    let (mut ours, theirs) = UnixStream::pair().expect("a socket pair");
    ours.set_nonblocking(true).expect("a socket");
    let mut client = Client::greeted(theirs, watch).expect("the socket takes the greeting");
    let (mut rest, mut answers) = (input, [0; 4096]);
    loop {
        let written = ours.write(&rest[..rest.len().min(1000)]).unwrap_or(0);
        rest = &rest[written..];
        let goes_on = client.go_on();
        let read = ours.read(&mut answers).unwrap_or(0);
        assert!(client.input.len() <= LINE_BYTES_MAX + 4096);
        if !goes_on || (written == 0 && read == 0) {
            return;
        }
    }
}

/// Accepts errors that only mean that the call would have waited.
fn may_wait(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
        _ => Err(error),
    }
}

/// The answer to a line.
fn answer(line: &[u8], watch: &Watch) -> Value {
    let command: Value = match serde_json::from_slice(line) {
        Ok(command) => command,
        Err(error) => {
            return failure(&format!("a command must be one JSON object on a line: {error}"));
        }
    };
    let result = match command["execute"].as_str() {
        Some(name) => execute(name, &command["arguments"], watch),
        None => {
            Err("the command has no name: write {\"execute\": NAME}; \"help\" lists the names"
                .into())
        }
    };
    let mut answer = match result {
        Ok(value) => json!({ "return": value }),
        Err(text) => failure(&text),
    };
    if let Some(id) = command.get("id") {
        answer["id"] = id.clone();
    }
    answer
}

fn failure(text: &str) -> Value {
    json!({ "error": { "class": "GenericError", "desc": text } })
}

/// Carries out a command; the error is a sentence with the reason.
fn execute(name: &str, arguments: &Value, watch: &Watch) -> std::result::Result<Value, String> {
    match name {
        "status" => Ok(serde_json::to_value(watch.status()).expect("plain numbers and strings")),
        "set" => set(arguments, watch).map(|()| json!({})),
        "postcopy" => watch.switch_to_postcopy().map(|()| json!({})).map_err(str::to_owned),
        "cancel" => watch.cancel().map(|()| json!({})).map_err(str::to_owned),
        "pause" => watch.order(LinkOrder::Pause).map(|()| json!({})).map_err(str::to_owned),
        "resume" => resume(arguments, watch).map(|()| json!({})),
        "help" => Ok(COMMANDS.iter().map(|&(name, help)| (name.to_owned(), json!(help))).collect()),
        other => {
            let names = COMMANDS.map(|(name, _)| name).join(", ");
            Err(format!("there is no command {other:?}: the commands are {names}"))
        }
    }
}

fn resume(arguments: &Value, watch: &Watch) -> std::result::Result<(), String> {
    let uri = match arguments {
        Value::Null => None,
        given => {
            let text = given["uri"]
                .as_str()
                .ok_or("write the \"arguments\" as {\"uri\": ADDRESS}, or leave them out")?;
            let uri: Uri = text.parse()?;
            if uri.is_one_connection() {
                return Err(format!("{uri} is not an address: write tcp:HOST:PORT or unix:PATH"));
            }
            Some(uri)
        }
    };
    watch.order(LinkOrder::Resume(uri)).map_err(str::to_owned)
}

fn set(arguments: &Value, watch: &Watch) -> std::result::Result<(), String> {
    const BACKGROUND: &str = "max-postcopy-bandwidth";
    const PASSES: &str = "max-bandwidth";
    let given = arguments.as_object().filter(|given| given.len() == 1);
    let (name, value) = given.and_then(|given| given.iter().next()).unzip();
    let (name, bandwidth) = match name.map(String::as_str) {
        Some(PASSES) => (
            PASSES,
            watch.pass_bandwidth().ok_or_else(|| {
                format!(
                    "{PASSES} limits the passes of a source while its guest runs (umem migrate, or --precopy -p); this \
                     migration has no passes, or has not connected yet"
                )
            })?,
        ),
        _ => (
            BACKGROUND,
            watch.bandwidth().ok_or_else(|| {
                format!(
                    "{BACKGROUND} limits a source's pages after the switchover (umem migrate -p); this \
                     migration sends none"
                )
            })?,
        ),
    };
    let is_named = given.is_some_and(|given| given.contains_key(name));
    let Some(limit) = value.and_then(Value::as_u64).filter(|_| is_named) else {
        return Err(format!(
            "write the \"arguments\" as {{\"{name}\": bytes a second}}, a whole number, 0 for no limit"
        ));
    };
    tracing::info!(limit, "{name} is set");
    bandwidth.set((limit > 0).then_some(limit));
    Ok(())
}

/// Sends one command for `umem control`, and returns its answer.
///
/// # Errors
/// No umem listens there; umem refused the command.
pub(crate) fn ask(path: &Path, command: &Value) -> Result<Value> {
    let host = |what: String| Error::Control(format!("{}: {what}", path.display()));
    let mut stream =
        UnixStream::connect(path).map_err(|error| host(cannot_connect(path, &error)))?;
    let lines = stream.try_clone().map(|stream| {
        let patient = Patient { stream, until: Instant::now() + ANSWER_PATIENCE };
        io::BufReader::new(patient.take(ANSWERS_BYTES_MAX))
    });
    let mut lines = io::BufRead::lines(lines.map_err(|error| host(error.to_string()))?);
    let mut next = || -> Result<Value> {
        let line = lines.next().unwrap_or(Err(io::ErrorKind::UnexpectedEof.into()));
        let line = line.map_err(|error| host(format!("umem sent no answer: {error}")))?;
        let foreign = || host(format!("the program that listens on it is not umem; {GIVE}"));
        serde_json::from_str(&line).map_err(|_| foreign())
    };
    let greeting = next()?;
    if greeting.get("umem").is_none() {
        let listener = match greeting.get("QMP") {
            Some(_) => "it is the QMP socket of a QEMU",
            None => "the program that listens on it is not umem",
        };
        return Err(host(format!("{listener}; {GIVE}")));
    }
    stream.write_all(format!("{command}\n").as_bytes()).map_err(|error| host(error.to_string()))?;
    let mut answer = next()?;
    match answer["error"]["desc"].as_str() {
        Some(text) => Err(Error::Control(text.to_owned())),
        None => Ok(answer["return"].take()),
    }
}

/// The way out of a socket that is no control socket.
const GIVE: &str = "give the socket of a running umem's --control option";

/// Why there is no connection to the socket; "it" is the socket.
fn cannot_connect(path: &Path, error: &io::Error) -> String {
    let why = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            return "this user may not use it; run `umem control` as the user that runs that umem, or as root".into();
        }
        io::ErrorKind::NotFound => "it does not exist".into(),
        io::ErrorKind::ConnectionRefused if !is_socket(path) => "it is a file and no socket".into(),
        io::ErrorKind::ConnectionRefused => "its umem has ended".into(),
        _ => error.to_string(),
    };
    format!("{why}; {GIVE}")
}

/// A reader with one deadline for all of its reads.
struct Patient {
    stream: UnixStream,
    until: Instant,
}

impl Read for Patient {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(into)
    }
}

/// The greeting and an answer.
const ANSWERS_BYTES_MAX: u64 = 1 << 20;

/// The time for both: umem answers a command at once.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::bandwidth::Bandwidth;
    use crate::runtime::role::Role;

    #[test]
    fn pause_and_resume_are_accepted_after_the_switchover() {
        let watch = source();
        let answer = |line: &str| answer(line.as_bytes(), &watch);
        let refused = |line: &str| answer(line)["error"]["desc"].as_str().unwrap().to_owned();
        let (pause, resume) = (r#"{"execute": "pause"}"#, r#"{"execute": "resume"}"#);
        assert!(refused(pause).contains("no connections"));
        let (tell, told) = std::sync::mpsc::channel();
        watch.link(move |order| tell.send(order).unwrap());
        assert!(refused(pause).contains("not been switched over"));
        watch.commit("").unwrap();
        let elsewhere = r#"{"execute": "resume", "arguments": {"uri": "tcp:there:1"}}"#;
        for line in [pause, resume, elsewhere] {
            assert_eq!(answer(line), json!({ "return": {} }));
        }
        let uri = "tcp:there:1".parse().unwrap();
        let expected = [LinkOrder::Pause, LinkOrder::Resume(None), LinkOrder::Resume(Some(uri))];
        assert_eq!(told.try_iter().collect::<Vec<_>>(), expected);
        for (uri, hint) in [("fd:3", "not an address"), ("there", "tcp:")] {
            let line = format!(r#"{{"execute": "resume", "arguments": {{"uri": "{uri}"}}}}"#);
            assert!(refused(&line).contains(hint), "{}", refused(&line));
        }
        assert!(refused(r#"{"execute": "resume", "arguments": {"url": 1}}"#).contains("uri"));
    }

    fn source() -> Arc<Watch> {
        Watch::new(Role::Source, false, Some(Arc::new(Bandwidth::new(None))))
    }

    #[test]
    fn postcopy_command_ends_the_passes_of_a_hybrid_migration() {
        let refused = |watch: &Watch| {
            let answer = answer(br#"{"execute": "postcopy"}"#, watch);
            answer["error"]["desc"].as_str().map(str::to_owned)
        };
        let limit = || Arc::new(Bandwidth::new(None));
        let watch = Watch::new(Role::Destination, false, None);
        assert!(refused(&watch).unwrap().contains("the source switches to postcopy"));
        let watch = source();
        assert!(refused(&watch).unwrap().contains("no passes to end"));
        watch.has_passes(false, limit(), || unreachable!("the migration has no postcopy"));
        assert!(refused(&watch).unwrap().contains("start it again with --precopy -p"));
        let watch = source();
        let (tell, told) = std::sync::mpsc::channel();
        watch.has_passes(true, limit(), move || tell.send(()).unwrap());
        assert_eq!([refused(&watch), refused(&watch)], [None, None]);
        assert_eq!(told.try_iter().count(), 1, "the order is passed on once");
        watch.commit("").unwrap();
        assert!(refused(&watch).unwrap().contains("has been switched over already"));
    }

    #[test]
    fn limit_of_passes_is_set_only_with_passes() {
        let watch = source();
        let line = br#"{"execute": "set", "arguments": {"max-bandwidth": 1000}}"#;
        let refused = answer(line, &watch)["error"]["desc"].as_str().unwrap().to_owned();
        assert!(refused.contains("while its guest runs"), "{refused}");
        watch.has_passes(false, Arc::new(Bandwidth::new(None)), || {});
        assert_eq!(answer(line, &watch), json!({ "return": {} }));
        assert_eq!(watch.status().max_bandwidth, Some(1000));
        assert_eq!(watch.status().max_postcopy_bandwidth, None);
    }

    #[test]
    fn each_command_has_an_answer_with_its_id() {
        let watch = source();
        let answer = |line: &str| answer(line.as_bytes(), &watch);
        let status = answer(r#"{"execute": "status", "id": [1, "a"]}"#);
        assert_eq!(status["id"], json!([1, "a"]));
        assert_eq!(status["return"]["role"], "source");
        assert_eq!(status["return"]["phase"], "connecting");
        assert_eq!(status["return"]["may-cancel"], true);
        let help = answer(r#"{"execute": "help"}"#);
        assert_eq!(help["return"].as_object().unwrap().len(), COMMANDS.len());
        assert!(help.get("id").is_none());
        for (line, hint) in [
            ("[", "one JSON object"),
            ("{}", "execute"),
            (r#"{"execute": 5}"#, "execute"),
            (r#"{"execute": "stop"}"#, "status, set, postcopy, cancel, pause"),
            (r#"{"execute": "set"}"#, "bytes a second"),
            (r#"{"execute": "set", "arguments": {"max-postcopy-bandwidth": -1}}"#, "whole number"),
            (
                r#"{"execute": "set", "arguments": {"max-postcopy-bandwidth": 1, "x": 1}}"#,
                "0 for no",
            ),
        ] {
            let text = answer(line)["error"]["desc"].as_str().unwrap().to_owned();
            assert!(text.contains(hint), "{line}: {text}");
        }
    }

    #[test]
    fn limit_of_the_background_is_set_only_with_a_background() {
        let watch = source();
        let line = r#"{"execute": "set", "arguments": {"max-postcopy-bandwidth": 1000}}"#;
        assert_eq!(answer(line.as_bytes(), &watch), json!({ "return": {} }));
        assert_eq!(watch.bandwidth().unwrap().limit(), Some(1000));
        assert_eq!(watch.status().max_postcopy_bandwidth, Some(1000));
        let line = r#"{"execute": "set", "arguments": {"max-postcopy-bandwidth": 0}}"#;
        answer(line.as_bytes(), &watch);
        assert_eq!(watch.bandwidth().unwrap().limit(), None);
        let destination = Watch::new(Role::Destination, false, None);
        let refused = answer(line.as_bytes(), &destination);
        assert!(refused["error"]["desc"].as_str().unwrap().contains("source"), "{refused}");
    }
}
