//! The umem migration protocol, version 1: the frames between the source and the destination of a
//! migration, and their order. This page is the specification.
//!
//! The crate does no input or output. It has no descriptors, clock or threads, and handles no page
//! contents. [`transmit`] encodes frames, [`Receiver`] says where the next bytes belong and decodes
//! them, and [`source`] and [`destination`] are the phase machines of the two roles.
//!
//! # Lanes
//!
//! The source, which has the guest's pages, dials the destination. One session is one *demand lane*
//! and up to [`LANES_MAX`](limits::LANES_MAX) *bulk lanes*, each a connection of its own:
//!
//! | lane | to the destination | to the source |
//! |---|---|---|
//! | demand, index 0 | control, device state, requested pages | control, requests |
//! | bulk, index 1 to N | background pages | acknowledgements |
//!
//! Every lane opens with a [`Hello`] from the source and a [`Welcome`] (or a refusal) from the
//! destination, [`HELLO_BYTES`] each. After that everything is a frame. Lanes are not ordered
//! against each other. A session without bulk lanes sends all pages on the demand lane.
//!
//! # Frames
//!
//! Integers are little-endian. A frame is a header of [`HEADER_BYTES`], its body if it has one,
//! then, after a data header, the pages themselves; [`frame`] has the layout. Zero is never a tag,
//! a code or a role. Unused fields are zero. The receiver checks both.
//!
//! | tag | frame | way | lanes | meaning |
//! |---:|---|---|---|---|
//! | 1 | data | → | any | these pages follow, at most [`RUN_BYTES_MAX`](limits::RUN_BYTES_MAX) or one page |
//! | 2 | zero | → | any | these pages hold zeroes only |
//! | 3 | hole | → | any | these pages were never written |
//! | 4 | request | ← | demand | a vCPU waits for these pages |
//! | 5 | ack | ← | any | the destination has cached these pages, with [`Capabilities::ACKS`] |
//! | 16 | regions | → | demand | the source's table of regions |
//! | 17 | ready | ← | demand | the regions match and the guest is prepared; the landing unit of each region |
//! | 18 | stopped | → | demand | the source's guest has stopped; pages begin |
//! | 19 | device state | → | demand | a piece of device state, opaque |
//! | 20 | load | → | demand | the device state is complete |
//! | 21 | loaded | ← | demand | the destination's guest has loaded the device state |
//! | 22 | switchover | → | demand | the guest belongs to the destination: the commit point |
//! | 23 | running | ← | demand | the destination's guest runs |
//! | 24 | lane end | → | bulk | the last frame on this lane, errors aside |
//! | 25 | complete | both | demand | every page is cached; the source's complete is its goodbye |
//! | 26 | resume | ← | demand | the destination's standing, first on a lane that replaces a lost one |
//! | 27 | have | ← | demand | which pages the destination has, after resume |
//! | 28 | digests | both | demand | digests of all pages, before complete, with [`Capabilities::WHOLE_DIGESTS`] |
//! | 29 | rounds | → | demand | pages follow while the source's guest runs, with [`Capabilities::ROUNDS`] |
//! | 30 | rounds end | → | bulk | from here on each page comes once on this lane |
//! | 31 | remaining | → | demand | the guest has stopped, and these pages are still to come |
//! | 32 | ping | both | any | asks for a pong |
//! | 33 | pong | both | any | answers a ping, with its number |
//! | 34 | settled | ← | demand | the destination knows what remains: from here on each page comes once |
//! | 255 | error | both | any | the sender gives up: a code and a text |
//!
//! → to the destination, ← to the source. Region numbers are always the source's.
//!
//! # Pages
//!
//! The page sizes of the two ends may differ: a file of 4 KiB pages at the source may land in huge
//! pages at the destination, and the reverse. The unit of sending, claiming and landing is a
//! region's *landing unit*, the larger of its two page sizes. A unit is sent and cached as a whole.
//! The regions frame states the source's page sizes, ready answers with the unit of each region,
//! and from then on "page" means unit in every frame: page numbers, counts of pages and the limit
//! of a run. No frame names pages before that.
//!
//! # Order
//!
//! ```text
//! source                       demand lane                      destination
//!    | hello ------------------------------------------------------> |
//!    | <---------------------------------------------------- welcome |
//!    | regions ----------------------------------------------------> | compares, prepares
//!    | <------------------------------------------------------ ready |
//!  stops its guest                                                   |
//!    | stopped ----------------------------------------------------> | pages come and may be
//!    |    (without postcopy: every page, over the bulk lanes)        |   requested from here on
//!    | device state … ---------------------------------------------> |
//!    | load -------------------------------------------------------> | loads, touching memory
//!    | <----------------------------------------------------- loaded |
//!    | switchover -------------------------------------------------> | runs its guest
//!    | <---------------------------------------------------- running |
//!    |    (with postcopy: pages, requested and in the background)    |
//!    | <--------------------------------------------------- complete | every page is cached
//!    | complete ---------------------------------------------------> |
//! ```
//!
//! Pages, requests and acknowledgements may come at any time between *stopped* and *complete*. Each
//! page is sent once, as data, zero or hole; a request for a page in flight needs no further
//! answer. An acknowledgement names cached pages, each page at most once. Acknowledgements are
//! optional: *complete* acknowledges every page. Ping, pong and error may come at any time after
//! the welcome.
//!
//! The source's guest may run until the switchover frame is handed to the kernel, the destination's
//! from the arrival of that frame: at no time both. [`source`] and [`destination`] draw the phases.
//!
//! Where both ends know a secret, each lane begins with a nonce from each end ([`auth`]); hello and
//! welcome then carry proofs that their senders know the secret.
//!
//! # Rounds
//!
//! With [`Capabilities::ROUNDS`] the source sends pages before its guest stops, and sends a page
//! again when the guest has written to it since:
//!
//! ```text
//! source                  demand lane and bulk lanes            destination
//!    | <------------------------------------------------------ ready |
//!    | rounds -----------------------------------------------------> | pages come, again and again
//!  stops its guest                                                   |
//!    | rounds end, on each bulk lane ------------------------------> |
//!    | remaining … ------------------------------------------------> | waits for every rounds end
//!    | <---------------------------------------------------- settled |
//!    | stopped, and on as without rounds --------------------------> |
//! ```
//!
//! The last copy of a page counts, so all copies of a page travel on one lane, which keeps their
//! order. Each copy states the page as it is at that time: data may follow a hole, and a hole may
//! follow data. Before *settled* no page is requested, acknowledged or visible to the guest.
//! *Remaining* names the pages whose last copy differs from what the guest has left there, and thus
//! every page that has never come. These pages count as missing, all others as cached. From
//! *settled* on each missing page comes once, as without rounds.
//!
//! A lane lost during rounds ends the migration, and the guest continues at the source.
//!
//! # External switchover
//!
//! With [`Capabilities::EXTERNAL`] a program beside both ends has the guest run. The messages are
//! the same: *switchover* then says that the source's monitor has given the guest up, and *running*
//! that the destination has heard so. An end that is not managed so refuses a peer that is.
//!
//! # Recovery
//!
//! With [`Capabilities::RECOVERY`] the session survives the loss of a lane after *loaded*. Each end
//! then drops all lanes of the session and stops all work on them, so that nothing from them
//! reaches a page any more. The guest runs on with the pages it has. The source opens all lanes
//! again, with the same session, number of lanes and capabilities, and a higher epoch than ever
//! before. The destination accepts lanes of one epoch together; a higher epoch ends all older
//! lanes. Regions are not compared or prepared again. On the new demand lane the destination first
//! sends its standing and its pages ([`resume`]), the *account*. After the last page of the account
//! the session continues as before: the pages that the account names missing are unclaimed at the
//! source, and no page is landing at the destination.
//!
//! The account settles what each end could not know when the lanes broke:
//!
//! - If the switchover has not come, the source sends it again.
//! - If the guest runs already, the source learns it from the account.
//! - A destination that was killed reports what it had recorded. If that is less than it had sent,
//!   the source sends the switchover again, and the destination sends *running* again.
//! - A destination that has every page sends *complete* again.
//! - A destination that has sent *loaded* and is not switched over waits, as the source may have
//!   committed; its guest does not run.
//! - A destination that has sent *complete* and waits for the goodbye has all it needs, and may
//!   leave.
//!
//! Before *loaded* a lost lane ends the migration, and the guest continues at the source.
//!
//! # Checksums
//!
//! With [`Capabilities::CHECKSUM`] every frame carries checksums of its header and of what follows
//! it ([`checksum`]). They are checked before the data they cover is used: a page is cached only
//! when its run arrived unchanged. A wrong checksum counts as a lost lane. Runs are shorter then
//! ([`CHECKED_RUN_BYTES_MAX`](limits::CHECKED_RUN_BYTES_MAX)), and hellos and welcomes carry their
//! own checksum. Before *complete* each end sends digests of all pages: the destination of what it
//! has landed, the source of what its files hold.
//!
//! # Limits
//!
//! All in [`limits`]. No limit depends on what a peer sends, and memory for a body grows only with
//! the bytes of it that have come.
//!
//! # Panics
//!
//! No input from a peer makes this crate panic. Mistakes of this end panic where they would reach
//! the peer (a request for too many pages), and are typed errors where they concern received data.
#![forbid(unsafe_code)]

pub mod auth;
mod bytes;
pub mod checksum;
pub mod destination;
pub mod error;
pub mod fault;
pub mod frame;
pub mod hello;
pub mod limits;
pub mod receive;
mod receive_error;
pub mod region;
pub mod resume;
pub mod source;
pub mod transmit;

pub use auth::{Nonce, Opening};
pub use checksum::Seal;
pub use error::{Error, PhaseError};
pub use fault::{Fault, FaultCode};
pub use frame::{Frame, FrameError, HEADER_BYTES, Kind, Standing, Totals};
pub use hello::{
    Capabilities, HELLO_BYTES, Hello, HelloError, LaneRole, PROTOCOL, SessionId, VersionRange,
    Welcome, select_version,
};
pub use receive::{Event, Receiver, RunTarget, Target};
pub use receive_error::ReceiveError;
pub use region::{
    Agreement, PageRange, PageSize, Region, RegionDifference, RegionError, RegionId,
    RegionMismatch, RegionTable,
};
