//! Every frame that one end can send decodes at the other end, in any pieces.

mod support;

use proptest::collection::vec;
use proptest::prelude::*;
use support::{Random, frame, receivers};
use umem_wire::*;

fn ranges() -> impl Strategy<Value = PageRange> {
    (0u64..300).prop_flat_map(|first| {
        (1..=300 - first).prop_map(move |pages| PageRange { region: RegionId(0), first, pages })
    })
}

fn tables() -> impl Strategy<Value = RegionTable> {
    vec(("[^\\p{Cc}]{1,15}", 1u64..1000, 12u8..=30), 1..20).prop_filter_map("names", |regions| {
        let region = |(name, pages, shift)| {
            let page_size = PageSize::from_shift(shift).expect("12 to 30");
            Region { name, bytes: pages * page_size.bytes(), page_size }
        };
        RegionTable::new(regions.into_iter().map(region).collect()).ok()
    })
}

fn totals() -> impl Strategy<Value = Totals> {
    any::<[u64; 5]>().prop_map(|[data_bytes, zero_bytes, hole_bytes, demand, background]| Totals {
        data_bytes,
        zero_bytes,
        hole_bytes,
        pages_demand: demand,
        pages_background: background,
    })
}

fn faults() -> impl Strategy<Value = Fault> {
    (1u16..=8, "\\PC{0,100}")
        .prop_map(|(code, text)| Fault::new(FaultCode::from_number(code).expect("a code"), &text))
}

fn requests() -> impl Strategy<Value = Vec<(RegionId, u64)>> {
    vec((0u16..2, 0u64..3), 1..=limits::REQUEST_ENTRIES_MAX).prop_map(|pages| {
        pages.into_iter().map(|(region, page)| (RegionId(region), page)).collect()
    })
}

/// Landing units that [`table`] can have: 300 pages are 75 units of 16 KiB, 3 and 2 are prime.
fn units() -> impl Strategy<Value = Vec<PageSize>> {
    (12u8..=14).prop_map(|shift| {
        let small = PageSize::from_shift(shift).expect("12 to 30");
        vec![small, PageSize::SIZE_2M, PageSize::SIZE_1G]
    })
}

fn frames() -> impl Strategy<Value = Frame> {
    let number = any::<u64>();
    prop_oneof![
        ranges().prop_map(Frame::Data),
        ranges().prop_map(Frame::Zero),
        ranges().prop_map(Frame::Hole),
        ranges().prop_map(Frame::Ack),
        requests().prop_map(Frame::Request),
        tables().prop_map(Frame::Regions),
        units().prop_map(Frame::Ready),
        any::<(bool, bool)>()
            .prop_map(|(postcopy, background)| Frame::Stopped { postcopy, background }),
        (1u32..=limits::STATE_CHUNK_BYTES_MAX as u32)
            .prop_map(|bytes| Frame::DeviceState { bytes }),
        number.prop_map(|state_bytes| Frame::Load { state_bytes }),
        Just(Frame::Loaded),
        number.prop_map(|stopped_us| Frame::Switchover { stopped_us }),
        number.prop_map(|us| Frame::Running { us_since_switchover: us }),
        Just(Frame::LaneEnd),
        totals().prop_map(Frame::Complete),
        (any::<bool>(), any::<Option<u64>>(), totals()).prop_map(|(switched, running, totals)| {
            let running = running.filter(|_| switched);
            Frame::Resume(Standing { switched, running, totals })
        }),
        any::<[u64; 4]>().prop_map(|words| {
            let range = PageRange { region: RegionId(0), first: 0, pages: 256 };
            Frame::Have { range, words: words.into() }
        }),
        any::<[u64; 3]>().prop_map(|digests| Frame::Digests(digests.into())),
        Just(Frame::Rounds),
        Just(Frame::RoundsEnd),
        (vec(ranges(), 0..limits::REMAINING_RUNS_MAX), any::<bool>())
            .prop_map(|(runs, last)| Frame::Remaining { runs, last }),
        Just(Frame::Settled),
        number.prop_map(Frame::Ping),
        number.prop_map(Frame::Pong),
        faults().prop_map(Frame::Error),
    ]
}

/// Feeds a frame and the state or pages that belong to it, in random pieces.
fn feed(
    receiver: &mut Receiver,
    frame: &Frame,
    random: &mut Random,
) -> Result<Vec<Event>, ReceiveError> {
    let mut bytes = Vec::new();
    transmit::encode(frame, &mut bytes);
    match *frame {
        Frame::DeviceState { bytes: state } => bytes.resize(HEADER_BYTES + state as usize, 0xa5),
        Frame::Data(range) => bytes.resize(HEADER_BYTES + range.pages as usize * 4096, 0xa5),
        _ => {}
    }
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let wanted = match receiver.next_target() {
            Target::Control { exact } => exact as u64,
            Target::Run(target) => target.bytes,
        };
        let (now, later) = rest.split_at(random.partial(wanted.min(rest.len() as u64)) as usize);
        match receiver.next_target() {
            Target::Control { .. } => receiver.control(now)?,
            Target::Run(_) => receiver.landed(now.len() as u64)?,
        }
        receiver.assert_invariants();
        rest = later;
    }
    Ok(std::iter::from_fn(|| receiver.poll_event()).collect())
}

proptest! {
    #[test]
    fn frames_arrive_as_they_were_sent(sent in frames(), seed in any::<u64>()) {
        let mut accepted = 0;
        for mut receiver in receivers() {
            match feed(&mut receiver, &sent, &mut Random(seed)) {
                Ok(events) => {
                    let meanings: Vec<Frame> = events.iter().filter_map(frame).collect();
                    prop_assert_eq!(&meanings, std::slice::from_ref(&sent));
                    prop_assert!(receiver.is_between_frames());
                    accepted += 1;
                }
                Err(
                    ReceiveError::WrongDirection { .. }
                    | ReceiveError::WrongLane { .. }
                    | ReceiveError::NotResuming { .. }
                    | ReceiveError::NotResumed { .. },
                ) => {}
                Err(error) => prop_assert!(false, "{}", error),
            }
        }
        prop_assert!(accepted > 0, "no receiver accepts {:?}", sent);
    }

    #[test]
    fn hellos_arrive_as_they_were_sent(
        (min, max) in (1u16.., 1u16..),
        (capabilities, session, proof, epoch) in any::<(u64, [u8; 16], [u8; 32], u32)>(),
        (index, bulk_lanes) in (0..=limits::LANES_MAX, 0..=limits::LANES_MAX),
    ) {
        let hello = Hello {
            versions: VersionRange { min: min.min(max), max: min.max(max) },
            capabilities: Capabilities(capabilities),
            session: SessionId(session),
            role: if index == 0 { LaneRole::Demand } else { LaneRole::Bulk },
            index,
            bulk_lanes: bulk_lanes.max(index),
            epoch,
            proof,
        };
        prop_assert_eq!(Hello::decode(&hello.encode()), Ok(hello.clone()));
        let welcome = Welcome::answer(&hello, hello.versions, Capabilities(1), proof).unwrap();
        prop_assert_eq!(Welcome::decode(&welcome.encode()), Ok(welcome.clone()));
        prop_assert_eq!(welcome.check(&hello), Ok(()));
    }

    #[test]
    fn refusals_arrive_as_they_were_sent(fault in faults()) {
        match Welcome::decode(&Welcome::refuse(fault.code, &fault.text)) {
            Err(HelloError::Refused { code, text }) => {
                prop_assert_eq!(code, fault.code);
                prop_assert!(fault.text.starts_with(&text));
                prop_assert!(text.len() + 4 > fault.text.len().min(limits::REFUSAL_TEXT_BYTES_MAX));
            }
            other => prop_assert!(false, "{:?}", other),
        }
    }
}
