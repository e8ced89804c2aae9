//! How a QEMU stops its guest and saves its device state, which is one step.

use std::convert::Infallible;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use serde_json::{Value, json};
use umem_wire::limits::STATE_BYTES_MAX;

use super::giving::is_not_ours;
use super::saving::{self, Saving};
use super::stream::reading::Reading;
use super::{GUEST_IS_PAUSED, GUEST_RUNS, HOW_TO_START, Qemu, STATE_SOCKET, run_state, settings};
use crate::error::{Error, Result};
use crate::runtime::panics;

/// Time limit for the guest to run while its device state is saved. QEMU evaluates its rate every 100 ms only
/// (`BUFFER_DELAY` in its migration/options.h), and everything that it sends until then is loaded while the guest
/// stands still.
const STOPS_ITSELF_WITHIN: Duration = Duration::from_millis(50);

impl Qemu {
    /// Whether QEMU can be kept from completing its migration: it must have a return path, and describe its stream,
    /// which machines older than QEMU 2.3 do not.
    pub(super) fn can_hold(&mut self) -> Result<bool> {
        let has_return_path =
            settings::capabilities(&mut self.qmp)?.contains_key(settings::RETURN_PATH);
        let undescribed = self.qmp.property("/machine", "suppress-vmdesc")?;
        Ok(has_return_path && undescribed != Some(json!(true)))
    }

    /// Has QEMU write its device state to the other end of a socket, and returns it: at most one byte beyond the limit.
    ///
    /// The migration stops a running guest eventually: QEMU continues while the guest changes memory that belongs to
    /// the state, such as video memory. After a time limit umem commands the stop.
    ///
    /// A thread of its own reads the state, from before the command on: QEMU's migration holds the main loop's lock
    /// while it writes, so QEMU can answer the command only after everything has been read.
    fn migrate_into(&mut self, ours: UnixStream, is_held: bool) -> Result<Vec<u8>> {
        let (has_ended, ended) = channel::<Infallible>();
        let read = std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let _has_ended = has_ended;
                let read = saving::read(&ours, is_held);
                if !matches!(read, Ok((_, false))) {
                    // The unread rest of a state that is too large makes QEMU's migration fail, and not wait.
                    let _ = ours.shutdown(Shutdown::Both);
                }
                read
            });
            let uri = json!({ "uri": format!("fd:{STATE_SOCKET}") });
            let asked = self.qmp.execute("migrate", uri).and_then(|_| {
                self.saving = Saving::Begun;
                match ended.recv_timeout(STOPS_ITSELF_WITHIN) {
                    Err(RecvTimeoutError::Timeout) => {
                        if let Some(claim) = &mut self.claim {
                            claim.note_stop(&mut self.qmp)?;
                        }
                        self.qmp.execute("stop", json!({}))
                    }
                    _ => Ok(Value::Null),
                }
            });
            if let Err(error) = asked {
                saving::abandon(&ours);
                return Err(error);
            }
            reader.join().unwrap_or_else(|payload| Err(panics::error(&*payload)))
        });
        let (state, has_ended) = read?;
        if !has_ended {
            self.saving = Saving::Held(ours);
        }
        Ok(state)
    }

    /// Has QEMU save its device state, and stop its guest if that runs.
    pub(super) fn save(&mut self, is_held: bool) -> Result<Vec<u8>> {
        if self.state_socket.is_none() {
            self.give_state_socket()?;
        }
        let ours = self.state_socket.take().expect("just given");
        let mut state = vec![if self.is_live { GUEST_RUNS } else { GUEST_IS_PAUSED }];
        state.extend(self.migrate_into(ours, is_held)?);
        if state.len() as u64 > STATE_BYTES_MAX {
            return Err(Error::Unsupported(format!(
                "QEMU's device state is larger than {} MiB: RAM outside of shared files is part of \
                 it; {HOW_TO_START}",
                STATE_BYTES_MAX >> 20
            )));
        }
        if matches!(self.saving, Saving::Begun) {
            let migration = self.wait_migrated()?;
            self.saving = Saving::Over;
            let status = run_state::status(&mut self.qmp)?;
            if run_state::is_live(&status) {
                return Err(is_not_ours((&status, &migration)));
            }
            self.given_away = Some((status, migration));
        } else {
            // The answer comes after the event with the time of the guest's stop.
            run_state::status(&mut self.qmp)?;
        }
        // Since the `migrate` command QEMU has refused to plug memory in or out. The blocks that it leaves out of its
        // stream must be those that umem moves.
        self.check_blocks()?;
        Ok(state)
    }

    /// Has QEMU stop its guest and write the rest of a stream that is being read.
    pub(super) fn save_rest(&mut self, reading: &Reading) -> Result<Vec<u8>> {
        let mut state = vec![if self.is_live { GUEST_RUNS } else { GUEST_IS_PAUSED }];
        state.extend(self.stop_stream(reading)?);
        // The answer comes after the event with the time of the guest's stop.
        run_state::status(&mut self.qmp)?;
        self.check_blocks()?;
        Ok(state)
    }

    /// Another client has paused a guest that has stopped while QEMU waits for umem: so the guest arrives paused, or
    /// stays paused.
    pub(super) fn look_for_a_pause(&mut self) -> Result<()> {
        // Its answer comes after the event.
        run_state::status(&mut self.qmp)?;
        if self.qmp.stopped_at().is_some() && self.waits_for_a_word()? {
            self.is_live = false;
        }
        Ok(())
    }
}
