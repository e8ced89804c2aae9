//! Errors: one line for the user.

/// An error in one line.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

pub(crate) type Result<T> = std::result::Result<T, Failure>;

/// Names the object of an operation.
pub(crate) trait Context<T> {
    /// Puts `what` before the error's own text; built only on failure.
    fn context<S: std::fmt::Display>(self, what: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: std::fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context<S: std::fmt::Display>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|error| format!("{}: {error}", what()).into())
    }
}

/// A failure with this text.
pub(crate) fn failure<T>(text: impl Into<String>) -> Result<T> {
    Err(text.into().into())
}

/// A command line that is not valid (exit status 2).
#[derive(Debug)]
pub(crate) struct Usage(String);

impl std::fmt::Display for Usage {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// A [`Usage`] failure with this text.
pub(crate) fn usage<T>(text: impl Into<String>) -> Result<T> {
    Err(Usage(text.into()).into())
}
