//! A small QMP client.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use serde_json::{Value, json};

use super::{DEADLINE, wait_for};

/// A connection to a QEMU's monitor.
pub(crate) struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects as soon as QEMU listens.
    pub(crate) fn connect(path: &Path) -> Qmp {
        let stream =
            wait_for(format!("QMP at {}", path.display()), || UnixStream::connect(path).ok());
        stream.set_read_timeout(Some(DEADLINE)).expect("a valid timeout");
        let mut qmp = Qmp { stream: BufReader::new(stream) };
        let greeting = qmp.read();
        assert!(greeting["QMP"].is_object(), "{greeting}");
        qmp.execute("qmp_capabilities", json!({}));
        qmp
    }

    /// Runs a command and returns its result.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Value {
        self.send(command, &arguments);
        loop {
            let mut answer = self.read();
            if let Some(value) = answer.get_mut("return") {
                return value.take();
            }
            assert!(answer.get("error").is_none(), "{command}: {answer}");
        }
    }

    /// Runs a command that is refused, and returns the reason.
    pub(crate) fn refuses(&mut self, command: &str, arguments: Value) -> String {
        self.send(command, &arguments);
        loop {
            let answer = self.read();
            assert!(answer.get("return").is_none(), "{command} must fail: {answer}");
            if let Some(error) = answer.get("error") {
                return error["desc"].as_str().expect("a text").to_owned();
            }
        }
    }

    /// `running`, `paused`, `postmigrate` …
    pub(crate) fn status(&mut self) -> String {
        let status = self.execute("query-status", json!({}));
        status["status"].as_str().expect("a status").to_owned()
    }

    /// Ends QEMU.
    pub(crate) fn quit(mut self) {
        self.send("quit", &json!({}));
        // Until QEMU has ended, so that the command is not lost with the connection.
        let mut rest = String::new();
        while self.stream.read_line(&mut rest).is_ok_and(|count| count > 0) {}
    }

    /// QEMU's pid.
    fn pid(&self) -> i32 {
        let peer = getsockopt(self.stream.get_ref(), PeerCredentials);
        peer.expect("the other end's credentials").pid()
    }

    fn send(&mut self, command: &str, arguments: &Value) {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.stream.get_mut().write_all(line.as_bytes()).expect("QMP takes a command");
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        let count = self.stream.read_line(&mut line).unwrap_or_else(|error| {
            panic!("QMP does not answer ({error}); QEMU's threads:\n{}", threads(self.pid()))
        });
        assert!(count > 0, "QEMU has closed QMP");
        serde_json::from_str(&line).expect("QMP speaks JSON")
    }
}

/// The state of each thread of a process, to diagnose a hang.
fn threads(pid: i32) -> String {
    let tasks = format!("/proc/{pid}/task");
    let Ok(tasks) = std::fs::read_dir(&tasks) else { return format!("{tasks} has gone") };
    let line = |task: std::fs::DirEntry| {
        let read = |name| {
            let text = std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
            text.trim_end().replace('\n', " < ")
        };
        let parts = ["comm", "stat", "wchan", "syscall", "stack"].map(|name| {
            let text = read(name);
            format!("  {name}: {text}\n")
        });
        parts.concat() + "\n"
    };
    tasks.flatten().map(line).collect()
}
