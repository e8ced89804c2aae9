//! The threads that serve lanes: how they are started, how they say that they could not go on.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use crate::error::{Context, Error, Result};
use crate::inbox::{Inbox, Post, Wake};

/// A note that can carry a worker's failure.
pub(crate) trait Failure: Send + 'static {
    /// The note that says why a worker could not go on.
    fn failed(error: Error) -> Self;
    /// The failure in a note, if that is what it is.
    fn into_failure(self) -> Option<Error>;
}

/// Starts `body` on a thread of its own and waits until it has said that it runs; what it says then
/// is returned. A failure at any time, a panic included, is posted to the inbox.
pub(crate) fn start<N: Failure, S: Send + 'static, T: Send + 'static>(
    name: &str,
    inbox: &Inbox<N>,
    body: impl FnOnce(Started<S>) -> Result<T> + Send + 'static,
) -> Result<(S, JoinHandle<Option<T>>)> {
    let (sender, receiver) = channel();
    let post = inbox.post();
    let thread = std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || run(&post, || body(Started(sender))))
        .context(|| format!("starting thread {name}"))?;
    Ok((started_or_failed(&receiver, inbox)?, thread))
}

/// What a worker says once, when it can be reached.
pub(crate) struct Started<S>(Sender<S>);

impl<S> Started<S> {
    pub(crate) fn with(self, reach: S) {
        // The control thread waits for this; where it has gone nobody needs it.
        let _ = self.0.send(reach);
    }
}

/// A worker that panics must not leave the control thread waiting for ever: what it served stands
/// still, and whoever depends on it is told.
fn run<N: Failure, T>(post: &Post<N>, body: impl FnOnce() -> Result<T>) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => Some(value),
        Ok(Err(error)) => {
            post.send(N::failed(error));
            None
        }
        Err(_) => {
            post.send(N::failed(Error::Internal));
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
