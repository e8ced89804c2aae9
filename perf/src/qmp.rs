//! A QMP client that keeps events, whose timestamps measure a migration.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::{Context, Result, failure};
use crate::interrupt;
use crate::process::{Lines, Next};

/// An answer that takes longer never comes.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Qmp {
    stream: UnixStream,
    lines: Lines,
    events: Vec<Event>,
    /// The monitor's version, from its greeting.
    pub(crate) version: String,
}

/// An event of the monitor.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    name: String,
    /// Seconds since 1970, by the monitor's clock, which is this machine's.
    pub(crate) at_s: f64,
    data: Value,
}

impl Qmp {
    /// Connects to the socket of a monitor that is just starting.
    pub(crate) fn connect(path: &Path) -> Result<Qmp> {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            interrupt::check()?;
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(error) => return failure(format!("{}: {error}", path.display())),
            }
        };
        let lines = Lines::of(stream.try_clone().context(|| "a monitor's socket")?);
        let mut qmp = Qmp { stream, lines, events: Vec::new(), version: String::new() };
        let greeting = qmp.read(deadline)?;
        let version = &greeting["QMP"]["version"]["qemu"];
        let number = |name: &str| version[name].as_u64().unwrap_or(0);
        qmp.version = format!("{}.{}.{}", number("major"), number("minor"), number("micro"));
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns its `return` value.
    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        self.execute_within(command, arguments, PATIENCE)
    }

    /// The same for a command that may take this long.
    pub(crate) fn execute_within(
        &mut self,
        command: &str,
        arguments: &Value,
        patience: Duration,
    ) -> Result<Value> {
        let text = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.stream.write_all(text.as_bytes()).context(|| command)?;
        let deadline = Instant::now() + patience;
        loop {
            let mut object = self.read(deadline).context(|| command)?;
            if let Some(value) = object.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = object.get("error") {
                let text = error["desc"].as_str().unwrap_or("no reason given");
                return failure(format!("{command}: {text}"));
            }
        }
    }

    pub(crate) fn set_capabilities(&mut self, names: &[&str]) -> Result<()> {
        let on: Vec<Value> =
            names.iter().map(|name| json!({ "capability": name, "state": true })).collect();
        self.execute("migrate-set-capabilities", &json!({ "capabilities": on })).map(drop)
    }

    /// Waits for an event; one that has come already counts.
    pub(crate) fn event(&mut self, name: &str, patience: Duration) -> Result<Event> {
        let event = self.matching(name, patience, |event| event.name == name)?;
        event.ok_or_else(|| format!("{name}: the monitor does not report it").into())
    }

    /// Waits until a migration has completed; a failed one is an error.
    pub(crate) fn migrated(&mut self, patience: Duration) -> Result<Event> {
        let event = self.migrated_within(patience)?;
        event.ok_or_else(|| "QEMU's migration does not end".into())
    }

    /// The same; None if the migration goes on after this time.
    pub(crate) fn migrated_within(&mut self, limit: Duration) -> Result<Option<Event>> {
        let last = self.matching("the migration's end", limit, Event::is_end)?;
        let Some(last) = last else { return Ok(None) };
        match last.status() {
            "completed" => Ok(Some(last)),
            other => failure(format!("QEMU's migration ended as {other}")),
        }
    }

    /// Waits until a migration with the capability `events` has begun this pass over the guest's memory, from 1, or
    /// has ended before.
    pub(crate) fn pass(&mut self, pass: u64, patience: Duration) -> Result<()> {
        let begun = |event: &Event| {
            let is_pass = event.name == "MIGRATION_PASS";
            is_pass && event.data["pass"].as_u64().is_some_and(|number| number >= pass)
        };
        let what = "the migration's pass";
        let event = self.matching(what, patience, |event| begun(event) || event.is_end())?;
        event.map(drop).ok_or_else(|| format!("QEMU's migration does not begin pass {pass}").into())
    }

    /// None if no such event has come in this time.
    fn matching(
        &mut self,
        what: &str,
        patience: Duration,
        is_it: impl Fn(&Event) -> bool,
    ) -> Result<Option<Event>> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(event) = self.events.iter().find(|event| is_it(event)) {
                return Ok(Some(event.clone()));
            }
            if self.read_before(deadline).context(|| what)?.is_none() {
                return Ok(None);
            }
        }
    }

    /// The next object; an event is kept as well.
    fn read(&mut self, deadline: Instant) -> Result<Value> {
        let object = self.read_before(deadline)?;
        object.ok_or_else(|| "the monitor does not answer".into())
    }

    /// The same; None if none comes before the deadline.
    fn read_before(&mut self, deadline: Instant) -> Result<Option<Value>> {
        let line = match self.lines.next(deadline)? {
            Next::Line(line) => line.text,
            Next::Late => return Ok(None),
            Next::Closed => return failure("the monitor has closed its connection"),
        };
        let object: Value = serde_json::from_str(&line).context(|| "a monitor's answer")?;
        if let Some(name) = object["event"].as_str() {
            let time = |unit: &str| object["timestamp"][unit].as_f64().unwrap_or(0.0);
            self.events.push(Event {
                name: name.to_owned(),
                at_s: time("seconds") + time("microseconds") / 1e6,
                data: object["data"].clone(),
            });
        }
        Ok(Some(object))
    }
}

impl Event {
    /// Of a migration; empty for other events.
    fn status(&self) -> &str {
        let status = self.data["status"].as_str().filter(|_| self.name == "MIGRATION");
        status.unwrap_or_default()
    }

    /// Whether a migration has ended, well or not.
    fn is_end(&self) -> bool {
        matches!(self.status(), "completed" | "failed" | "cancelled" | "postcopy-paused")
    }
}
