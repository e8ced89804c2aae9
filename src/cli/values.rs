//! Values of options, and checks that several subcommands share

use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::transport::uri::Uri;

/// The RFC's `-postcopy-flags`.
#[derive(Clone, Copy)]
pub(super) struct PostcopyFlags(pub(super) u8);

impl std::str::FromStr for PostcopyFlags {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<PostcopyFlags, String> {
        match text {
            "0" => Ok(PostcopyFlags(0)),
            "1" => Ok(PostcopyFlags(1)),
            _ => Err(format!("0 or 1 (touch requests), not {text:?}")),
        }
    }
}

/// Bytes, as `1500`, `64K` or `10G`.
#[derive(Clone, Copy)]
pub(super) struct Size(pub(super) u64);

impl std::str::FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Size, String> {
        let shifts = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];
        let unit = shifts.iter().find(|(unit, _)| text.to_ascii_uppercase().ends_with(*unit));
        let (digits, shift) =
            unit.map_or((text, 0), |(_, shift)| (&text[..text.len() - 1], *shift));
        let bytes = digits.parse::<u64>().ok().and_then(|count| count.checked_mul(1 << shift));
        bytes.map(Size).ok_or_else(|| format!("write a size such as 512M or 10G, not {text:?}"))
    }
}

/// Whole MiB: a number of them, as `64`, or a size with its unit, as `2G`.
#[derive(Clone, Copy)]
pub(super) struct Mebibytes(pub(super) u64);

impl std::str::FromStr for Mebibytes {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Mebibytes, String> {
        let wrong = || format!("write MiB such as 64, or a size such as 512M or 2G, not {text:?}");
        if let Ok(count) = text.parse() {
            return Ok(Mebibytes(count));
        }
        let Size(bytes) = text.parse().map_err(|_: String| wrong())?;
        if bytes % (1 << 20) != 0 {
            return Err(format!("{text} is not a whole number of MiB"));
        }
        Ok(Mebibytes(bytes >> 20))
    }
}

/// Seconds, at least one.
#[derive(Clone, Copy)]
pub(super) struct Seconds(pub(super) std::time::Duration);

impl std::str::FromStr for Seconds {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Seconds, String> {
        let seconds = text.parse::<u32>().ok().filter(|&seconds| seconds > 0);
        let seconds =
            seconds.ok_or_else(|| format!("write whole seconds such as 60, not {text:?}"))?;
        Ok(Seconds(std::time::Duration::from_secs(seconds.into())))
    }
}

/// `0,2,3`
#[derive(Default)]
pub(super) struct CoreList(pub(super) Vec<usize>);

impl std::str::FromStr for CoreList {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<CoreList, String> {
        let available: Vec<usize> =
            core_affinity::get_core_ids().unwrap_or_default().iter().map(|core| core.id).collect();
        let cores: std::result::Result<Vec<usize>, _> = text.split(',').map(str::parse).collect();
        let cores = cores.map_err(|_| format!("write core numbers such as 0,2,3, not {text:?}"))?;
        match cores.iter().find(|core| !available.contains(core)) {
            Some(core) => Err(format!("umem may not use core {core}; write some of {available:?}")),
            None => Ok(CoreList(cores)),
        }
    }
}

pub(super) fn check_percent(name: &str, percent: u32) -> Result<()> {
    if percent <= 100 {
        return Ok(());
    }
    Err(Error::Usage(format!("--{name} is 0 to 100 percent, not {percent}")))
}

pub(super) fn check_lanes(lanes: u16) -> Result<()> {
    if (1..=umem_wire::limits::LANES_MAX).contains(&lanes) {
        return Ok(());
    }
    Err(Error::Usage(format!("--lanes is 1 to {}, not {lanes}", umem_wire::limits::LANES_MAX)))
}

/// The number of bulk lanes: the given number, or the default; 0 on a single connection.
pub(super) fn lanes_to(uri: &Uri, asked: Option<u16>, default: u16) -> Result<u16> {
    match asked {
        Some(_) if uri.is_one_connection() => Err(Error::Usage(format!(
            "--lanes: {uri} is one connection for all pages; leave out --lanes, or use tcp: or unix:"
        ))),
        None if uri.is_one_connection() => Ok(0),
        asked => several_lanes(asked, default),
    }
}

pub(super) fn several_lanes(asked: Option<u16>, default: u16) -> Result<u16> {
    let lanes = asked.unwrap_or(default);
    check_lanes(lanes)?;
    Ok(lanes)
}

/// A unix socket's path, as `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct UnixPath(pub(super) PathBuf);

impl std::str::FromStr for UnixPath {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<UnixPath, String> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(UnixPath(path.into())),
            _ => Err(format!("{text:?} is not unix:PATH")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_in_mebibytes_may_have_a_unit() {
        let parse = |text: &str| text.parse::<Mebibytes>().map(|size| size.0);
        assert_eq!(
            ["64", "64M", "2G", "2g", "1T"].map(|text| parse(text).unwrap()),
            [64, 64, 2048, 2048, 1 << 20]
        );
        for wrong in ["", "64X", "1.5G", "-1", "1500K"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert_eq!(parse("2048K"), Ok(2));
    }
}
