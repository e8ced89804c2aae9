//! Files that a package installs beside the executable: the manual, generated from the command line's definitions,
//! shell completions, and the files in this folder: `deb`, which builds the Debian package, and the units for
//! systemd.

pub(crate) mod completions;
pub(crate) mod manual;

use std::str::FromStr;

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
