//! A small QMP client.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

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

    /// Runs a command and returns what it returns.
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

    /// `running`, `paused`, `postmigrate` …
    pub(crate) fn status(&mut self) -> String {
        let status = self.execute("query-status", json!({}));
        status["status"].as_str().expect("a status").to_owned()
    }

    /// Ends QEMU.
    pub(crate) fn quit(mut self) {
        self.send("quit", &json!({}));
        // Until it has gone, so that the command is not lost with the connection.
        let mut rest = String::new();
        while self.stream.read_line(&mut rest).is_ok_and(|count| count > 0) {}
    }

    fn send(&mut self, command: &str, arguments: &Value) {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.stream.get_mut().write_all(line.as_bytes()).expect("QMP takes a command");
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        let count = self.stream.read_line(&mut line).expect("QMP answers");
        assert!(count > 0, "QEMU has closed QMP");
        serde_json::from_str(&line).expect("QMP speaks JSON")
    }
}
