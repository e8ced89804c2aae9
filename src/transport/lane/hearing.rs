//! What the other side says on a demand lane for the control thread, and how much of it waits there at most.
//!
//! The queue between the two threads has no limit of its own: what may be put there is limited here. Pages,
//! requests and acknowledgements never go there, a flood of pings leaves one to be answered, and pieces of
//! device state are gathered first. Of the rest the protocol has each kind once in a lane's life.

use umem_wire::Event;

/// Control frames of a lane for the control thread: twice as many as there are kinds of them.
const FRAMES_MAX: usize = 16;

/// Of one lane.
#[derive(Debug)]
pub(crate) struct Hearing {
    frames: usize,
    /// Our pings that have not been answered. The next follows an answer, or a phase that nobody was asked in.
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

    /// This is for the control thread. An error says why the other side cannot mean well.
    pub(crate) fn take(&mut self, event: &Event) -> Result<(), &'static str> {
        if let Event::Pong(number) = event {
            // Of several pings the last may be answered alone.
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
    fn each_ping_has_one_pong() {
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
    fn frames_are_few() {
        let mut hearing = Hearing::new();
        let taken = (0..1000).take_while(|_| hearing.take(&Event::Loaded).is_ok()).count();
        assert_eq!(taken, FRAMES_MAX);
    }
}
