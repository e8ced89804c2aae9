//! Which kinds of frames may come at which end of which lane.

use crate::error::ReceiveError;
use crate::frame::Kind;
use crate::hello::LaneRole;

/// Which end of which lane this is: together with the kind it decides what may come.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum Lane {
    AtSource(LaneRole),
    AtDestination(LaneRole),
    /// A bulk lane at the destination, after its end.
    Ended,
}

impl Lane {
    /// Whether a kind of frame may come here.
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

/// Which way a kind of frame goes.
#[derive(Copy, Clone, PartialEq, Eq)]
enum Way {
    ToDestination,
    ToSource,
    Both,
}

/// Which lanes a kind of frame goes over.
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
