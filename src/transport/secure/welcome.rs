//! The destination's welcome, with its proof.

use umem_wire::{Capabilities, FaultCode, Hello, PROTOCOL, Welcome};

use super::secret::Answer;
use crate::error::{Error, Result};
use crate::transport::lane::{Lane, refuse};

/// Answers a hello that fits. `answer`: the source has proven the secret, and the welcome proves it
/// too.
pub(crate) fn welcome(
    lane: &mut Lane,
    hello: &Hello,
    ours: Capabilities,
    answer: Option<&Answer>,
) -> Result<()> {
    let mut welcome = match Welcome::answer(hello, PROTOCOL, ours, [0; 32]) {
        Ok(welcome) => welcome,
        Err(error) => {
            refuse(lane, FaultCode::Protocol, &error.to_string());
            return Err(Error::protocol(&lane.name, error));
        }
    };
    if let Some(answer) = answer {
        welcome.proof = answer.welcome_proof(hello, &welcome);
    }
    lane.capabilities = welcome.capabilities;
    lane.say(&welcome.encode())
}
