//! Complete headers and bodies: a header determines what follows it; a frame is checked against the
//! state of the session, and becomes its event.

use crate::fault::Fault;
use crate::frame::{Body, Content, Frame, Head, Header, Kind};
use crate::receive_error::ReceiveError;
use crate::region::{PageRange, RegionId};
use crate::resume::AccountStep;

use super::lane::Lane;
use super::{Event, Receiver, RunTarget, SPARE_BYTES_MAX, State};

impl Receiver {
    /// Processes a complete header that passed its check, if there is one; `sum` covers what
    /// follows it.
    pub(super) fn begin(
        &mut self,
        header: Header,
        sum: Option<u32>,
    ) -> Result<State, ReceiveError> {
        self.lane.check(header.kind)?;
        self.check_account(header.kind)?;
        match header.head()? {
            Head::Whole(frame) => {
                self.whole(frame)?;
                Ok(State::NEXT_HEADER)
            }
            Head::Body(Body { bytes: 0, content: Content::Fault(code) }) => {
                self.events.push_back(Event::Error(Fault { code, text: String::new() }));
                Ok(State::NEXT_HEADER)
            }
            Head::Body(Body { bytes: 0, content: Content::Remaining(last) }) => {
                self.whole(Frame::Remaining { runs: Vec::new(), last })?;
                Ok(State::NEXT_HEADER)
            }
            Head::Body(body) => {
                if let (Content::Have(range), Some(account)) = (body.content, &self.account) {
                    self.check_pages(Kind::Have, range)?;
                    account.check_range(range, self.regions.as_ref().expect("just checked"))?;
                }
                Ok(State::Body {
                    kind: header.kind,
                    body,
                    bytes: std::mem::take(&mut self.spare.body),
                    sum,
                })
            }
            Head::Data(range) => {
                let target = self.run_target(range)?;
                self.events.push_back(Event::RunBegins(range));
                Ok(State::Run { range, target, sum })
            }
        }
    }

    /// Processes a complete body.
    pub(super) fn finish(&mut self, body: Body, bytes: Vec<u8>) -> Result<(), ReceiveError> {
        if body.content == Content::DeviceState {
            self.events.push_back(Event::DeviceState(bytes));
            return Ok(());
        }
        let frame = body.frame(&bytes, &mut self.spare.pages)?;
        if bytes.capacity() <= SPARE_BYTES_MAX {
            self.spare.body = bytes;
            self.spare.body.clear();
        }
        self.whole(frame)
    }

    /// Checks a complete frame's pages and turns the frame into its event.
    fn whole(&mut self, frame: Frame) -> Result<(), ReceiveError> {
        let event = match frame {
            Frame::Data(_) | Frame::DeviceState { .. } => {
                unreachable!("these kinds have their own states and events")
            }
            Frame::Zero(range) => {
                self.check_pages(Kind::Zero, range)?;
                Event::Zero(range)
            }
            Frame::Hole(range) => {
                self.check_pages(Kind::Hole, range)?;
                Event::Hole(range)
            }
            Frame::Ack(range) => {
                self.check_pages(Kind::Ack, range)?;
                Event::Ack(range)
            }
            Frame::Request(pages) => {
                for &(region, first) in &pages {
                    self.check_pages(Kind::Request, PageRange { region, first, pages: 1 })?;
                }
                Event::Request(pages)
            }
            Frame::Regions(table) => {
                if self.offered.is_some() {
                    return Err(ReceiveError::RegionsTwice);
                }
                self.offered = Some(table.clone());
                Event::Regions(table)
            }
            Frame::LaneEnd => {
                self.lane = Lane::Ended;
                Event::LaneEnd
            }
            Frame::Ready(units) => {
                let offered = self.offered.take().ok_or(ReceiveError::ReadyUnasked)?;
                let landing = offered.with_units(&units).map_err(ReceiveError::Units)?;
                self.set_regions(&landing);
                Event::Ready(landing)
            }
            Frame::Stopped { postcopy, background } => Event::Stopped { postcopy, background },
            Frame::Load { state_bytes } => Event::Load { state_bytes },
            Frame::Loaded => Event::Loaded,
            Frame::Switchover { stopped_us } => Event::Switchover { stopped_us },
            Frame::Running { us_since_switchover } => Event::Running { us_since_switchover },
            Frame::Complete(totals) => Event::Complete(totals),
            Frame::Resume(standing) => {
                self.account = Some(AccountStep::Pages { region: RegionId(0), first: 0 });
                Event::Resume(standing)
            }
            Frame::Have { range, words } => {
                let regions = self.regions.as_ref().expect("a resumed lane has its regions");
                self.account = AccountStep::heard(range, regions);
                self.events.push_back(Event::Have { range, words });
                if self.account.is_some() {
                    return Ok(());
                }
                Event::Accounted
            }
            Frame::Digests(digests) => {
                let kind = Kind::Digests;
                let regions = self.regions.as_ref().ok_or(ReceiveError::NoRegions { kind })?.len();
                if digests.len() != regions {
                    return Err(ReceiveError::DigestCount { digests: digests.len(), regions });
                }
                Event::Digests(digests)
            }
            Frame::Rounds => Event::Rounds,
            Frame::RoundsEnd => Event::RoundsEnd,
            Frame::Remaining { runs, last } => {
                runs.iter().try_for_each(|&run| self.check_pages(Kind::Remaining, run))?;
                Event::Remaining { runs, last }
            }
            Frame::Settled => Event::Settled,
            Frame::Ping(number) => Event::Ping(number),
            Frame::Pong(number) => Event::Pong(number),
            Frame::Error(fault) => Event::Error(fault),
        };
        self.events.push_back(event);
        Ok(())
    }

    /// Whether a kind of frame fits the account that the destination still has to send, if any.
    fn check_account(&self, kind: Kind) -> Result<(), ReceiveError> {
        match &self.account {
            Some(account) => account.check(kind),
            None if matches!(kind, Kind::Resume | Kind::Have) => {
                Err(ReceiveError::NotResuming { kind })
            }
            None => Ok(()),
        }
    }

    fn check_pages(&self, kind: Kind, range: PageRange) -> Result<(), ReceiveError> {
        let regions = self.regions.as_ref().ok_or(ReceiveError::NoRegions { kind })?;
        regions.check(range).map_err(|error| ReceiveError::Pages { kind, error })
    }

    /// Where a data run begins, after a check of its region and its limit.
    fn run_target(&self, range: PageRange) -> Result<RunTarget, ReceiveError> {
        let kind = Kind::Data;
        let regions = self.regions.as_ref().ok_or(ReceiveError::NoRegions { kind })?;
        regions.check(range).map_err(|error| ReceiveError::Pages { kind, error })?;
        let region = regions.get(range.region).expect("checked");
        let pages_max = match self.is_checked() {
            true => region.page_size.checked_run_pages_max(),
            false => region.page_size.run_pages_max(),
        };
        if range.pages > pages_max {
            return Err(ReceiveError::RunLength { range, pages_max });
        }
        let shift = region.page_size.shift();
        Ok(RunTarget {
            region: range.region,
            byte_offset: range.first << shift,
            bytes: range.pages << shift,
        })
    }
}
