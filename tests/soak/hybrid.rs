//! A guest that is moved by hybrid repeatedly. umems are killed, and connections break, at any moment of any phase.
//! Every word of the guest is right on the side where it ends up.
//!
//! `UMEM_SOAK_MOVES=N` for more moves, `UMEM_SEED=N` for others.

use std::fs;

use serde_json::{Value, json};

use crate::support::killed::{How, Move, Side, text};
use crate::support::{Ends, Qmp, Random, seed, wait_for};

const MOVES: u64 = 4;

/// Size of the demo's guest, which writes all the time.
const MIB: u64 = 24;

/// The event during a move.
#[derive(Clone, Copy, Debug)]
enum Deed {
    None,
    Kill(Side),
    Cut(Ends),
}

/// Options of `umem migrate`. With few passes more pages are left for after the switchover.
const OPTIONS: [&[&str]; 4] = [
    &["--precopy", "--downtime-limit", "0"],
    &["--precopy", "--downtime-limit", "0", "--precopy-passes", "1", "--lanes", "3"],
    &["--precopy", "--downtime-limit", "0", "--precopy-passes", "9", "--checksum"],
    &["--precopy", "--downtime-limit", "0", "--lanes", "2", "--release-ram", "--checksum"],
];

fn deed(random: &mut Random) -> Deed {
    match random.below(8) {
        0 => Deed::None,
        1..=2 => Deed::Cut(random.pick(&[Ends::Both, Ends::Source, Ends::Destination])),
        _ => Deed::Kill(random.pick(&[Side::Source, Side::Destination, Side::Both])),
    }
}

/// The guest's side after a move.
enum End {
    Arrived(Value),
    Stayed,
}

impl Move {
    /// The session that one side has left, if any.
    fn left_session(&self, side: &str) -> Option<String> {
        let names = self.session_files();
        names.iter().find_map(|name| name.strip_suffix(side)).map(str::to_owned)
    }

    /// Takes over from a killed process if a session is left: a source has a record before it stops its guest.
    fn take_over(&mut self, side: Side) {
        if side != Side::Source
            && let Some(session) = self.left_session(".destination")
        {
            self.session = session;
            self.incoming = self.resume("incoming");
        }
        if side != Side::Destination
            && let Some(session) = self.left_session(".source")
        {
            self.session = session;
            self.migrate = self.resume("migrate");
        }
    }

    /// The guest's side, once the move is over on both sides.
    fn end(&mut self) -> Option<End> {
        if let Some(report) = self.incoming.said("completed") {
            return Some(End::Arrived(report));
        }
        let is_over = !self.incoming.is_running() && !self.migrate.is_running();
        // The last event may have come since.
        is_over.then(|| self.incoming.said("completed").map_or(End::Stayed, End::Arrived))
    }

    /// Waits for this many bytes, or for the end.
    fn pass_or_end(&mut self, bytes: u64) -> Option<End> {
        wait_for(format!("{bytes} bytes, or the end"), || {
            let end = self.end();
            (end.is_some() || self.cutter.passed() >= bytes).then_some(end)
        })
    }

    fn suffers(&mut self, deed: Deed) {
        match deed {
            Deed::None => {}
            Deed::Cut(ends) => self.cutter.cut(ends, false),
            Deed::Kill(side) => {
                if side != Side::Source {
                    self.incoming.kill();
                    self.incoming.wait();
                }
                if side != Side::Destination {
                    self.migrate.kill();
                    self.migrate.wait();
                }
                self.take_over(side);
            }
        }
    }
}

fn status(qmp: &mut Qmp) -> String {
    text(&qmp.execute("query-status", json!({})), "status")
}

/// The guest runs, and every word of its memory is right.
fn is_whole(qmp: &mut Qmp) {
    wait_for("the guest to run", || (status(qmp) == "running").then_some(()));
    let verdict = qmp.execute("umem-verify", json!({}));
    assert_eq!(verdict["bad_pages"], 0, "{verdict}");
    // It stands still for the check.
    qmp.execute("cont", json!({}));
}

#[test]
fn hybrid_moves_with_kills_and_cuts_lose_no_word() {
    let seed = seed(1);
    let moves = super::number("UMEM_SOAK_MOVES", MOVES);
    let name = |number: u64| -> &'static str { format!("guest{number}.").leak() };
    let how = |random: &mut Random| How {
        mib: MIB,
        threads: 2,
        migrate: random.pick(&OPTIONS),
        ..How::default()
    };
    let mut random = Random::of(seed, 0);
    let mut moving = Move::start(how(&mut random));
    let (mut arrived, mut stayed) = (0, 0);
    for number in 0..moves {
        let deed = deed(&mut random);
        // Moves with several passes carry more than the guest's memory. Some moments are before its first page.
        let at = match random.below(4) {
            0 => random.magnitude(17),
            _ => random.below((MIB * 2) << 20),
        };
        println!("move {number}: {deed:?} after {at} bytes, {:?}", moving.how.migrate);
        moving.cutter.let_pages_go();
        let end = match moving.pass_or_end(at) {
            Some(end) => end,
            None => {
                moving.suffers(deed);
                wait_for("the end of the move", || moving.end())
            }
        };
        let source = moving.scratch.path(&format!("{}.qmp", moving.names[0]));
        let here = match end {
            End::Arrived(report) => {
                arrived += 1;
                moving.check(&report);
                // The check has stopped it.
                let arrived = moving.scratch.path(&format!("{}.qmp", moving.names[1]));
                Qmp::connect(&arrived).execute("cont", json!({}));
                println!("  arrived");
                // A source that was killed after its guest was complete may print nothing.
                wait_for("the end of the source", || (!moving.migrate.is_running()).then_some(()));
                Qmp::connect(&source).quit();
                let Move { scratch, guest, incoming, names, .. } = moving;
                guest.succeeds();
                scratch.wait_until_gone(&format!("{}.qmp", names[0]));
                fs::remove_file(scratch.ram(names[0])).expect("umem deletes no guest's memory");
                (scratch, incoming, names[1])
            }
            End::Stayed => {
                stayed += 1;
                println!("  stayed, {}", status(&mut Qmp::connect(&source)));
                is_whole(&mut Qmp::connect(&source));
                let Move { scratch, guest, names, .. } = moving;
                scratch.wait_until_gone(&format!("{}.qmp", names[1]));
                // The file of a umem that was killed before it had opened the lanes.
                let _ = fs::remove_file(scratch.ram(names[1]));
                (scratch, guest, names[0])
            }
        };
        let (scratch, guest, here) = here;
        let _ = fs::remove_dir_all(scratch.path("sessions"));
        if number + 1 == moves {
            let mut qmp = Qmp::connect(&scratch.path(&format!("{here}.qmp")));
            is_whole(&mut qmp);
            qmp.quit();
            guest.succeeds();
            println!("{arrived} of {moves} moves arrived, {stayed} stayed");
            return;
        }
        moving = Move::from(here, guest, name(number), scratch, how(&mut random));
    }
}
