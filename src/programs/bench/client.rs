//! `umem bench client`: runs one test and reports it.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::lanes;
use super::options::Client;
use super::protocol::{
    Control, Direction, End, JOIN_TIMEOUT, Message, Request, Test, hello, region_bytes, unexpected,
};
use super::report::{self, Report, Tick};
use super::side::ThreadMessage;
use super::sides::{Sides, SoFar, prepare};
use crate::error::{Error, Result};
use crate::runtime::inbox::{Inbox, Wake};
use crate::runtime::print;
use crate::transport::lane::HELLO_TIMEOUT;
use crate::transport::secure::connect_to;

/// How long a server may take to count, and to check landed pages.
const RESULT_TIMEOUT: Duration = Duration::from_secs(60);

/// How far the control connection may be behind a lane when the server gives up.
const CAUSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Runs the test, and prints its results. The value is the exit status.
pub(crate) fn run(options: &Client) -> Result<i32> {
    let mut report = Report::new(options);
    match test(options, &mut report) {
        Ok(is_whole) => Ok(i32::from(!is_whole)),
        Err(error) if options.json => {
            print::err_line(&format!("umem: {error}"));
            report.failed(&error);
            Ok(error.exit_status())
        }
        Err(error) => Err(error),
    }
}

/// False if the test was interrupted; its partial results are reported.
fn test(options: &Client, report: &mut Report) -> Result<bool> {
    let inbox = Inbox::new()?;
    let mut test = options.test.clone();
    test.region_bytes = test.region_bytes.min(region_bytes(&test, End::Client)?);
    let mut control = connect(options, &inbox)?;
    control.write(&hello(Request::Test(test.clone())))?;
    let cookie = match reply(&inbox, &mut control, HELLO_TIMEOUT)? {
        Message::Accepted { cookie, region_bytes } => {
            test.region_bytes = region_bytes;
            cookie
        }
        Message::Refused(text) | Message::Failed(text) => return Err(gave_up(&text)),
        other => return Err(unexpected(&other)),
    };
    test.check().map_err(Error::Bench)?;
    let prepared = prepare(&test, End::Client)?;
    let mut lanes = Vec::new();
    for lane in 0..test.connections() {
        let connection = connect(options, &inbox)?;
        connection.write(&hello(Request::Join { cookie: cookie.clone(), lane }))?;
        lanes.push(lanes::lane(connection.into_socket(), lane, &test)?);
    }
    match reply(&inbox, &mut control, JOIN_TIMEOUT)? {
        Message::Started => {}
        Message::Failed(text) => return Err(gave_up(&text)),
        other => return Err(unexpected(&other)),
    }
    report.started(&test, &cookie);
    let zero_copy = !report::is_local(control.as_fd());
    let mut sides = Sides::start(&test, prepared, lanes, &options.cores, zero_copy, &inbox)?;
    let ended = watch(options, &inbox, &mut control, &mut sides, report)?;
    sides.stop();
    control.send(if ended == Ended::Finished { &Message::Finish } else { &Message::Stop })?;
    let theirs = loop {
        match reply(&inbox, &mut control, RESULT_TIMEOUT)? {
            Message::Result(measured) => break measured,
            // For the last intervals.
            Message::Faults(latency) => report.faults(&test, latency),
            Message::Failed(text) => return Err(gave_up(&text)),
            other => return Err(unexpected(&other)),
        }
    };
    let ours = sides.end()?;
    if theirs.len() != ours.len() {
        return Err(Error::Bench("the server's results belong to another test".into()));
    }
    report.completed(&test, &ours, &theirs, ended == Ended::Interrupted);
    Ok(ended != Ended::Interrupted)
}

/// How a test ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// Its time was up.
    Stopped,
    /// All bytes have been moved.
    Finished,
    Interrupted,
}

/// Reports while the lanes run.
fn watch(
    options: &Client,
    inbox: &Inbox<ThreadMessage>,
    control: &mut Control,
    sides: &mut Sides,
    report: &mut Report,
) -> Result<Ended> {
    let mut omitting = !options.omit.is_zero();
    let mut since = Instant::now();
    let mut ticks = 1;
    // The time at which the last interval ended.
    let mut last = Duration::ZERO;
    loop {
        let end = if omitting { Some(options.omit) } else { options.duration };
        let end = end.map(|after| since + after);
        let tick = options.interval.map(|interval| since + interval * ticks);
        let until = [end, tick].into_iter().flatten().min();
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let ended = match inbox.wait(&[control.as_fd()], left)? {
            Wake::Message(note) => match sides.take(note) {
                Ok(true) => Some(Ended::Finished),
                Ok(false) => None,
                Err(error) => return Err(cause(inbox, control, error)),
            },
            Wake::Signal => Some(Ended::Interrupted),
            Wake::Ready(_) => {
                handle_message(control, &options.test, report)?;
                None
            }
            Wake::Timeout => {
                let now = Instant::now();
                if tick.is_some_and(|tick| tick <= now) {
                    let so_far = sides.so_far();
                    last = so_far[0].0;
                    interval(options, control, sides, so_far, omitting, report)?;
                    ticks += 1;
                }
                let is_over = end.is_some_and(|end| end <= now);
                if is_over && omitting {
                    omitting = false;
                    sides.measure();
                    control.send(&Message::Measure)?;
                    report.measure();
                    (since, ticks, last) = (Instant::now(), 1, Duration::ZERO);
                    None
                } else {
                    is_over.then_some(Ended::Stopped)
                }
            }
        };
        if let Some(ended) = ended {
            let so_far = sides.so_far();
            let rest = so_far[0].0.saturating_sub(last);
            if options.interval.is_some_and(|interval| rest > interval / 10 || ticks == 1) {
                interval(options, control, sides, so_far, omitting, report)?;
            }
            return Ok(ended);
        }
    }
}

/// A message of the server during a test.
fn handle_message(control: &mut Control, test: &Test, report: &mut Report) -> Result<()> {
    match control.receive()? {
        None => {}
        Some(Message::Faults(latency)) => report.faults(test, latency),
        Some(Message::Failed(text)) => return Err(gave_up(&text)),
        Some(other) => return Err(unexpected(&other)),
    }
    Ok(())
}

/// An interval has ended. The server's fault latencies must be requested; the interval is reported with the answer.
fn interval(
    options: &Client,
    control: &Control,
    sides: &Sides,
    so_far: Vec<SoFar>,
    omitted: bool,
    report: &mut Report,
) -> Result<()> {
    let test = &options.test;
    let asks = test.fault_rate > 0 && test.directions().contains(&Direction::Forward);
    report.tick(test, Tick { so_far, omitted, ours: sides.interval_faults() }, asks);
    if asks {
        control.send(&Message::AskFaults)?;
    }
    Ok(())
}

fn connect(options: &Client, inbox: &Inbox<ThreadMessage>) -> Result<Control> {
    let wait = |sockets: &[(std::os::fd::BorrowedFd<'_>, nix::poll::PollFlags)],
                limit: Option<Duration>| match inbox.wait_for(sockets, limit)? {
        Wake::Ready(_) => Ok(true),
        Wake::Timeout => Ok(false),
        Wake::Signal => Err(interrupted()),
        Wake::Message(_) => unreachable!("no thread runs before the lanes are open"),
    };
    let socket = connect_to(&options.uri, &wait).map_err(|error| match error {
        Error::Connect { uri, source } => Error::Bench(format!(
            "cannot connect to {uri}: {source}; start `umem bench server` there first"
        )),
        error => error,
    })?;
    Ok(Control::new(socket, "server"))
}

fn interrupted() -> Error {
    Error::Interrupted("nothing has been measured".into())
}

/// The server's next message.
fn reply(inbox: &Inbox<ThreadMessage>, control: &mut Control, limit: Duration) -> Result<Message> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match inbox.wait(&[control.as_fd()], Some(left))? {
            Wake::Ready(_) => {
                if let Some(message) = control.receive()? {
                    return Ok(message);
                }
            }
            Wake::Signal => return Err(interrupted()),
            // A lane that had ended with its end frame; a failure now is the server's, which sends the reason.
            Wake::Message(_) => {}
            Wake::Timeout => {
                return Err(Error::Bench(format!(
                    "the server has not answered in {} s; check that `umem bench server` listens there",
                    limit.as_secs()
                )));
            }
        }
    }
}

/// The reason of a lost lane: a server that gives up sends it on the control connection.
fn cause(inbox: &Inbox<ThreadMessage>, control: &mut Control, error: Error) -> Error {
    match reply(inbox, control, CAUSE_TIMEOUT) {
        Ok(Message::Failed(text)) => gave_up(&text),
        _ => error,
    }
}

fn gave_up(text: &str) -> Error {
    Error::Bench(format!("the server gave up: {text}"))
}
