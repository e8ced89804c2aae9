//! The tests' own tools: the fetcher (tests/lib/fetch), and the detector of leftovers (tests/lib/alone).

mod fetch;
mod left;

use std::path::{Path, PathBuf};

/// One of the scripts in tests/lib.
fn tool(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lib").join(name)
}
