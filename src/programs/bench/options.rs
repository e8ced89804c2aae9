//! The options of `umem bench client`.

use std::path::PathBuf;
use std::time::Duration;

use super::protocol::Test;
use crate::transport::uri::Uri;

/// The options of `umem bench client`.
pub(crate) struct Client {
    pub(crate) uri: Uri,
    pub(crate) test: Test,
    /// None with [`Test::bytes`].
    pub(crate) duration: Option<Duration>,
    pub(crate) omit: Duration,
    /// None reports only the total.
    pub(crate) interval: Option<Duration>,
    /// Cores of the lanes; None leaves the choice to umem.
    pub(crate) cores: Vec<usize>,
    /// A file for an HTML page of the test.
    pub(crate) report: Option<PathBuf>,
    pub(crate) json: bool,
}
