//! Frames compared with literal bytes.

use super::header::field;
use super::*;
use crate::fault::FaultCode;
use crate::region::Region;
use crate::region::RegionError;
use crate::transmit;

const RANGE: PageRange =
    PageRange { region: RegionId(0x0102), first: 0x1122_3344_5566_7788, pages: 0x99 };

/// A header's bytes from its fields, written out by hand.
fn literal(
    kind: u8,
    flags: u8,
    region: [u8; 2],
    body: [u8; 4],
    first: [u8; 8],
    pages: [u8; 8],
) -> Vec<u8> {
    let mut out = vec![kind, flags];
    out.extend(region);
    out.extend(body);
    out.extend(first);
    out.extend(pages);
    out.extend([0; 8]);
    out
}

/// A frame's bytes, encoded behind others that must stay.
fn encoded(frame: &Frame) -> Vec<u8> {
    let mut out = vec![0xa5; 7];
    out.spare_capacity_mut().fill(std::mem::MaybeUninit::new(0xa5));
    transmit::encode(frame, &mut out);
    assert_eq!(out[..7], [0xa5; 7]);
    out.split_off(7)
}

/// Reads a whole frame the way a receiver does.
fn decoded(bytes: &[u8]) -> Result<Frame, FrameError> {
    let (header, body) = bytes.split_first_chunk().expect("a header");
    match Header::decode(header)?.head()? {
        Head::Whole(frame) => Ok(frame),
        Head::Data(range) => Ok(Frame::Data(range)),
        Head::Body(announced) => announced.frame(body, &mut Vec::new()),
    }
}

fn assert_literal(frame: &Frame, bytes: &[u8]) {
    assert_eq!(encoded(frame), bytes);
    assert_eq!(decoded(bytes).as_ref(), Ok(frame));
}

#[test]
fn tags_keep_their_numbers() {
    let tags = Kind::ALL.map(|kind| kind as u8);
    let expected = [
        1, 2, 3, 4, 5, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34,
        255,
    ];
    assert_eq!(tags, expected);
    for tag in 0..=255 {
        assert_eq!(Kind::from_tag(tag).map(|kind| kind as u8), tags.contains(&tag).then_some(tag));
    }
}

#[test]
fn run_and_ack_layout() {
    let bytes = |kind| {
        let first = [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11];
        literal(kind, 0, [2, 1], [0; 4], first, [0x99, 0, 0, 0, 0, 0, 0, 0])
    };
    assert_literal(&Frame::Data(RANGE), &bytes(1));
    assert_literal(&Frame::Zero(RANGE), &bytes(2));
    assert_literal(&Frame::Hole(RANGE), &bytes(3));
    assert_literal(&Frame::Ack(RANGE), &bytes(5));
    assert_eq!(transmit::data_header(RANGE)[..], bytes(1));
    assert_eq!(transmit::zero_header(RANGE)[..], bytes(2));
    assert_eq!(transmit::hole_header(RANGE)[..], bytes(3));
    assert_eq!(transmit::ack_header(RANGE)[..], bytes(5));
}

#[test]
fn layout_of_frames_without_fields() {
    let bytes = |kind| literal(kind, 0, [0; 2], [0; 4], [0; 8], [0; 8]);
    assert_literal(&Frame::Loaded, &bytes(21));
    assert_literal(&Frame::LaneEnd, &bytes(24));
    assert_literal(&Frame::Rounds, &bytes(29));
    assert_literal(&Frame::RoundsEnd, &bytes(30));
    assert_literal(&Frame::Settled, &bytes(34));
}

#[test]
fn layout_of_frames_with_a_number() {
    let number = 0x0807_0605_0403_0201;
    let bytes = |kind| literal(kind, 0, [0; 2], [0; 4], [1, 2, 3, 4, 5, 6, 7, 8], [0; 8]);
    assert_literal(&Frame::Load { state_bytes: number }, &bytes(20));
    assert_literal(&Frame::Switchover { stopped_us: number }, &bytes(22));
    assert_literal(&Frame::Running { us_since_switchover: number }, &bytes(23));
    assert_literal(&Frame::Ping(number), &bytes(32));
    assert_literal(&Frame::Pong(number), &bytes(33));
}

#[test]
fn stopped_encodes_two_flags() {
    let bytes = |flags| literal(18, flags, [0; 2], [0; 4], [0; 8], [0; 8]);
    assert_literal(&Frame::Stopped { postcopy: false, background: false }, &bytes(0));
    assert_literal(&Frame::Stopped { postcopy: true, background: false }, &bytes(1));
    assert_literal(&Frame::Stopped { postcopy: false, background: true }, &bytes(2));
    assert_literal(&Frame::Stopped { postcopy: true, background: true }, &bytes(3));
    let unused = FrameError::Unused { kind: Kind::Stopped, field: "flags" };
    assert_eq!(decoded(&bytes(4)), Err(unused));
}

#[test]
fn request_packs_region_and_page_into_8_bytes() {
    let mut bytes = literal(4, 0, [0; 2], [16, 0, 0, 0], [0; 8], [0; 8]);
    bytes.extend([6, 5, 4, 3, 2, 1, 0xfe, 0xff]);
    bytes.extend([9, 0, 0, 0, 0, 0, 1, 0]);
    let pages = vec![(RegionId(0xfffe), 0x0102_0304_0506), (RegionId(1), 9)];
    assert_literal(&Frame::Request(pages), &bytes);
}

#[test]
fn regions_follow_their_header() {
    let region = Region { name: "ram0".into(), bytes: 0x20_0000, page_size: PageSize::SIZE_2M };
    let table = RegionTable::new(vec![region]).unwrap();
    let mut bytes = literal(16, 0, [0; 2], [80, 0, 0, 0], [0; 8], [0; 8]);
    bytes.extend(b"ram0");
    bytes.extend([0; 60]);
    bytes.extend([0, 0, 0x20, 0, 0, 0, 0, 0]);
    bytes.extend([21, 0, 0, 0, 0, 0, 0, 0]);
    assert_literal(&Frame::Regions(table), &bytes);
    bytes[32] = b'\n';
    assert_eq!(decoded(&bytes), Err(FrameError::Regions(RegionError::Name(0))));
}

#[test]
fn ready_encodes_one_byte_a_region() {
    let mut bytes = literal(17, 0, [0; 2], [3, 0, 0, 0], [0; 8], [0; 8]);
    bytes.extend([12, 30, 21]);
    let units = vec![PageSize::SIZE_4K, PageSize::SIZE_1G, PageSize::SIZE_2M];
    assert_literal(&Frame::Ready(units), &bytes);
    for shift in [0, 11, 31, 255] {
        bytes[33] = shift;
        assert_eq!(decoded(&bytes), Err(FrameError::Unit { index: 1, shift }));
    }
}

#[test]
fn device_state_encodes_as_header_only() {
    let header = literal(19, 0, [0; 2], [0, 0, 1, 0], [0; 8], [0; 8]);
    assert_eq!(encoded(&Frame::DeviceState { bytes: 65536 }), header);
    assert_eq!(transmit::device_state_header(65536)[..], header);
    let whole = [header, vec![0xa5; 65536]].concat();
    assert_eq!(decoded(&whole), Ok(Frame::DeviceState { bytes: 65536 }));
}

#[test]
fn complete_encodes_five_u64() {
    let totals = Totals {
        data_bytes: 1,
        zero_bytes: 2,
        hole_bytes: 3,
        pages_demand: 4,
        pages_background: 5 << 56,
    };
    let mut bytes = literal(25, 0, [0; 2], [40, 0, 0, 0], [0; 8], [0; 8]);
    for low in 1..=4 {
        bytes.extend([low, 0, 0, 0, 0, 0, 0, 0]);
    }
    bytes.extend([0, 0, 0, 0, 0, 0, 0, 5]);
    assert_literal(&Frame::Complete(totals), &bytes);
}

#[test]
fn resume_encodes_the_destination_standing() {
    let totals = Totals { pages_demand: 3, ..Totals::default() };
    let mut totals_bytes = [0; 40];
    totals_bytes[24] = 3;
    let bytes = |flags, us: u8| {
        let first = [us, 0, 0, 0, 0, 0, 0, 0];
        let mut bytes = literal(26, flags, [0; 2], [40, 0, 0, 0], first, [0; 8]);
        bytes.extend(totals_bytes);
        bytes
    };
    let standing = |switched, running| Standing { switched, running, totals };
    assert_literal(&Frame::Resume(standing(false, None)), &bytes(0, 0));
    assert_literal(&Frame::Resume(standing(true, None)), &bytes(1, 0));
    assert_literal(&Frame::Resume(standing(true, Some(9))), &bytes(3, 9));
    assert_eq!(decoded(&bytes(2, 9)), Err(FrameError::Standing));
    let unused = |field| Err(FrameError::Unused { kind: Kind::Resume, field });
    assert_eq!(decoded(&bytes(4, 0)), unused("flags"));
    assert_eq!(decoded(&bytes(1, 9)), unused("first"));
}

#[test]
fn have_encodes_one_bit_a_page() {
    let bytes = |first: u8, pages: u8, words: &[u64]| {
        let mut first_page = [0; 8];
        first_page[0] = first;
        let body = [8 * words.len() as u8, 0, 0, 0];
        let mut bytes = literal(27, 0, [2, 1], body, first_page, [pages, 0, 0, 0, 0, 0, 0, 0]);
        words.iter().for_each(|word| bytes.extend(word.to_le_bytes()));
        bytes
    };
    let range = PageRange { region: RegionId(0x0102), first: 64, pages: 66 };
    let words = vec![0x8000_0000_0000_0001, 2];
    assert_literal(&Frame::Have { range, words: words.clone() }, &bytes(64, 66, &words));
    assert_eq!(decoded(&bytes(64, 65, &words)), Err(FrameError::HavePadding));
    for (first, pages) in [(63, 66), (64, 0)] {
        let range = PageRange { first, pages, ..range };
        let wrong = decoded(&bytes(first as u8, pages as u8, &words));
        assert_eq!(wrong, Err(FrameError::HaveRange(range)));
    }
    let length = FrameError::BodyLength { kind: Kind::Have, body_bytes: 16 };
    assert_eq!(decoded(&bytes(64, 64, &words)), Err(length));
}

#[test]
fn digests_encode_one_u64_a_region() {
    let mut bytes = literal(28, 0, [0; 2], [16, 0, 0, 0], [0; 8], [0; 8]);
    bytes.extend([1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0, 0, 0, 0, 0]);
    assert_literal(&Frame::Digests(vec![0x0807_0605_0403_0201, 9]), &bytes);
}

#[test]
fn remaining_encodes_sixteen_bytes_a_run() {
    let header = |flags, body: u8| literal(31, flags, [0; 2], [body, 0, 0, 0], [0; 8], [0; 8]);
    assert_literal(&Frame::Remaining { runs: Vec::new(), last: true }, &header(1, 0));
    let mut bytes = header(0, 32);
    bytes.extend([6, 5, 4, 3, 2, 1, 0xfe, 0xff, 7, 0, 0, 0, 0, 0, 0, 1]);
    bytes.extend([9, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    let run = |region, first, pages| PageRange { region: RegionId(region), first, pages };
    let runs = vec![run(0xfffe, 0x0102_0304_0506, 1 << 56 | 7), run(1, 9, 1)];
    assert_literal(&Frame::Remaining { runs, last: false }, &bytes);
    let unused = FrameError::Unused { kind: Kind::Remaining, field: "flags" };
    assert_eq!(decoded(&header(2, 0)), Err(unused));
}

#[test]
fn error_encodes_code_and_text() {
    let mut bytes = literal(255, 0, [0; 2], [3, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0, 0], [0; 8]);
    bytes.extend("né".as_bytes());
    let fault = Fault { code: FaultCode::OutOfMemory, text: "né".into() };
    assert_literal(&Frame::Error(fault), &bytes);

    bytes[34] = 0xff;
    assert_eq!(decoded(&bytes), Err(FrameError::FaultText));
    bytes[8] = 0;
    assert_eq!(decoded(&bytes), Err(FrameError::FaultCode(0)));
    bytes[10] = 1;
    assert_eq!(decoded(&bytes), Err(FrameError::FaultCode(0x1_0000)));
}

#[test]
fn frame_with_an_unused_field_set_is_refused() {
    let fields = [
        (field::FLAGS, "flags"),
        (field::REGION, "region"),
        (field::BODY_BYTES, "body bytes"),
        (field::FIRST, "first"),
        (field::PAGES, "pages"),
        (field::EXTRA, "extra"),
    ];
    for (at, field) in fields {
        let mut bytes = Header::new(Kind::Loaded).encode();
        bytes[at] = 1;
        let unused = FrameError::Unused { kind: Kind::Loaded, field };
        assert_eq!(Header::decode(&bytes), Err(unused));
    }
    assert_eq!(decoded(&[0; HEADER_BYTES]), Err(FrameError::Kind(0)));
}

#[test]
fn body_length_outside_its_limit_is_refused() {
    let limits = [
        (Kind::Request, [0, 7, 12, 2056], [8, 2048]),
        (Kind::Regions, [0, 79, 120, 20560], [80, 20480]),
        (Kind::Ready, [0, 257, 1 << 20, u32::MAX], [1, 256]),
        (Kind::DeviceState, [0, 65537, 1 << 20, u32::MAX], [1, 65536]),
        (Kind::Complete, [0, 39, 41, u32::MAX], [40, 40]),
        (Kind::Digests, [0, 7, 12, 2056], [8, 2048]),
        (Kind::Remaining, [1, 8, 65_552, u32::MAX], [0, 65_536]),
    ];
    for (kind, wrong, right) in limits {
        for body_bytes in wrong {
            let header = Header { body_bytes, ..Header::new(kind) };
            assert_eq!(header.head(), Err(FrameError::BodyLength { kind, body_bytes }));
        }
        for body_bytes in right {
            let header = Header { body_bytes, ..Header::new(kind) };
            assert!(matches!(header.head(), Ok(Head::Body(_))), "{kind} {body_bytes}");
        }
    }
}
