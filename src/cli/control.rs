//! `umem control`: commands to a running umem

use std::path::PathBuf;

use argh::{ArgsInfo, FromArgs};
use serde_json::{Value, json};

use super::values::Size;
use crate::error::{Error, Result};
use crate::observe::control;
use crate::runtime::print;

/// Show the state of a running migration, or change it, through its --control socket.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "control",
    note = "status prints the state of the migration. set changes a limit: of the background after \
            the switchover, or of the passes while the guest runs; 0 removes the limit. postcopy \
            ends the passes of `umem migrate --precopy -p` and switches over. cancel ends the \
            migration before the switchover, and the guest continues at the source; after the \
            switchover umem refuses it. pause gives up the connections after the switchover; the \
            guest continues with the pages that it has. resume opens the connections again, at \
            another address if the command has one: the source dials it, the destination listens \
            on it. A program can send the same commands: the socket takes and returns one JSON \
            object a line, as QMP does, and \"execute\" has the command.",
    example = "Start a migration with a control socket:\n  umem migrate -p --control /run/umem.sock --qmp \
               /run/qmp.sock tcp:DESTINATION:4444",
    example = "Show its state:\n  {command_name} /run/umem.sock status",
    example = "Leave room on the link for others:\n  {command_name} /run/umem.sock set \
               max-postcopy-bandwidth=100M",
    example = "Switch over to postcopy, however much is left:\n  {command_name} /run/umem.sock postcopy",
    error_code(
        1,
        "No umem listens on the socket, or umem refused the command; stderr has the reason."
    ),
    error_code(2, "The command line is wrong.")
)]
pub(super) struct Control {
    /// the control socket of the running umem
    #[argh(positional)]
    socket: PathBuf,
    /// the command: status, set, postcopy, cancel, pause or resume
    #[argh(positional)]
    command: String,
    /// for set: max-postcopy-bandwidth=BYTES or max-bandwidth=BYTES a second, such as 100M; for
    /// resume: another URI
    #[argh(positional)]
    setting: Vec<String>,
}

impl Control {
    pub(super) fn run(self) -> Result<i32> {
        let command = match self.command.as_str() {
            "set" => json!({ "execute": "set", "arguments": settings(&self.setting)? }),
            "resume" if self.setting.len() == 1 => {
                json!({ "execute": "resume", "arguments": { "uri": self.setting[0] } })
            }
            other if self.setting.is_empty() => json!({ "execute": other }),
            other => {
                return Err(Error::Usage(format!(
                    "{other} takes no argument; only set and resume take one"
                )));
            }
        };
        let answer = control::ask(&self.socket, &command)?;
        if answer != json!({}) {
            let text = serde_json::to_string_pretty(&answer).expect("parsed JSON");
            print::out_line(&text);
        }
        Ok(0)
    }
}

/// `NAME=VALUE` in the form of the socket's arguments.
fn settings(words: &[String]) -> Result<Value> {
    const NAMES: [&str; 2] = ["max-postcopy-bandwidth", "max-bandwidth"];
    let setting = match words {
        [word] => word.split_once('=').filter(|(name, _)| NAMES.contains(name)),
        _ => None,
    };
    let Some((name, value)) = setting else {
        let [background, passes] = NAMES;
        return Err(Error::Usage(format!(
            "write set {background}=BYTES or set {passes}=BYTES (bytes a second, such as 100M)"
        )));
    };
    let size: Size = value.parse().map_err(Error::Usage)?;
    Ok(json!({ name: size.0 }))
}
