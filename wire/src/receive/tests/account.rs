//! Lanes that replace lost ones.

use super::*;
use crate::resume::Standing;

/// The account that a destination sends first on a lane that replaces a lost one.
#[test]
fn resumed_lane_accepts_only_a_complete_account_first() {
    let standing = Standing { switched: true, running: None, totals: Totals::default() };
    let resume = encoded(&Frame::Resume(standing));
    let have = |region, first, pages, words: &[u64]| {
        encoded(&Frame::Have { range: range(region, first, pages), words: words.to_vec() })
    };
    let request = encoded(&Frame::Request(vec![(SMALL, 1)]));
    let fresh = || Receiver::for_resumed_source(&table());
    let mut receiver = fresh();
    let ping = encoded(&Frame::Ping(4));
    let first = have(SMALL, 0, 960, &[7; 15]);
    let rest = [have(SMALL, 960, 64, &[0]), have(HUGE, 0, 2, &[3])].concat();
    let whole = [&resume[..], &ping, &first, &rest, &request].concat();
    feed(&mut receiver, &whole, 5).unwrap();
    let events = [
        Event::Resume(standing),
        Event::Ping(4),
        Event::Have { range: range(SMALL, 0, 960), words: vec![7; 15] },
        Event::Have { range: range(SMALL, 960, 64), words: vec![0] },
        Event::Have { range: range(HUGE, 0, 2), words: vec![3] },
        Event::Accounted,
        Event::Request(vec![(SMALL, 1)]),
    ];
    assert_eq!(drain(&mut receiver), events);
    let again = feed(&mut receiver, &resume, 64);
    assert_eq!(again, Err(ReceiveError::NotResuming { kind: Kind::Resume }));

    let early = feed(&mut fresh(), &request, 64);
    assert_eq!(early, Err(ReceiveError::NotResumed { kind: Kind::Request }));
    let unsaid = feed(&mut fresh(), &first, 64);
    assert_eq!(unsaid, Err(ReceiveError::NotResumed { kind: Kind::Have }));
    let gap = [&resume[..], &have(SMALL, 64, 64, &[0])].concat();
    let order = ReceiveError::HaveOrder { range: range(SMALL, 64, 64) };
    assert_eq!(feed(&mut fresh(), &gap, 64), Err(order));
    let mut outside = fresh();
    let result = feed(&mut outside, &[&resume[..], &have(SMALL, 0, 1088, &[0; 17])].concat(), 9);
    assert!(matches!(result, Err(ReceiveError::Pages { kind: Kind::Have, .. })), "{result:?}");
    let normal = feed(&mut source(), &resume, 64);
    assert_eq!(normal, Err(ReceiveError::NotResuming { kind: Kind::Resume }));
}

#[test]
fn resumed_lane_at_the_destination_knows_its_regions() {
    let mut receiver = Receiver::for_resumed_destination(&table());
    let regions = feed(&mut receiver, &encoded(&Frame::Regions(table())), 64);
    assert_eq!(regions, Err(ReceiveError::RegionsTwice));
    let mut receiver = Receiver::for_resumed_destination(&table());
    feed(&mut receiver, &transmit::hole_header(range(SMALL, 3, 2)), 64).unwrap();
    assert_eq!(drain(&mut receiver), [Event::Hole(range(SMALL, 3, 2))]);
}
