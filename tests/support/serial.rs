//! The console of the Linux guest (tests/guest).

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::wait_for;

/// Follows the file that QEMU writes a serial port to.
pub(crate) struct Serial {
    path: PathBuf,
    /// None until QEMU has created it.
    file: Option<File>,
    /// The last line, which may be incomplete.
    begun: Vec<u8>,
}

/// One heartbeat: the guest's totals at that time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Beat {
    pub(crate) number: u64,
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    /// Complete sweeps over its memory.
    pub(crate) passes: u64,
    /// Pages in the balloon, if it uses one.
    pub(crate) given: u64,
    /// Reads of its disk, if it has one.
    pub(crate) disk: u64,
}

impl Serial {
    pub(crate) fn follow(path: &Path) -> Serial {
        Serial { path: path.into(), file: None, begun: Vec::new() }
    }

    /// The next heartbeat that satisfies `is_wanted`.
    ///
    /// # Panics
    /// If the guest finds a wrong word, or no such heartbeat comes.
    pub(crate) fn beat(&mut self, what: &str, wanted: impl Fn(&Beat) -> bool) -> Beat {
        let what = format!("a heartbeat with {what} in {}", self.path.display());
        wait_for(what, || self.beats().into_iter().find(&wanted))
    }

    /// The latest heartbeat.
    pub(crate) fn last_beat(&mut self) -> Beat {
        if let Some(file) = &mut self.file {
            file.seek(SeekFrom::Start(0)).expect("a plain file");
        }
        self.begun.clear();
        self.beats().pop().expect("a heartbeat")
    }

    /// Waits until the guest has made progress from now on.
    pub(crate) fn goes_on(&mut self) {
        let last = self.last_beat();
        self.beat("a later number", |beat| beat.number >= last.number + 3);
    }

    /// The heartbeats since the last call.
    ///
    /// # Panics
    /// If the guest reports an error, with its whole console.
    fn beats(&mut self) -> Vec<Beat> {
        let lines = self.lines();
        if let Some(line) = lines.iter().find(|line| complains(line)) {
            let all = std::fs::read(&self.path).unwrap_or_default();
            panic!("the guest reports: {line}\n{}", String::from_utf8_lossy(&all));
        }
        lines.iter().filter_map(|line| read_beat(line)).collect()
    }

    /// The lines completed since the last call.
    fn lines(&mut self) -> Vec<String> {
        let file = match &mut self.file {
            Some(file) => file,
            none => match File::open(&self.path) {
                Ok(file) => none.insert(file),
                Err(error) if error.kind() == ErrorKind::NotFound => return Vec::new(),
                Err(error) => panic!("{}: {error}", self.path.display()),
            },
        };
        file.read_to_end(&mut self.begun).expect("a plain file");
        let Some(end) = self.begun.iter().rposition(|&byte| byte == b'\n') else {
            return Vec::new();
        };
        let complete: Vec<u8> = self.begun.drain(..=end).collect();
        String::from_utf8_lossy(&complete).lines().map(str::to_owned).collect()
    }
}

fn complains(line: &str) -> bool {
    ["umem-guest BAD", "umem-guest failed", "Kernel panic"].iter().any(|text| line.contains(text))
}

/// The numbers of a heartbeat; None for other lines, including the rest of a line that began at the source.
fn read_beat(line: &str) -> Option<Beat> {
    let numbers: HashMap<&str, u64> = line
        .strip_prefix("umem-guest ")?
        .split(' ')
        .filter_map(|word| word.split_once('='))
        .filter_map(|(name, value)| Some((name, value.parse().ok()?)))
        .collect();
    let get = |name| numbers.get(name).copied();
    let number = get("beat")?;
    // The last field: the line is complete.
    get("ms")?;
    assert_eq!(get("bad"), Some(0), "the guest reports: {line}");
    let [given, disk] = ["given", "disk"].map(|name| get(name).unwrap_or(0));
    let (reads, writes, passes) = (get("reads")?, get("writes")?, get("pass")?);
    Some(Beat { number, reads, writes, passes, given, disk })
}
