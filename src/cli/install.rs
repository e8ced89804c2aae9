//! `umem man` and `umem completions`

use argh::{ArgsInfo, FromArgs};

use super::Arguments;
use crate::error::{Error, Result};
use crate::programs::install;
use crate::runtime::print;

/// Print a page of the manual, in roff.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "man",
    example = "Read about umem migrate:\n  {command_name} migrate | man -l -"
)]
pub(super) struct Man {
    /// the command of the page (default: umem as a whole)
    #[argh(positional)]
    command: Option<String>,
}

impl Man {
    pub(super) fn run(self) -> Result<i32> {
        let umem = Arguments::get_args_info();
        let Some(page) = install::manual::page(&umem, self.command.as_deref()) else {
            let names: Vec<&str> = umem.commands.iter().map(|sub| sub.name).collect();
            return Err(Error::Usage(format!(
                "no such command: write one of {}",
                names.join(", ")
            )));
        };
        print::out(&page);
        Ok(0)
    }
}

/// Print the script with which a shell completes umem's commands and options.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "completions",
    example = "In a running bash:\n  source <({command_name} bash)"
)]
pub(super) struct Completions {
    /// bash, zsh or fish
    #[argh(positional)]
    shell: install::Shell,
}

impl Completions {
    pub(super) fn run(self) -> Result<i32> {
        print::out(install::completions::script(self.shell));
        Ok(0)
    }
}
