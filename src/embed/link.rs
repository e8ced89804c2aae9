//! What a program may want done with the connections of a migration that goes on without them.

use std::os::fd::OwnedFd;

use crate::error::{Error, Result};
use crate::lane::Listener;
use crate::observe::watch::Watch;
use crate::uri::Uri;

/// What is to be done with the lanes.
pub(crate) enum LinkOrder {
    /// Give them up, and open none until another order.
    Pause,
    /// Open them again as before.
    Resume,
    /// A source: open them at this address.
    Dial(Uri),
    /// A destination: take them here.
    Listen(Listener),
    /// Open them on these, the demand lane's first.
    Reconnect(Vec<OwnedFd>),
}

/// Whether orders are followed now.
///
/// # Errors
/// [`Error::Usage`], why not.
pub(crate) fn check(recovers: bool, watch: &Watch) -> Result<()> {
    if !recovers {
        return Err(Error::Usage(
            "this migration ends with its connections: set recover on both sides before they start"
                .into(),
        ));
    }
    if !watch.is_committed() {
        return Err(Error::Usage(
            "the guest has not been handed over: without its connections it would stay at the source, as \
             after a cancel"
                .into(),
        ));
    }
    Ok(())
}
