//! The kinds of frames: tags and names.

use std::fmt;

/// A frame's tag. Zero is never a tag.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Kind {
    /// Pages, which follow.
    Data = 1,
    /// Pages that hold zeroes only.
    Zero = 2,
    /// Pages that the source's file does not have.
    Hole = 3,
    /// Pages that a vCPU at the destination waits for.
    Request = 4,
    /// Pages that the destination has cached.
    Ack = 5,
    /// The source's table of regions.
    Regions = 16,
    /// The destination is ready to receive the guest.
    Ready = 17,
    /// The source's guest has stopped.
    Stopped = 18,
    /// A piece of device state.
    DeviceState = 19,
    /// The device state is complete.
    Load = 20,
    /// The destination's guest has loaded the device state.
    Loaded = 21,
    /// The guest belongs to the destination.
    Switchover = 22,
    /// The destination's guest runs.
    Running = 23,
    /// The last frame of a bulk lane.
    LaneEnd = 24,
    /// Every page is cached; also the source's goodbye.
    Complete = 25,
    /// The destination's standing, on a demand lane that replaces a lost one.
    Resume = 26,
    /// Which pages the destination has, after a resume frame.
    Have = 27,
    /// Digests of all that has landed, region by region.
    Digests = 28,
    /// The source sends pages while its guest runs.
    Rounds = 29,
    /// From here on each page comes once on this bulk lane.
    RoundsEnd = 30,
    /// Pages that are still to come after rounds.
    Remaining = 31,
    /// Asks for a pong.
    Ping = 32,
    /// Answers a ping.
    Pong = 33,
    /// The destination has taken note of the remaining pages: from here on each page comes once.
    Settled = 34,
    /// The sender gives up.
    Error = 255,
}

impl Kind {
    /// Every kind, in order of its tag.
    pub const ALL: [Kind; 25] = [
        Kind::Data,
        Kind::Zero,
        Kind::Hole,
        Kind::Request,
        Kind::Ack,
        Kind::Regions,
        Kind::Ready,
        Kind::Stopped,
        Kind::DeviceState,
        Kind::Load,
        Kind::Loaded,
        Kind::Switchover,
        Kind::Running,
        Kind::LaneEnd,
        Kind::Complete,
        Kind::Resume,
        Kind::Have,
        Kind::Digests,
        Kind::Rounds,
        Kind::RoundsEnd,
        Kind::Remaining,
        Kind::Ping,
        Kind::Pong,
        Kind::Settled,
        Kind::Error,
    ];

    pub(super) fn from_tag(tag: u8) -> Option<Kind> {
        Kind::ALL.into_iter().find(|&kind| kind as u8 == tag)
    }

    /// The kind's name, for messages.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Data => "data",
            Kind::Zero => "zero",
            Kind::Hole => "hole",
            Kind::Request => "request",
            Kind::Ack => "ack",
            Kind::Regions => "regions",
            Kind::Ready => "ready",
            Kind::Stopped => "stopped",
            Kind::DeviceState => "device state",
            Kind::Load => "load",
            Kind::Loaded => "loaded",
            Kind::Switchover => "switchover",
            Kind::Running => "running",
            Kind::LaneEnd => "lane end",
            Kind::Complete => "complete",
            Kind::Resume => "resume",
            Kind::Have => "have",
            Kind::Digests => "digests",
            Kind::Rounds => "rounds",
            Kind::RoundsEnd => "rounds end",
            Kind::Remaining => "remaining",
            Kind::Ping => "ping",
            Kind::Pong => "pong",
            Kind::Settled => "settled",
            Kind::Error => "error",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
