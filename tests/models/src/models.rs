//! The models, each with its invariant for every order of its threads' steps.

mod claiming;
mod discarding;
mod leaving;
mod waking;

pub use claiming::*;
pub use discarding::*;
pub use leaving::*;
pub use waking::*;

use loom::model::Builder;

use crate::guest::{GuestRegion, Part, RegionSetup};
use crate::memory::kind::Kind;
use crate::memory::region::RamFile;

/// Runs a model in every order with at most three preemptions.
fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

/// A region of shared memory whose landing units are two of the guest's pages each.
fn region(units: u64) -> GuestRegion {
    let bytes = units << 13;
    GuestRegion::new(RegionSetup {
        name: "ram".into(),
        kind: Kind::Shared,
        bytes,
        unit_shift: 13,
        page_shift: 12,
        file: Some(RamFile::of_zeroes(2 * units)),
        parts: vec![Part { offset: 0, bytes, address: 0, source: 0 }],
    })
}
