//! The way to the monitor: through a thread, as talking to it may block, which the control thread never
//! does; or, where umem is a part of the monitor, through whatever that listens to.

use std::marker::PhantomData;
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use super::{DestinationHost, SourceHost};
use crate::error::{Error, Result};
use crate::inbox::Post;

/// The monitor's answers, in the order of the questions.
pub(crate) enum Answer {
    /// When it was asked to, where that is later than the question.
    Stopped(Result<Option<Instant>>),
    Saved(Result<Vec<u8>>),
    Resumed(Result<()>),
    Prepared(Result<()>),
    Loaded(Result<()>),
    Running(Result<()>),
}

/// What the monitor is asked to do.
pub(crate) enum Question {
    /// Whether its device state is asked for at once afterwards.
    Stop {
        saves: bool,
    },
    Save,
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
    fn with(
        mut answer: impl FnMut(Question) -> Answer + Send + 'static,
        post: Post<impl From<Answer> + Send + 'static>,
    ) -> Result<HostThread<H>> {
        let (questions, queue): (Sender<Question>, _) = channel();
        std::thread::Builder::new()
            .name("umem-host".into())
            .spawn(move || {
                for question in queue {
                    post.send(answer(question).into());
                }
            })
            .map_err(|source| Error::System { what: "starting a thread".into(), source })?;
        Ok(HostThread::elsewhere(move |question| {
            questions.send(question).expect("the thread ends after this sender");
        }))
    }
}

impl HostThread<dyn SourceHost> {
    pub(crate) fn start<T: From<Answer> + Send + 'static>(
        mut host: Box<dyn SourceHost>,
        post: Post<T>,
    ) -> Result<Self> {
        let answer = move |question| match question {
            Question::Stop { saves } => Answer::Stopped(host.stop(saves)),
            Question::Save => Answer::Saved(host.save_state()),
            Question::Resume => Answer::Resumed(host.resume()),
            Question::Prepare | Question::Load(_) | Question::Run => {
                unreachable!("a source is not asked that")
            }
        };
        HostThread::with(answer, post)
    }

    pub(crate) fn stop(&self, saves: bool) {
        (self.ask)(Question::Stop { saves });
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
            Question::Stop { .. } | Question::Save | Question::Resume => {
                unreachable!("a destination is not asked that")
            }
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
