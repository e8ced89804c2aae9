//! Frames in pieces of any size, and frames that must be refused.

mod account;
mod checked;
mod lane;

use super::*;
use crate::fault::{Fault, FaultCode};
use crate::frame::FrameError;
use crate::frame::{Frame, Totals};
use crate::region::RegionError;
use crate::region::{PageSize, Region};
use crate::transmit;

const SMALL: RegionId = RegionId(0);
const HUGE: RegionId = RegionId(1);

/// 1024 pages of 4 KiB and 2 pages of 1 GiB.
fn table() -> RegionTable {
    let region = |name: &str, bytes, page_size| Region { name: name.into(), bytes, page_size };
    RegionTable::new(vec![
        region("small", 4 << 20, PageSize::SIZE_4K),
        region("huge", 2 << 30, PageSize::SIZE_1G),
    ])
    .unwrap()
}

fn range(region: RegionId, first: u64, pages: u64) -> PageRange {
    PageRange { region, first, pages }
}

fn bulk() -> Receiver {
    let mut receiver = Receiver::for_destination(LaneRole::Bulk);
    receiver.set_regions(&table());
    receiver
}

fn source() -> Receiver {
    let mut receiver = Receiver::for_source(&table());
    receiver.control(&encoded(&Frame::Ready(table().units()))).unwrap();
    assert_eq!(drain(&mut receiver), [Event::Ready(table())]);
    receiver
}

fn encoded(frame: &Frame) -> Vec<u8> {
    let mut out = Vec::new();
    transmit::encode(frame, &mut out);
    out
}

/// Feeds a frame target by target, `step` bytes at most each time.
fn feed(receiver: &mut Receiver, bytes: &[u8], step: usize) -> Result<(), ReceiveError> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let Target::Control { exact } = receiver.next_target() else { panic!("a run") };
        let (now, later) = rest.split_at(exact.min(step).min(rest.len()));
        receiver.control(now)?;
        receiver.assert_invariants();
        rest = later;
    }
    Ok(())
}

fn drain(receiver: &mut Receiver) -> Vec<Event> {
    std::iter::from_fn(|| receiver.poll_event()).collect()
}

#[test]
fn run_target_points_into_its_pages() {
    let mut receiver = bulk();
    let run = range(SMALL, 3, 2);
    assert_eq!(receiver.next_target(), Target::Control { exact: HEADER_BYTES });
    receiver.control(&transmit::data_header(run)).unwrap();
    assert_eq!(drain(&mut receiver), [Event::RunBegins(run)]);

    let target = |byte_offset, bytes| Target::Run(RunTarget { region: SMALL, byte_offset, bytes });
    assert_eq!(receiver.next_target(), target(12288, 8192));
    receiver.landed(1).unwrap();
    receiver.assert_invariants();
    assert_eq!(receiver.next_target(), target(12289, 8191));
    assert_eq!(drain(&mut receiver), []);
    receiver.landed(8191).unwrap();
    assert_eq!(drain(&mut receiver), [Event::Data(run)]);
    assert_eq!(receiver.next_target(), Target::Control { exact: HEADER_BYTES });
}

#[test]
fn target_after_a_run_is_a_whole_header() {
    let mut receiver = bulk();
    let (events, header) = (receiver.events.capacity(), Target::Control { exact: HEADER_BYTES });
    for pages in 1..=512 {
        receiver.control(&transmit::data_header(range(SMALL, 0, pages))).unwrap();
        receiver.landed(pages * 4096).unwrap();
        assert_eq!(receiver.next_target(), header);
        assert_eq!(drain(&mut receiver).len(), 2);
    }
    receiver.control(&transmit::data_header(range(HUGE, 1, 1))).unwrap();
    receiver.landed(1 << 30).unwrap();
    assert_eq!(receiver.next_target(), header);
    assert_eq!(receiver.events.capacity(), events, "the loop allocates nothing");
}

#[test]
fn data_run_over_its_limit_is_refused_and_long_zero_run_accepted() {
    let long = range(SMALL, 0, 513);
    let too_long = ReceiveError::RunLength { range: long, pages_max: 512 };
    assert_eq!(bulk().control(&transmit::data_header(long)), Err(too_long));
    let two = range(HUGE, 0, 2);
    let too_long = ReceiveError::RunLength { range: two, pages_max: 1 };
    assert_eq!(bulk().control(&transmit::data_header(two)), Err(too_long));

    let mut receiver = bulk();
    let whole = range(SMALL, 0, 1024);
    receiver.control(&transmit::zero_header(whole)).unwrap();
    receiver.control(&transmit::hole_header(two)).unwrap();
    assert_eq!(drain(&mut receiver), [Event::Zero(whole), Event::Hole(two)]);
}

#[test]
fn frames_that_name_nonexistent_pages_are_refused() {
    let outside = range(SMALL, 1024, 1);
    let error = RegionError::Outside { range: outside, region_pages: 1024 };
    for kind in [Kind::Data, Kind::Zero, Kind::Hole] {
        let header = Header::with_range(kind, outside).encode();
        let pages = ReceiveError::Pages { kind, error: error.clone() };
        assert_eq!(bulk().control(&header), Err(pages));
        let mut ignorant = Receiver::for_destination(LaneRole::Bulk);
        assert_eq!(ignorant.control(&header), Err(ReceiveError::NoRegions { kind }));
    }
    let ack = ReceiveError::Pages { kind: Kind::Ack, error };
    assert_eq!(source().control(&transmit::ack_header(outside)), Err(ack));
    let request = encoded(&Frame::Request(vec![(SMALL, 1023), (HUGE, 2)]));
    let range = range(HUGE, 2, 1);
    let error = RegionError::Outside { range, region_pages: 2 };
    let pages = ReceiveError::Pages { kind: Kind::Request, error };
    assert_eq!(source().control(&request), Err(pages));
}

#[test]
fn body_in_any_pieces_gives_the_same_event() {
    let frames = [
        Frame::Regions(table()),
        Frame::Stopped { postcopy: true, background: true },
        Frame::Complete(Totals { data_bytes: 1, ..Totals::default() }),
        Frame::Error(Fault::new(FaultCode::Other, "why")),
        Frame::Error(Fault::new(FaultCode::Other, "")),
    ];
    for step in 1..=64 {
        let mut receiver = Receiver::for_destination(LaneRole::Demand);
        for frame in &frames {
            feed(&mut receiver, &encoded(frame), step).unwrap();
        }
        let mut state = transmit::device_state_header(100).to_vec();
        state.extend([0xa5; 100]);
        feed(&mut receiver, &state, step).unwrap();
        assert!(receiver.is_between_frames());
        assert_eq!(
            drain(&mut receiver),
            [
                Event::Regions(table()),
                Event::Stopped { postcopy: true, background: true },
                Event::Complete(Totals { data_bytes: 1, ..Totals::default() }),
                Event::Error(Fault { code: FaultCode::Other, text: "why".into() }),
                Event::Error(Fault { code: FaultCode::Other, text: String::new() }),
                Event::DeviceState(vec![0xa5; 100]),
            ]
        );
    }
}

#[test]
fn reading_ahead_works_at_the_source_and_fails_at_the_destination() {
    let pages = vec![(SMALL, 7), (HUGE, 1)];
    let mut bytes = encoded(&Frame::Request(pages.clone()));
    bytes.extend(encoded(&Frame::Ping(1)));
    bytes.extend(&encoded(&Frame::Loaded)[..31]);
    let mut receiver = source();
    receiver.control(&bytes).unwrap();
    assert_eq!(drain(&mut receiver), [Event::Request(pages), Event::Ping(1)]);
    assert_eq!(receiver.next_target(), Target::Control { exact: 1 });

    let misfed = ReceiveError::Misfed { wanted_bytes: 32, given_bytes: 64 };
    assert_eq!(bulk().control(&[0; 64]), Err(misfed));
}

#[test]
fn events_before_a_wrong_frame_can_still_be_polled() {
    let mut receiver = source();
    let bytes = [encoded(&Frame::Ping(1)), vec![0; 32]].concat();
    let wrong = ReceiveError::Frame(FrameError::Kind(0));
    assert_eq!(receiver.control(&bytes), Err(wrong.clone()));
    assert_eq!(drain(&mut receiver), [Event::Ping(1)]);
    assert_eq!(receiver.next_target(), Target::Control { exact: 0 });
    assert_eq!(receiver.control(&encoded(&Frame::Ping(2))), Err(wrong.clone()));
    assert_eq!(receiver.landed(1), Err(wrong));
}

#[test]
fn miscounts_of_the_caller_are_errors() {
    let misfed =
        |wanted_bytes, given_bytes| Err(ReceiveError::Misfed { wanted_bytes, given_bytes });
    assert_eq!(bulk().landed(1), misfed(0, 1));
    let mut receiver = bulk();
    receiver.control(&transmit::data_header(range(SMALL, 0, 1))).unwrap();
    assert_eq!(receiver.control(&[1]), misfed(0, 1));
    let mut receiver = bulk();
    receiver.control(&transmit::data_header(range(SMALL, 0, 1))).unwrap();
    assert_eq!(receiver.landed(4097), misfed(4096, 4097));
}

#[test]
fn given_back_request_vector_is_reused() {
    let mut receiver = Receiver::for_source(&table());
    receiver.set_regions(&table());
    let mut places = Vec::new();
    for page in 0..9 {
        let pages = vec![(SMALL, page), (HUGE, 1)];
        feed(&mut receiver, &encoded(&Frame::Request(pages.clone())), 7).unwrap();
        let Some(Event::Request(came)) = receiver.poll_event() else { panic!("no request") };
        assert_eq!(came, pages);
        places.push((came.as_ptr(), receiver.spare.body.as_ptr()));
        receiver.give_back(came);
    }
    assert!(places[1..].iter().all(|place| *place == places[1]), "{places:?}");
}

#[test]
fn second_regions_frame_is_refused() {
    let mut receiver = Receiver::for_destination(LaneRole::Demand);
    let regions = encoded(&Frame::Regions(table()));
    feed(&mut receiver, &regions, 99).unwrap();
    assert_eq!(feed(&mut receiver, &regions, 99), Err(ReceiveError::RegionsTwice));
}

#[test]
fn ready_sets_the_landing_units_that_count_pages() {
    let (small, huge) = (PageSize::SIZE_4K, PageSize::SIZE_1G);
    let request = |page| encoded(&Frame::Request(vec![(SMALL, page)]));
    let mut receiver = Receiver::for_source(&table());
    let early = ReceiveError::NoRegions { kind: Kind::Request };
    assert_eq!(receiver.control(&request(0)), Err(early));

    let landing = table().with_units(&[PageSize::SIZE_2M, huge]).unwrap();
    let ready = encoded(&Frame::Ready(landing.units()));
    let mut receiver = Receiver::for_source(&table());
    receiver.control(&ready).unwrap();
    receiver.control(&request(1)).unwrap();
    let events = [Event::Ready(landing), Event::Request(vec![(SMALL, 1)])];
    assert_eq!(drain(&mut receiver), events);
    let range = range(SMALL, 2, 1);
    let error = RegionError::Outside { range, region_pages: 2 };
    let outside = ReceiveError::Pages { kind: Kind::Request, error };
    assert_eq!(receiver.control(&request(2)), Err(outside));

    let mut receiver = source();
    assert_eq!(receiver.control(&ready), Err(ReceiveError::ReadyUnasked));
    for units in [&[small][..], &[small; 2], &[huge; 2], &[small, huge, huge]] {
        let mut receiver = Receiver::for_source(&table());
        let error = table().with_units(units).unwrap_err();
        let ready = encoded(&Frame::Ready(units.to_vec()));
        assert_eq!(receiver.control(&ready), Err(ReceiveError::Units(error)));
    }
}

#[test]
fn lane_closed_inside_a_frame_is_an_error() {
    assert_eq!(bulk().closed(), Ok(()));
    let mut receiver = bulk();
    let header = transmit::data_header(range(SMALL, 0, 1));
    receiver.control(&header[..20]).unwrap();
    assert_eq!(receiver.closed(), Err(ReceiveError::Truncated { missing_bytes: 12 }));
    let mut receiver = bulk();
    receiver.control(&header).unwrap();
    receiver.landed(96).unwrap();
    assert_eq!(receiver.closed(), Err(ReceiveError::Truncated { missing_bytes: 4000 }));
}
