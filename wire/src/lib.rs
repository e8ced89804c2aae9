//! The umem migration protocol, version 1: what travels between the source and the destination of a
//! migration, and in which order. This page is its specification.
//!
//! The crate does no input or output. It has no descriptors, clock or threads, and it never sees a
//! page: it turns meanings into headers ([`transmit`]), says where the bytes that come belong and
//! what they meant ([`Receiver`]), and knows what may happen next ([`source`], [`destination`]).
//!
//! # Lanes
//!
//! The source, which has the guest's pages, dials the destination. One session is one *demand lane*
//! and up to [`LANES_MAX`](limits::LANES_MAX) *bulk lanes*, each a connection of its own:
//!
//! | lane | to the destination | to the source |
//! |---|---|---|
//! | demand, index 0 | control, device state, pages somebody waits for | control, requests |
//! | bulk, index 1 to N | pages nobody waits for | acknowledgements |
//!
//! Every lane opens with a [`Hello`] from the source and a [`Welcome`] (or a refusal) from the
//! destination, [`HELLO_BYTES`] each. After that everything is a frame. Lanes are not ordered
//! against each other. A session without bulk lanes sends all pages on the demand lane.
//!
//! # Frames
//!
//! Integers are little-endian. A frame is a header of [`HEADER_BYTES`], its body if it has one,
//! then, after a data header, the pages themselves; [`frame`] has the layout. Zero is never a tag,
//! a code or a role, and what a frame does not use is zero: the receiver checks both.
//!
//! | tag | frame | way | lanes | says |
//! |---:|---|---|---|---|
//! | 1 | data | → | any | these pages follow, at most [`RUN_BYTES_MAX`](limits::RUN_BYTES_MAX) or one page |
//! | 2 | zero | → | any | these pages hold zeroes only |
//! | 3 | hole | → | any | these pages were never written |
//! | 4 | request | ← | demand | somebody waits for these pages |
//! | 5 | ack | ← | any | these pages are the destination's own, with [`Capabilities::ACKS`] |
//! | 16 | regions | → | demand | the source's table of regions |
//! | 17 | ready | ← | demand | the regions match and the guest is prepared; each one's landing unit |
//! | 18 | stopped | → | demand | the source's guest has stopped; pages begin |
//! | 19 | device state | → | demand | a piece of device state, opaque |
//! | 20 | load | → | demand | that was all of it |
//! | 21 | loaded | ← | demand | the guest has taken it |
//! | 22 | switchover | → | demand | the guest is yours: the commit point |
//! | 23 | running | ← | demand | it runs |
//! | 24 | lane end | → | bulk | nothing more comes here, errors aside |
//! | 25 | complete | both | demand | every page is cached; the source's answer is goodbye |
//! | 26 | resume | ← | demand | where the destination stands, first on a lane that replaces a lost one |
//! | 27 | have | ← | demand | which pages the destination has, behind resume |
//! | 28 | digests | both | demand | what all pages come to, before complete, with [`Capabilities::WHOLE_DIGESTS`] |
//! | 29 | rounds | → | demand | pages come while the source's guest runs, with [`Capabilities::ROUNDS`] |
//! | 30 | rounds end | → | bulk | a page comes once on this lane from here on |
//! | 31 | remaining | → | demand | the guest has stopped, and these pages are still to come |
//! | 32 | ping | both | any | please answer |
//! | 33 | pong | both | any | the answer, with the ping's number |
//! | 34 | settled | ← | demand | what remains is known: each page comes once from here on |
//! | 255 | error | both | any | the sender gives up: a code and a text |
//!
//! → to the destination, ← to the source. Region numbers are always the source's.
//!
//! # Pages
//!
//! The two ends' pages may differ in size: a file of 4 KiB pages at the source may land in huge pages
//! at the destination, and the other way round. What is sent, claimed and landed as one is a region's
//! *landing unit*, the larger of its two page sizes; a unit never comes in parts, so that it is
//! cached as a whole. The regions frame says the source's page sizes, ready answers with the unit of
//! each region, and from then on "page" means unit in every frame: page numbers, counts of pages and
//! the limit of a run. Nothing speaks of pages before.
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
//!    |    (without postcopy: every page, over the bulk lanes)        |   asked for from here on
//!    | device state … ---------------------------------------------> |
//!    | load -------------------------------------------------------> | loads, touching memory
//!    | <----------------------------------------------------- loaded |
//!    | switchover -------------------------------------------------> | runs its guest
//!    | <---------------------------------------------------- running |
//!    |    (with postcopy: pages, as asked for and in the background) |
//!    | <--------------------------------------------------- complete | every page is cached
//!    | complete ---------------------------------------------------> |
//! ```
//!
//! Requests and their answers, acknowledgements and pages run through all of this from *stopped* to
//! *complete*. An acknowledgement says that pages are cached, each once, after they came; one that was
//! not sent is none that was not given: *complete* acknowledges every page. Each page goes once, as data, zero or hole: a request for a page that is on its way
//! already needs no other answer. Ping, pong and error may come any time after the welcome.
//!
//! The source's guest may run until the switchover frame is handed to the kernel, the destination's
//! from the arrival of that frame: at no time both. [`source`] and [`destination`] draw the phases.
//!
//! Where both ends know a secret, each lane begins with a nonce from each end ([`auth`]), and hello and
//! welcome prove with them that their senders know it.
//!
//! # Rounds
//!
//! With [`Capabilities::ROUNDS`] pages go before the source's guest stops, and go again where it has written to
//! them meanwhile:
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
//! The last copy of a page that comes counts, so all copies of a page come on one lane, which keeps their order.
//! A page comes as what it is then: data where a hole came before, a hole where data came. Nothing of the memory
//! is asked for, acknowledged or shown before *settled*. *Remaining* names the pages whose last copy is not what
//! the guest has left there; they count as missing, all others as cached. So *remaining* names every page that
//! has not come. From *settled* on each page that is missing comes once, as without rounds.
//!
//! A lane that is lost in rounds ends the migration, and the guest goes on at the source.
//!
//! # Recovery
//!
//! With [`Capabilities::RECOVERY`] a lane that is lost after *loaded* is not the end. Either end then
//! gives up all lanes of the session, and stops whatever they were doing: nothing of them reaches a page
//! any more. The guest runs on with what it has. The source opens all lanes anew, with the same session,
//! number of lanes and capabilities, and a higher epoch than ever before; the destination takes lanes of
//! one epoch together, and a higher one ends whatever is older. Nothing is compared or prepared again:
//! on the new demand lane the destination says where it stands and which pages it has ([`resume`]), and
//! from the last page of that account on everything goes on as before, with what the account calls
//! missing unclaimed at the source and no page landing at the destination.
//!
//! The account settles what neither end could know when the lanes broke. If the switchover has not come
//! the source sends it again; if the guest runs already the source learns it there; a destination that
//! has every page says *complete* again. A destination that has said *loaded* and is not switched over
//! waits, as the source may have committed; its guest does not run. One that has said *complete* and
//! waits for the goodbye has all it needs, and may leave.
//!
//! Before *loaded* a lost lane ends the migration, and the guest goes on at the source.
//!
//! # Checksums
//!
//! With [`Capabilities::CHECKSUM`] every frame carries sums of its header and of what follows it
//! ([`checksum`]), which are checked before anything that they are of is used: a page is cached only when
//! the run that it came with is as it was sent. A wrong sum is a lost lane. Runs are shorter then
//! ([`CHECKED_RUN_BYTES_MAX`](limits::CHECKED_RUN_BYTES_MAX)), hellos and welcomes have a sum of their own,
//! and before *complete* each end says what all pages come to: the destination what it has landed, the
//! source what its files hold.
//!
//! # Limits
//!
//! All in [`limits`]. No limit depends on what a peer says, and memory for a body grows only with
//! the bytes of it that have come.
//!
//! # Panics
//!
//! Nothing a peer sends makes anything here panic. Our own mistakes do where they would go out to
//! the peer (a request for too many pages), and are typed errors where they would come in.
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
pub mod region;
pub mod resume;
pub mod source;
pub mod transmit;

pub use auth::{Nonce, Opening};
pub use checksum::Seal;
pub use error::{Error, FrameError, HelloError, PhaseError, ReceiveError, RegionError};
pub use fault::{Fault, FaultCode};
pub use frame::{Frame, HEADER_BYTES, Kind, Totals};
pub use hello::{
    Capabilities, HELLO_BYTES, Hello, LaneRole, PROTOCOL, SessionId, VersionRange, Welcome,
    select_version,
};
pub use receive::{Event, Receiver, RunTarget, Target};
pub use region::{
    Agreement, PageRange, PageSize, Region, RegionDifference, RegionId, RegionMismatch, RegionTable,
};
pub use resume::Standing;
