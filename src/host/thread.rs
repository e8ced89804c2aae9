//! The path to the monitor: a thread, as a monitor's answers may block, which the control thread never does; or, if
//! umem is embedded in the monitor's program, that program's own event loop.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Sender, channel};

use super::monitor::{Answer, Monitor, Question};
use crate::error::{Error, Result};
use crate::memory::dirty::DirtyLog;
use crate::runtime::inbox::Post;
use crate::runtime::panics;

/// Hands questions to a monitor; the answers come as posts.
pub(crate) struct HostThread {
    ask: Box<dyn Fn(Question) + Send>,
}

impl HostThread {
    /// Questions go to `ask`, which does not block; the receiver of the questions posts the answers.
    pub(crate) fn elsewhere(ask: impl Fn(Question) + Send + 'static) -> HostThread {
        HostThread { ask: Box::new(ask) }
    }

    /// Questions are answered on a thread of their own. The thread ends when this is dropped and the current question
    /// is answered. A monitor that never answers keeps the thread; the process can still end.
    ///
    /// A panic is an answer, too: the monitor is unchanged, and may be asked to undo earlier questions.
    fn with(
        mut answer: impl FnMut(Question) -> Answer + Send + 'static,
        post: Post<impl From<Answer> + Send + 'static>,
    ) -> Result<HostThread> {
        let (questions, queue): (Sender<Question>, _) = channel();
        std::thread::Builder::new()
            .name("umem-host".into())
            .spawn(move || {
                for question in queue {
                    let failed = question.failed();
                    let answered = catch_unwind(AssertUnwindSafe(|| {
                        panics::point(format_args!("host"));
                        answer(question)
                    }));
                    let answered =
                        answered.unwrap_or_else(|payload| failed(panics::error(&*payload)));
                    post.send(answered.into());
                }
            })
            .map_err(|source| Error::System { what: "starting a thread".into(), source })?;
        Ok(HostThread::elsewhere(move |question| {
            questions.send(question).expect("the thread ends after this sender");
        }))
    }
}

impl HostThread {
    /// A thread that asks `monitor`.
    pub(crate) fn start<T: From<Answer> + Send + 'static>(
        monitor: Box<dyn Monitor>,
        post: Post<T>,
    ) -> Result<HostThread> {
        HostThread::tracking(monitor, None, post)
    }

    /// The same, with the log of the guest's writes until the guest stops.
    pub(crate) fn tracking<T: From<Answer> + Send + 'static>(
        mut monitor: Box<dyn Monitor>,
        mut log: Option<Box<dyn DirtyLog>>,
        post: Post<T>,
    ) -> Result<HostThread> {
        HostThread::with(move |question| question.put(&mut *monitor, &mut log), post)
    }

    /// Asks a question. The answer comes as a post.
    pub(crate) fn ask(&self, question: Question) {
        (self.ask)(question);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::runtime::inbox::{Inbox, Wake};

    struct Panics;

    impl Monitor for Panics {
        fn name(&self) -> &'static str {
            "a monitor that panics"
        }

        fn stop(&mut self) -> Result<Option<Instant>> {
            panic!("a monitor like no other")
        }

        fn save_state(&mut self) -> Result<Vec<u8>> {
            panic!("a monitor like no other")
        }

        fn stands_still(&mut self) -> Result<()> {
            panic!("a monitor like no other")
        }

        fn resume(&mut self) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn guest_can_be_resumed_after_a_panic_which_is_an_answer() {
        let inbox = Inbox::<Answer>::new().unwrap();
        let host = HostThread::start(Box::new(Panics), inbox.post()).unwrap();
        host.ask(Question::Stop);
        host.ask(Question::Save);
        host.ask(Question::StandsStill);
        host.ask(Question::Resume);
        let answers: Vec<Answer> = std::iter::from_fn(|| match inbox.wait(&[], None) {
            Ok(Wake::Message(answer)) => Some(answer),
            _ => None,
        })
        .take(4)
        .collect();
        let [
            Answer::Stopped(Err(stopped)),
            Answer::Saved(Err(_)),
            Answer::StandsStill(Err(_)),
            Answer::Resumed(Ok(())),
        ] = &answers[..]
        else {
            panic!("other answers")
        };
        assert!(stopped.to_string().contains("a monitor like no other"), "{stopped}");
    }
}
