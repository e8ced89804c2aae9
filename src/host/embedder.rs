//! The program that umem is a part of, as either side of a migration sees it: events one way, answers and orders the
//! other. `embed` implements it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::monitor::{Answer, Question};
use crate::error::{Error, Result};
use crate::observe::output::Output;
use crate::observe::watch::Watch;
use crate::runtime::inbox::Canceller;
use crate::statistics::Counters;
use crate::transport::lane::{Listener, ShutdownHandle};
use crate::transport::uri::Uri;

/// Where answers go.
pub(crate) type Answers = Box<dyn Fn(Answer) + Send + Sync>;

/// Where orders go.
pub(crate) type Orders = Box<dyn Fn(LinkOrder) -> Result<()> + Send + Sync>;

/// What the control thread tells the program around it, and asks it.
pub(crate) trait Embedder: Send + Sync {
    /// How the program ends the migration.
    fn canceller(&self) -> Canceller;
    /// Where answers go from here on.
    fn answers(&self, post: Answers);
    /// Every lane is open.
    fn connected(&self, lanes: ShutdownHandle);
    /// The lanes that may have to be ended from here on are these.
    fn connected_by(&self, lanes: ShutdownHandle);
    /// Lanes can be given up and opened again, on as many `connections`.
    fn takes_orders(&self, connections: u16, post: Orders);
    /// What is counted from here on, and the size of the guest's memory in bytes.
    fn watch(&self, counters: Arc<Counters>, total_bytes: u64);
    /// Asks the program's monitor something. The answer follows, perhaps at once.
    fn ask(&self, question: Question);
    /// Where events go that are neither questions nor the end.
    fn output(self: Arc<Self>) -> Output;
}

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
