//! How lanes share the path with other connections.

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt};

use super::Check;
use crate::runtime::process::{read, sudo};
use crate::transport::lane::CONGESTION_CONTROL;

/// Sets it for a socket as a lane does.
pub(super) fn congestion_control() -> Check {
    let check = |found: String| {
        Check::ok("congestion control", "a lane takes the path's whole rate at once", found)
    };
    let flags = SockFlag::SOCK_CLOEXEC;
    let result = socket(AddressFamily::Inet, SockType::Stream, flags, None)
        .and_then(|socket| setsockopt(&socket, sockopt::TcpCongestion, &CONGESTION_CONTROL.into()));
    let name = "net.ipv4.tcp_allowed_congestion_control";
    let allowed = read("/proc/sys/net/ipv4/tcp_allowed_congestion_control").unwrap_or_default();
    match result {
        Ok(()) => check(format!("{CONGESTION_CONTROL} is allowed")),
        Err(Errno::ENOENT) => check(format!("{CONGESTION_CONTROL} is not loaded"))
            .warning(format!("{}modprobe tcp_{CONGESTION_CONTROL}", sudo())),
        Err(Errno::EPERM) => check(format!("{CONGESTION_CONTROL} is not allowed to this user"))
            .warning(format!("{}sysctl -w \"{name}={allowed} {CONGESTION_CONTROL}\"", sudo())),
        Err(errno) => check(format!("cannot be tried: {errno}"))
            .warning("see open files, or allow sockets of TCP"),
    }
}
