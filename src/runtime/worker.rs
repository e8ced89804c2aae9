//! The threads that serve lanes: their start and their failures.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use umem_wire::LaneRole;

use super::inbox::{Inbox, Post, Wake};
use super::panics;
use crate::error::{Context, Error, Result, lane_name};
use umem_ring::{Mailbox, Waker};

/// How far the demand lane may lag behind a bulk lane when a peer gives up.
const CAUSE_TIMEOUT: Duration = Duration::from_secs(1);

/// How long sending the reason of a failure may take.
const PARTING_TIMEOUT: Duration = Duration::from_secs(2);

/// A message that can carry a worker's failure.
pub(crate) trait Failure: Send + 'static {
    /// The message with a worker's error.
    fn failed(error: Error) -> Self;
    /// The failure in a message, a worker's or the peer's, if it has one.
    fn into_failure(self) -> Option<Error>;
}

/// Starts `body` on a thread of its own and waits until the thread reports that it runs; returns
/// the report. A failure at any time, a panic included, is posted to the inbox.
pub(crate) fn start<N: Failure, S: Send + 'static, T: Send + 'static>(
    name: &str,
    inbox: &Inbox<N>,
    body: impl FnOnce(Started<S>) -> Result<T> + Send + 'static,
) -> Result<(S, JoinHandle<Option<T>>)> {
    let (sender, receiver) = channel();
    let post = inbox.post();
    let thread = std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            tracing::debug!("begins");
            let result = run(&post, || {
                panics::point(format_args!("beginning of {}", current_name()));
                body(Started(sender))
            });
            tracing::debug!("ends");
            result
        })
        .context(|| format!("starting thread {name}"))?;
    Ok((started_or_failed(&receiver, inbox)?, thread))
}

fn current_name() -> String {
    std::thread::current().name().unwrap_or_default().to_owned()
}

/// Takes a worker's report that it runs, once.
pub(crate) struct Started<S>(Sender<S>);

impl<S> Started<S> {
    /// For a worker whose report is not needed.
    pub(crate) fn unheard() -> Started<S> {
        Started(channel().0)
    }

    pub(crate) fn with(self, reach: S) {
        // The control thread waits for this; if it has ended, the report is not needed.
        let _ = self.0.send(reach);
    }
}

/// A worker that panics must not leave the control thread waiting forever: its lane has stopped,
/// and the panic is posted as an error.
fn run<N: Failure, T>(post: &Post<N>, body: impl FnOnce() -> Result<T>) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => Some(value),
        Ok(Err(error)) => {
            post.send(N::failed(error));
            None
        }
        Err(payload) => {
            post.send(N::failed(panics::error(&*payload)));
            None
        }
    }
}

fn started_or_failed<N: Failure, S>(started: &Receiver<S>, inbox: &Inbox<N>) -> Result<S> {
    if let Ok(reach) = started.recv() {
        return Ok(reach);
    }
    // The worker has dropped its end, and posts its error.
    loop {
        if let Wake::Message(note) = inbox.wait(&[], None)?
            && let Some(error) = note.into_failure()
        {
            return Err(error);
        }
    }
}

/// Waits for a thread's end. After a failure the thread gets [`PARTING_TIMEOUT`] to send its data,
/// which the peer may not read; then `sever` has to end its wait.
pub(crate) fn part<T>(
    thread: JoinHandle<T>,
    has_failed: bool,
    sever: impl FnOnce(),
) -> std::thread::Result<T> {
    let deadline = Instant::now() + PARTING_TIMEOUT;
    while has_failed && !thread.is_finished() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    if has_failed && !thread.is_finished() {
        sever();
    }
    thread.join()
}

/// Finds why a bulk lane was lost: a peer that gives up sends its reason on the demand lane and
/// closes all lanes, and lanes are not ordered against each other. Other errors are causes already.
pub(crate) fn first_cause<N: Failure>(inbox: &Inbox<N>, error: Error) -> Error {
    let demand = lane_name(LaneRole::Demand, 0);
    let is_effect = |error: &Error| matches!(error, Error::Lost { lane, .. } if *lane != demand);
    if !is_effect(&error) {
        return error;
    }
    let deadline = Instant::now() + CAUSE_TIMEOUT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(Wake::Message(note)) = inbox.wait(&[], Some(left)) else {
            return error;
        };
        if let Some(cause) = note.into_failure().filter(|cause| !is_effect(cause)) {
            return cause;
        }
    }
}

/// The address of a thread that waits for its ring.
pub(crate) struct ThreadHandle {
    pub(crate) waker: Waker,
    pub(crate) mailbox: Mailbox,
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Message(Option<Error>);

    impl Failure for Message {
        fn failed(error: Error) -> Message {
            Message(Some(error))
        }

        fn into_failure(self) -> Option<Error> {
            self.0
        }
    }

    fn lost(lane: &str) -> Error {
        Error::Lost { side: "source", lane: lane.into(), what: "closed".into() }
    }

    #[test]
    fn lost_bulk_lane_takes_its_cause_from_the_demand_lane() {
        let inbox = Inbox::new().unwrap();
        inbox.post().send(Message(None));
        inbox.post().send(Message(Some(lost("bulk lane 2"))));
        inbox.post().send(Message(Some(Error::Interrupted("why".into()))));
        let cause = first_cause(&inbox, lost("bulk lane 1"));
        assert!(matches!(cause, Error::Interrupted(_)), "{cause}");

        inbox.post().send(Message(Some(lost("demand lane"))));
        let cause = first_cause(&inbox, lost("bulk lane 1"));
        assert!(cause.to_string().contains("demand lane"), "{cause}");
    }

    #[test]
    fn error_with_its_own_cause_is_returned_at_once() {
        let inbox = Inbox::<Message>::new().unwrap();
        inbox.post().send(Message(Some(Error::Internal("why".into()))));
        let cause = first_cause(&inbox, lost("demand lane"));
        assert!(cause.to_string().contains("demand lane"), "{cause}");
    }
}
