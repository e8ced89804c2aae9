//! Keeps the machine's idle cores awake while a guest waits for pages.
//!
//! Each fault wakes two threads, the one that serves it and the vCPU, and each may find its core
//! asleep. Waking a core takes longer than all other work for a page, as in a virtual machine the
//! core was given back to the host: on one of two cores a fault took 185 µs with sleeping cores and
//! 44 to 52 µs with polling ones. The kernel's interface is PM QoS, `/dev/cpu_dma_latency`
//! (Documentation/power/pm_qos_interface.rst): an open descriptor bounds how deeply cores sleep,
//! and the bound ends with the descriptor, also when its process dies. The bound affects all cores,
//! so it is held only while faults come, and [`CALM`] longer.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::time::Duration;

use umem_ring::{Op, Ring};

use crate::error::{Error, Result};

/// Cores may sleep again after one to two such periods without a fault.
const CALM: Duration = Duration::from_millis(100);

/// Takes a 32-bit number of µs; the bound holds while it is open.
pub(crate) const DEVICE: &str = "/dev/cpu_dma_latency";

/// In a virtual machine: cores poll. Any other number lets them halt, and the kernel does not know
/// the cost of that.
const LATENCY_VIRTUAL_US: i32 = 0;

/// On bare metal: the lightest sleep (C1), which ends within 2 µs and spares the core's sibling
/// thread.
const LATENCY_BARE_US: i32 = 2;

/// The state of idle cores while faults come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum IdleCores {
    /// Stay awake.
    #[default]
    Poll,
    /// Sleep as usual.
    Sleep,
}

impl std::str::FromStr for IdleCores {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<IdleCores, String> {
        match text {
            "poll" => Ok(IdleCores::Poll),
            "sleep" => Ok(IdleCores::Sleep),
            _ => Err(format!("{text:?} is neither poll nor sleep")),
        }
    }
}

/// Keeps cores awake for one thread, which owns a ring.
#[derive(Debug)]
pub(crate) struct CpuLatencyHold {
    /// Not wanted, or not allowed.
    is_off: bool,
    held: Option<File>,
    /// A fault has come since the timer was armed.
    is_busy: bool,
    token: u64,
}

impl CpuLatencyHold {
    /// Takes one token, for its timer.
    pub(crate) fn new(idle: IdleCores, token: u64) -> CpuLatencyHold {
        CpuLatencyHold { is_off: idle == IdleCores::Sleep, held: None, is_busy: false, token }
    }

    /// A vCPU waits for a page. Opening takes some µs, so call this after requesting the page.
    pub(crate) fn fault(&mut self, ring: &mut Ring) -> Result<()> {
        self.is_busy = true;
        if self.is_off || self.held.is_some() {
            return Ok(());
        }
        self.held = hold(DEVICE).ok();
        if self.held.is_none() {
            // Not allowed, or no such device: faults only take longer.
            self.is_off = true;
            return Ok(());
        }
        self.arm(ring)
    }

    /// The timer's completion.
    pub(crate) fn calm(&mut self, ring: &mut Ring) -> Result<()> {
        if std::mem::take(&mut self.is_busy) {
            return self.arm(ring);
        }
        self.held = None;
        Ok(())
    }

    fn arm(&mut self, ring: &mut Ring) -> Result<()> {
        self.is_busy = false;
        ring.submit(Op::timeout(CALM), self.token)
            .map_err(|rejected| Error::Ring(rejected.error))?;
        Ok(())
    }
}

/// Cores stay awake while this exists.
#[derive(Debug)]
pub(crate) struct Awake {
    _bound: File,
}

/// For the time in which a guest is stopped and two monitors and their umems wake each other a
/// dozen times. None if not wanted or not allowed.
pub(crate) fn stay_awake(idle: IdleCores) -> Option<Awake> {
    let bound = (idle == IdleCores::Poll).then(|| hold(DEVICE).ok()).flatten();
    bound.map(|bound| Awake { _bound: bound })
}

/// Keeps cores awake while the returned file is open.
pub(crate) fn hold(device: &str) -> io::Result<File> {
    let latency = if is_virtual() { LATENCY_VIRTUAL_US } else { LATENCY_BARE_US };
    let mut file = OpenOptions::new().write(true).open(device)?;
    file.write_all(&latency.to_ne_bytes())?;
    Ok(file)
}

/// Whether this is a virtual machine, by its processors' flags (the CPUID bit that Linux calls
/// `hypervisor`).
fn is_virtual() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::x86_64::__cpuid(1).ecx & 1 << 31 != 0;
    #[cfg(not(target_arch = "x86_64"))]
    return std::path::Path::new("/sys/hypervisor/type").exists();
}

#[cfg(test)]
mod tests {
    use super::*;
    use umem_ring::{Config, Wait};

    #[test]
    fn latency_bound_is_held_only_while_faults_come() {
        const TOKEN: u64 = 7;
        let mut ring = Ring::new(&Config::default()).unwrap();
        let mut vigil = CpuLatencyHold::new(IdleCores::Poll, TOKEN);
        vigil.fault(&mut ring).unwrap();
        if vigil.is_off {
            assert!(hold(DEVICE).is_err(), "off only if the device may not be opened");
            return;
        }
        vigil.fault(&mut ring).unwrap();
        for is_held_after in [true, false] {
            assert!(vigil.held.is_some());
            ring.enter(Wait::One).unwrap();
            assert_eq!(ring.next().unwrap().token, TOKEN);
            vigil.calm(&mut ring).unwrap();
            assert_eq!(vigil.held.is_some(), is_held_after);
        }
        assert_eq!(ring.in_flight(), 0, "no timer without need");
        vigil.fault(&mut ring).unwrap();
        assert!(vigil.held.is_some());
    }

    #[test]
    fn latency_device_is_not_opened_when_unwanted_or_missing() {
        let mut ring = Ring::new(&Config::default()).unwrap();
        let mut vigil = CpuLatencyHold::new(IdleCores::Sleep, 0);
        vigil.fault(&mut ring).unwrap();
        assert!(vigil.held.is_none() && ring.in_flight() == 0);
        assert!(hold("/dev/there-is-no-such-device").is_err());
    }
}
