//! `rounds`: a Linux guest that writes, moved by passes while it runs, by QEMU and by umem in turns.

mod figures;
mod words;

use std::path::PathBuf;
use std::time::Duration;

use argh::FromArgs;

use crate::error::{Result, usage};
use crate::link::Link;
use crate::machine::Machine;
use crate::memory::List;
use crate::process::find_umem;
use crate::report::{Measure, Output, Report, progress};

use super::check_size;
use super::guest::{Artefacts, Load, Ram, Setup};
use super::mover::{Mover, Subject};
use super::moving::Move;
use words::{LoadName, Road};

/// The same Linux guest, idle or writing, moved by QEMU's precopy, its multifd and its postcopy after a pass, and by
/// umem's three modes, in turns, over the loopback address and through a shaped link.
#[derive(FromArgs)]
#[argh(
    subcommand,
    name = "rounds",
    note = "Kernel, initramfs and QEMU are those of the tests, as for `qemu`. The link needs root, ip and tc.",
    example = "The targets of umem's hybrid and precopy:\n  {command_name} --loads idle,hot",
    example = "Two movers, one load, quickly:\n  {command_name} --only umem-postcopy,umem-hybrid --loads hot \
               --links loopback --rounds 1"
)]
pub(crate) struct Options {
    /// movers, separated by commas (default all): qemu-precopy, qemu-multifd, qemu-hybrid, umem-postcopy,
    /// umem-precopy, umem-hybrid
    #[argh(option, default = "List(words::MOVERS.map(|(_, mover)| mover).to_vec())")]
    only: List<Mover>,
    /// what the guest does, separated by commas (default all): idle, hot, sequential, random
    #[argh(option, default = "List(words::LOADS.map(|(_, load)| load).to_vec())")]
    loads: List<LoadName>,
    /// the ways between the two hosts, separated by commas (default both): loopback, 10g
    #[argh(option, default = "List(words::ROADS.map(|(_, road)| road).to_vec())")]
    links: List<Road>,
    /// turns of each mover (default 5)
    #[argh(option, default = "5")]
    rounds: usize,
    /// the guest's RAM, MiB (default 2048)
    #[argh(option, default = "2048")]
    size: u64,
    /// memory that the guest fills, MiB (default 1024)
    #[argh(option, default = "1024")]
    fill: u64,
    /// the hot set of the load `hot`, MiB (default 64)
    #[argh(option, default = "64")]
    hot: u64,
    /// the guest's RAM: file (the default), huge (a file in huge pages), private (QEMU's default; not for
    /// umem-postcopy)
    #[argh(option, default = "Ram::File")]
    ram: Ram,
    /// QEMU's precopy that has not ended after so many seconds does not converge, and is cancelled (default 60)
    #[argh(option, default = "60")]
    limit: u64,
    /// the link's rate, Gbit/s (default 10)
    #[argh(option, default = "10")]
    rate: u32,
    /// the directory that holds qemu-system-x86_64 (default: QEMU 10.0 in tests/cache)
    #[argh(option)]
    qemu: Option<PathBuf>,
    /// the umem to measure (default: the one beside this program)
    #[argh(option)]
    umem: Option<PathBuf>,
    /// write a page with the tables and plots, for a browser, to this file
    #[argh(option)]
    report: Option<PathBuf>,
    /// print one JSON object
    #[argh(switch)]
    json: bool,
}

/// The guest is watched for this many beats of 100 ms at its destination, at least.
const BEATS_MIN: usize = 10;

/// One load on one way, and its moves.
struct Course {
    load: LoadName,
    road: Road,
    turns: Vec<Turns>,
}

/// The moves of one mover, one a round; None where it did not converge.
struct Turns {
    mover: Mover,
    moves: Vec<Option<Move>>,
}

impl Turns {
    fn diverges(&self) -> bool {
        self.moves.iter().any(Option::is_none)
    }
}

impl Measure for Options {
    fn measure(&self) -> Result<Report> {
        let options = self;
        if options.rounds == 0 || options.fill == 0 || options.hot == 0 || options.limit == 0 {
            return usage("--rounds, --fill, --hot and --limit are at least 1");
        }
        if options.rate == 0 {
            return usage("--rate is at least 1");
        }
        if options.hot > options.fill {
            return usage("--hot is at most --fill");
        }
        check_size(options.size, options.fill)?;
        if let Some(mover) = options.only.0.iter().find(|mover| !mover.takes(options.ram)) {
            return usage(format!(
                "{} does not move RAM without a file: leave it out with --only, or choose another --ram",
                mover.name()
            ));
        }
        let artefacts = Artefacts::find(options.qemu.as_deref())?;
        let umem = find_umem(options.umem.as_deref())?;
        let machine = Machine::describe();
        let has_link = options.links.0.contains(&Road::Link);
        let link = has_link.then(|| Link::new(options.rate)).transpose()?;
        let mut courses = options.courses();
        for round in 1..=options.rounds {
            for course in &mut courses {
                let setup = Setup {
                    artefacts: &artefacts,
                    umem: &umem,
                    size_mib: options.size,
                    fill_mib: options.fill,
                    load: options.load(course.load),
                    link: link.as_ref().filter(|_| course.road == Road::Link),
                    beats_min: BEATS_MIN,
                    limit: Some(Duration::from_secs(options.limit)),
                };
                course.round(options, round, &setup)?;
            }
        }
        Ok(figures::report(options, machine, &courses))
    }

    fn output(&self) -> Output<'_> {
        Output { json: self.json, report: self.report.as_deref(), svg: None }
    }
}

impl Options {
    fn courses(&self) -> Vec<Course> {
        let roads = self.links.0.iter();
        let courses = roads.flat_map(|&road| self.loads.0.iter().map(move |&load| (load, road)));
        let turns = |&mover: &Mover| Turns { mover, moves: Vec::new() };
        let course = |(load, road)| {
            let turns = self.only.0.iter().map(turns).collect();
            Course { load, road, turns }
        };
        courses.map(course).collect()
    }

    fn load(&self, name: LoadName) -> Load {
        match name {
            LoadName::Idle => Load::Idle,
            LoadName::Hot => Load::Hot(self.hot),
            LoadName::Sequential => Load::Sequential,
            LoadName::Random => Load::Random,
        }
    }
}

impl Course {
    /// The load and the way.
    fn name(&self) -> String {
        format!("{}, {}", self.load.word(), self.road.word())
    }

    /// Each mover's turn.
    fn round(&mut self, options: &Options, round: usize, setup: &Setup<'_>) -> Result<()> {
        let name = self.name();
        for turns in &mut self.turns {
            let mover = turns.mover;
            if turns.diverges() {
                turns.moves.push(None);
                continue;
            }
            progress(&format!("round {round} of {}: {name}: {}", options.rounds, mover.name()));
            let moved = Subject { mover, ram: options.ram }.run(setup)?;
            progress(&match &moved {
                Some(moved) => format!(
                    "moved in {:.2} s, downtime {:.0} ms, {} faults",
                    moved.total_s, moved.downtime_ms, moved.faults
                ),
                None => format!("does not converge within {} s", options.limit),
            });
            turns.moves.push(moved);
        }
        Ok(())
    }
}
