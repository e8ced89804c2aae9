//! Messages to other threads' rings that arrive in any case.
//!
//! The kernel allocates memory for a message. Under a memory limit it may refuse the message with ENOMEM. A message
//! that is lost leaves a vCPU waiting for a page that has arrived, or that no thread requests. So a refused message is
//! sent again after [`SHORTAGE_INTERVAL`].

use slab::Slab;
use umem_ring::{Completion, Mailbox, Op, Outcome, Ring};

use crate::destination::memory::SHORTAGE_INTERVAL;
use crate::error::{Error, Result};

/// The token of the timer. Message `key` has this token plus 1 plus `key`. The other tokens of a thread are lower.
const TOKEN_TIMER: u64 = 1 << 32;

/// A message.
struct Message {
    to: Mailbox,
    value: u64,
    extra: u32,
}

/// The messages that one thread has sent and that have not arrived yet.
pub(crate) struct RingMessages {
    sent: Slab<Message>,
    /// Keys of those that the kernel has refused.
    refused: Vec<usize>,
    timer_is_armed: bool,
}

impl RingMessages {
    pub(crate) fn new() -> RingMessages {
        RingMessages { sent: Slab::new(), refused: Vec::new(), timer_is_armed: false }
    }

    /// Whether [`RingMessages::complete`] takes completions with this token.
    pub(crate) fn owns(token: u64) -> bool {
        (TOKEN_TIMER..TOKEN_TIMER << 1).contains(&token)
    }

    /// Sends a message through `ring`.
    ///
    /// # Errors
    /// The other ring is closed.
    pub(crate) fn send(
        &mut self,
        ring: &mut Ring,
        to: &Mailbox,
        value: u64,
        extra: u32,
    ) -> Result<()> {
        let key = self.sent.insert(Message { to: to.clone(), value, extra });
        self.submit(ring, key)
    }

    fn submit(&self, ring: &mut Ring, key: usize) -> Result<()> {
        let message = &self.sent[key];
        let message = Op::msg_ring(message.to.clone(), message.value, message.extra);
        let token = TOKEN_TIMER + 1 + key as u64;
        ring.submit(message, token).map_err(|rejected| Error::Ring(rejected.error))?;
        Ok(())
    }

    /// Takes the completion of a message or of the timer.
    ///
    /// # Errors
    /// The kernel has refused the message for another reason than a shortage of memory.
    pub(crate) fn complete(&mut self, ring: &mut Ring, completion: &Completion) -> Result<()> {
        let Some(key) = completion.token.checked_sub(TOKEN_TIMER + 1) else {
            // Also where the kernel had no memory for the timer.
            self.timer_is_armed = false;
            let refused = std::mem::take(&mut self.refused);
            return refused.into_iter().try_for_each(|key| self.submit(ring, key));
        };
        let key = usize::try_from(key).expect("our own token");
        match completion.outcome {
            Outcome::Done(_) => {
                self.sent.remove(key);
                Ok(())
            }
            Outcome::Failed(errno) if matches!(errno.raw(), libc::ENOMEM | libc::EAGAIN) => {
                self.refused.push(key);
                if !std::mem::replace(&mut self.timer_is_armed, true) {
                    ring.submit(Op::timeout(SHORTAGE_INTERVAL), TOKEN_TIMER)
                        .map_err(|rejected| Error::Ring(rejected.error))?;
                }
                Ok(())
            }
            other => Err(Error::Host(format!("waking a vCPU through another ring: {other:?}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use umem_ring::{Config, Errno, TOKEN_MESSAGE, Wait};

    use super::*;

    /// Waits for the next completion of `ring`.
    fn next(ring: &mut Ring) -> Completion {
        loop {
            if let Some(completion) = ring.next() {
                return completion;
            }
            ring.enter(Wait::One).unwrap();
        }
    }

    fn ring() -> Ring {
        Ring::new(&Config { name: "messages".into(), ..Config::default() }).unwrap()
    }

    #[test]
    fn message_is_sent_again_when_the_kernel_lacks_memory() {
        let (mut from, mut to) = (ring(), ring());
        let mailbox = to.mailbox();
        let mut messages = RingMessages::new();
        for errno in [libc::ENOMEM, libc::EAGAIN] {
            messages.send(&mut from, &mailbox, 7, 1).unwrap();
            let sent = next(&mut from);
            assert!(RingMessages::owns(sent.token));
            next(&mut to);
            // As if it had not arrived.
            let refused = Completion { outcome: Outcome::Failed(Errno::new(errno)), ..sent };
            messages.complete(&mut from, &refused).unwrap();
            assert_eq!(messages.sent.len(), 1);
            let timer = next(&mut from);
            assert_eq!(timer.token, TOKEN_TIMER);
            messages.complete(&mut from, &timer).unwrap();
            let sent = next(&mut from);
            messages.complete(&mut from, &sent).unwrap();
            let arrived = next(&mut to);
            assert_eq!(arrived.token, TOKEN_MESSAGE);
            assert_eq!(arrived.outcome, Outcome::Message { value: 7, extra: 1 });
            assert!(messages.sent.is_empty() && messages.refused.is_empty());
        }
    }

    #[test]
    fn message_refused_for_another_reason_is_an_error() {
        let (mut from, to) = (ring(), ring());
        let mut messages = RingMessages::new();
        messages.send(&mut from, &to.mailbox(), 7, 1).unwrap();
        let sent = next(&mut from);
        let refused = Completion { outcome: Outcome::Failed(Errno::new(libc::EBADF)), ..sent };
        let error = messages.complete(&mut from, &refused).unwrap_err();
        assert!(error.to_string().contains("through another ring"), "{error}");
    }
}
