//! The interface between a migration's control thread and the program that embeds umem: events to the program, answers
//! and orders from it. `embed` implements it.

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

/// The function that receives the program's answers.
pub(crate) type Answers = Box<dyn Fn(Answer) + Send + Sync>;

/// The function that receives the program's orders.
pub(crate) type Orders = Box<dyn Fn(LinkOrder) -> Result<()> + Send + Sync>;

/// The control thread's events and questions to the program around it.
pub(crate) trait Embedder: Send + Sync {
    /// The handle by which the program cancels the migration.
    fn canceller(&self) -> Canceller;
    /// Sets the receiver of answers.
    fn answers(&self, post: Answers);
    /// Every lane is open.
    fn connected(&self, lanes: ShutdownHandle);
    /// Replaces the lanes that a cancellation shuts down.
    fn connected_by(&self, lanes: ShutdownHandle);
    /// Lanes can be given up and opened again, on as many `connections`.
    fn takes_orders(&self, connections: u16, post: Orders);
    /// Gives the counters of the migration, and the size of the guest's memory in bytes.
    fn watch(&self, counters: Arc<Counters>, total_bytes: u64);
    /// Asks the program's monitor a question. The answer follows, possibly before this returns.
    fn ask(&self, question: Question);
    /// The output for events that are neither questions nor the end.
    fn output(self: Arc<Self>) -> Output;
}

/// An order for the lanes.
pub(crate) enum LinkOrder {
    /// Give the lanes up, and open none until another order.
    Pause,
    /// Open them again as before.
    Resume,
    /// Source: open them at this address.
    Dial(Uri),
    /// Destination: accept them here.
    Listen(Listener),
    /// Open them on these descriptors, the demand lane's first.
    Reconnect(Vec<OwnedFd>),
}

/// Whether orders are followed now.
///
/// # Errors
/// [`Error::Usage`] with the reason.
pub(crate) fn check(recovers: bool, watch: &Watch) -> Result<()> {
    if !recovers {
        return Err(Error::Usage(
            "this migration ends with its connections: set recover on both sides before they start"
                .into(),
        ));
    }
    if !watch.is_committed() {
        return Err(Error::Usage(
            "the guest has not been handed over: without the connections it would stay at the source, as after a \
             cancellation"
                .into(),
        ));
    }
    Ok(())
}
