//! Both sides of a migration in one process, as `umem::embed` runs them: real memory, userfaultfd, io_uring and
//! sockets, a wire that breaks, and a guest that checks every word.

mod drive;
mod left;
mod model;
mod relay;
mod spoil;

#[allow(unused_imports, reason = "each test file uses its own part of this")]
pub(crate) use {
    drive::{End, Move, Moved, Pausing, Route, Side},
    left::{Left, mappings},
    model::{Backing, Guest, Habits, Model, PAGE, Region, Running},
    relay::{Deed, Deeds, Ends, Place, Relay, Spoilt},
    spoil::Spoil,
};
