//! Compiles the preload object (src/preload), so that the umem binary can carry it inside itself, and names the
//! shared library of the C interface.
//!
//! The preload object has no dependencies, so that one call of the compiler does: the workspace's own build of the
//! crate is for the lints and the editor.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a build script talks to cargo")]

use std::env;
use std::path::PathBuf;
use std::process::Command;

/// What a program that is linked with libumem.so asks for at run time. The number is the version of the binary
/// interface: it grows when a program would have to be compiled again.
const SONAME: &str = "libumem.so.0";

fn main() {
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,{SONAME}");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/preload/src");

    let object = PathBuf::from(variable("OUT_DIR")).join("libumem_preload.so");
    let mut compiler = Command::new(variable("RUSTC"));
    compiler
        .args(["--crate-name", "umem_preload", "--crate-type", "cdylib", "--edition", "2024"])
        .args(["--target", &variable("TARGET")])
        .args(["-C", "opt-level=2", "-C", "panic=abort", "-C", "strip=symbols"])
        .args(["-C", "lto=fat", "-C", "codegen-units=1"])
        .arg("-o")
        .arg(&object)
        .arg("src/preload/src/lib.rs");
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        compiler.arg("-C").arg(format!("linker={linker}"));
    }
    match compiler.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("compiling the preload object failed: {status}"),
        Err(error) => panic!("the compiler for the preload object did not start: {error}"),
    }
}

/// A variable that cargo always gives to build scripts.
fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|error| panic!("{name}: {error}"))
}
