//! How a migration ends at the source: memory is compared and freed, threads end, the guest goes on after a
//! failure, and what happened is told.

use std::sync::atomic::Ordering::{Relaxed, Release};
use std::time::{Duration, Instant};

use umem_ring::Waker;
use umem_wire::source::Phase;
use umem_wire::{FaultCode, Frame, PageSize, Totals, transmit};

use super::demand::Command;
use super::parting::{Caller, GOODBYE_PING, is_nobody};
use super::{Migration, Note, digest};
use crate::control::event::{Event, Remark};
use crate::error::{Error, Result};
use crate::host::thread::Answer;
use crate::inbox::Wake;
use crate::lane;
use crate::report::{Completed, CpuTime};
use crate::worker;

/// How long a monitor may take to put back what has no effect on the guest.
const TIDY_PATIENCE: Duration = Duration::from_secs(5);

/// How long a monitor may take to let its guest go on before that is remarked on.
const RESUME_PATIENCE: Duration = Duration::from_secs(10);

/// How long the destination may take to answer the goodbye. Nobody depends on that.
const GOODBYE_PATIENCE: Duration = Duration::from_secs(2);

/// How long the goodbye is tried again: who resumes a destination that was killed is there by then.
const GOODBYE_AGAIN_PATIENCE: Duration = Duration::from_secs(5);

/// How long a destination is tried that may have loaded the guest.
const TELL_PATIENCE: Duration = Duration::from_secs(30);

impl Migration {
    /// The destination has everything: says goodbye, after it is known what everything comes to where that
    /// is compared.
    pub(super) fn completed(&mut self) -> Result<()> {
        if self.digesting.is_done() {
            // Before it is said that the destination has what was here.
            self.memory.check_files(self.digesting.are_compared())?;
            self.say_goodbye();
            return Ok(());
        }
        self.end_release();
        self.progress.phase("comparing");
        digest::begin(self.memory.clone(), self.inbox.post())
    }

    /// Written down before it is said: whoever takes over then knows that nobody needs what is here, whether the
    /// destination has heard the goodbye or not.
    fn say_goodbye(&mut self) {
        let goodbye = Frame::Complete(self.memory.counters.totals());
        if self.link.keeper.is_none() {
            return self.send(&goodbye);
        }
        self.keep_completed();
        let mut bytes = Vec::new();
        transmit::encode(&goodbye, &mut bytes);
        self.command(Command::SendAndPing(bytes, GOODBYE_PING));
        self.link.parting = Some(Instant::now() + GOODBYE_PATIENCE);
    }

    /// The lanes are lost: whether the goodbye has come is not known.
    pub(super) fn parting_is_lost(&mut self) {
        self.link.is_unheard |= self.link.parting.take().is_some();
    }

    /// Says goodbye again where it was lost: a destination that was killed over it, and one that cannot be reached
    /// at this moment, would wait for it.
    pub(super) fn part(&mut self) {
        if !self.link.is_unheard {
            return;
        }
        let Some(uri) = self.link.uri.clone() else { return };
        let (session, pass) = (self.link.session, self.link.pass.clone());
        let landing = self.memory.landing().clone();
        let Migration { inbox, link, .. } = self;
        let caller = Caller { uri: &uri, session, pass: &pass, inbox };
        if let Err(error) =
            caller.goodbye(&landing, &mut || link.next_epoch(), GOODBYE_AGAIN_PATIENCE)
        {
            tracing::debug!("the goodbye was not said again: {error}");
        }
    }

    /// Before the commit: the guest goes on here, and a destination that may have loaded it is told so if its lanes
    /// were lost. It would keep its guest for the case.
    fn tell_that_it_stays(&mut self, error: &Error) {
        let may_be_loaded = matches!(self.phase, Phase::Loading { .. } | Phase::Loaded { .. });
        let Some(uri) = self.link.uri.clone() else { return };
        let Error::Lost { lane, what, .. } = error else { return };
        if !may_be_loaded || !self.link.recovers() {
            return;
        }
        let (lane, reason) = (lane.clone(), what.clone());
        self.output.tell(&Event::Telling { uri: uri.clone(), lane, reason });
        let (session, pass) = (self.link.session, self.link.pass.clone());
        let Migration { inbox, link, .. } = self;
        let caller = Caller { uri: &uri, session, pass: &pass, inbox };
        let why = Error::Interrupted(
            "the guest goes on at the source, which had lost the connection".into(),
        );
        let told = caller.gave_up(&why, &mut || link.next_epoch(), TELL_PATIENCE);
        // Where nobody listens nobody waits either.
        if let Err(error) = told
            && !is_nobody(&error)
        {
            self.output.tell(&Event::Untold { uri, reason: error.to_string() });
        }
    }

    /// It is known now. That it cannot be changes nothing for the guest, which has moved, unless it is for the
    /// files, which may have failed before, too.
    pub(super) fn digested(&mut self, outcome: Result<digest::Outcome>) -> Result<()> {
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error @ Error::RamFailed { .. }) => return Err(error),
            Err(error) => {
                self.remark(Remark::NotCompared { reason: error.to_string() });
                None
            }
        };
        self.digesting.known(outcome);
        if let Some(digests) = self.digesting.ours() {
            self.send(&Frame::Digests(digests.clone()));
        }
        self.completed()
    }

    /// Nothing is freed on the way any more.
    fn end_release(&mut self) {
        self.memory.is_ending.store(true, Release);
        self.memory.releaser.get().into_iter().for_each(Waker::wake);
        if let Some(thread) = self.release_thread.take() {
            let _ = thread.join();
        }
    }

    /// At the end the destination has every page.
    pub(super) fn release_rest(&self) -> Result<u64> {
        if !self.memory.releases {
            return Ok(0);
        }
        self.memory.regions.iter().try_for_each(|region| region.ram.free())?;
        Ok(self.allocated_bytes.saturating_sub(self.memory.allocated_bytes()?))
    }

    /// After a failure: resumes the guest where that is still right, and says how things stand.
    pub(super) fn give_up(mut self, error: Error) -> Error {
        if !self.phase.may_run() && !self.link.is_not_given_away {
            let is_served = matches!(self.phase, Phase::Completed(_))
                && matches!(error, Error::RamFailed { .. });
            if matches!(error, Error::Peer { code: FaultCode::Ended, .. }) || is_served {
                // Its guest has ended, or has every page: nothing could go on.
                self.forget_session();
            }
            return match error {
                Error::Lost { side, lane, what } => Error::Lost {
                    side,
                    lane,
                    what: format!(
                        "{what}; the guest may be running at the destination: do not start it here \
                         again, and keep its RAM file"
                    ),
                },
                Error::RamFailed { name, path, what } => {
                    let what = format!("{what}; {}", self.what_a_failed_file_means());
                    Error::RamFailed { name, path, what }
                }
                other => other,
            };
        }
        self.host.resume();
        if self.times.stopped.is_none() {
            // There is nothing of the guest's to undo, and nobody waits for long.
            let _ = self.host_answers(TIDY_PATIENCE, |answer| match answer {
                Answer::Resumed(result) => Some(result),
                _ => None,
            });
            self.forget_session();
            return error;
        }
        self.keep_stopped();
        // Whoever has interrupted knows what for; everybody else hears it when it takes long, or interrupts.
        let mut is_told = matches!(error, Error::Interrupted(_));
        let mut until = Some(Instant::now() + RESUME_PATIENCE);
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            match self.inbox.wait(&[], left) {
                Ok(Wake::Message(Note::Host(Answer::Resumed(Ok(()))))) => {
                    self.forget_session();
                    self.tell_that_it_stays(&error);
                    return error;
                }
                Ok(Wake::Message(Note::Host(Answer::Resumed(Err(resume))))) => {
                    return Error::Host(format!(
                        "{error}; and the guest could not be resumed here: {resume}; resume it by \
                         hand with the monitor command `cont`"
                    ));
                }
                Ok(Wake::Timeout) => {
                    (until, is_told) = (None, true);
                    self.remark(Remark::AwaitsMonitor);
                }
                // A program that embeds this has another way to end it, which no cancel is.
                Ok(Wake::Signal) if self.inbox.is_embedded() => {}
                Ok(Wake::Signal) if is_told => return self.left_to_monitor(&error),
                Ok(Wake::Signal) => {
                    (until, is_told) = (None, true);
                    self.remark(Remark::AwaitsMonitor);
                }
                Ok(_) => {}
                Err(inbox) => return inbox,
            }
        }
    }

    /// The guest has gone; what was changed in its monitor has been put back when this returns, or it does not
    /// answer.
    pub(super) fn wait_put_back(&mut self) {
        if !self.puts_back {
            return;
        }
        let answer = self.host_answers(TIDY_PATIENCE, |answer| match answer {
            Answer::PutBack(result) => Some(result),
            _ => None,
        });
        let none = || Err(Error::Host("it does not answer".into()));
        self.has_put_back(&answer.ok().flatten().unwrap_or_else(none));
    }

    /// The monitor's next answer of a kind; none when it takes longer than that, or somebody interrupts.
    fn host_answers<T>(
        &self,
        patience: Duration,
        kind: impl Fn(Answer) -> Option<T>,
    ) -> Result<Option<T>> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.inbox.wait(&[], Some(left))? {
                Wake::Message(Note::Host(answer)) => {
                    if let Some(answer) = kind(answer) {
                        return Ok(Some(answer));
                    }
                }
                Wake::Timeout | Wake::Signal => return Ok(None),
                _ => {}
            }
        }
    }

    /// A RAM file has failed after the switchover: what that means, and what to do.
    fn what_a_failed_file_means(&self) -> String {
        if matches!(self.phase, Phase::Completed(_)) {
            return "the destination has every page, and whether all of them are right is not known: stop its \
                    guest, and start it again from something older than this, unless the change is known to \
                    have come last"
                .into();
        }
        let how = match (self.how_to_resume(), &self.link.keeper) {
            (Some(how), Some(keeper)) => {
                // So that whoever resumes it need not show that the file is as it was.
                let _ = keeper.edit(|record| record.file_failed = true);
                format!(
                    "write what it held back into the same file, of the same length, then {how} goes on"
                )
            }
            _ => "this session cannot go on".into(),
        };
        format!(
            "the guest runs at the destination and waits for pages that were only here: do not start it here \
             again; {how}"
        )
    }

    /// Nobody waits any more for a monitor that does not answer. The session stays.
    fn left_to_monitor(&self, error: &Error) -> Error {
        let error = match error {
            Error::Interrupted(_) => "interrupted".to_owned(),
            other => other.to_string(),
        };
        let how = self.how_to_resume();
        let how = how.map_or_else(String::new, |how| format!("; or, when it answers again: {how}"));
        Error::Host(format!(
            "{error}; but it has not answered, so that the guest may stand still here, or go on later: ask it \
             with the monitor command `query-status`, and have the guest go on with `cont`{how}"
        ))
    }

    /// Ends the threads. What was to be sent still goes out, the reason of a failure last, by us if
    /// the demand thread is the one that failed.
    ///
    /// A panic after the commit is told as a kill would be: by the lanes' end. The destination then waits for who
    /// takes this session over, and does not give up as well.
    pub(super) fn end(&mut self, error: Option<&Error>) {
        let is_resumable = !self.phase.may_run() && self.link.recovers();
        let is_kept = is_resumable && self.link.keeper.is_some();
        let told = error.filter(|error| !(is_kept && matches!(error, Error::Internal(_))));
        if let Some(error) = told {
            self.send(&Frame::Error(error.to_fault()));
        }
        self.command(Command::End);
        self.bulk_wakers.iter().for_each(Waker::wake);
        for thread in self.bulk_threads.drain(..) {
            let _ = thread.join();
        }
        self.end_release();
        // None while there are no lanes.
        let sever = || self.link.sockets.sever();
        let demand = self.demand_thread.take();
        let demand = demand.map(|thread| worker::part(thread, error.is_some(), sever));
        if let (Some(Ok(None) | Err(_)), Some(reach), Some(error)) = (demand, &self.reach, told) {
            lane::tell(&reach.socket, self.memory.is_checked, error);
        }
    }

    pub(super) fn report(&self, totals: Totals) -> Completed {
        let seconds = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from).as_secs_f64(),
            _ => 0.0,
        };
        let times = &self.times;
        let ours = self.memory.counters.totals();
        let moving_s = seconds(times.first_page.or(times.stopped), times.completed);
        let unit = self.memory.regions.iter().map(|region| region.unit()).min();
        if self.has_monitor && self.output.is_for_person() {
            self.remark(Remark::QuitMonitor);
        }
        Completed {
            event: "completed".into(),
            role: "source".into(),
            kind: "shared".into(),
            page_size: unit.map_or(0, PageSize::bytes),
            lanes: self.lane_count,
            total_bytes: self.memory.total_bytes(),
            data_bytes: totals.data_bytes,
            zero_bytes: totals.zero_bytes,
            hole_bytes: totals.hole_bytes,
            pages_demand: ours.pages_demand,
            pages_background: ours.pages_background,
            downtime_ms: self.downtime().as_secs_f64() * 1e3,
            drain_s: seconds(times.running, times.completed),
            total_s: seconds(times.stopped, times.completed),
            gbps: if moving_s > 0.0 { totals.data_bytes as f64 * 8e-9 / moving_s } else { 0.0 },
            fault_latency_us: None,
            fault_stages_us: None,
            cpu_s: CpuTime::of_this_process(),
            zero_copy: self.memory.counters.zero_copy(),
            release_bytes: 0,
            spare_bytes_max: 0,
            congestion: self.congestion.clone(),
            recoveries: self.link.recoveries,
            disconnected_s: self.link.disconnected.as_secs_f64(),
            checksum: self.memory.is_checked,
            checksum_errors: self.memory.counters.checksum_errors.load(Relaxed),
            digests: self.digesting.compared(&self.memory),
        }
    }
}
