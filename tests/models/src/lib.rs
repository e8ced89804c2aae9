//! Model checks of the state that umem's threads share: page states, wanted bits, discards, blocks, claims.
//!
//! The files under test are the product's own, compiled once more with another `memory::sync`: loom runs a model
//! repeatedly, with every order of its threads' steps on atomics and locks that could make a difference. The
//! dependencies of these files, RAM files and shared words, are replaced here ([`standins`]).
//!
//! The models are functions, which `tests/models.rs` runs.

// In a test build the product's files would bring their own tests along, which run without a model.
#![cfg(not(test))]
// The models use a part of the product files' interface, and export none; links in these files lead to other files of
// the product.
#![allow(dead_code, unused_imports, unreachable_pub, rustdoc::broken_intra_doc_links)]

mod models;
mod standins;
mod sync;

pub use models::*;
pub(crate) use standins::error;

/// As the product's `src/memory`.
#[path = "../../../src/memory"]
mod memory {
    pub(crate) mod acks;
    pub(crate) mod blocks;
    pub(crate) mod claims;
    pub(crate) mod fragments;
    pub(crate) mod kind;
    pub(crate) mod pages;
    pub(crate) use crate::standins::{region, words};
    pub(crate) use crate::sync;

    /// The models' guest has pages of 4 KiB on every kernel.
    pub(crate) fn small_page_bytes() -> u64 {
        4096
    }

    /// As the product's.
    pub(crate) fn block_pages(page_shift: u8) -> u64 {
        ((2 << 20) >> page_shift).max(1)
    }
}

/// As the product's `src/destination/memory`.
#[path = "../../../src/destination/memory"]
mod guest {
    mod region;

    pub(crate) use region::{GuestRegion, Part, RegionSetup};

    use crate::error::Result;

    /// The operations of the guest's modules on a region.
    pub(crate) fn finish(region: &GuestRegion, first: u64, pages: u64) -> Result<()> {
        region.finish_in_file(first, pages)
    }

    pub(crate) fn discard(region: &GuestRegion, bytes: std::ops::Range<u64>) {
        region.discard(bytes);
    }

    pub(crate) fn complete(region: &GuestRegion, first: u64, pages: u64) -> u64 {
        let mut left = 0;
        region.blocks.complete(first, pages, |pages| left += pages.end - pages.start);
        left
    }
}
