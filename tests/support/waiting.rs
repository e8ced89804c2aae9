//! Guests that wait behind `umem incoming` and touch nothing, and the snapshots that move to them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{Scratch, Umem};

/// Bytes of a page.
const PAGE: u64 = 4096;

/// A guest that maps its RAM and never touches it, behind `umem incoming`.
pub(crate) fn incoming_to_idle_guest(scratch: &Scratch, mib: u64) -> Umem {
    let ram = format!("ram0={}", scratch.ram("destination").display());
    let qmp = scratch.path("guest.qmp");
    let mib = mib.to_string();
    let guest = [env!("CARGO_BIN_EXE_umem"), "guest", "--incoming", "--threads", "0"];
    let mut arguments = vec!["incoming", "--json", "--ram", &ram, "tcp:127.0.0.1:0", "--"];
    arguments.extend(guest);
    arguments.extend(["--ram", &ram, "--size", &mib, "--qmp", qmp.to_str().unwrap()]);
    Umem::start(arguments)
}

/// A guest that reads page 0 while its device state is loaded, behind `umem incoming`.
pub(crate) fn incoming_to_loading_guest(scratch: &Scratch, mib: u64) -> Umem {
    let ram = format!("ram0={}", scratch.ram("destination").display());
    let qmp = scratch.path("guest.qmp").display().to_string();
    let mib = mib.to_string();
    let mut arguments = vec!["incoming", "--json", "--ram", &ram, "--qmp", &qmp];
    arguments.extend(["tcp:127.0.0.1:0", "--", env!("CARGO_BIN_EXE_umem"), "guest"]);
    arguments.extend(["--incoming", "--threads", "0"]);
    arguments.extend(["--ram", &ram, "--size", &mib, "--qmp", &qmp]);
    Umem::start(arguments)
}

/// The address of a destination.
pub(crate) fn uri_of(incoming: &mut Umem) -> String {
    incoming.event("listening")["uri"].as_str().unwrap().to_owned()
}

/// Writes a snapshot: data in two pages of three, zeroes written in every 16th, and holes. Returns the number of pages
/// with data.
pub(crate) fn write_snapshot(path: &Path, mib: u64) -> u64 {
    let file = File::create(path).unwrap();
    file.set_len(mib << 20).unwrap();
    let mut data_pages = 0;
    for page in (0..mib * 256).filter(|page| page % 3 != 0) {
        let is_zero = page % 16 == 1;
        let bytes: Vec<u8> =
            (0..PAGE).map(|at| if is_zero { 0 } else { (page * 31 + at) as u8 | 1 }).collect();
        file.write_all_at(&bytes, page * PAGE).unwrap();
        data_pages += u64::from(!is_zero);
    }
    data_pages
}

/// The contents of a file.
pub(crate) fn bytes_of(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}
