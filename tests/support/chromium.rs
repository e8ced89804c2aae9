//! A headless Chromium, controlled over its debugging pipe.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use base64::Engine;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::DEADLINE;
use super::process::Process;
use super::qemu::provided;

/// A browser with one page, ended when it is dropped.
pub(crate) struct Chromium {
    pipe: BufReader<UnixStream>,
    process: Process,
    session: String,
    last_id: u64,
    /// Console messages of the page and of the browser.
    console: Vec<Value>,
    _profile: TempDir,
}

/// The preferred colour scheme of the reader's system.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Scheme {
    Light,
    Dark,
}

/// A picture of a part of a page: its pixels, red, green, blue.
pub(crate) struct Screenshot {
    pub(crate) pixels: Vec<[u8; 3]>,
}

impl Chromium {
    pub(crate) fn start() -> Chromium {
        let program = provided("UMEM_TEST_CHROMIUM", "chromium").join("chromium-headless-shell");
        let profile = TempDir::new().expect("a temporary directory");
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        ours.set_read_timeout(Some(DEADLINE)).expect("a socket");
        let mut command = Command::new(program);
        command
            .args(["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
            .args(["--disable-breakpad", "--no-first-run", "--remote-debugging-pipe"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .env("HOME", profile.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let descriptor = theirs.as_raw_fd();
        // SAFETY: between fork and exec only fcntl and dup2 run, which are async-signal-safe. The browser reads
        // commands from 3 and writes to 4; the copy keeps the socket open if its number is one of these.
        unsafe {
            command.pre_exec(move || {
                let copy = libc::fcntl(descriptor, libc::F_DUPFD_CLOEXEC, 10);
                match copy >= 0 && libc::dup2(copy, 3) == 3 && libc::dup2(copy, 4) == 4 {
                    true => Ok(()),
                    false => Err(std::io::Error::last_os_error()),
                }
            });
        }
        let process = Process::start(&mut command);
        drop(theirs);
        let mut chromium = Chromium {
            pipe: BufReader::new(ours),
            process,
            session: String::new(),
            last_id: 0,
            console: Vec::new(),
            _profile: profile,
        };
        let target = chromium.execute("Target.createTarget", json!({ "url": "about:blank" }));
        let target = json!({ "targetId": target["targetId"], "flatten": true });
        let session = chromium.execute("Target.attachToTarget", target)["sessionId"].take();
        chromium.session = session.as_str().expect("a session").to_owned();
        for domain in ["Page.enable", "Runtime.enable", "Log.enable"] {
            chromium.execute(domain, json!({}));
        }
        chromium
    }

    /// Opens a file with this preference, and waits until it is loaded.
    pub(crate) fn open(&mut self, path: &Path, scheme: Scheme) {
        let value = match scheme {
            Scheme::Light => "light",
            Scheme::Dark => "dark",
        };
        let features = json!([{ "name": "prefers-color-scheme", "value": value }]);
        self.execute("Emulation.setEmulatedMedia", json!({ "features": features }));
        let size = json!({ "width": 1060, "height": 900, "deviceScaleFactor": 1, "mobile": false });
        self.execute("Emulation.setDeviceMetricsOverride", size);
        let url = format!("file://{}", path.display());
        self.execute("Page.navigate", json!({ "url": url }));
        while self.next()["method"] != "Page.loadEventFired" {}
    }

    /// The value of a JavaScript expression in the page.
    pub(crate) fn evaluate(&mut self, expression: &str) -> Value {
        let arguments = json!({ "expression": expression, "returnByValue": true });
        let mut answer = self.execute("Runtime.evaluate", arguments);
        assert!(answer.get("exceptionDetails").is_none(), "{expression}: {answer}");
        answer["result"]["value"].take()
    }

    /// Takes a picture of the element that this selects.
    pub(crate) fn screenshot(&mut self, selector: &str) -> Screenshot {
        let area = self.evaluate(&format!(
            "(r => ({{x: r.x, y: r.y + scrollY, width: r.width, height: r.height, scale: 1}}))\
             (document.querySelector({selector:?}).getBoundingClientRect())"
        ));
        let arguments = json!({ "clip": area, "captureBeyondViewport": true });
        let answer = self.execute("Page.captureScreenshot", arguments);
        let data = answer["data"].as_str().expect("a picture");
        let bytes = base64::engine::general_purpose::STANDARD.decode(data).expect("base64");
        let mut decoder = png::Decoder::new(std::io::Cursor::new(bytes));
        decoder.set_transformations(png::Transformations::normalize_to_color8());
        let mut reader = decoder.read_info().expect("a PNG");
        let mut pixels = vec![0; reader.output_buffer_size().expect("a size")];
        let frame = reader.next_frame(&mut pixels).expect("a PNG");
        let samples = frame.color_type.samples();
        assert!(samples >= 3, "{:?}", frame.color_type);
        let pixels = pixels[..frame.buffer_size()].chunks_exact(samples);
        Screenshot { pixels: pixels.map(|p| [p[0], p[1], p[2]]).collect() }
    }

    /// Console messages since the start: none for a correct page.
    pub(crate) fn console(&mut self) -> &[Value] {
        // Messages sent before this request have arrived with its answer.
        self.evaluate("0");
        &self.console
    }

    fn execute(&mut self, method: &str, params: Value) -> Value {
        self.last_id += 1;
        let mut command = json!({ "id": self.last_id, "method": method, "params": params });
        if !self.session.is_empty() {
            command["sessionId"] = json!(self.session);
        }
        let mut bytes = command.to_string().into_bytes();
        bytes.push(0);
        self.pipe.get_mut().write_all(&bytes).expect("the browser runs");
        loop {
            let mut message = self.next();
            if message["id"] == self.last_id {
                assert!(message.get("error").is_none(), "{method}: {message}");
                return message["result"].take();
            }
        }
    }

    fn next(&mut self) -> Value {
        let mut bytes = Vec::new();
        self.pipe.read_until(0, &mut bytes).expect("the browser answers");
        assert_eq!(bytes.pop(), Some(0), "the browser has ended");
        let message: Value = serde_json::from_slice(&bytes).expect("JSON");
        let noises = ["Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"];
        if noises.iter().any(|noise| message["method"] == *noise) {
            self.console.push(message.clone());
        }
        message
    }
}

impl Drop for Chromium {
    fn drop(&mut self) {
        // The browser ends its child processes; a kill would not.
        let close = json!({ "id": 0, "method": "Browser.close" }).to_string() + "\0";
        if self.pipe.get_mut().write_all(close.as_bytes()).is_ok() && !std::thread::panicking() {
            self.process.wait();
        }
    }
}
