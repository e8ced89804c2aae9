//! The fuzz targets' corpus, every input once: what fuzzing has reached stays as it was found to be.

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
fn every_input_of_the_corpus_holds() {
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

/// A target without a binary would never be fuzzed, and a folder without a target never be replayed.
#[test]
fn targets_binaries_and_folders_are_the_same() {
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
