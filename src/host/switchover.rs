//! Who has the guest run at the destination.

use std::str::FromStr;

/// Who decides that the guest stops at the source, and has it run at the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Switchover {
    /// Umem, by the monitors of both sides.
    #[default]
    Umem,
    /// A program that manages both monitors: umem tells neither of them to run the guest.
    External,
}

impl FromStr for Switchover {
    type Err = String;

    fn from_str(text: &str) -> Result<Switchover, String> {
        match text {
            "umem" => Ok(Switchover::Umem),
            "external" => Ok(Switchover::External),
            _ => Err(format!("{text:?} is neither umem nor external")),
        }
    }
}
