//! The loss of a bulk lane may have a cause that arrives later on the demand lane.

use std::time::Instant;

use umem_wire::LaneRole;

use crate::error::{Error, lane_name};
use crate::transport::lane::CAUSE_PATIENCE;

/// The loss of a lane, while its cause may still arrive.
#[derive(Debug)]
pub(crate) struct Doubt {
    pub(crate) error: Error,
    pub(crate) until: Instant,
}

impl Doubt {
    pub(crate) fn new(error: Error, now: Instant) -> Doubt {
        Doubt { error, until: now + CAUSE_PATIENCE }
    }
}

/// Whether an error may be the effect of another error: a peer that gives up closes all lanes, so the loss of a lane
/// other than the demand lane may be an effect. Other errors are causes.
pub(crate) fn is_effect(error: &Error) -> bool {
    matches!(error, Error::Lost { lane, .. } if *lane != lane_name(LaneRole::Demand, 0))
}
