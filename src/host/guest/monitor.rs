//! The demo guest's monitor: the QMP commands that umem sends to a QEMU, and `umem-verify`.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread::JoinHandle;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};

use super::threads::Machine;
use super::{Options, log};
use crate::error::{Context, Result};

/// Accepts clients, each on a thread of its own, until one sends `quit`.
pub(crate) fn serve(
    listener: &UnixListener,
    machine: &Arc<Machine>,
    options: &Options,
) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().context(|| "the guest's monitor")?;
        let (machine, path) = (machine.clone(), options.qmp.clone());
        let incoming = options.incoming;
        super::thread("monitor", move || {
            let mut client = Client {
                stream,
                machine,
                bytes: Vec::new(),
                descriptors: Vec::new(),
                given: HashMap::new(),
                migration: Migration::None,
                incoming,
            };
            if let Ok(true) = client.talk() {
                let _ = std::fs::remove_file(path);
                std::process::exit(0);
            }
        })?;
    }
}

struct Client {
    stream: UnixStream,
    machine: Arc<Machine>,
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
    given: HashMap<String, OwnedFd>,
    migration: Migration,
    incoming: bool,
}

/// The state of this guest's migration, as `query-migrate` returns it.
enum Migration {
    None,
    Loading(JoinHandle<bool>),
    Completed,
    Failed,
}

impl Migration {
    fn status(&mut self) -> &'static str {
        if let Migration::Loading(thread) = self
            && thread.is_finished()
            && let Migration::Loading(thread) = std::mem::replace(self, Migration::Failed)
            && thread.join().unwrap_or(false)
        {
            *self = Migration::Completed;
        }
        match self {
            Migration::None => "none",
            Migration::Loading(_) => "active",
            Migration::Completed => "completed",
            Migration::Failed => "failed",
        }
    }
}

/// Longer than any command.
const LINE_BYTES_MAX: usize = 1 << 20;

/// Descriptors that wait for the command that takes them: one at a time.
const DESCRIPTORS_MAX: usize = 16;

impl Client {
    /// Answers a client. Returns true after `quit`, and false when the client has gone.
    fn talk(&mut self) -> io::Result<bool> {
        self.say(&json!({ "QMP": { "version": {}, "capabilities": [] } }))?;
        while let Some(line) = self.read_line()? {
            let request: Value = serde_json::from_slice(&line)?;
            let command = request["execute"].as_str().unwrap_or_default();
            let answer = self.execute(command, &request["arguments"]);
            self.say(&match answer {
                Ok(value) => json!({ "return": value }),
                Err(text) => json!({ "error": { "class": "GenericError", "desc": text } }),
            })?;
            if command == "quit" {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn say(&mut self, object: &Value) -> io::Result<()> {
        self.stream.write_all(format!("{object}\n").as_bytes())
    }

    fn read_line(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.bytes.iter().position(|&byte| byte == b'\n') {
                return Ok(Some(self.bytes.drain(..=end).collect()));
            }
            let mut buffer = [0; 4096];
            let mut control = nix::cmsg_space!([i32; 4]);
            let mut iov = [IoSliceMut::new(&mut buffer)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let received =
                recvmsg::<()>(self.stream.as_raw_fd(), &mut iov, Some(&mut control), flags)?;
            let count = received.bytes;
            for message in received.cmsgs()? {
                if let ControlMessageOwned::ScmRights(fds) = message {
                    // SAFETY: the kernel has just made these descriptors for this process.
                    self.descriptors
                        .extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
            if count == 0 {
                return Ok(None);
            }
            self.bytes.extend_from_slice(&buffer[..count]);
            if self.bytes.len() > LINE_BYTES_MAX || self.descriptors.len() > DESCRIPTORS_MAX {
                return Err(io::Error::other("a command without an end"));
            }
        }
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> std::result::Result<Value, String> {
        let machine = self.machine.clone();
        match command {
            "qmp_capabilities"
            | "migrate-set-capabilities"
            | "migrate-set-parameters"
            | "migrate_cancel"
            | "quit" => Ok(json!({})),
            "query-migrate-capabilities" => Ok(json!([])),
            "query-migrate-parameters" => Ok(json!({})),
            "query-migrate" => Ok(json!({ "status": self.migration.status() })),
            "human-monitor-command" => Ok(json!("")),
            "query-status" => {
                let status = match (machine.is_running(), self.incoming) {
                    (true, _) => "running",
                    (false, true) if !machine.has_arrived() => "inmigrate",
                    (false, _) => "paused",
                };
                Ok(json!({ "status": status }))
            }
            "stop" => {
                machine.stop();
                Ok(json!({}))
            }
            "cont" => {
                machine.resume();
                Ok(json!({}))
            }
            "x-query-ramblock" => {
                let ram = &machine.ram;
                // The columns of a QEMU's table.
                let table = format!(
                    "Block Name PSize Offset Used Total HVA RO\n{} 4 KiB {:#x} {:#x} {:#x} {:#x} rw\n",
                    ram.name,
                    0,
                    ram.bytes,
                    ram.bytes,
                    ram.address()
                );
                Ok(json!({ "human-readable-text": table }))
            }
            "qom-list" => Ok(match arguments["path"].as_str() {
                Some("/objects") => {
                    json!([{ "name": machine.ram.name, "type": "child<memory-backend-file>" }])
                }
                _ => json!([]),
            }),
            "qom-get" => self.property(arguments),
            "getfd" => {
                let name = arguments["fdname"].as_str().ok_or("no fdname")?.to_owned();
                let descriptor = self.descriptors.pop().ok_or("the command has no descriptor")?;
                self.given.insert(name, descriptor);
                Ok(json!({}))
            }
            "migrate" => {
                let mut socket = self.socket(arguments)?;
                // As a QEMU does: it stops the guest itself after it has sent all that can be sent before.
                machine.stop();
                socket.write_all(&machine.save()).map_err(|error| error.to_string())?;
                self.migration = Migration::Completed;
                Ok(json!({}))
            }
            "migrate-incoming" => {
                let mut socket = self.socket(arguments)?;
                let load = move || {
                    let mut state = Vec::new();
                    let read = socket.read_to_end(&mut state).is_ok();
                    // A device's state refers to memory, and loading it reads there.
                    machine.ram.touch(0);
                    read && machine.load(&state).is_ok()
                };
                let loading = super::thread("load", load).map_err(|error| error.to_string())?;
                self.migration = Migration::Loading(loading);
                Ok(json!({}))
            }
            log::COMMAND => {
                let from = arguments["from"].as_u64().unwrap_or(0);
                let (runs, next) = machine.take_dirty(from);
                Ok(json!({ "runs": runs, "next": next }))
            }
            "umem-verify" => {
                serde_json::to_value(machine.verify()).map_err(|error| error.to_string())
            }
            _ => Err(format!("unknown command {command}")),
        }
    }

    fn property(&self, arguments: &Value) -> std::result::Result<Value, String> {
        let ram = &self.machine.ram;
        let object = format!("/objects/{}", ram.name);
        match (arguments["path"].as_str(), arguments["property"].as_str()) {
            (Some("/machine"), Some("memory-backend")) => Ok(json!(ram.name)),
            (Some(path), Some("share")) if path == object => Ok(json!(true)),
            (Some(path), Some("mem-path")) if path == object => Ok(json!(ram.path)),
            (Some(path), Some("size")) if path == object => Ok(json!(ram.bytes)),
            _ => Err("no such property".into()),
        }
    }

    fn socket(&mut self, arguments: &Value) -> std::result::Result<File, String> {
        let name = arguments["uri"].as_str().and_then(|uri| uri.strip_prefix("fd:"));
        let descriptor = name.and_then(|name| self.given.remove(name));
        Ok(File::from(descriptor.ok_or("only fd:NAME of a descriptor given with getfd")?))
    }
}
