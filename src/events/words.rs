//! The events of a migration as JSON and as sentences.

use serde_json::{Value, json};

use super::{
    AWAITS_STANDSTILL, Event, Lost, Missing, Pause, Place, Remark, Room, Route, Unanswered, Undone,
    awaits_cont,
};

/// The fields of a JSON event besides its name.
pub(crate) fn fields(event: &Event) -> Value {
    match event {
        Event::Listening { uri, guest_pid, handoff } => {
            json!({ "uri": uri, "guest_pid": guest_pid, "handoff": handoff })
        }
        Event::ListeningAgain { uri } => json!({ "uri": uri }),
        Event::AwaitsQemu { path } => json!({ "uri": format!("unix:{}", path.display()) }),
        Event::Connected { to: Some(uri), lanes, security, checksum } => json!({
            "uri": uri.to_string(), "lanes": lanes, "security": security, "checksum": checksum,
        }),
        Event::Connected { to: None, lanes, security, checksum } => {
            json!({ "lanes": lanes, "security": security, "checksum": checksum })
        }
        Event::Pass {
            pass,
            took,
            sent_bytes,
            dirty_bytes,
            hot_bytes,
            dirty_bytes_per_s,
            expected_downtime,
            is_cut,
        } => json!({
            "pass": pass,
            "seconds": took.as_secs_f64(),
            "sent_bytes": sent_bytes,
            "remaining_bytes": dirty_bytes,
            "hot_bytes": hot_bytes,
            "dirty_bytes_per_s": dirty_bytes_per_s,
            "expected_downtime_ms": expected_downtime.map(|time| time.as_secs_f64() * 1e3),
            "cut": is_cut,
        }),
        Event::Stopped { postcopy, session } => json!({ "postcopy": postcopy, "session": session }),
        Event::StoppedAtSource { postcopy } => json!({ "postcopy": postcopy }),
        Event::Running { downtime, .. } | Event::LeftToManager { downtime, .. } => {
            json!({ "downtime_ms": downtime.as_secs_f64() * 1e3 })
        }
        Event::Resumable { session, command } => json!({ "session": session, "command": command }),
        Event::Recovering { reason, route: Route::Waits { pages_missing } }
        | Event::Paused { reason, pause: Pause::Destination { pages_missing } } => {
            json!({ "reason": reason, "pages_missing": pages_missing })
        }
        Event::Recovering { reason, .. }
        | Event::Paused { reason, .. }
        | Event::Retrying { reason }
        | Event::Short { reason, room: Room::Elsewhere } => json!({ "reason": reason }),
        Event::Resumed { disconnected, recoveries, .. } => json!({
            "disconnected_ms": disconnected.as_secs_f64() * 1e3, "recoveries": recoveries,
        }),
        Event::Short { reason, room: Room::Here { missing, free } } => {
            json!({ "reason": reason, "missing_bytes": missing, "free_bytes": free })
        }
        Event::ChecksumError { reason, errors } => {
            json!({ "reason": reason, "checksum_errors": errors })
        }
        Event::Unanswered(Unanswered { uri, session, is_running, heard_bytes, .. }) => json!({
            "uri": uri.to_string(), "session": session, "running": is_running,
            "heard_bytes": heard_bytes,
        }),
        Event::Telling { uri, lane, reason } => {
            json!({ "uri": uri.to_string(), "lane": lane, "reason": reason })
        }
        Event::Untold { uri, reason } => json!({ "uri": uri.to_string(), "reason": reason }),
        Event::Undone { session, how } => match how {
            Undone::GoesOn | Undone::NothingLeft | Undone::Complete => {
                json!({ "session": session })
            }
            Undone::Parted { is_told } => {
                json!({ "session": session, "destination_knows": is_told })
            }
            Undone::Heard { is_told } => json!({ "session": session, "source_knows": is_told }),
        },
        Event::Abandoned { session, ram } => json!({ "session": session, "ram": ram }),
        Event::Unmapped { bytes } => json!({ "bytes": bytes }),
        Event::Damaged { error } => json!({ "error": error }),
        Event::Stays { session, .. } => json!({ "session": session }),
        Event::Stopping { guest_pid, .. } | Event::Left { guest_pid } => {
            json!({ "guest_pid": guest_pid })
        }
        Event::Releasing { guest_pid, is_stopped, .. } => {
            json!({ "guest_pid": guest_pid, "stopped": is_stopped })
        }
        Event::Remark(_) => json!({}),
    }
}

/// The event as a sentence for a user; empty if the event has no sentence.
pub(crate) fn sentence(event: &Event) -> String {
    match event {
        Event::Listening { uri, handoff: Some(path), .. } => {
            format!("waiting for a guest on {path} and a source on {uri}")
        }
        Event::Listening { uri, handoff: None, .. } => format!("waiting for a source on {uri}"),
        Event::AwaitsQemu { path } => format!(
            "waiting for QEMU's migration: have it migrate to unix:{}, with its capability return-path on",
            path.display()
        ),
        Event::ListeningAgain { uri } => format!("waiting for the source on {uri}"),
        Event::Connected { to: Some(uri), .. } => format!("connected to {uri}"),
        Event::Connected { to: None, lanes, .. } => format!("connected, {lanes} bulk lane(s)"),
        Event::Pass { pass, took, sent_bytes, dirty_bytes, dirty_bytes_per_s, is_cut, .. } => {
            let mib = |bytes: u64| bytes >> 20;
            let (sent, dirty, seconds) = (mib(*sent_bytes), mib(*dirty_bytes), took.as_secs_f64());
            match (is_cut, dirty_bytes_per_s) {
                (false, Some(rate)) => format!(
                    "pass {pass}: {sent} MiB sent in {seconds:.1} s, {dirty} MiB written meanwhile ({} MiB/s)",
                    mib(*rate)
                ),
                (false, None) => {
                    format!("pass {pass}: {sent} MiB sent in {seconds:.1} s, {dirty} MiB left")
                }
                (true, _) => format!(
                    "pass {pass} ends early: {sent} MiB sent in {seconds:.1} s, {dirty} MiB left"
                ),
            }
        }
        Event::Running { place, downtime } => {
            let place = match place {
                Place::Source => "at the destination",
                Place::Destination => "here",
            };
            let downtime_ms = downtime.as_secs_f64() * 1e3;
            format!("the guest runs {place}; it stood still for {downtime_ms:.1} ms")
        }
        Event::LeftToManager { place, downtime } => {
            let place = match place {
                Place::Source => "at the destination",
                Place::Destination => "here",
            };
            let downtime_ms = downtime.as_secs_f64() * 1e3;
            format!(
                "the guest may run {place} as soon as its manager starts it; it has stood still for {downtime_ms:.1} ms"
            )
        }
        Event::Resumable { command, .. } => {
            format!("if umem is killed here, take over with: {command}")
        }
        Event::Recovering { reason, route } => recovering(reason, route),
        Event::Paused { reason, pause } => paused(reason, *pause),
        Event::Resumed { place, disconnected, .. } => {
            let message = match place {
                Place::Source => "connected again",
                Place::Destination => "the source reconnected",
            };
            format!("{message} after {:.1} s", disconnected.as_secs_f64())
        }
        Event::Short { reason, room: Room::Elsewhere } => format!(
            "the destination has no memory for the guest's pages: {reason}; free memory there: this side keeps the \
             guest's memory and continues when memory is free"
        ),
        Event::Short { reason, room: Room::Here { .. } } => format!(
            "{reason}: free memory at the destination (a tmpfs such as /dev/shm: `mount -o remount,size=…`; huge \
             pages: `sysctl vm.nr_hugepages=…`; or raise the memory limit); the guest waits for pages without \
             memory, and umem continues when memory is free, or at once with `umem control resume`"
        ),
        Event::Unanswered(unanswered) => nobody_listens(unanswered),
        Event::Telling { uri, .. } => {
            format!("the guest continues here; notifying {uri}, which may have loaded the guest")
        }
        Event::Untold { uri, reason } => format!(
            "the destination at {uri} was not notified ({reason}); if a umem waits there, interrupt it twice"
        ),
        Event::Undone { how, .. } => undone(*how).into(),
        Event::Abandoned { session, ram } => format!(
            "session {session} is abandoned: the guest's memory is no longer served, and the guest must not run here \
             again; quit its monitor, and remove {} when the guest at its destination is known to be well",
            ram.join(" and ")
        ),
        Event::Unmapped { bytes } => format!(
            "{} MiB of the guest's memory were unmapped here during the move, as by an unplugged DIMM; their pages \
             were discarded",
            bytes >> 20
        ),
        Event::Damaged { error } => error.clone(),
        Event::Stays { is_loaded_only, command, .. } => {
            let pages = if *is_loaded_only { "to run" } else { "for its pages" };
            format!("the guest's process stays and waits {pages}; {command} takes over")
        }
        Event::Stopping { guest_pid: pid, is_halted } => {
            let halted = match is_halted {
                true => format!(", which takes effect after `kill -CONT {pid}`"),
                false => String::new(),
            };
            format!(
                "stopping the guest: its process {pid} has been sent SIGTERM{halted}; waiting for its end; \
                 another interrupt leaves the process running"
            )
        }
        Event::Releasing { guest_pid: pid, why, .. } => format!(
            "every page is here; waiting for the guest's process {pid} to close its userfaultfd, but \
             {why}; an interrupt ends the wait and is safe: the process closes it later"
        ),
        Event::Left { guest_pid: pid } => format!(
            "the complete guest continues without umem as process {pid}: `ps {pid}` shows it, `kill {pid}` \
             ends it"
        ),
        Event::Remark(remark) => self::remark(remark),
        Event::Stopped { .. }
        | Event::StoppedAtSource { .. }
        | Event::Retrying { .. }
        | Event::ChecksumError { .. } => String::new(),
    }
}

fn recovering(reason: &str, route: &Route) -> String {
    match route {
        Route::Dials(uri) => {
            format!("{reason}; the guest runs at the destination; trying {uri} again")
        }
        Route::Given => String::new(),
        Route::Waits { .. } => {
            format!(
                "{reason}; the guest runs on with the pages that it has until the source reconnects"
            )
        }
    }
}

fn paused(reason: &str, pause: Pause) -> String {
    match pause {
        Pause::Source => format!(
            "{reason}; the guest runs at the destination and may need pages from here; waiting \
             for a resume with an address"
        ),
        Pause::Destination { .. } => {
            format!(
                "{reason}; the guest runs on with the pages that it has until a resume gives an address"
            )
        }
        Pause::Ordered => "paused; a resume continues the move".into(),
        Pause::GivenInVain => String::new(),
    }
}

fn nobody_listens(unanswered: &Unanswered) -> String {
    let Unanswered { uri, session, directory_option, .. } = unanswered;
    let (heard, total) = (unanswered.heard_bytes >> 20, unanswered.total_bytes >> 20);
    let known = match (unanswered.is_running, heard) {
        (false, _) => "this side does not know whether the guest runs there".to_owned(),
        (true, 0) => {
            "the guest runs there, and this side does not know how much of its memory it has".into()
        }
        (true, _) => {
            format!("the guest runs there, and had {heard} of {total} MiB by the last report")
        }
    };
    format!(
        "no process listens at {uri}: the umem there has ended, and {known}; `umem incoming --resume {session}` \
         there takes over the guest, or reports here that it is complete or has ended; if that \
         is certain, interrupt this umem twice and end it with `umem migrate --resume \
         {session}{directory_option} --abandon`"
    )
}

fn undone(how: Undone) -> &'static str {
    match how {
        Undone::GoesOn => "no switchover had been sent: the guest continues here",
        Undone::NothingLeft => {
            "no switchover had been sent, and the guest's QEMU holds no state of this session: QEMU \
             was restarted, or the session was undone before"
        }
        Undone::Parted { .. } => {
            "the guest has all of its memory at its destination: there is nothing left to do here"
        }
        Undone::Complete => "the guest has all of its memory: there is nothing left to do",
        Undone::Heard { .. } => "the guest has all of its memory: there is nothing left to do here",
    }
}

fn remark(remark: &Remark) -> String {
    match remark {
        Remark::AwaitsMonitor => {
            "the guest is to continue here, and its monitor has not confirmed that it runs; \
             another interrupt ends the wait and leaves the guest as it is"
                .into()
        }
        Remark::AwaitsStandstill { can_leave } => match can_leave {
            true => format!(
                "{AWAITS_STANDSTILL}; another interrupt ends the wait and leaves the guest as it is"
            ),
            false => format!("{AWAITS_STANDSTILL}, so umem keeps waiting"),
        },
        Remark::NotCompared { reason } => {
            format!("the memory of both sides is not compared: {reason}")
        }
        Remark::QuitMonitor => {
            "the guest here is stopped and must not be resumed; quit its monitor".into()
        }
        Remark::NotFreed { reason } => {
            format!("the guest has moved, but its RAM here stays: {reason}")
        }
        Remark::NotPutBack { reason } => {
            format!("the guest has moved, but the settings of its QEMU here were not restored: {reason}")
        }
        Remark::NotTidied { reason, command } => format!(
            "the guest continues here, but the settings of its monitor may not be restored: {reason}; when the \
             monitor answers, restore them with {command}"
        ),
        Remark::SendsTheRest => "sending the remaining pages, then exiting".into(),
        Remark::StillNeeded { bytes } => format!(
            "the guest runs at the destination and needs {} MiB more from here; continuing until it \
             has them",
            bytes >> 20
        ),
        Remark::NotPaused { place } => {
            let other = match place {
                Place::Source => "destination",
                Place::Destination => "source",
            };
            format!(
                "not paused: the guest has not been switched over, or its {other} cannot resume"
            )
        }
        Remark::NoAddress { uri } => format!("not resumed: umem cannot connect to {uri}"),
        Remark::InterruptAgain { missing } => {
            format!("{}; interrupt again to give up", self::missing(*missing))
        }
        Remark::Distrusted { losses } => format!(
            "{losses} consecutive connections failed checksum verification without one valid page: pausing; \
             repair the path between the two hosts, then resume here (umem control), by another path if there is one"
        ),
        Remark::StandsStill => {
            "the guest stands still here, and its monitor has not confirmed that it runs again; \
             another interrupt ends the wait"
                .into()
        }
        Remark::DestinationNotTold { uri, reason } => format!(
            "the destination at {uri} was not notified ({reason}); if a umem waits there, interrupt it twice"
        ),
        Remark::NotWritten { reason } => format!("{reason}; continuing"),
        Remark::NotResumed { reason } => format!("not resumed: {reason}"),
        Remark::SourceMayGiveUp => {
            "the source may be giving the guest up at this moment; continuing, because otherwise the guest \
             could be lost"
                .into()
        }
        Remark::PagesNeeded { pages } => format!(
            "the guest runs here and still needs {pages} pages from the source; stopping now would stop \
             it, so umem continues until they have arrived"
        ),
        Remark::AwaitsCont { pages, goes_on } => {
            let waits = awaits_cont(*pages);
            match goes_on {
                true => format!("{waits}, so umem continues until they have arrived"),
                false => format!(
                    "{waits}; another interrupt ends the wait and leaves the guest as it is"
                ),
            }
        }
        Remark::InterruptAgainHere { lost } => {
            let hint = match lost {
                Lost::Owner => "interrupt again to end this one, if the guest runs there",
                Lost::Pages => "interrupt again to leave the guest waiting for them forever",
            };
            format!("{}; {hint}", lost.in_words())
        }
        Remark::AwaitsSource => {
            "the guest has all of its memory; waiting for the source to send it the completion".into()
        }
        Remark::SourceTold => {
            "the source connected and has the completion of its guest".into()
        }
        Remark::SourceNotToldOfEnd { reason: None } => {
            "the source did not connect to learn that the guest has ended: end its umem, too".into()
        }
        Remark::SourceNotToldOfEnd { reason: Some(reason) } => format!(
            "the source has not learned that the guest has ended ({reason}): end its umem, too"
        ),
        Remark::AddressInUse { uri } => format!("{uri} is still in use; waiting for it"),
        Remark::SourceUnaware { session, command } => format!(
            "the source has not learned that its guest is complete: if its umem comes back, it learns that from \
             {command}; or end it there with `umem migrate --resume {session} --abandon`"
        ),
    }
}

/// The information that the source lacks, or the data that only it has, while it has no lanes.
pub(crate) fn missing(missing: Missing) -> &'static str {
    match missing {
        Missing::PerhapsNothing => {
            "every page has been sent, and only the destination knows whether all have arrived"
        }
        Missing::Pages => {
            "the guest runs at the destination, and its missing pages exist only here"
        }
    }
}
