//! The view of a migration from outside, and its control: progress, reports, metrics, a control socket.
//!
//! Threads that move pages only count ([`Counters`](crate::statistics::Counters)). A [`Watch`] reads the counters, and
//! all other parts read the watch:
//!
//! - [`progress`]: bars, lines or JSON events while the migration runs
//! - [`recording`] and [`report`]: `--report FILE`, figures over time and pictures of them on a [`page`]
//! - [`metrics`]: `--metrics ADDRESS`, for Prometheus
//! - [`control`]: `--control SOCKET`, commands in lines of JSON
//! - [`trace`]: `--verbose` and RUST_LOG
//!
//! [`visitors`] listens to the clients of the two servers.

pub(crate) mod bench;
pub(crate) mod control;
pub(crate) mod metrics;
pub(crate) mod output;
pub mod page;
mod passes;
mod pictures;
pub(crate) mod progress;
pub mod recording;
mod report;
pub mod svg;
pub(crate) mod trace;
mod visitors;
pub(crate) mod watch;

use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::runtime::bandwidth::Bandwidth;
use crate::statistics::Completed;
use output::Output;

use crate::runtime::role::Role;
pub(crate) use report::{check_writable, write};
use watch::Watch;

pub use metrics::Address;

/// The options of a side that make it observable.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A file for the report: a page, or the figures if its name ends in `.json`.
    pub report: Option<PathBuf>,
    /// The address for Prometheus.
    pub metrics: Option<Address>,
    /// The path of the control socket.
    pub control: Option<PathBuf>,
    /// No progress.
    pub quiet: bool,
}

/// The observers of one side of a migration. Dropping it ends them.
pub(crate) struct Observer {
    pub(crate) watch: Arc<Watch>,
    report: Option<PathBuf>,
    output: Output,
    _metrics: Option<metrics::Server>,
    _control: Option<control::Server>,
}

impl Observer {
    /// Starts the observers that the options name.
    ///
    /// # Errors
    /// An address in use; a file that cannot be written.
    pub(crate) fn start(
        options: &Options,
        role: Role,
        bandwidth: Option<Arc<Bandwidth>>,
        output: &Output,
    ) -> Result<Observer> {
        if let Some(path) = &options.report {
            check_writable(path)?;
        }
        let watch = Watch::new(role, options.report.is_some(), bandwidth);
        let metrics = match &options.metrics {
            Some(address) => Some(metrics::Server::start(address, watch.clone(), output)?),
            None => None,
        };
        let control = match &options.control {
            Some(path) => Some(control::Server::start(path, watch.clone())?),
            None => None,
        };
        Ok(Observer {
            watch,
            report: options.report.clone(),
            output: output.clone(),
            _metrics: metrics,
            _control: control,
        })
    }

    /// Writes the report, once the migration has ended or has failed to begin. A failure is only reported, because the
    /// guest does not depend on it.
    pub(crate) fn ended(&self, outcome: std::result::Result<&Completed, &Error>) {
        if let (Some(path), Some(recording)) = (&self.report, self.watch.recording(outcome))
            && let Err(error) = write(path, &[recording])
        {
            self.output.remark(&format!("no report: {error}"));
        }
    }
}
