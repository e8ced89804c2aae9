//! `umem control`: commands to an umem that runs

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
    note = "status prints the state of the migration. set changes a limit, of the background after \
            the switchover or of the passes while the guest runs; 0 is no limit. postcopy ends the \
            passes of `umem migrate --precopy -p`, and switches over. cancel gives up before the switchover, and the guest goes on at the \
            source; afterwards it is refused. pause gives up the connections after the \
            switchover, and the guest goes on with the pages it has. resume opens the \
            connections again, at another address if one is named: at the source the address to \
            dial, at the destination the address to listen at. Any program can do the same: the \
            socket takes and gives one JSON object a line, in the manner of QMP. Its \"execute\" \
            is the command.",
    example = "Start a migration with a control socket:\n  umem migrate -p --control /run/umem.sock --qmp \
               /run/qmp.sock tcp:DESTINATION:4444",
    example = "Show its state:\n  {command_name} /run/umem.sock status",
    example = "Leave room on the link for others:\n  {command_name} /run/umem.sock set \
               max-postcopy-bandwidth=100M",
    example = "Switch over to postcopy, however much is left:\n  {command_name} /run/umem.sock postcopy",
    error_code(1, "No umem listens there, or the command was refused; stderr says why."),
    error_code(2, "The command line is wrong.")
)]
pub(super) struct Control {
    /// the socket
    #[argh(positional)]
    socket: PathBuf,
    /// status, set, postcopy, cancel, pause or resume
    #[argh(positional)]
    command: String,
    /// set: max-postcopy-bandwidth=BYTES or max-bandwidth=BYTES a second, such as 100M; resume: another URI
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
                    "{other} takes nothing after it; set and resume do"
                )));
            }
        };
        let answer = control::ask(&self.socket, &command)?;
        if answer != json!({}) {
            let text = serde_json::to_string_pretty(&answer).expect("it was JSON before");
            print::out_line(&text);
        }
        Ok(0)
    }
}

/// `NAME=VALUE` as the socket takes them.
fn settings(words: &[String]) -> Result<Value> {
    const NAMES: [&str; 2] = ["max-postcopy-bandwidth", "max-bandwidth"];
    let setting = match words {
        [word] => word.split_once('=').filter(|(name, _)| NAMES.contains(name)),
        _ => None,
    };
    let Some((name, value)) = setting else {
        let [background, passes] = NAMES;
        return Err(Error::Usage(format!(
            "write set {background}=BYTES or set {passes}=BYTES, a second, such as 100M"
        )));
    };
    let size: Size = value.parse().map_err(Error::Usage)?;
    Ok(json!({ name: size.0 }))
}
