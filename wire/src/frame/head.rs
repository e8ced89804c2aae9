//! The meaning of a header.

use super::body::Body;
use super::header::{FLAG_BACKGROUND, FLAG_POSTCOPY, Header};
use super::kind::Kind;
use super::{Frame, FrameError};
use crate::region::{PageRange, RegionId};

/// The meaning of a header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Head {
    /// The frame is whole.
    Whole(Frame),
    /// A body follows.
    Body(Body),
    /// Pages follow.
    Data(PageRange),
}

impl Header {
    /// The header's meaning, and what has to come before the frame is whole. Pages are not checked
    /// here, as that takes the table of regions.
    pub(crate) fn head(self) -> Result<Head, FrameError> {
        let range =
            PageRange { region: RegionId(self.region), first: self.first, pages: self.pages };
        let frame = match self.kind {
            Kind::Data => return Ok(Head::Data(range)),
            Kind::Zero => Frame::Zero(range),
            Kind::Hole => Frame::Hole(range),
            Kind::Ack => Frame::Ack(range),
            Kind::Loaded => Frame::Loaded,
            Kind::LaneEnd => Frame::LaneEnd,
            Kind::Rounds => Frame::Rounds,
            Kind::RoundsEnd => Frame::RoundsEnd,
            Kind::Settled => Frame::Settled,
            Kind::Stopped => Frame::Stopped {
                postcopy: self.flags & FLAG_POSTCOPY != 0,
                background: self.flags & FLAG_BACKGROUND != 0,
            },
            Kind::Load => Frame::Load { state_bytes: self.first },
            Kind::Switchover => Frame::Switchover { stopped_us: self.first },
            Kind::Running => Frame::Running { us_since_switchover: self.first },
            Kind::Ping => Frame::Ping(self.first),
            Kind::Pong => Frame::Pong(self.first),
            Kind::Request
            | Kind::Regions
            | Kind::Ready
            | Kind::DeviceState
            | Kind::Complete
            | Kind::Resume
            | Kind::Have
            | Kind::Digests
            | Kind::Remaining
            | Kind::Error => return self.body().map(Head::Body),
        };
        Ok(Head::Whole(frame))
    }
}
