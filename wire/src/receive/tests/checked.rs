//! Checked lanes.

use super::*;
use crate::checksum::Seal;

fn checked() -> Receiver {
    bulk().checked(true)
}

fn sealed_run(seal: &mut Seal, range: PageRange, sums: &[u32]) -> [u8; HEADER_BYTES] {
    let mut header = transmit::data_header(range);
    seal.data(&mut header, sums);
    header
}

#[test]
fn checked_run_lands_only_after_its_sum_is_verified() {
    let (pages, sums) = (range(SMALL, 3, 2), [7, 9]);
    let begun = |receiver: &mut Receiver, seal: &mut Seal| {
        receiver.control(&sealed_run(seal, pages, &sums)).unwrap();
        assert_eq!(receiver.poll_event(), Some(Event::RunBegins(pages)));
    };
    let (mut receiver, mut seal) = (checked(), Seal::new(true));
    begun(&mut receiver, &mut seal);
    receiver.landed(5000).unwrap();
    receiver.verify(&sums).unwrap();
    receiver.landed(3192).unwrap();
    assert_eq!(drain(&mut receiver), [Event::Data(pages)]);

    begun(&mut receiver, &mut seal);
    let wrong = ReceiveError::RunSum { range: pages };
    assert_eq!(receiver.verify(&[7, 8]), Err(wrong.clone()));
    assert!(wrong.is_corruption());
    assert_eq!(receiver.landed(8192), Err(wrong));
    assert_eq!(drain(&mut receiver), []);

    let (mut receiver, mut seal) = (checked(), Seal::new(true));
    begun(&mut receiver, &mut seal);
    assert_eq!(receiver.landed(8192), Err(ReceiveError::Unchecked { range: pages }));
    let (mut receiver, mut seal) = (checked(), Seal::new(true));
    begun(&mut receiver, &mut seal);
    let misfed = ReceiveError::Misfed { wanted_bytes: 8192, given_bytes: 4096 };
    assert_eq!(receiver.verify(&[7]), Err(misfed));
}

#[test]
fn checked_run_over_64_kib_is_refused() {
    let (mut seal, pages) = (Seal::new(true), range(SMALL, 0, 17));
    let header = sealed_run(&mut seal, pages, &[0; 17]);
    let long = ReceiveError::RunLength { range: pages, pages_max: 16 };
    assert_eq!(checked().control(&header), Err(long));
    assert_eq!(bulk().control(&transmit::data_header(pages)), Ok(()));
}

/// Changed bits never cause a wait, an allocation or an event.
#[test]
fn every_flipped_bit_of_a_checked_lane_is_detected() {
    let frames = [
        Frame::Request(vec![(SMALL, 7), (HUGE, 1)]),
        Frame::Ack(range(SMALL, 0, 4)),
        Frame::Digests(vec![1, 2]),
        Frame::Error(Fault::new(FaultCode::Other, "why")),
    ];
    for frame in &frames {
        let mut bytes = encoded(frame);
        Seal::new(true).frames(&mut bytes);
        let receiver = || {
            let mut receiver = Receiver::for_source(&table()).checked(true);
            receiver.set_regions(&table());
            receiver
        };
        assert_eq!(feed(&mut receiver(), &bytes, 99), Ok(()));
        for bit in 0..8 * bytes.len() {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let mut receiver = receiver();
            let error = feed(&mut receiver, &flipped, 99).unwrap_err();
            assert!(error.is_corruption(), "bit {bit} of {frame:?}: {error}");
            assert_eq!(drain(&mut receiver), []);
        }
    }
    let unsealed = checked().control(&encoded(&Frame::LaneEnd));
    assert_eq!(unsealed, Err(ReceiveError::HeaderSum { number: 0 }));
}
