//! Records with fixed keys: for published vectors, and for the fuzz target.

use super::*;

/// A key and its IV, of AES-128-GCM.
pub(super) type FixedKey = ([u8; 16], [u8; NONCE_LEN]);

/// Both directions' keys. A renewal increments the key's first byte.
pub(crate) struct FixedKeys {
    reading: FixedKey,
    writing: FixedKey,
}

impl FixedKeys {
    pub(super) fn next_for_reading(&mut self) -> Cipher {
        next(&mut self.reading)
    }

    pub(super) fn next_for_writing(&mut self) -> Cipher {
        next(&mut self.writing)
    }
}

fn next((key, iv): &mut FixedKey) -> Cipher {
    key[0] = key[0].wrapping_add(1);
    cipher((*key, *iv))
}

fn cipher((key, iv): FixedKey) -> Cipher {
    let key = UnboundKey::new(&aead::AES_128_GCM, &key).expect("the key has its cipher's length");
    Cipher { key: LessSafeKey::new(key), iv, sequence: 0 }
}

impl Records {
    /// `records_max`: most records per key.
    pub(super) fn fixed(reading: FixedKey, writing: FixedKey, records_max: u64) -> Records {
        Records {
            keys: Keys::Fixed(FixedKeys { reading, writing }),
            reading: cipher(reading),
            writing: cipher(writing),
            records_max,
            owes_update: false,
            vain: 0,
            peer_has_closed: false,
        }
    }
}

/// Data from a peer that holds the keys, in any pieces, and changes by an attacker on the path:
/// pairs of an operation and its size.
///
/// # Panics
/// When the receiver returns a byte that was not sent, or refuses a byte that was sent and not
/// changed.
#[cfg(feature = "fuzz")]
pub(crate) fn fuzz(input: &[u8]) {
    const RECORDS_MAX: u64 = 8;
    const HERE: FixedKey = ([1; 16], [2; NONCE_LEN]);
    const THERE: FixedKey = ([3; 16], [4; NONCE_LEN]);
    let mut sender = Records::fixed(HERE, THERE, RECORDS_MAX);
    let mut receiver = Records::fixed(THERE, HERE, RECORDS_MAX);
    let (mut out, mut on_the_way) = (Outgoing::default(), Vec::new());
    let (mut sent, mut taken) = (Vec::new(), Vec::new());
    let (mut buffer, mut window) = (vec![0xa5; 2 * RECORD_BYTES_MAX], Window::default());
    // Data in flight was changed, or the sender has sent something invalid.
    let mut is_spoilt = false;
    for (&[operation, size], number) in input.as_chunks::<2>().0.iter().zip((1..=u8::MAX).cycle()) {
        let size = usize::from(size);
        match operation % 6 {
            0 => {
                let bytes = vec![number; size * 64];
                sender.append(&mut out, &bytes).expect("the sender has a key");
                sender.flush(&mut out).expect("the sender has a key");
                sent.extend_from_slice(&bytes);
            }
            1 => {
                // A type of 0 would be padding, and the contents' last byte the type.
                let (content, bytes) = ((operation / 6).max(1), vec![number; size]);
                sender.say(&mut out, content, &bytes).expect("the sender has a key");
                if content == DATA {
                    sent.extend_from_slice(&bytes);
                }
                is_spoilt = true;
            }
            2 => sender.renew(&mut out).expect("the sender has a key"),
            3 => {
                if let Some(byte) = on_the_way.get_mut(size) {
                    *byte ^= operation / 6 + 1;
                    is_spoilt = true;
                }
            }
            4 => {
                on_the_way.extend(std::iter::repeat_n(number, size));
                is_spoilt |= size > 0;
            }
            _ => {
                let end = window.pack(&mut buffer);
                let count = (size * 97 + 1).min(on_the_way.len()).min(buffer.len() - end);
                buffer[end..end + count].copy_from_slice(&on_the_way[..count]);
                on_the_way.drain(..count);
                window.sealed.end += count;
                let opened = receiver.open(&mut buffer, &mut window);
                taken.extend_from_slice(&buffer[window.plain.clone()]);
                window.plain.start = window.plain.end;
                assert!(sent.starts_with(&taken), "a byte that was not sent");
                if let Err(error) = opened {
                    assert!(is_spoilt, "{error} of what the sender sent");
                    return;
                }
            }
        }
        on_the_way.extend_from_slice(out.pending());
        out.sent(out.pending().len());
    }
}
