//! The output of a migration's events and its result: JSON, sentences for a user, or the embedding program.

use std::sync::Arc;

use crate::error::Error;
use crate::events::{Event, words};
use crate::runtime::{print, screen};
use crate::statistics::Completed;

/// The destination of events.
#[derive(Clone)]
pub(crate) enum Output {
    /// Sentences on stderr, the report on stdout.
    Person,
    /// JSON objects on stdout.
    Json,
    /// To the embedding program; nothing is printed.
    Host(Take),
}

type Take = Arc<dyn Fn(&Event) + Send + Sync>;

impl Output {
    /// For the umem program, with or without `--json`.
    pub(crate) fn new(json: bool) -> Output {
        if json { Output::Json } else { Output::Person }
    }

    pub(crate) fn is_for_person(&self) -> bool {
        matches!(self, Output::Person)
    }

    /// Writes an event of a migration.
    pub(crate) fn tell(&self, event: &Event) {
        match (self, event.name()) {
            (Output::Host(take), _) => take(event),
            (_, None) => self.remark(&words::sentence(event)),
            (_, Some(name)) => self.event(name, words::fields(event), &words::sentence(event)),
        }
    }

    /// Writes an event of another program, with its sentence for a user.
    pub(crate) fn event(&self, name: &str, fields: serde_json::Value, sentence: &str) {
        match self {
            Output::Json => {
                let mut object = serde_json::json!({ "event": name });
                if let (Some(object), serde_json::Value::Object(fields)) =
                    (object.as_object_mut(), fields)
                {
                    object.extend(fields);
                }
                self.line(&object.to_string());
            }
            Output::Person if !sentence.is_empty() => screen::say(&format!("umem: {sentence}")),
            Output::Person | Output::Host(_) => {}
        }
    }

    /// Writes a sentence for the user.
    pub(crate) fn remark(&self, sentence: &str) {
        if !matches!(self, Output::Host(_)) {
            screen::say(&format!("umem: {sentence}"));
        }
    }

    pub(crate) fn completed(&self, report: &Completed) {
        match self {
            Output::Json => {
                self.line(&serde_json::to_string(report).expect("plain numbers and strings"));
            }
            Output::Person => {
                print::out(&report.summary());
            }
            // The embedding program gets the report itself.
            Output::Host(_) => {}
        }
    }

    /// Writes an error as one line.
    pub(crate) fn failed(&self, error: &Error) {
        // Texts of monitors and commands may have several lines.
        self.remark(&error.to_string().lines().collect::<Vec<_>>().join(" "));
        if matches!(self, Output::Json) {
            let object = serde_json::json!({ "event": "failed", "error": error.to_string() });
            self.line(&object.to_string());
        }
    }

    /// Writes a line to stdout. A failure shows in the exit status at the end.
    pub(crate) fn line(&self, text: &str) {
        print::out_line(text);
    }
}
