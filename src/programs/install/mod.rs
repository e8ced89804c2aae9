//! Files that a package installs beside the executable: the manual and shell completions, both generated from the
//! command line's definitions, and the files in this folder: `deb`, which builds the Debian package, and the units for
//! systemd.

pub(crate) mod manual;

use std::str::FromStr;

use argh::CommandInfoWithArgs;
use argh_complete::Generator;
use argh_complete::bash::Bash;
use argh_complete::fish::Fish;
use argh_complete::zsh::Zsh;

/// A shell with completions for umem's options.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Shell {
    Bash,
    Zsh,
    Fish,
}

impl FromStr for Shell {
    type Err = String;

    fn from_str(text: &str) -> Result<Shell, String> {
        match text {
            "bash" => Ok(Shell::Bash),
            "zsh" => Ok(Shell::Zsh),
            "fish" => Ok(Shell::Fish),
            _ => Err(format!("the shells are bash, zsh and fish, not {text:?}")),
        }
    }
}

/// The completion script for the shell.
pub(crate) fn completions(shell: Shell, umem: &CommandInfoWithArgs) -> String {
    match shell {
        Shell::Bash => Bash::generate("umem", umem),
        Shell::Zsh => Zsh::generate("umem", umem),
        Shell::Fish => Fish::generate("umem", umem),
    }
}
