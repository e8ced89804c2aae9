//! `umem doctor`

use argh::{ArgsInfo, FromArgs};

use crate::error::Result;
use crate::programs::doctor;

/// Check this machine for the needs of umem, and print the command that solves each problem.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "doctor",
    note = "Each line starts with ok, warning (umem works, but is slower or cannot move every \
            guest) or missing. The finding and its purpose follow. The command that solves a \
            problem is on the next line. The result is valid for the user who runs the command, \
            and covers both sides: a host that is only a source needs no userfaultfd. Settings \
            made with sysctl, mount and setfacl last until the next boot.",
    error_code(0, "umem works here, possibly with warnings."),
    error_code(1, "A need of umem is missing.")
)]
pub(super) struct Doctor {
    /// print JSON objects: one for each check, then one with the verdict
    #[argh(switch)]
    json: bool,
}

impl Doctor {
    pub(super) fn run(self) -> Result<i32> {
        Ok(doctor::run(self.json))
    }
}
