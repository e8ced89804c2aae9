//! The devices that prevent a QEMU's guest from being moved.

use serde_json::json;

use super::Qemu;
use crate::error::{Error, Result};

/// The folders of QEMU's object tree that have its devices, and those objects that other processes implement.
const DEVICES: [&str; 4] =
    ["/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached", "/objects"];

impl Qemu {
    /// Devices and network backends are identified by their type: names are the user's choice.
    pub(super) fn check_devices(&mut self) -> Result<()> {
        for place in DEVICES {
            for (name, kind) in self.qmp.children(place)? {
                if let Some(why) = unsupported_device(&kind) {
                    return Err(Error::Unsupported(format!("device {name} ({kind}) {why}")));
                }
            }
        }
        let network = json!({ "command-line": "info network" });
        let network = self.qmp.try_execute("human-monitor-command", network)?;
        let network = network.unwrap_or_default();
        let lines = network.as_str().unwrap_or_default().lines();
        for (name, kind) in lines.filter_map(network_client) {
            if let Some(why) = unsupported_device(kind) {
                return Err(Error::Unsupported(format!("{name}, a netdev of type {kind}, {why}")));
            }
        }
        Ok(())
    }
}

/// The reason why a device prevents a move, from the name of its type or of a network backend's type.
fn unsupported_device(kind: &str) -> Option<&'static str> {
    let begins = |with: &[&str]| with.iter().any(|with| kind.starts_with(with));
    if begins(&["vhost-user", "cryptodev-vhost-user", "x-remote", "x-pci-proxy"]) {
        Some(
            "lets another process access the guest's RAM behind userfaultfd: remove it before moving the guest",
        )
    } else if begins(&["vfio", "x-vfio", "vhost-vdpa"]) {
        Some(
            "accesses the guest's RAM without the kernel's page tables, so pages cannot be fetched on demand: unplug \
             it before moving the guest",
        )
    } else if begins(&["ivshmem"]) {
        Some(
            "shares memory with programs outside of the guest, which continue to access it on this host: unplug it \
             before moving the guest",
        )
    } else {
        None
    }
}

/// Name and type in a line of `info network`: `n0: index=0,type=user,net=10.0.2.0,…`. The user's own text follows them.
fn network_client(line: &str) -> Option<(&str, &str)> {
    let (name, rest) = line.trim_start_matches([' ', '\\']).split_once(": index=")?;
    let (_, kind) = rest.split_once(",type=")?;
    Some((name, kind.split(',').next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_bypass_userfaultfd_are_identified_by_type() {
        for kind in [
            "vhost-user-fs-pci",
            "vhost-user-blk-pci",
            "vhost-vdpa-device-pci",
            "vfio-pci",
            "vfio-pci-nohotplug",
            "ivshmem-plain",
            "cryptodev-vhost-user",
            // Netdevs.
            "vhost-user",
            "vhost-vdpa",
        ] {
            assert!(unsupported_device(kind).is_some(), "{kind}");
        }
        for kind in ["virtio-net-pci", "virtio-balloon-pci", "e1000", "user", "tap"] {
            assert!(unsupported_device(kind).is_none(), "{kind}");
        }
    }

    #[test]
    fn network_client_is_identified_by_type_and_not_by_name() {
        for (line, expected) in [
            (
                "vhost-user-x: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56",
                Some(("vhost-user-x", "nic")),
            ),
            (" \\ vhost-user-n0: index=0,type=user,net=10.0.2.0", Some(("vhost-user-n0", "user"))),
            ("n: index=0,type=tap,ifname=a,script=x,type=vhost-user", Some(("n", "tap"))),
            ("n: index=0,type=vhost-vdpa", Some(("n", "vhost-vdpa"))),
            ("hub 0", None),
            ("", None),
        ] {
            assert_eq!(network_client(line), expected, "{line}");
        }
    }
}
