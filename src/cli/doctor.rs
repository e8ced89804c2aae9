//! `umem doctor`

use argh::{ArgsInfo, FromArgs};

use crate::doctor;
use crate::error::Result;

/// Say what this machine has of what umem needs, and what to do about the rest.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "doctor",
    note = "Each line says ok, warning (umem works, but slower or not for every guest) or missing, what \
            there is, and what it is for; below it is a command that mends it. It speaks of the user \
            who runs it: of both sides, so that a source may do without userfaultfd. What sysctl, \
            mount and setfacl set lasts until the next boot.",
    error_code(0, "umem can work here; there may be warnings."),
    error_code(1, "Something is missing that umem needs.")
)]
pub(super) struct Doctor {
    /// print JSON objects, one for each thing and a last one with the verdict
    #[argh(switch)]
    json: bool,
}

impl Doctor {
    pub(super) fn run(self) -> Result<i32> {
        Ok(doctor::run(self.json))
    }
}
