//! What `umem bench client` was told.

use std::path::PathBuf;
use std::time::Duration;

use super::protocol::Test;
use crate::transport::uri::Uri;

/// What `umem bench client` was told.
pub(crate) struct Client {
    pub(crate) uri: Uri,
    pub(crate) test: Test,
    /// None with [`Test::bytes`].
    pub(crate) duration: Option<Duration>,
    pub(crate) omit: Duration,
    /// None reports the whole only.
    pub(crate) interval: Option<Duration>,
    /// Cores of the lanes; none leaves the choice.
    pub(crate) cores: Vec<usize>,
    /// A file for a page of the test.
    pub(crate) report: Option<PathBuf>,
    pub(crate) json: bool,
}
