//! The fuzz targets' corpus, every input once: faults found by fuzzing stay fixed.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a test may say what it does")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use umem_test_fuzz::TARGETS;

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz")
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn corpus_inputs_pass() {
    for target in TARGETS {
        let folder = fuzz().join("corpus").join(target.name);
        let inputs = names(&folder);
        assert!(!inputs.is_empty(), "{} has a corpus", target.name);
        for name in inputs {
            println!("{}/{name}", target.name);
            (target.run)(&fs::read(folder.join(name)).unwrap());
        }
    }
}

/// Damaged copies of the corpus, the same each time: a fuzzer's first attempts. `UMEM_FUZZ_RUNS` of each input.
#[test]
fn damaged_corpus_inputs_pass() {
    let runs = std::env::var("UMEM_FUZZ_RUNS").map_or(5, |runs| runs.parse().expect("a number"));
    for target in TARGETS {
        let folder = fuzz().join("corpus").join(target.name);
        let inputs: Vec<Vec<u8>> =
            names(&folder).iter().map(|name| fs::read(folder.join(name)).unwrap()).collect();
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for input in &inputs {
            for run in 0..runs {
                let spoilt = random.spoil(input, &inputs);
                // Printed if it panics.
                println!("{} {run} {:?}", target.name, String::from_utf8_lossy(&spoilt));
                (target.run)(&spoilt);
            }
        }
    }
}

/// Numbers that are the same each time (xorshift64).
struct Random(u64);

impl Random {
    /// Below `below`; 0 where that is 0.
    fn number(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % below.max(1) as u64) as usize
    }

    /// A copy with a few changes; `others` give parts to it.
    fn spoil(&mut self, input: &[u8], others: &[Vec<u8>]) -> Vec<u8> {
        const TEXTS: [&[u8]; 8] =
            [b"-1", b"18446744073709551615", b"1e308", b"null", b"[[", b"\\u0000", b"\xff", b"\n"];
        let mut bytes = input.to_vec();
        for _ in 0..=self.number(4) {
            let at = self.number(bytes.len());
            match self.number(5) {
                0 if !bytes.is_empty() => bytes[at] ^= 1 << self.number(8),
                1 => bytes.truncate(at),
                2 => {
                    let text = TEXTS[self.number(TEXTS.len())];
                    let end = (at + self.number(12)).min(bytes.len());
                    bytes.splice(at..end, text.iter().copied());
                }
                3 => {
                    let end = (at + self.number(64)).min(bytes.len());
                    let part = bytes[at..end].to_vec();
                    bytes.splice(at..at, part);
                }
                _ => {
                    let other = &others[self.number(others.len())];
                    let from = self.number(other.len());
                    bytes.splice(at.., other[from..].iter().copied());
                }
            }
        }
        bytes
    }
}

/// A target without a binary would never be fuzzed, and a folder without a target never be replayed.
#[test]
fn targets_match_binaries_and_corpus_folders() {
    let targets: BTreeSet<String> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    assert_eq!(names(&fuzz().join("corpus")), targets);
    let manifest = fs::read_to_string(fuzz().join("Cargo.toml")).unwrap();
    let binaries = names(&fuzz().join("fuzz_targets"));
    for target in &targets {
        assert!(binaries.contains(&format!("{target}.rs")), "{target} has its binary");
        assert!(manifest.contains(&format!("name = \"{target}\"")), "{target} is in the manifest");
    }
    assert_eq!(binaries.len(), targets.len());
}
