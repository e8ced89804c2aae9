//! The kinds of frames that may come at each end of each lane.

use crate::frame::Kind;
use crate::hello::LaneRole;
use crate::receive_error::ReceiveError;

/// An end of a lane: with the frame's kind it decides whether the frame may come.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum Lane {
    AtSource(LaneRole),
    AtDestination(LaneRole),
    /// A bulk lane at the destination, after its end.
    Ended,
}

impl Lane {
    /// Whether a kind of frame may come at this end.
    pub(super) fn check(self, kind: Kind) -> Result<(), ReceiveError> {
        let (way, lanes) = route(kind);
        let (role, way_here) = match self {
            Lane::Ended if kind == Kind::Error => return Ok(()),
            Lane::Ended => return Err(ReceiveError::AfterEnd { kind }),
            Lane::AtSource(role) => (role, Way::ToSource),
            Lane::AtDestination(role) => (role, Way::ToDestination),
        };
        if way != way_here && way != Way::Both {
            return Err(ReceiveError::WrongDirection { kind });
        }
        match (role, lanes) {
            (LaneRole::Demand, Lanes::Bulk) => Err(ReceiveError::WrongLane { kind, bulk: false }),
            (LaneRole::Bulk, Lanes::Demand) => Err(ReceiveError::WrongLane { kind, bulk: true }),
            _ => Ok(()),
        }
    }
}

/// The direction of a kind of frame.
#[derive(Copy, Clone, PartialEq, Eq)]
enum Way {
    ToDestination,
    ToSource,
    Both,
}

/// The lanes of a kind of frame.
#[derive(Copy, Clone, PartialEq, Eq)]
enum Lanes {
    Demand,
    Bulk,
    Any,
}

fn route(kind: Kind) -> (Way, Lanes) {
    match kind {
        Kind::Data | Kind::Zero | Kind::Hole => (Way::ToDestination, Lanes::Any),
        Kind::LaneEnd | Kind::RoundsEnd => (Way::ToDestination, Lanes::Bulk),
        Kind::Rounds | Kind::Remaining => (Way::ToDestination, Lanes::Demand),
        Kind::Regions | Kind::Stopped | Kind::DeviceState | Kind::Load | Kind::Switchover => {
            (Way::ToDestination, Lanes::Demand)
        }
        Kind::Request | Kind::Ready | Kind::Settled | Kind::Loaded | Kind::Running => {
            (Way::ToSource, Lanes::Demand)
        }
        Kind::Resume | Kind::Have => (Way::ToSource, Lanes::Demand),
        Kind::Ack => (Way::ToSource, Lanes::Any),
        Kind::Complete | Kind::Digests => (Way::Both, Lanes::Demand),
        Kind::Ping | Kind::Pong | Kind::Error => (Way::Both, Lanes::Any),
    }
}
