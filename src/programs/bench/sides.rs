//! The work of one of the two programs in a test: a [`RunningSide`] for each direction.

use std::time::Duration;

use super::protocol::{Counts, End, Measured, Test};
use super::side::{Prepared, RunningSide, ThreadMessage};
use crate::error::Result;
use crate::runtime::inbox::Inbox;
use crate::statistics::Latency;
use crate::transport::lane::Lane;

/// Bytes moved since counting began, the time, and the retransmitted segments.
pub(super) type SoFar = (Duration, Counts, Option<u64>);

/// In the order of [`Test::directions`].
pub(super) struct Sides(Vec<RunningSide>);

/// The preparation before the lanes may start.
pub(super) fn prepare(test: &Test, end: End) -> Result<Vec<Prepared>> {
    test.directions().iter().map(|&direction| Prepared::new(test, end, direction)).collect()
}

impl Sides {
    /// Starts the threads of all connections, which are in order.
    pub(super) fn start(
        test: &Test,
        prepared: Vec<Prepared>,
        lanes: Vec<Lane>,
        cores: &[usize],
        zero_copy: bool,
        inbox: &Inbox<ThreadMessage>,
    ) -> Result<Sides> {
        let mut lanes = lanes.into_iter();
        let mut sides = Sides(Vec::new());
        for prepared in prepared {
            let lanes = lanes.by_ref().take(test.connections_each().into()).collect();
            let side = RunningSide::start(test, prepared, lanes, cores, zero_copy, inbox)?;
            sides.0.push(side);
        }
        Ok(sides)
    }

    /// Starts counting.
    pub(super) fn measure(&mut self) {
        self.0.iter_mut().for_each(RunningSide::measure);
    }

    /// Handles a message; true when the last lane has ended.
    pub(super) fn take(&mut self, note: ThreadMessage) -> Result<bool> {
        match note {
            ThreadMessage::Failed(error) => Err(error),
            ThreadMessage::LaneEnded(direction) => {
                let side = self.0.iter_mut().find(|side| side.direction() == direction);
                side.expect("lanes belong to a direction").lane_ended();
                Ok(self.has_ended())
            }
        }
    }

    /// Every byte has been moved.
    pub(super) fn has_ended(&self) -> bool {
        self.0.iter().all(RunningSide::has_ended)
    }

    /// Cuts the lanes off, as [`RunningSide::stop`] does.
    pub(super) fn stop(&mut self) {
        self.0.iter_mut().for_each(RunningSide::stop);
    }

    /// Ends the threads, and returns the results.
    pub(super) fn end(mut self) -> Result<Vec<Measured>> {
        // All of them first: no direction continues alone.
        self.stop();
        self.0.into_iter().map(RunningSide::end).collect()
    }

    pub(super) fn so_far(&self) -> Vec<SoFar> {
        self.0.iter().map(RunningSide::so_far).collect()
    }

    /// Fault latencies in this program since the last call; None without faults.
    pub(super) fn interval_faults(&self) -> Option<Latency> {
        self.0.iter().find_map(RunningSide::interval_faults)
    }
}
