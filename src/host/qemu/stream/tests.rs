//! Handwritten streams: literal bytes, in any pieces.

use super::records::Word;
use super::*;

/// Big-endian numbers and texts, in sequence.
#[derive(Clone, Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn with(mut self, bytes: impl AsRef<[u8]>) -> Bytes {
        self.0.extend_from_slice(bytes.as_ref());
        self
    }

    fn named(self, name: &str) -> Bytes {
        self.with([u8::try_from(name.len()).unwrap()]).with(name)
    }

    fn page(self, offset: u64, name: Option<&str>, byte: u8) -> Bytes {
        let same = if name.is_some() { 0 } else { flag::SAME_BLOCK };
        let kind = if byte == 0 { flag::ZERO } else { flag::PAGE };
        let begun = self.with(Word { offset, flags: kind | same }.bytes());
        let begun = if let Some(name) = name { begun.named(name) } else { begun };
        begun.with(vec![byte; if byte == 0 { 1 } else { PAGE_BYTES }])
    }

    fn end(self) -> Bytes {
        self.with([0, 0, 0, 0, 0, 0, 0, 0x10])
    }

    fn footer(self) -> Bytes {
        self.with([0x7e, 0, 0, 0, 2])
    }
}

/// Up to the configuration's end.
fn configured() -> Bytes {
    Bytes::default().with(b"QEVM\0\0\0\x03\x07\0\0\0\x03q35")
}

/// Two blocks, of two pages and of one.
fn set_up(begun: Bytes) -> Bytes {
    let begun =
        begun.with(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04").with(0x3004_u64.to_be_bytes());
    let begun = begun.named("ram0").with(0x2000_u64.to_be_bytes());
    begun.named("vga").with(0x1000_u64.to_be_bytes()).end().footer()
}

const PART: &[u8] = b"\x02\0\0\0\x02";
const END: &[u8] = b"\x03\0\0\0\x02";
const OPEN_RETURN_PATH: &[u8] = b"\x08\0\x01\0\0";
const PING: &[u8] = b"\x08\0\x02\0\x04\0\0\0\x01";
const SWITCHOVER_START: &[u8] = b"\x08\0\x0b\0\0";
const REST: &[u8] = b"\x04\0\0\0\x00\x05timer rest \0\x06\0\0\0\x02{}";

pub(super) fn whole() -> Vec<u8> {
    let begun = set_up(configured().with(OPEN_RETURN_PATH).with(PING));
    let begun = begun.with(PART).page(0, Some("ram0"), 1).page(0x1000, None, 0);
    let begun = begun.page(0, Some("vga"), 7).end().footer();
    // The same page again, of both blocks.
    let begun = begun.with(PART).page(0x1000, Some("ram0"), 2).page(0, Some("vga"), 8);
    let begun = begun.end().footer().with(PART).end().footer();
    let begun = begun.with(SWITCHOVER_START).with(END).page(0, Some("ram0"), 3);
    begun.end().footer().with(REST).0
}

/// The same up to its first pages, with a return path or without.
pub(super) fn head(has_return_path: bool) -> Vec<u8> {
    let begun = configured();
    let begun = if has_return_path { begun.with(OPEN_RETURN_PATH) } else { begun };
    set_up(begun).with(PART).page(0, Some("ram0"), 1).0
}

/// The head of a stream that leaves shared RAM out.
pub(super) fn head_without_shared() -> Vec<u8> {
    let capabilities = b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0fx-ignore-shared";
    configured().with(capabilities).with(OPEN_RETURN_PATH).0
}

/// The events of a stream that is read in pieces of this size, with consecutive contents and other bytes joined; and
/// the cut.
fn read(stream: &[u8], piece: usize) -> Result<(Vec<String>, Vec<u8>)> {
    let (mut parser, mut cut) = (Parser::new(), Cut::new(1 << 20));
    let mut told = Vec::new();
    let mut other = Vec::new();
    for piece in stream.chunks(piece) {
        parser.read(piece, |parser, event| {
            match &event {
                Event::Other(bytes) => other.extend_from_slice(bytes),
                Event::Content(_) => {}
                event => told.push(format!("{event:?} after {}", other.len())),
            }
            let blocks = parser.blocks();
            cut.take(blocks, |block| blocks[block].name == "ram0", &event)
        })?;
    }
    Ok((told, cut.into_stream()))
}

fn refused(stream: impl AsRef<[u8]>) -> String {
    read(stream.as_ref(), 1).unwrap_err().to_string()
}

#[test]
fn pieces_of_any_size_give_the_same_events() {
    let stream = whole();
    let expected = read(&stream, stream.len()).unwrap();
    for piece in (1..300).chain(4000..4200) {
        assert_eq!(read(&stream, piece).unwrap(), expected, "{piece}");
    }
    let (told, _) = expected;
    let pages: Vec<&String> = told.iter().filter(|line| line.starts_with("Page")).collect();
    assert_eq!(pages.len(), 6);
    assert!(pages[1].starts_with("Page { block: 0, offset: 4096, is_zero: true"), "{}", pages[1]);
    assert_eq!(told.iter().filter(|line| line.starts_with("Ended")).count(), 4);
}

#[test]
fn cut_has_the_last_contents_of_each_unmoved_page_once() {
    let (_, cut) = read(&whole(), 1000).unwrap();
    let begun = set_up(configured().with(OPEN_RETURN_PATH).with(PING));
    let begun = begun.with(SWITCHOVER_START).with(END).page(0, Some("vga"), 8).end().footer();
    assert_eq!(cut, begun.with(REST).0);
    // The cut is a stream, and its own cut is the same.
    assert_eq!(read(&cut, 1000).unwrap().1, cut);
}

#[test]
fn size_of_the_cut_is_bounded() {
    let mut cut = Cut::new(PAGE_BYTES + 10);
    let block = |name: &str| Block { name: name.into(), bytes: 1 << 20 };
    let blocks = [block("vga")];
    let mut take = |event| cut.take(&blocks, |_| false, &event);
    let page = |offset| Event::Page { block: 0, offset, is_zero: false, at: 0 };
    // The same page after each change by the guest.
    for _ in 0..3 {
        take(page(0)).unwrap();
        take(Event::Content(&[1; PAGE_BYTES])).unwrap();
    }
    take(page(0x1000)).unwrap();
    let error = take(Event::Content(&[1; PAGE_BYTES])).unwrap_err().to_string();
    assert!(error.contains("device state is larger"), "{error}");
}

#[test]
fn configuration_names_capabilities() {
    let capabilities = b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0fx-ignore-shared";
    let page_bits = b"\x05\x1econfiguration/target-page-bits\0\0\0\x01\0\0\0\x0c";
    let uuid = b"\x05\x12configuration/uuid\0\0\0\x01................";
    let begun = configured().with(page_bits).with(capabilities).with(uuid);
    let begun =
        begun.with(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04").with(0x1004_u64.to_be_bytes());
    let begun = begun.named("ram0").with(0x1000_u64.to_be_bytes()).with([0xa5; 8]).end();
    let stream = begun.with(END).end().with(REST).0;
    let mut parser = Parser::new();
    for byte in &stream {
        parser.read(&[*byte], |_, _| Ok(())).unwrap();
    }
    assert_eq!(parser.capabilities(), ["x-ignore-shared"]);
    assert_eq!(parser.blocks(), [Block { name: "ram0".into(), bytes: 0x1000 }]);
    assert!(parser.is_device_state() && parser.ignores_shared());
    assert_eq!(ignores_shared(&stream), Some(true));
    assert_eq!(ignores_shared(&whole()), Some(false));
    assert_eq!(ignores_shared(b"a monitor of its own"), None);
}

#[test]
fn unknown_element_is_named_in_the_error() {
    let part = || set_up(configured()).with(PART);
    let word = |flags| Word { offset: 0, flags }.bytes();
    for (stream, named) in [
        (Bytes::default().with(b"QEVX\0\0\0\x03"), "begins with"),
        (Bytes::default().with(b"QEVM\0\0\0\x04"), "version 4"),
        (configured().with(b"\x05\x03new\0\0\0\x01"), "version 1 of new"),
        (
            configured().with(b"\x05\x12configuration/uuid\0\0\0\x02"),
            "version 2 of configuration/uuid",
        ),
        (
            configured().with(b"\x05\x1econfiguration/target-page-bits\0\0\0\x01\0\0\0\x10"),
            "pages of 2^16 bytes",
        ),
        (configured().with(OPEN_RETURN_PATH).with(b"\x05"), "type 0x05"),
        (configured().with(b"\x09"), "type 0x09"),
        (configured().with(b"\x08\0\x03\0\0"), "command 3"),
        (configured().with(b"\x08\0\x02\0\x05"), "command 2 with 5 bytes"),
        (configured().with(b"\x01\0\0\0\x05\x04htab"), "the section htab in parts"),
        (set_up(configured()).with(b"\x01\0\0\0\x05\x04vfio"), "the section vfio in parts"),
        (configured().with(b"\x04\0\0\0\x05\x05early"), "the section early before the end of RAM"),
        (
            configured().with(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x05"),
            "version 5 of the section ram",
        ),
        (configured().with(PART), "a part of section 2"),
        (set_up(configured()).with(b"\x02\0\0\0\x03"), "a part of section 3"),
        (set_up(configured()).with(b"\x7e\0\0\0\x03"), "a footer of section 3"),
        (part().with(word(0x40)), "flags 0x40"),
        (part().with(word(flag::PAGE | flag::ZERO)), "flags 0xa"),
        (part().with(word(flag::PAGE | flag::SAME_BLOCK)), "there is none"),
        (part().with(word(flag::ZERO)).named("ram1"), "a RAM block ram1"),
        (part().page(0x2000, Some("ram0"), 1), "a page at 0x2000 of the RAM block ram0"),
        (part().with(word(flag::ZERO)).named("ram0").with([1]), "full of bytes 0x01"),
        (part().end().footer().with(END).end().footer().with(PART), "type 0x02"),
    ] {
        let error = refused(&stream.0);
        assert!(error.contains(named), "{named}: {error}");
    }
}

#[test]
fn lists_have_limits() {
    let begun = configured().with(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    let too_large = begun.clone().with(0x1004_u64.to_be_bytes()).named("a");
    let error = refused(too_large.with(0x2000_u64.to_be_bytes()).0);
    assert!(error.contains("larger than all of RAM"), "{error}");
    let many = (0..=BLOCKS_MAX).fold(begun.with(0x1004_u64.to_be_bytes()), |begun, _| {
        begun.named("a").with(0_u64.to_be_bytes())
    });
    let error = refused(many.0);
    assert!(error.contains("more than 1024 RAM blocks"), "{error}");
    let count = configured().with(b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x41");
    assert!(refused(count.0).contains("65 capabilities"));
    let name = Bytes::default().with(b"QEVM\0\0\0\x03\x07\0\0\x01\x01");
    assert!(refused(name.0).contains("name of 257 bytes"));
}
