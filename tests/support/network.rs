//! Two hosts with a router between them, which can stop to pass anything on.
//!
//! Three network namespaces of the test's own, joined by two veth pairs. Each belongs to a process that
//! does nothing and dies with its parent, so that they go when the test ends, however it does.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::{Process, wait_for};

/// The two hosts' addresses, in networks that only the namespaces have.
const SOURCE: &str = "10.213.1.1";
const DESTINATION: &str = "10.213.2.1";
/// The destination's second one.
const ELSEWHERE: &str = "10.213.3.1";

/// The router's addresses beside the hosts'.
const ROUTER: [&str; 2] = ["10.213.1.2", "10.213.2.2"];

/// See the [module](self).
pub(crate) struct Network {
    source: Namespace,
    router: Namespace,
    destination: Namespace,
}

impl Network {
    /// Everything passes.
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

    /// From now on nothing gets through, in either direction, and nobody is told: the hosts' links are
    /// up, and their routes are there.
    pub(crate) fn darken(&self) {
        self.forward(false);
    }

    pub(crate) fn lighten(&self) {
        self.forward(true);
    }

    /// A router that forwards nothing throws away what is not for itself, and says nothing.
    fn forward(&self, yes: bool) {
        let line = format!("echo {} > /proc/sys/net/ipv4/ip_forward", u8::from(yes));
        self.router.run(&["sh", "-c", &line]);
    }

    /// The source's own link goes down, which it knows.
    pub(crate) fn unplug(&self) {
        self.source.ip(&["link", "set", DEVICE, "down"]);
    }

    pub(crate) fn plug_in(&self) {
        self.source.ip(&["link", "set", DEVICE, "up"]);
        // The route went with the link.
        self.source.ip(&["route", "replace", "default", "via", ROUTER[0]]);
    }
}

/// What a host calls its end of the link.
const DEVICE: &str = "uplink";

/// A network namespace, for as long as this is there.
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
        let ours = std::fs::read_link("/proc/self/ns/net").expect("there is /proc");
        wait_for("a network namespace", || {
            std::fs::read_link(&path).ok().filter(|namespace| *namespace != ours)
        });
        let namespace = Namespace { holder, option: format!("--net={path}") };
        namespace.ip(&["link", "set", "lo", "up"]);
        namespace
    }

    /// A link to `router`: this end's address, and that one's.
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

    /// Comes before a command that is to run there, and becomes it by exec.
    pub(crate) fn wrapper(&self) -> [&str; 2] {
        ["nsenter", &self.option]
    }

    fn ip(&self, arguments: &[&str]) {
        self.run(&[&["ip"], arguments].concat());
    }

    /// Runs a program there to its end, which is a success, and returns what it printed.
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

    /// Bytes that have left it since it was made, packets' headers and all, but for what it said to
    /// itself.
    pub(crate) fn bytes_sent(&self) -> u64 {
        let path = format!("/proc/{}/net/dev", self.holder.pid());
        let table = std::fs::read_to_string(path).expect("the holder lives");
        let line = table.lines().find_map(|line| line.trim().strip_prefix("uplink:"));
        // Eight columns of what was received come first.
        let sent = line.and_then(|columns| columns.split_ascii_whitespace().nth(8));
        sent.expect("a table of devices").parse().expect("a number")
    }
}
