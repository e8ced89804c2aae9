//! Lanes that are authenticated by a secret.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};

use ring::hmac;
use umem_wire::{HELLO_BYTES, Hello, Nonce, PROTOCOL, Welcome};

use super::support::DEADLINE;
use super::{Move, SECRET, hello, says, socket};

#[test]
fn source_with_a_wrong_secret_is_refused() {
    let moving = Move::new();
    let right = moving.secret("right", SECRET);
    // A trailing newline does not change the secret.
    let same = moving.secret("same", &format!("{SECRET}\n"));
    let wrong = moving.secret("wrong", "another secret, and long enough");
    let (mut incoming, uri) = moving.incoming("tcp:127.0.0.1:0", &["--secret-file", &right]);
    let error = moving.migrate(&uri, &["--secret-file", &wrong]).fails();
    assert!(error.contains("the destination gave up: it does not know the secret"), "{error}");
    says(&incoming, "refused: it does not know the secret");
    let error = moving.migrate(&uri, &[]).fails();
    assert!(error.contains("a secret is required here: give --secret-file"), "{error}");
    says(&incoming, "refused: a secret is required here");
    assert!(incoming.is_running());
    let migrate = moving.migrate(&uri, &["--secret-file", &same]);
    moving.succeeds(incoming, migrate, "secret");

    let moving = Move::new();
    let (incoming, uri) = moving.incoming("tcp:127.0.0.1:0", &[]);
    let error = moving.migrate(&uri, &["--secret-file", &right]).fails();
    assert!(error.contains("no secret is known here"), "{error}");
    says(&incoming, "refused: no secret is known here");
    moving.succeeds(incoming, moving.migrate(&uri, &[]), "none");
}

/// Made from the description in `src/transport/secure/secret.rs` alone.
fn proof(secret: &str, label: &str, said: &[&[u8]]) -> [u8; 32] {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
    let tag = hmac::sign(&key, &[&[label.as_bytes()], said].concat().concat());
    tag.as_ref().try_into().unwrap()
}

#[test]
fn replayed_hello_is_refused() {
    let moving = Move::new();
    let secret = moving.secret("secret", SECRET);
    let (mut incoming, uri) = moving.incoming("tcp:127.0.0.1:0", &["--secret-file", &secret]);
    let hear = |stream: &mut TcpStream| {
        let mut bytes = [0; HELLO_BYTES];
        stream.read_exact(&mut bytes).unwrap();
        bytes
    };
    let ours = Nonce([3; 32]);
    // One of two bulk lanes, so that the session stays incomplete.
    let hello = Hello { bulk_lanes: 1, ..hello() };
    let mut stream = socket(&uri);
    stream.write_all(&ours.encode_ask()).unwrap();
    let theirs = Nonce::decode_answer(&hear(&mut stream)).unwrap();
    let said = [&ours.0[..], &theirs.0, &hello.encode()];
    let proven = Hello { proof: proof(SECRET, "umem hello 1", &said), ..hello.clone() };
    stream.write_all(&proven.encode()).unwrap();
    let welcome = Welcome::decode(&hear(&mut stream)).unwrap();
    let bare = Welcome { proof: [0; 32], ..welcome.clone() };
    let said = [&ours.0[..], &theirs.0, &proven.encode(), &bare.encode()];
    assert_eq!(
        welcome.proof,
        proof(SECRET, "umem welcome 1", &said),
        "the destination knows the secret"
    );
    drop(stream);

    let mut stream = socket(&uri);
    stream.write_all(&ours.encode_ask()).unwrap();
    assert_ne!(Nonce::decode_answer(&hear(&mut stream)).unwrap(), theirs, "each nonce is new");
    stream.write_all(&proven.encode()).unwrap();
    let refused = Welcome::decode(&hear(&mut stream)).unwrap_err().to_string();
    assert!(refused.contains("it does not know the secret"), "{refused}");
    assert!(incoming.is_running());
}

/// The answer of a destination without the secret, or one that reflects the source's own proof.
#[test]
fn source_sends_no_data_to_a_wrong_secret() {
    let moving = Move::new();
    let secret = moving.secret("secret", SECRET);
    for reflects in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        let migrate = moving.migrate(&uri, &["--secret-file", &secret]);
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut bytes = [0; HELLO_BYTES];
        stream.read_exact(&mut bytes).unwrap();
        stream.write_all(&Nonce([5; 32]).encode_answer()).unwrap();
        stream.read_exact(&mut bytes).unwrap();
        let hello = Hello::decode(&bytes).unwrap();
        let proof = if reflects { hello.proof } else { [0; 32] };
        let welcome = Welcome::answer(&hello, PROTOCOL, hello.capabilities, proof).unwrap();
        stream.write_all(&welcome.encode()).unwrap();
        let error = migrate.fails();
        assert!(error.contains("no secure connection to the destination: it does not"), "{error}");
        let left = stream.read(&mut bytes);
        let is_closed = matches!(&left, Ok(0))
            || left.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset);
        assert!(is_closed, "nothing else was sent: {left:?}");
    }
}
