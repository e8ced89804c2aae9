//! Two hosts with a router between them, which can stop forwarding.
//!
//! Three network namespaces of the test, joined by two veth pairs. Each belongs to an idle process that dies with its
//! parent, so the namespaces end with the test in any case.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::{Process, wait_for};

/// The two hosts' addresses, in networks that exist only in the namespaces.
const SOURCE: &str = "10.213.1.1";
const DESTINATION: &str = "10.213.2.1";
/// The destination's second address.
const ELSEWHERE: &str = "10.213.3.1";

/// The router's addresses in the hosts' networks.
const ROUTER: [&str; 2] = ["10.213.1.2", "10.213.2.2"];

/// See the [module](self).
pub(crate) struct Network {
    source: Namespace,
    router: Namespace,
    destination: Namespace,
}

impl Network {
    /// Every packet passes.
    pub(crate) fn new() -> Network {
        let [source, router, destination] = [(); 3].map(|()| Namespace::new());
        let network = Network { source, router, destination };
        for (host, address, router) in
            [(&network.source, SOURCE, ROUTER[0]), (&network.destination, DESTINATION, ROUTER[1])]
        {
            host.join(address, &network.router, router);
            host.ip(&["route", "add", "default", "via", router]);
        }
        network.destination.ip(&["address", "add", ELSEWHERE, "dev", "lo"]);
        let via = ["route", "add", ELSEWHERE, "via", DESTINATION];
        network.router.ip(&via);
        network.lighten();
        network
    }

    pub(crate) fn source(&self) -> &Namespace {
        &self.source
    }

    pub(crate) fn destination(&self) -> &Namespace {
        &self.destination
    }

    /// For a certificate.
    pub(crate) fn destination_address(&self) -> &'static str {
        DESTINATION
    }

    /// `tcp:ADDRESS:0` of the destination.
    pub(crate) fn listen(&self) -> String {
        format!("tcp:{DESTINATION}:0")
    }

    /// The same at its second address.
    pub(crate) fn listen_elsewhere(&self) -> String {
        format!("tcp:{ELSEWHERE}:0")
    }

    /// From now on no packet passes, in either direction, without an error: the hosts' links are up, and their routes
    /// exist.
    pub(crate) fn darken(&self) {
        self.forward(false);
    }

    pub(crate) fn lighten(&self) {
        self.forward(true);
    }

    /// A router that does not forward drops packets silently.
    fn forward(&self, yes: bool) {
        let line = format!("echo {} > /proc/sys/net/ipv4/ip_forward", u8::from(yes));
        self.router.run(&["sh", "-c", &line]);
    }

    /// The source's own link goes down, which its kernel reports.
    pub(crate) fn unplug(&self) {
        self.source.ip(&["link", "set", DEVICE, "down"]);
    }

    pub(crate) fn plug_in(&self) {
        self.source.ip(&["link", "set", DEVICE, "up"]);
        // The route was removed with the link.
        self.source.ip(&["route", "replace", "default", "via", ROUTER[0]]);
    }
}

/// The name of a host's end of the link.
const DEVICE: &str = "uplink";

/// A network namespace, for the lifetime of this value.
pub(crate) struct Namespace {
    holder: Process,
    /// Of nsenter.
    option: String,
}

impl Namespace {
    /// With its loopback device up.
    fn new() -> Namespace {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"]);
        let holder = Process::start(command.stdin(Stdio::null()));
        let path = format!("/proc/{}/ns/net", holder.pid());
        let ours = std::fs::read_link("/proc/self/ns/net").expect("/proc is mounted");
        wait_for("a network namespace", || {
            std::fs::read_link(&path).ok().filter(|namespace| *namespace != ours)
        });
        let namespace = Namespace { holder, option: format!("--net={path}") };
        namespace.ip(&["link", "set", "lo", "up"]);
        namespace
    }

    /// A link to `router`: this end's address, and the router's.
    fn join(&self, address: &str, router: &Namespace, its_address: &str) {
        static LINKS: AtomicU32 = AtomicU32::new(0);
        let there = format!("host{}", LINKS.fetch_add(1, Relaxed));
        let router_pid = router.holder.pid().to_string();
        let peer = ["peer", "name", &there, "netns", &router_pid];
        self.ip(&[&["link", "add", DEVICE, "type", "veth"], &peer[..]].concat());
        for (end, device, address) in [(self, DEVICE, address), (router, &there, its_address)] {
            end.ip(&["address", "add", &format!("{address}/30"), "dev", device]);
            end.ip(&["link", "set", device, "up"]);
        }
    }

    /// The prefix of a command that runs there; it becomes the command by exec.
    pub(crate) fn wrapper(&self) -> [&str; 2] {
        ["nsenter", &self.option]
    }

    fn ip(&self, arguments: &[&str]) {
        self.run(&[&["ip"], arguments].concat());
    }

    /// Runs a program there to its end, which must be a success, and returns its output.
    pub(crate) fn run(&self, words: &[&str]) -> String {
        let output = Command::new("nsenter")
            .arg(&self.option)
            .args(words)
            .stdin(Stdio::null())
            .output()
            .expect("nsenter is installed");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {errors}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// Bytes sent from it since it was made, with packet headers, without those to itself.
    pub(crate) fn bytes_sent(&self) -> u64 {
        let path = format!("/proc/{}/net/dev", self.holder.pid());
        let table = std::fs::read_to_string(path).expect("the holder lives");
        let line = table.lines().find_map(|line| line.trim().strip_prefix("uplink:"));
        // The first eight columns count received data.
        let sent = line.and_then(|columns| columns.split_ascii_whitespace().nth(8));
        sent.expect("a table of devices").parse().expect("a number")
    }
}
