//! The fuzz targets: each panics if it finds a fault.
//!
//! `fuzz/` runs these under libFuzzer, and `tests/replay.rs` runs them on the committed corpus without
//! it. A target is a function of bytes, listed in [`TARGETS`]; a new one also needs its few lines in
//! `fuzz/Cargo.toml` and `fuzz/fuzz_targets/`, which the replay checks.

mod frames;
mod handoff;
mod heap;
mod hello;
mod pair;
mod phases;
mod receiver;
mod stream;
mod text;
mod words;

/// A fuzz target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// The name of its binary, and of its folder in `fuzz/corpus`.
    pub name: &'static str,
    /// Tries one input.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "receiver", run: receiver::run },
    Target { name: "phases", run: phases::run },
    Target { name: "pair", run: pair::run },
    Target { name: "frames", run: frames::run },
    Target { name: "hello", run: hello::run },
    Target { name: "handoff", run: handoff::run },
    Target { name: "stream", run: stream::run },
    Target { name: "uri", run: text::uri },
    Target { name: "qmp", run: text::qmp },
    Target { name: "maps", run: text::maps },
    Target { name: "session", run: text::session },
    Target { name: "control", run: text::control },
    Target { name: "metrics", run: text::metrics },
    Target { name: "records", run: text::records },
];

/// Tries one input with the target of this name.
///
/// # Panics
/// If there is no such target, or it finds a fault.
pub fn run(name: &str, input: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target's name");
    (target.run)(input);
}
