//! The 64 bits that travel through the kernel as `user_data`.
//!
//! ```text
//!   63   62 ........ 32   31 ......... 0
//!    0    generation        slot            an operation of the table: a Key
//!   63 .......... 56      55 ......... 0
//!    1, what it is          payload         the ring's own: it never reaches the user as an operation
//! ```
//!
//! The generation counts submissions, not uses of a slot, so a key repeats only after 2^31
//! submissions, and only if it falls on the same slot. Until then a completion or a cancellation
//! with an old key finds no operation: it never affects the slot's next operation.

use std::fmt;

/// Names one submitted operation of one ring. The name stays valid; once the operation's last
/// completion was read, it refers to no operation.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key(u64);

impl Key {
    /// The key in completions that belong to no operation: messages and wake-ups.
    pub const NONE: Key = Key(u64::MAX);

    pub(crate) fn new(slot: u32, generation: Generation) -> Key {
        Key((u64::from(generation.0) << GENERATION_SHIFT) | u64::from(slot))
    }

    pub(crate) fn slot(self) -> usize {
        self.0 as u32 as usize
    }

    pub(crate) fn user_data(self) -> u64 {
        self.0
    }

    /// The part of the key that fits an internal payload: the slot and 24 bits of the generation.
    pub(crate) fn payload(self) -> u64 {
        self.0 & PAYLOAD_MASK
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Key::NONE {
            return f.write_str("Key(none)");
        }
        write!(f, "Key({}.{})", self.slot(), self.0 >> GENERATION_SHIFT)
    }
}

/// Counts submissions, modulo 2^31.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Generation(u32);

impl Generation {
    pub(crate) fn next(self) -> Generation {
        Generation(self.0.wrapping_add(1) & GENERATION_MASK)
    }
}

/// The meaning of a completion's `user_data`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UserData {
    /// An operation of the table, present or past.
    Operation(Key),
    /// A request to cancel the operation with this [`Key::payload`].
    Cancel(u64),
    /// The standing read of the wake-up eventfd.
    Wake,
    /// Posted by another ring; carries the low [`PAYLOAD_BITS`] bits of the value.
    Message(u64),
    /// Without an owner: probes of the setup, and requests to cancel everything.
    Ignored,
}

impl UserData {
    pub(crate) fn decode(raw: u64) -> UserData {
        let payload = raw & PAYLOAD_MASK;
        match raw >> PAYLOAD_BITS {
            CANCEL => UserData::Cancel(payload),
            WAKE => UserData::Wake,
            MESSAGE => UserData::Message(payload),
            what if what & INTERNAL != 0 => UserData::Ignored,
            _ => UserData::Operation(Key(raw)),
        }
    }

    pub(crate) fn encode(self) -> u64 {
        let (what, payload) = match self {
            UserData::Operation(key) => return key.0,
            UserData::Cancel(payload) => (CANCEL, payload),
            UserData::Wake => (WAKE, 0),
            UserData::Message(payload) => (MESSAGE, payload),
            UserData::Ignored => (IGNORED, 0),
        };
        debug_assert_eq!(payload & !PAYLOAD_MASK, 0);
        (what << PAYLOAD_BITS) | payload
    }
}

/// Payload bits of an internal `user_data`.
pub(crate) const PAYLOAD_BITS: u32 = 56;
pub(crate) const PAYLOAD_MASK: u64 = (1 << PAYLOAD_BITS) - 1;

const GENERATION_SHIFT: u32 = 32;
const GENERATION_MASK: u32 = (1 << 31) - 1;

const INTERNAL: u64 = 0x80;
const CANCEL: u64 = INTERNAL;
const WAKE: u64 = INTERNAL + 1;
const MESSAGE: u64 = INTERNAL + 2;
const IGNORED: u64 = INTERNAL + 3;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn generation_wraps_inside_its_bits() {
        let last = Generation(GENERATION_MASK);
        assert_eq!(last.next(), Generation(0));
        let key = Key::new(u32::MAX, last);
        assert_eq!(UserData::decode(key.user_data()), UserData::Operation(key));
    }

    #[test]
    fn key_none_decodes_as_no_operation() {
        assert_eq!(UserData::decode(Key::NONE.user_data()), UserData::Ignored);
    }

    proptest! {
        #[test]
        fn user_data_of_every_kind_decodes_to_itself(slot: u32, generation in 0..=GENERATION_MASK, payload in 0..=PAYLOAD_MASK) {
            let key = Key::new(slot, Generation(generation));
            prop_assert_eq!(key.slot(), slot as usize);
            for data in [
                UserData::Operation(key),
                UserData::Cancel(payload),
                UserData::Wake,
                UserData::Message(payload),
                UserData::Ignored,
            ] {
                prop_assert_eq!(UserData::decode(data.encode()), data);
            }
        }
    }
}
