//! The frames that may come on each lane.

use super::*;

#[test]
fn each_kind_is_accepted_only_in_its_direction_and_on_its_lanes() {
    // Letters: the ends that accept the kind. s/S source demand/bulk, d/D destination demand/bulk.
    let routes = [
        (Kind::Data, "dD"),
        (Kind::Zero, "dD"),
        (Kind::Hole, "dD"),
        (Kind::Request, "s"),
        (Kind::Ack, "sS"),
        (Kind::Regions, "d"),
        (Kind::Ready, "s"),
        (Kind::Stopped, "d"),
        (Kind::DeviceState, "d"),
        (Kind::Load, "d"),
        (Kind::Loaded, "s"),
        (Kind::Switchover, "d"),
        (Kind::Running, "s"),
        (Kind::LaneEnd, "D"),
        (Kind::Complete, "sd"),
        (Kind::Resume, "s"),
        (Kind::Have, "s"),
        (Kind::Digests, "sd"),
        (Kind::Rounds, "d"),
        (Kind::RoundsEnd, "D"),
        (Kind::Remaining, "d"),
        (Kind::Ping, "sSdD"),
        (Kind::Pong, "sSdD"),
        (Kind::Settled, "s"),
        (Kind::Error, "sSdD"),
    ];
    assert_eq!(routes.map(|(kind, _)| kind), Kind::ALL);
    let lanes = [
        ('s', Lane::AtSource(LaneRole::Demand)),
        ('S', Lane::AtSource(LaneRole::Bulk)),
        ('d', Lane::AtDestination(LaneRole::Demand)),
        ('D', Lane::AtDestination(LaneRole::Bulk)),
    ];
    for (kind, accepted) in routes {
        for (letter, lane) in lanes {
            let comes = lane.check(kind);
            assert_eq!(comes.is_ok(), accepted.contains(letter), "{kind} at {lane:?}");
        }
        assert_eq!(Lane::Ended.check(kind).is_ok(), kind == Kind::Error);
    }
    let wrong = ReceiveError::WrongDirection { kind: Kind::Loaded };
    assert_eq!(bulk().control(&encoded(&Frame::Loaded)), Err(wrong));
    let wrong = ReceiveError::WrongLane { kind: Kind::Load, bulk: true };
    assert_eq!(bulk().control(&encoded(&Frame::Load { state_bytes: 0 })), Err(wrong));
}

#[test]
fn only_an_error_is_accepted_after_the_lane_end() {
    let mut receiver = bulk();
    receiver.control(&encoded(&Frame::LaneEnd)).unwrap();
    feed(&mut receiver, &encoded(&Frame::Error(Fault::new(FaultCode::Other, "x"))), 99).unwrap();
    assert_eq!(drain(&mut receiver).len(), 2);
    assert_eq!(receiver.closed(), Ok(()));
    let after = ReceiveError::AfterEnd { kind: Kind::Ping };
    assert_eq!(receiver.control(&encoded(&Frame::Ping(0))), Err(after));
}
