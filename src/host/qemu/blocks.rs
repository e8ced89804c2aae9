//! The addresses of a QEMU's RAM blocks, as QEMU reports them.
//!
//! `x-query-ramblock` lists the blocks. The name is empty if QEMU's migration leaves a block out, such as a backend
//! that no device uses. Later QEMUs also report the address of each block in their own address space (`HVA`). With an
//! earlier one the address is derived from the guest's addresses, with `info mtree -f` and `gpa2hva`.

use std::collections::BTreeSet;

use serde_json::json;

use super::Qemu;
use crate::error::{Error, Result};

/// A RAM block that QEMU's migration carries or leaves out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) name: String,
    pub(super) bytes: u64,
    /// Its offset in QEMU's address space of all RAM.
    pub(super) offset: u64,
    /// In QEMU's own address space. None if QEMU does not report it.
    pub(super) address: Option<u64>,
}

impl Block {
    /// Whether it is the memory of the backend with this id. A block's name is the id, or the backend's path in QEMU's
    /// object tree; a device on a bus puts its own path in front of the name.
    pub(super) fn is_of(&self, id: &str) -> bool {
        self.name.rsplit_once('/').map_or(self.name.as_str(), |(_, last)| last) == id
    }
}

impl Qemu {
    /// Its RAM blocks that have a name.
    pub(super) fn blocks(&mut self) -> Result<Vec<Block>> {
        let mut blocks = self.listed_blocks()?;
        self.block_names = Some(names_of(&blocks));
        if blocks.iter().any(|block| block.address.is_none()) {
            let ranges = ranges_in(&self.human("info mtree -f")?);
            for block in blocks.iter_mut().filter(|block| block.address.is_none()) {
                block.address = self.address_of(block, &ranges)?;
            }
        }
        Ok(blocks)
    }

    /// Fails if memory was plugged in or taken out since QEMU was asked for its blocks.
    pub(super) fn check_blocks(&mut self) -> Result<()> {
        let Some(before) = self.block_names.clone() else { return Ok(()) };
        let now = names_of(&self.listed_blocks()?);
        let Some(changed) = now.symmetric_difference(&before).next() else { return Ok(()) };
        let what = if now.contains(changed) { "plugged in" } else { "taken out" };
        Err(Error::Host(format!(
            "memory (RAM block {changed}) was {what} since umem listed the guest's memory: move the guest again"
        )))
    }

    fn listed_blocks(&mut self) -> Result<Vec<Block>> {
        let text = match self.qmp.try_execute("x-query-ramblock", json!({}))? {
            Ok(answer) => answer["human-readable-text"].as_str().unwrap_or_default().to_owned(),
            // QEMU before 6.2.
            Err(_) => self.human("info ramblock")?,
        };
        blocks_in(&text).ok_or_else(|| {
            Error::Host(format!("umem cannot parse its list of RAM blocks: {}", text.trim()))
        })
    }

    /// The host address, found by a guest address at which the block is mapped.
    fn address_of(&mut self, block: &Block, ranges: &[Range]) -> Result<Option<u64>> {
        for range in ranges.iter().filter(|range| block.is_of(&range.region)) {
            let answer = self.human(&format!("gpa2hva {:#x}", range.guest_address))?;
            if let Some((region, address)) = host_address_in(&answer)
                && region == range.region
            {
                return Ok(address.checked_sub(range.offset));
            }
        }
        Ok(None)
    }

    pub(super) fn human(&mut self, line: &str) -> Result<String> {
        let answer = self.qmp.execute("human-monitor-command", json!({ "command-line": line }))?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }
}

fn names_of(blocks: &[Block]) -> BTreeSet<String> {
    blocks.iter().map(|block| block.name.clone()).collect()
}

/// Parses the table of `info ramblock`: name, page size, offset, used and total size, and possibly the address. None if
/// the text is not such a table.
fn blocks_in(text: &str) -> Option<Vec<Block>> {
    let mut lines = text.lines().skip_while(|line| !line.contains("Block Name"));
    let has_address = lines.next()?.contains("HVA");
    let block = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let first = words.iter().position(|word| word.starts_with("0x"))?;
        // Two words for the page size come before the numbers.
        let name = words.get(..first.checked_sub(2)?)?.join(" ");
        let number = |index: usize| {
            u64::from_str_radix(words.get(first + index)?.strip_prefix("0x")?, 16).ok()
        };
        let address = if has_address { Some(number(3)?) } else { None };
        // QEMU migrates the used bytes; the others are room to grow.
        Some(Block { name, bytes: number(1)?, offset: number(0)?, address })
    };
    let blocks: Option<Vec<Block>> =
        lines.filter(|line| !line.trim().is_empty()).map(block).collect();
    Some(blocks?.into_iter().filter(|block| !block.name.is_empty()).collect())
}

/// A range of guest addresses that is RAM.
#[derive(Debug, PartialEq, Eq)]
struct Range {
    guest_address: u64,
    region: String,
    /// The offset in the region at which the range begins.
    offset: u64,
}

/// The ranges of RAM that `info mtree -f` lists for the address space `memory`, which is the one that `gpa2hva` uses.
fn ranges_in(text: &str) -> Vec<Range> {
    let hexadecimal = |text: &str| u64::from_str_radix(text, 16).ok();
    let range = |line: &str| {
        let (addresses, rest) = line.trim().split_once(" (prio ")?;
        let (_, rest) = rest.split_once("): ").filter(|(kind, _)| kind.ends_with("ram"))?;
        let (region, offset) = match rest.split_once(" @") {
            Some((region, offset)) => (region, hexadecimal(offset.split(' ').next()?)?),
            None => (rest, 0),
        };
        let guest_address = hexadecimal(addresses.split_once('-')?.0)?;
        // The accelerator follows, if it has registered the range.
        let region = region.strip_suffix(" KVM").unwrap_or(region).to_owned();
        Some(Range { guest_address, region, offset })
    };
    let views = text.split("FlatView #");
    let view = views.into_iter().find(|view| view.contains("AS \"memory\", root: system"));
    view.into_iter().flat_map(str::lines).filter_map(range).collect()
}

/// `Host virtual address for 0x0 (ram0) is 0x7f98fffff000`
fn host_address_in(text: &str) -> Option<(String, u64)> {
    let (before, address) = text.trim().rsplit_once(" is 0x")?;
    let region = before.split_once('(')?.1.strip_suffix(')')?;
    Some((region.to_owned(), u64::from_str_radix(address, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_read_from_both_tables() {
        let old = "              Block Name    PSize              Offset               Used              Total\n                    ram0    4 KiB  0x0000000000000000 0x0000000008000000 0x0000000008000000\n                            4 KiB  0x000000000c000000 0x0000000001000000 0x0000000001000000\n         0000:00:01.0/mm    2 MiB  0x0000000014000000 0x0000000004000000 0x0000000004000000\n";
        let block = |name: &str, bytes, offset, address| {
            let name = name.into();
            Block { name, bytes, offset, address }
        };
        let expected = [
            block("ram0", 128 << 20, 0, None),
            block("0000:00:01.0/mm", 64 << 20, 0x1400_0000, None),
        ];
        assert_eq!(blocks_in(old).unwrap(), expected);
        let new = "              Block Name    PSize              Offset               Used              Total                HVA  RO\n           /objects/ram0    4 KiB  0x0000000000000000 0x0000000008000000 0x0000000008000000 0x00007f8927fff000  rw\n    /rom@etc/acpi/tables    4 KiB  0x000000000d880000 0x0000000000020000 0x0000000000200000 0x00007f8974e00000  ro\n";
        let expected = [
            block("/objects/ram0", 128 << 20, 0, Some(0x7f89_27ff_f000)),
            block("/rom@etc/acpi/tables", 128 << 10, 0xd88_0000, Some(0x7f89_74e0_0000)),
        ];
        assert_eq!(blocks_in(new).unwrap(), expected);
        assert!(expected[0].is_of("ram0") && !expected[0].is_of("objects"));
        assert_eq!(blocks_in("no such command"), None);
        assert_eq!(blocks_in("Block Name\n ram0 4 KiB 0x0"), None);
    }

    #[test]
    fn host_address_is_found_by_a_guest_address() {
        let tree = "\
            FlatView #0\n AS \"cpu-smm-1\", root: memory\n Root memory region: memory\n  \
            0000000000000000-00000000000bffff (prio 0, ram): other\n\n\
            FlatView #1\n AS \"memory\", root: system\n AS \"cpu-memory-0\", root: system\n \
            Root memory region: system\n  \
            00000000000c0000-00000000000dffff (prio 1, rom): pc.rom\n  \
            0000000000100000-0000000007ffffff (prio 0, ram): ram-node0 @0000000000100000 KVM\n  \
            0000000008000000-000000000fffffff (prio 0, ram): ram-node1 KVM\n  \
            0000000100000000-0000000100ffffff (prio 0, nv-ram): nv\n\n\
            FlatView #2\n AS \"I/O\", root: io\n  0000000000000000-0000000000000007 (prio 0, i/o): dma\n";
        let range = |guest_address, region: &str, offset| Range {
            guest_address,
            region: region.into(),
            offset,
        };
        let expected = [
            range(0x10_0000, "ram-node0", 0x10_0000),
            range(0x800_0000, "ram-node1", 0),
            range(0x1_0000_0000, "nv", 0),
        ];
        assert_eq!(ranges_in(tree), expected);
        assert_eq!(
            host_address_in("Host virtual address for 0x0 (ram-node0) is 0x7f98fffff000\r\n"),
            Some(("ram-node0".into(), 0x7f98_ffff_f000))
        );
        assert_eq!(host_address_in("No memory is mapped at address 0x0"), None);
    }
}
