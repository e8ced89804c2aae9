use std::net::{TcpListener, TcpStream};

use super::*;

/// The kernel's value of an option of four bytes.
fn option(lane: &Lane, level: i32, name: i32) -> i32 {
    let mut value = -1;
    let mut length = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the kernel writes at most four bytes to a local variable.
    let result = unsafe {
        libc::getsockopt(
            lane.as_fd().as_raw_fd(),
            level,
            name,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    assert_eq!(result, 0);
    value
}

#[test]
fn demand_lane_gets_interactive_priority_and_low_delay() {
    for (address, level, name) in [
        ("127.0.0.1:0", libc::IPPROTO_IP, libc::IP_TOS),
        ("[::1]:0", libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
    ] {
        let listener = TcpListener::bind(address).unwrap();
        let dial = || OwnedFd::from(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        let marks = |lane: &Lane| {
            (option(lane, level, name), option(lane, libc::SOL_SOCKET, libc::SO_PRIORITY))
        };
        let first = (i32::from(libc::IPTOS_LOWDELAY), 6);
        let dialled = Lane::new(dial(), lane_name(LaneRole::Demand, 0)).unwrap();
        assert_eq!(marks(&dialled), first, "{address}");
        let accepted = Lane::new(dial(), "a lane".into()).unwrap();
        assert_eq!(marks(&accepted), (0, 0), "{address}");
        assert_eq!(marks(&accepted.clone().assign(LaneRole::Bulk, 1)), (0, 0), "{address}");
        assert_eq!(marks(&accepted.assign(LaneRole::Demand, 0)), first, "{address}");
    }
}
