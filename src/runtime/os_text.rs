//! File names that need not be UTF-8, as text, for the parser of the command line and for session
//! files.
//!
//! Each byte outside UTF-8 becomes a character at the end of the last private use area. The bytes
//! of those characters, if a name has them, are replaced as well. So every name has a text, and
//! every text converts back to its name.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::error::{Context, Result};

/// Replaces a byte: the sum of this and the byte, which is never ASCII.
const ESCAPES: u32 = 0x10_ff00;

pub(crate) fn encode(name: &OsStr) -> String {
    let escape = |&byte: &u8| char::from_u32(ESCAPES + u32::from(byte)).expect("no surrogate");
    let mut text = String::with_capacity(name.len());
    for chunk in name.as_bytes().utf8_chunks() {
        for character in chunk.valid().chars() {
            match escaped(character) {
                Some(_) => {
                    text.extend(character.encode_utf8(&mut [0; 4]).as_bytes().iter().map(escape));
                }
                None => text.push(character),
            }
        }
        text.extend(chunk.invalid().iter().map(escape));
    }
    text
}

pub(crate) fn decode(text: &str) -> OsString {
    let mut name = Vec::with_capacity(text.len());
    for character in text.chars() {
        match escaped(character) {
            Some(byte) => name.push(byte),
            None => name.extend(character.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    OsString::from_vec(name)
}

/// The byte that a character replaces.
fn escaped(character: char) -> Option<u8> {
    let byte = u8::try_from(u32::from(character).checked_sub(ESCAPES)?).ok()?;
    (!byte.is_ascii()).then_some(byte)
}

/// For serde: a path.
pub(crate) mod path {
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&super::encode(path.as_os_str()))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
        Ok(super::decode(&String::deserialize(from)?).into())
    }
}

/// The absolute path, which is valid in every working directory.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_decodes_to_itself() {
        let lone = [
            &b"/dev/shm/\xff\xfe \xc3"[..],
            b"\x80",
            b"\xed\xa0\x80",
            b"plain",
            "ä€😀".as_bytes(),
            b"",
        ];
        for name in lone.map(OsStr::from_bytes) {
            assert_eq!(decode(&encode(name)), name);
        }
        assert_eq!(encode(OsStr::new("/dev/shm/gäst")), "/dev/shm/gäst", "UTF-8 stays unchanged");
        // A name that looks like the text of another name.
        let text = encode(OsStr::from_bytes(b"a\xffb"));
        let looks_alike = OsStr::new(&text);
        assert_eq!(decode(&encode(looks_alike)), looks_alike);
        assert_ne!(encode(looks_alike), text);
    }
}
