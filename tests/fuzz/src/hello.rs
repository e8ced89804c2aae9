//! Any 128 bytes, twice: a hello, and its answer. A decoded value encodes to the same bytes.

use umem_wire::{Capabilities, HELLO_BYTES, Hello, HelloError, PROTOCOL, Welcome, select_version};

pub(crate) fn run(input: &[u8]) {
    let mut pieces = input.chunks(HELLO_BYTES).map(|piece| {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..piece.len()].copy_from_slice(piece);
        bytes
    });
    let hello = pieces.next().unwrap_or([0; HELLO_BYTES]);
    let answer = pieces.next().unwrap_or(hello);
    welcome(&answer, None);
    match Hello::decode(&hello) {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(decoded) => {
            assert_eq!(decoded.encode(), hello);
            welcome(&answer, Some(&decoded));
            let ours = Welcome::answer(&decoded, PROTOCOL, Capabilities::ACKS, [7; 32]);
            assert_eq!(ours.is_ok(), select_version(PROTOCOL, decoded.versions).is_some());
            if let Ok(ours) = ours {
                assert_eq!(ours.check(&decoded), Ok(()));
                assert_eq!(Welcome::decode(&ours.encode()), Ok(ours));
            }
        }
    }
}

fn welcome(bytes: &[u8; HELLO_BYTES], hello: Option<&Hello>) {
    match Welcome::decode(bytes) {
        Ok(decoded) => {
            assert_eq!(decoded.encode(), *bytes);
            if let Some(hello) = hello
                && decoded.check(hello).is_ok()
            {
                assert!(hello.capabilities.contains(decoded.capabilities));
                assert_eq!(decoded.session, hello.session);
            }
        }
        Err(HelloError::Refused { code, text }) => {
            let again = Welcome::decode(&Welcome::refuse(code, &text));
            assert_eq!(again, Err(HelloError::Refused { code, text }));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
