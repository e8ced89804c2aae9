//! The options that umem adds to the command line of a QEMU that hands over its memory itself. For other QEMUs the
//! preload object adds them (`src/preload/src/qemu.rs`).

use std::ffi::{OsStr, OsString};
use std::path::Path;

/// True for `qemu-system-x86_64`, `/usr/bin/qemu-kvm` and similar names.
pub(super) fn is_qemu(program: &str) -> bool {
    Path::new(program)
        .file_name()
        .and_then(OsStr::to_str)
        .is_some_and(|name| name.starts_with("qemu") || name == "kvm")
}

/// The arguments that a QEMU needs in addition to those of its user.
pub(super) fn qemu_arguments(given: &[String], qmp_fd: i32) -> Vec<OsString> {
    let mut added: Vec<OsString> = vec![
        "-chardev".into(),
        format!("socket,id=umem-qmp,fd={qmp_fd}").into(),
        "-mon".into(),
        "chardev=umem-qmp,mode=control".into(),
    ];
    if !given.iter().any(|argument| argument == "-incoming" || argument == "--incoming") {
        added.extend(["-incoming".into(), "defer".into()]);
    }
    added
}

#[cfg(test)]
mod tests;
