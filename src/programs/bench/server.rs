//! `umem bench server`: one test at a time.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use serde_json::json;

use super::lobby::{Lobby, refuse};
use super::protocol::{
    Control, Counts, End, Measured, Message, Request, Test, region_bytes, unexpected,
};
use super::side::ThreadMessage;
use super::sides::{Sides, prepare};
use super::{lanes, report};
use crate::error::{Error, Result};
use crate::observe::output::Output;
use crate::runtime::accepting::Accepted;
use crate::runtime::inbox::{Inbox, Wake};
use crate::transport::lane::{Lane, Listener, new_session};
use crate::transport::secure::WayIn;
use crate::transport::uri::Uri;

const BUSY: &str = "the server is busy with another test: try again when that test has ended";

/// The options of `umem bench server`.
pub(crate) struct Server {
    pub(crate) uri: Uri,
    /// A client that is silent for this long, before or during a test, loses the server to the next.
    pub(crate) idle_timeout: Duration,
    /// End after one test.
    pub(crate) one_off: bool,
    /// Listen also on addresses that other machines can reach.
    pub(crate) insecure: bool,
    /// Cores of the lanes; None leaves the choice to umem.
    pub(crate) cores: Vec<usize>,
    pub(crate) json: bool,
}

/// Serves tests until it is interrupted.
pub(crate) fn run(options: &Server) -> Result<()> {
    let inbox = Inbox::new()?;
    let listener = Listener::bind(&options.uri)?;
    let uri = listener.uri(&options.uri);
    if !options.insecure && !WayIn::Listener(&listener).is_local() {
        return Err(Error::Usage(format!(
            "{uri} would be open to every host that can reach it, and tests take memory: give --insecure \
             if every host of the network is trusted"
        )));
    }
    let output = Output::new(options.json);
    output.event("listening", json!({ "uri": uri.to_string() }), &format!("listening on {uri}"));
    let mut desk = Desk { inbox, listener, lobby: Lobby::default() };
    loop {
        let Some((control, test)) = desk.next_test()? else {
            return Ok(());
        };
        match serve(&mut desk, &mut Control::new(control, "client"), test, options) {
            Ok((test, measured)) => {
                let sentence = report::served(&test, &measured);
                let mut fields = json!({ "test": test });
                for (direction, measured) in test.directions().iter().zip(measured) {
                    fields[report::named("result", &test, *direction)] = json!(measured);
                }
                output.event("tested", fields, &sentence);
            }
            Err(error) if options.one_off || matches!(error, Error::Interrupted(_)) => {
                return Err(error);
            }
            Err(error) => {
                output.event(
                    "test_failed",
                    json!({ "error": error.to_string() }),
                    &error.to_string(),
                );
            }
        }
        if options.one_off {
            return Ok(());
        }
    }
}

/// The event queue of a server.
struct Desk {
    inbox: Inbox<ThreadMessage>,
    listener: Listener,
    lobby: Lobby,
}

/// An event.
enum Happened {
    ThreadMessage(ThreadMessage),
    Signal,
    /// The test's control connection is readable.
    Control,
    /// A connection has sent its hello.
    Newcomer(OwnedFd, Request),
    Timeout,
}

impl Desk {
    fn wait(&mut self, control: Option<&Control>, deadline: Option<Instant>) -> Result<Happened> {
        loop {
            self.lobby.expire();
            let until = [deadline, self.lobby.deadline(), self.listener.deadline()];
            let until = until.into_iter().flatten().min();
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            let first = usize::from(control.is_some());
            // In the order of importance: many new connections do not delay a test.
            let mut sockets: Vec<_> = control.iter().map(|control| control.as_fd()).collect();
            sockets.extend(self.lobby.sockets());
            let door = sockets.len();
            sockets.extend(self.listener.interest());
            match self.inbox.wait(&sockets, left)? {
                Wake::Message(note) => return Ok(Happened::ThreadMessage(note)),
                Wake::Signal => return Ok(Happened::Signal),
                Wake::Ready(index) if index < first => return Ok(Happened::Control),
                Wake::Ready(index) if index == door => {
                    match self.listener.accept()? {
                        Accepted::One(socket) => self.lobby.admit(socket),
                        Accepted::Gone => {}
                        // The oldest connection is dropped; without one the accept is only tried again later.
                        Accepted::NoRoom(_) if self.lobby.show_out() => {}
                        Accepted::NoRoom(_) => self.listener.leave(),
                    }
                }
                Wake::Ready(index) => {
                    if let Some((socket, request)) = self.lobby.hear(index - first) {
                        return Ok(Happened::Newcomer(socket, request));
                    }
                }
                Wake::Timeout if deadline.is_some_and(|deadline| deadline <= Instant::now()) => {
                    return Ok(Happened::Timeout);
                }
                Wake::Timeout => {}
            }
        }
    }

    /// Waits for a client with a test; None when interrupted.
    fn next_test(&mut self) -> Result<Option<(OwnedFd, Test)>> {
        loop {
            match self.wait(None, None)? {
                Happened::Signal => return Ok(None),
                Happened::Newcomer(socket, Request::Test(test)) => return Ok(Some((socket, test))),
                Happened::Newcomer(socket, Request::Join { .. }) => {
                    refuse(socket, "the test of this lane has ended");
                }
                // Late messages of an earlier test's threads.
                Happened::ThreadMessage(_) | Happened::Control | Happened::Timeout => {}
            }
        }
    }
}

/// Runs a test, and notifies the client of a failure.
fn serve(
    desk: &mut Desk,
    control: &mut Control,
    mut test: Test,
    options: &Server,
) -> Result<(Test, Vec<Measured>)> {
    let result = test.check().map_err(Error::Bench).and_then(|()| {
        test.region_bytes = test.region_bytes.min(region_bytes(&test, End::Server)?);
        carry_out(desk, control, &test, options)
    });
    match result {
        Ok(measured) => Ok((test, measured)),
        Err(error) => {
            // Fails if the client was the cause.
            let _ = control.send(&Message::Failed(error.to_string()));
            Err(error)
        }
    }
}

fn carry_out(
    desk: &mut Desk,
    control: &mut Control,
    test: &Test,
    options: &Server,
) -> Result<Vec<Measured>> {
    let cookie: String = new_session()?.0.iter().map(|byte| format!("{byte:02x}")).collect();
    let region_bytes = test.region_bytes;
    control.send(&Message::Accepted { cookie: cookie.clone(), region_bytes })?;
    let prepared = prepare(test, End::Server)?;
    let lanes = gather(desk, control, test, &cookie, options.idle_timeout)?;
    let zero_copy = !report::is_local(control.as_fd());
    let mut sides = Sides::start(test, prepared, lanes, &options.cores, zero_copy, &desk.inbox)?;
    control.send(&Message::Started)?;
    let output = Output::new(options.json);
    output.event("testing", json!({ "test": test }), "");
    let mut finishing = false;
    let mut quiet = Quiet::new(options.idle_timeout);
    while !(finishing && sides.has_ended()) {
        quiet.check(&sides)?;
        match desk.wait(Some(control), Some(quiet.until))? {
            Happened::ThreadMessage(note) => {
                sides.take(note)?;
            }
            Happened::Signal => {
                return Err(Error::Interrupted("the server ended during a test".into()));
            }
            Happened::Newcomer(socket, _) => refuse(socket, BUSY),
            Happened::Timeout => {}
            Happened::Control => match control.receive()? {
                None => {}
                Some(Message::Measure) => {
                    sides.measure();
                    quiet = Quiet::new(options.idle_timeout);
                }
                Some(Message::AskFaults) => {
                    let latency = sides.interval_faults().unwrap_or_default();
                    control.send(&Message::Faults(latency))?;
                }
                Some(Message::Stop) => break,
                Some(Message::Finish) => {
                    finishing = true;
                    quiet = Quiet::new(options.idle_timeout);
                }
                Some(other) => return Err(unexpected(&other)),
            },
        }
    }
    let measured = sides.end()?;
    control.send(&Message::Result(measured.clone()))?;
    Ok(measured)
}

/// The time of the last progress, so that a stalled client does not block others.
struct Quiet {
    limit: Duration,
    until: Instant,
    moved: u64,
}

impl Quiet {
    fn new(limit: Duration) -> Quiet {
        Quiet { limit, until: Instant::now() + limit, moved: 0 }
    }

    fn check(&mut self, sides: &Sides) -> Result<()> {
        let bytes = |counts: Counts| counts.bytes.saturating_add(counts.zero_bytes);
        let moved = sides.so_far().into_iter().map(|(_, counts, _)| bytes(counts));
        let moved = moved.fold(0, u64::saturating_add);
        if moved != self.moved {
            self.moved = moved;
            self.until = Instant::now() + self.limit;
        }
        if self.until > Instant::now() {
            return Ok(());
        }
        let seconds = self.limit.as_secs();
        Err(Error::Bench(format!(
            "nothing has moved for {seconds} s (--idle-timeout): the server is free for the next test"
        )))
    }
}

/// Waits until every lane of the test is open.
fn gather(
    desk: &mut Desk,
    control: &mut Control,
    test: &Test,
    cookie: &str,
    limit: Duration,
) -> Result<Vec<Lane>> {
    let deadline = Instant::now() + limit;
    let mut lanes: Vec<Option<Lane>> = (0..test.connections()).map(|_| None).collect();
    while lanes.iter().any(Option::is_none) {
        match desk.wait(Some(control), Some(deadline))? {
            Happened::Newcomer(socket, Request::Join { cookie: said, lane }) if said == cookie => {
                match lanes.get_mut(usize::from(lane)) {
                    Some(slot @ None) => {
                        *slot = Some(lanes::lane(socket, lane, test)?);
                    }
                    _ => refuse(socket, "the test has no such lane, or has it already"),
                }
            }
            Happened::Newcomer(socket, _) => refuse(socket, BUSY),
            Happened::Signal => {
                return Err(Error::Interrupted("the server ended before the test began".into()));
            }
            Happened::Control => {
                if let Some(other) = control.receive()? {
                    return Err(unexpected(&other));
                }
            }
            Happened::Timeout => {
                return Err(Error::Bench(format!(
                    "the client has not opened its {} lanes in {} s",
                    test.connections(),
                    limit.as_secs()
                )));
            }
            Happened::ThreadMessage(_) => {}
        }
    }
    Ok(lanes.into_iter().flatten().collect())
}
