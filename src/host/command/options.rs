//! The command line of a QEMU: what umem reads in it, refuses in it and adds to it.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use super::RamPath;
use crate::error::{Error, Result};
use crate::host::qemu::HOW_TO_START;
use crate::memory::kind::Kind;

/// True for `qemu-system-x86_64`, `/usr/bin/qemu-kvm` and their like.
pub(crate) fn is_qemu(program: &str) -> bool {
    Path::new(program)
        .file_name()
        .and_then(OsStr::to_str)
        .is_some_and(|name| name.starts_with("qemu") || name == "kvm")
}

/// What a QEMU needs beyond what its user wrote.
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

/// Reads the RAM files out of a QEMU command line, and refuses what cannot work before QEMU starts.
pub(crate) fn ram_of_qemu(arguments: &[String], kind: Kind) -> Result<Vec<RamPath>> {
    let mut ram = Vec::new();
    let mut options = arguments.iter().map(String::as_str);
    while let Some(option) = options.next() {
        match option.strip_prefix('-').map(|rest| rest.strip_prefix('-').unwrap_or(rest)) {
            Some("object") => ram.extend(ram_of_object(options.next().unwrap_or_default(), kind)?),
            Some("daemonize") => {
                return Err(Error::Unsupported(
                    "-daemonize hides QEMU from umem: leave it out; umem starts QEMU itself".into(),
                ));
            }
            Some("mem-prealloc") => return Err(prealloc("-mem-prealloc")),
            Some("incoming") => check_incoming(options.next().unwrap_or_default())?,
            Some("overcommit") => check_overcommit(options.next().unwrap_or_default())?,
            Some("device" | "netdev") => check_device(options.next().unwrap_or_default())?,
            _ => {}
        }
    }
    Ok(ram)
}

fn check_incoming(option: &str) -> Result<()> {
    if option == "defer" {
        return Ok(());
    }
    Err(Error::Unsupported(
        "QEMU's own -incoming would wait for another source: leave it out, umem adds `-incoming \
         defer`"
            .into(),
    ))
}

fn check_overcommit(option: &str) -> Result<()> {
    if !flag(option, "mem-lock") {
        return Ok(());
    }
    Err(Error::Unsupported(
        "mem-lock=on makes QEMU fetch every page before it starts: take it out of the destination's \
         -overcommit option"
            .into(),
    ))
}

fn check_device(option: &str) -> Result<()> {
    let kind = option.split(',').next().unwrap_or_default();
    if kind.starts_with("vhost-user") || kind.starts_with("vfio") {
        return Err(Error::Unsupported(format!(
            "{kind} reaches the guest's RAM past userfaultfd, so that pages cannot be fetched on \
             demand: take it out of the destination's command line"
        )));
    }
    Ok(())
}

fn ram_of_object(option: &str, wanted: Kind) -> Result<Option<RamPath>> {
    let properties = object_properties(option);
    let get = |key: &str| {
        properties.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    };
    let kind = get("qom-type").unwrap_or_default();
    let Some(backend) = kind.strip_prefix("memory-backend-") else {
        return Ok(None);
    };
    let name = get("id").unwrap_or_default().to_owned();
    let is_on = |key| get(key).is_some_and(|value| matches!(value, "on" | "yes" | "true" | "y"));
    if backend != "file" {
        return Err(Error::Unsupported(format!(
            "RAM backend {name} is a {kind}, which umem cannot fill from outside: {HOW_TO_START}"
        )));
    }
    if wanted == Kind::Private && is_on("share") {
        return Err(Error::Unsupported(format!(
            "RAM backend {name} has share=on, and --kind private is for memory that becomes the \
             guest's own: give it share=off, or leave out --kind"
        )));
    }
    if wanted == Kind::Shared && !is_on("share") {
        return Err(Error::Unsupported(format!(
            "RAM backend {name} has share=off, so that its file is not the guest's memory: add \
             share=on to its -object option"
        )));
    }
    if is_on("prealloc") {
        return Err(prealloc(&format!("prealloc=on of RAM backend {name}")));
    }
    match get("mem-path") {
        Some(path) if Path::new(path).is_dir() => Err(Error::Unsupported(format!(
            "RAM backend {name} has a directory as its mem-path: name a file in it, such as \
             {path}/{name}"
        ))),
        Some(path) => Ok(Some(RamPath { name, path: path.into() })),
        None => {
            Err(Error::Unsupported(format!("RAM backend {name} has no mem-path: {HOW_TO_START}")))
        }
    }
}

fn prealloc(what: &str) -> Error {
    Error::Unsupported(format!(
        "{what} makes QEMU touch every page before any has come: leave it out on the destination \
         (the source may have it)"
    ))
}

/// The properties of an `-object` option, in QEMU's key=value form or as JSON.
fn object_properties(option: &str) -> Vec<(String, String)> {
    if let Ok(serde_json::Value::Object(object)) = serde_json::from_str(option) {
        return object
            .into_iter()
            .map(|(key, value)| match value {
                serde_json::Value::String(text) => (key, text),
                other => (key, other.to_string()),
            })
            .collect();
    }
    // A comma inside a value is written twice (QEMU's own rule for keyval options).
    let protected = option.replace(",,", "\0");
    protected
        .split(',')
        .enumerate()
        .map(|(index, item)| {
            let (key, value) = match item.split_once('=') {
                Some((key, value)) => (key, value),
                None if index == 0 => ("qom-type", item),
                None => (item, "on"),
            };
            (key.to_owned(), value.replace('\0', ","))
        })
        .collect()
}

fn flag(option: &str, key: &str) -> bool {
    object_properties(option)
        .iter()
        .any(|(name, value)| name == key && matches!(value.as_str(), "on" | "yes" | "true"))
}

#[cfg(test)]
mod tests;
