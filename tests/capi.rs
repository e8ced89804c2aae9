//! The C interface: its header matches the code, its library exports the header's functions, and a C program that
//! embeds both sides moves memory with it, under AddressSanitizer.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use support::Scratch;

/// The sources of the interface, in the order of the header.
const SOURCES: [&str; 3] = ["types.rs", "source.rs", "destination.rs"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The directory of the libraries that belong to this test.
fn library(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_umem")).with_file_name("deps").join(name);
    assert!(
        path.exists(),
        "{} is missing: `cargo build --workspace --all-targets` first",
        path.display()
    );
    path
}

/// Runs a program to its end; returns its output.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}\n{err}", output.status);
    assert_eq!(err, "", "{command:?} complains");
    out.into_owned()
}

fn header() -> String {
    let folder = root().join("src/capi");
    let config = cbindgen::Config::from_file(folder.join("cbindgen.toml")).unwrap();
    let builder = SOURCES.iter().fold(cbindgen::Builder::new().with_config(config), |all, name| {
        all.with_src(folder.join(name))
    });
    let mut header = Vec::new();
    builder.generate().unwrap().write(&mut header);
    String::from_utf8(header).unwrap()
}

/// With UMEM_WRITE_HEADER=1 the header is rewritten.
#[test]
fn c_header_matches_the_rust_types() {
    let path = root().join("src/capi/umem.h");
    let made = header();
    if std::env::var_os("UMEM_WRITE_HEADER").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let there = std::fs::read_to_string(&path).unwrap();
    assert!(
        there == made,
        "src/capi/umem.h is not what src/capi makes: run \
         `UMEM_WRITE_HEADER=1 cargo test --test capi header` and look at the difference"
    );
}

#[test]
fn shared_library_exports_only_the_interface() {
    let header = std::fs::read_to_string(root().join("src/capi/umem.h")).unwrap();
    let code = header.lines().filter(|line| !line.starts_with("//") && !line.starts_with(" *"));
    let mut declared: Vec<&str> = code
        .filter_map(|line| line.split_once('(')?.0.rsplit([' ', '*']).next())
        .filter(|name| name.starts_with("umem_"))
        .collect();
    declared.sort_unstable();
    let listing = run(Command::new("nm").args(["-D", "--defined-only"]).arg(library("libumem.so")));
    let mut exported: Vec<&str> =
        listing.lines().filter_map(|line| line.split_whitespace().last()).collect();
    exported.sort_unstable();
    assert_eq!(exported, declared);
}

/// Compiles the C program; `link` has the linker's arguments.
fn compile(scratch: &Scratch, sanitizers: &str, link: &[&str]) -> PathBuf {
    let program = scratch.path("embed");
    let mut gcc = Command::new("gcc");
    gcc.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-g", "-O1"])
        .args(["-fno-omit-frame-pointer", sanitizers])
        .arg(format!("-I{}", root().join("src/capi").display()))
        .arg(root().join("tests/embed/embed.c"))
        .args(link)
        .arg("-o")
        .arg(&program);
    run(&mut gcc);
    program
}

/// Linked with the static library, so that the sanitizer's allocator serves all of it.
fn sanitized(scratch: &Scratch) -> PathBuf {
    let archive = library("libumem.a").display().to_string();
    let link = [archive.as_str(), "-lpthread", "-ldl", "-lm"];
    compile(scratch, "-fsanitize=address,undefined", &link)
}

fn embed(scenario: &str) {
    let scratch = Scratch::new();
    let program = sanitized(&scratch);
    let printed = run(Command::new(program)
        .arg(scenario)
        .arg(scratch.path("socket"))
        .env("ASAN_OPTIONS", "detect_leaks=1:abort_on_error=0")
        .env("UBSAN_OPTIONS", "halt_on_error=1"));
    assert_eq!(printed, format!("{scenario}: ok\n"));
}

#[test]
fn c_program_moves_shared_memory() {
    embed("shared");
}

#[test]
fn c_program_moves_anonymous_memory() {
    embed("anonymous");
}

#[test]
fn c_program_moves_memory_with_its_own_userfaultfd() {
    embed("userfaultfd");
}

#[test]
fn c_program_moves_all_pages_before_the_switchover() {
    embed("precopy");
}

#[test]
fn c_program_moves_memory_while_its_guest_writes() {
    embed("rounds");
}

#[test]
fn checksums_are_used_when_the_source_requests_them() {
    embed("checked");
}

#[test]
fn cancelled_migration_leaves_the_guest_at_the_source() {
    embed("cancel");
}

#[test]
fn refusal_by_a_program_ends_the_migration_on_both_sides() {
    embed("refuse");
}

#[test]
fn destination_waits_for_pages_after_the_source_is_lost() {
    embed("lost");
}

#[test]
fn program_replaces_lost_connections() {
    embed("reconnect");
}

#[test]
fn program_resumes_both_sides_at_another_address() {
    embed("elsewhere");
}

#[test]
fn program_keeps_its_descriptors_of_reset_connections() {
    embed("reset");
}

#[test]
fn impossible_settings_are_refused_with_a_text() {
    embed("misuse");
}

/// The same with the shared library, as in a program built without umem's sources. It asks for the library by the name
/// in it.
#[test]
fn c_program_runs_with_the_shared_library() {
    let scratch = Scratch::new();
    let library = library("libumem.so");
    std::os::unix::fs::symlink(&library, scratch.path("libumem.so.0")).unwrap();
    let rpath = format!("-Wl,-rpath,{}", scratch.path("").display());
    let program = compile(&scratch, "-fsanitize=undefined", &[library.to_str().unwrap(), &rpath]);
    let printed = run(Command::new(program).arg("shared").arg(scratch.path("socket")));
    assert_eq!(printed, "shared: ok\n");
}
