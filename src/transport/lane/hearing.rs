//! Limits what a peer can queue for the control thread over the demand lane.
//!
//! The queue between the two threads has no limit of its own; this module limits what enters it.
//! Pages, requests and acknowledgements never enter it, a flood of pings leaves one to answer, and
//! pieces of device state are gathered first. Each other kind of frame is sent once in a lane's life.

use umem_wire::Event;

/// Most control frames of one lane for the control thread: twice the number of their kinds.
const FRAMES_MAX: usize = 16;

/// The limits of one lane.
#[derive(Debug)]
pub(crate) struct Hearing {
    frames: usize,
    /// This side's unanswered pings. The next ping follows an answer, or a phase without a ping.
    asked: Vec<u64>,
}

impl Hearing {
    pub(crate) fn new() -> Hearing {
        // Threads that serve lanes allocate nothing later.
        Hearing { frames: 0, asked: Vec::with_capacity(8) }
    }

    /// A ping with this number is about to be sent.
    pub(crate) fn asks(&mut self, number: u64) {
        self.asked.push(number);
    }

    /// Counts an event for the control thread. An error names the peer's violation.
    pub(crate) fn take(&mut self, event: &Event) -> Result<(), &'static str> {
        if let Event::Pong(number) = event {
            // A pong may answer the last of several pings only.
            let place = self.asked.iter().position(|asked| asked == number);
            let place = place.ok_or("a pong for which there was no ping")?;
            self.asked.drain(..=place);
            return Ok(());
        }
        self.frames += 1;
        match self.frames <= FRAMES_MAX {
            true => Ok(()),
            false => Err("more control frames than a migration has"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pong_without_its_ping_is_refused() {
        let mut hearing = Hearing::new();
        assert!(hearing.take(&Event::Pong(1)).is_err());
        for number in 0..100 {
            hearing.asks(number);
            assert!(hearing.take(&Event::Pong(number)).is_ok());
            assert!(hearing.take(&Event::Pong(number)).is_err());
        }
        (5..8).for_each(|number| hearing.asks(number));
        assert!(hearing.take(&Event::Pong(6)).is_ok());
        assert!(hearing.take(&Event::Pong(5)).is_err());
        assert!(hearing.take(&Event::Pong(7)).is_ok());
    }

    #[test]
    fn control_frames_over_the_limit_are_refused() {
        let mut hearing = Hearing::new();
        let taken = (0..1000).take_while(|_| hearing.take(&Event::Loaded).is_ok()).count();
        assert_eq!(taken, FRAMES_MAX);
    }
}
