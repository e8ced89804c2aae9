//! The side that starts the guest at the destination.

use std::str::FromStr;

/// The decision that the guest stops at the source and runs at the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Switchover {
    /// umem stops and starts the guest, through the monitors of both sides.
    #[default]
    Umem,
    /// A program that manages both monitors decides: umem starts the guest on neither side.
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
