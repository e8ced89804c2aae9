//! The way to the monitor: through a thread, as talking to it may block, which the control thread never
//! does; or, where umem is a part of the monitor, through whatever that listens to.

use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use super::{DestinationHost, SourceHost};
use crate::error::{Error, Result};
use crate::memory::dirty::{DirtyLog, DirtyMap};
use crate::runtime::inbox::Post;
use crate::runtime::panics;

/// The monitor's answers, in the order of the questions.
#[derive(Debug)]
pub(crate) enum Answer {
    /// The guest's writes are tracked from now on.
    Tracking(Result<()>),
    /// What had been written when that was asked is marked.
    Looked(Result<()>),
    /// Not all of it is: what is marked has to leave first, and then it is to be asked again.
    LookedInPart,
    /// All of it is, and the guest has stopped by itself: nothing is written any more.
    LookedLast,
    /// When it was asked to, where that is later than the question.
    Stopped(Result<Option<Instant>>),
    Saved(Result<Vec<u8>>),
    /// The guest may be given away.
    StandsStill(Result<()>),
    /// What was changed in the source's monitor.
    PutBack(Result<()>),
    Resumed(Result<()>),
    Prepared(Result<()>),
    Loaded(Result<()>),
    Running(Result<()>),
}

/// What the monitor is asked to do.
pub(crate) enum Question {
    /// Mark the pages that the guest writes from now on.
    Track(Arc<DirtyMap>),
    /// Whether all is marked that has been written so far.
    Look,
    Stop,
    Save,
    /// Whether it may be given away.
    StandsStill,
    PutBack,
    Resume,
    Prepare,
    Load(Vec<u8>),
    Run,
}

/// Hands questions to a monitor; the answers come as posts.
pub(crate) struct HostThread<H: ?Sized> {
    ask: Box<dyn Fn(Question) + Send>,
    host: PhantomData<fn(Box<H>)>,
}

impl<H: ?Sized> HostThread<H> {
    /// Questions go to `ask`, which does not block; whoever takes them there posts the answers.
    pub(crate) fn elsewhere(ask: impl Fn(Question) + Send + 'static) -> HostThread<H> {
        HostThread { ask: Box::new(ask), host: PhantomData }
    }

    /// Questions are answered on a thread of their own. The thread ends when this is dropped and its
    /// question is answered; a monitor that never answers keeps the thread, not the process.
    ///
    /// A panic is an answer, too: the monitor is there as before, and may be asked to undo what was done.
    fn with(
        mut answer: impl FnMut(Question) -> Answer + Send + 'static,
        post: Post<impl From<Answer> + Send + 'static>,
    ) -> Result<HostThread<H>> {
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

impl Question {
    /// The answer that says why there is no other one.
    fn failed(&self) -> fn(Error) -> Answer {
        match self {
            Question::Track(_) => |error| Answer::Tracking(Err(error)),
            Question::Look => |error| Answer::Looked(Err(error)),
            Question::Stop => |error| Answer::Stopped(Err(error)),
            Question::Save => |error| Answer::Saved(Err(error)),
            Question::StandsStill => |error| Answer::StandsStill(Err(error)),
            Question::PutBack => |error| Answer::PutBack(Err(error)),
            Question::Resume => |error| Answer::Resumed(Err(error)),
            Question::Prepare => |error| Answer::Prepared(Err(error)),
            Question::Load(_) => |error| Answer::Loaded(Err(error)),
            Question::Run => |error| Answer::Running(Err(error)),
        }
    }
}

impl HostThread<dyn SourceHost> {
    pub(crate) fn start<T: From<Answer> + Send + 'static>(
        host: Box<dyn SourceHost>,
        post: Post<T>,
    ) -> Result<Self> {
        HostThread::tracking(host, None, post)
    }

    /// The same, with who tracks the guest's writes until it stops.
    pub(crate) fn tracking<T: From<Answer> + Send + 'static>(
        mut host: Box<dyn SourceHost>,
        mut log: Option<Box<dyn DirtyLog>>,
        post: Post<T>,
    ) -> Result<Self> {
        let answer = move |question| match question {
            Question::Track(marks) => Answer::Tracking(match &mut log {
                Some(log) => log.start(marks),
                None => Err(untracked()),
            }),
            Question::Look => match &mut log {
                None => Answer::Looked(Err(untracked())),
                Some(log) => match log.next() {
                    Ok(()) if log.is_in_part() => Answer::LookedInPart,
                    Ok(()) if log.has_stopped() => Answer::LookedLast,
                    looked => Answer::Looked(looked),
                },
            },
            Question::Stop => Answer::Stopped(host.stop().and_then(|at| {
                log.as_mut().map_or(Ok(()), |log| log.finish())?;
                Ok(at)
            })),
            Question::Save => Answer::Saved(host.save_state()),
            Question::StandsStill => Answer::StandsStill(host.stands_still()),
            Question::PutBack => Answer::PutBack(host.put_back()),
            Question::Resume => {
                // The guest goes on untracked.
                log = None;
                Answer::Resumed(host.resume())
            }
            Question::Prepare | Question::Load(_) | Question::Run => {
                unreachable!("a source is not asked that")
            }
        };
        HostThread::with(answer, post)
    }

    pub(crate) fn track(&self, marks: Arc<DirtyMap>) {
        (self.ask)(Question::Track(marks));
    }

    pub(crate) fn look(&self) {
        (self.ask)(Question::Look);
    }

    pub(crate) fn stop(&self) {
        (self.ask)(Question::Stop);
    }

    pub(crate) fn stands_still(&self) {
        (self.ask)(Question::StandsStill);
    }

    pub(crate) fn put_back(&self) {
        (self.ask)(Question::PutBack);
    }

    pub(crate) fn save_state(&self) {
        (self.ask)(Question::Save);
    }

    pub(crate) fn resume(&self) {
        (self.ask)(Question::Resume);
    }
}

impl HostThread<dyn DestinationHost> {
    pub(crate) fn start<T: From<Answer> + Send + 'static>(
        mut host: Box<dyn DestinationHost>,
        post: Post<T>,
    ) -> Result<Self> {
        let answer = move |question| match question {
            Question::Prepare => Answer::Prepared(host.prepare()),
            Question::Load(state) => Answer::Loaded(host.load_state(state)),
            Question::Run => Answer::Running(host.run()),
            Question::Track(_)
            | Question::Look
            | Question::Stop
            | Question::Save
            | Question::StandsStill
            | Question::PutBack
            | Question::Resume => unreachable!("a destination is not asked that"),
        };
        HostThread::with(answer, post)
    }

    pub(crate) fn prepare(&self) {
        (self.ask)(Question::Prepare);
    }

    pub(crate) fn load_state(&self, state: Vec<u8>) {
        (self.ask)(Question::Load(state));
    }

    pub(crate) fn run(&self) {
        (self.ask)(Question::Run);
    }
}

fn untracked() -> Error {
    Error::Internal("nobody tracks what the guest writes".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::inbox::{Inbox, Wake};

    struct Panics;

    impl SourceHost for Panics {
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
    fn a_panic_is_an_answer_and_the_guest_can_be_resumed_after_it() {
        let inbox = Inbox::<Answer>::new().unwrap();
        let host = HostThread::<dyn SourceHost>::start(Box::new(Panics), inbox.post()).unwrap();
        host.stop();
        host.save_state();
        host.stands_still();
        host.resume();
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
