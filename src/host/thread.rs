//! The host's thread: talks to the monitor, which may block, so that the control thread never does.

use std::sync::mpsc::{Sender, channel};

use super::{DestinationHost, SourceHost};
use crate::error::{Error, Result};
use crate::inbox::Post;

/// The monitor's answers, in the order of the questions.
pub(crate) enum Answer {
    Stopped(Result<()>),
    Saved(Result<Vec<u8>>),
    Resumed(Result<()>),
    Loaded(Result<()>),
    Running(Result<()>),
}

type Job<H> = Box<dyn FnOnce(&mut H) -> Answer + Send>;

/// Hands jobs to a host on a thread of its own. The thread ends when this is dropped and its job
/// is done; a monitor that never answers keeps the thread, not the process.
pub(crate) struct HostThread<H: ?Sized> {
    jobs: Sender<Job<Box<H>>>,
}

impl<H: ?Sized + Send + 'static> HostThread<H> {
    pub(crate) fn start<T: From<Answer> + Send + 'static>(
        mut host: Box<H>,
        post: Post<T>,
    ) -> Result<HostThread<H>> {
        let (jobs, queue) = channel::<Job<Box<H>>>();
        std::thread::Builder::new()
            .name("umem-host".into())
            .spawn(move || {
                for job in queue {
                    post.send(job(&mut host).into());
                }
            })
            .map_err(|source| Error::System { what: "starting a thread".into(), source })?;
        Ok(HostThread { jobs })
    }

    fn ask(&self, job: impl FnOnce(&mut Box<H>) -> Answer + Send + 'static) {
        self.jobs.send(Box::new(job)).expect("the thread ends after this sender");
    }
}

impl HostThread<dyn SourceHost> {
    pub(crate) fn stop(&self) {
        self.ask(|host| Answer::Stopped(host.stop()));
    }

    pub(crate) fn save_state(&self) {
        self.ask(|host| Answer::Saved(host.save_state()));
    }

    pub(crate) fn resume(&self) {
        self.ask(|host| Answer::Resumed(host.resume()));
    }
}

impl HostThread<dyn DestinationHost> {
    pub(crate) fn load_state(&self, state: Vec<u8>) {
        self.ask(|host| Answer::Loaded(host.load_state(state)));
    }

    pub(crate) fn run(&self) {
        self.ask(|host| Answer::Running(host.run()));
    }
}
