//! `umem doctor`

use argh::{ArgsInfo, FromArgs};

use crate::error::Result;
use crate::programs::doctor;

/// Check what umem needs on this machine, and print the command that mends each problem.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "doctor",
    note = "Each line says ok, warning (umem works, but is slower or cannot move every guest) or \
            missing, then what there is and what it is for. Below a problem stands the command \
            that mends it. The result is valid for the user who runs the command, and covers \
            both sides: a host that is only a source needs no userfaultfd. Settings made by \
            sysctl, mount and setfacl last until the next boot.",
    error_code(0, "umem can work here; there may be warnings."),
    error_code(1, "Something is missing that umem needs.")
)]
pub(super) struct Doctor {
    /// print JSON objects, one for each check and a last one with the verdict
    #[argh(switch)]
    json: bool,
}

impl Doctor {
    pub(super) fn run(self) -> Result<i32> {
        Ok(doctor::run(self.json))
    }
}
