//! A bulk lane that is lost may be the effect of something that the demand lane tells.

use std::time::Instant;

use umem_wire::LaneRole;

use crate::error::{Error, lane_name};
use crate::transport::lane::CAUSE_PATIENCE;

/// A lane that is lost, and the cause that may still come.
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

/// Whether an error may be the effect of another one: lanes other than the demand lane are lost when a peer gives
/// up. Other errors are causes already.
pub(crate) fn is_effect(error: &Error) -> bool {
    matches!(error, Error::Lost { lane, .. } if *lane != lane_name(LaneRole::Demand, 0))
}
