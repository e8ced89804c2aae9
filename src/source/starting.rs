//! The start of a migration at the source: its threads.

use std::collections::VecDeque;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::channel;
use std::time::Instant;

use umem_ring::Waker;
use umem_wire::{Capabilities, Receiver};

use super::lanes::bulk::{BulkLane, Order};
use super::lanes::demand::{Command, DemandLane};
use super::link::Link;
use super::memory::SourceMemory;
use super::memory::release::Releaser;
use super::{BulkHandle, DemandHandle, InboxMessage, Migration, Plan};
use crate::control;
use crate::control::source::{Kept, Source};
use crate::error::Result;
use crate::host::thread::HostThread;
use crate::observe::output::Output;
use crate::observe::progress::Progress;
use crate::runtime::cores::Cores;
use crate::runtime::inbox::Inbox;
use crate::runtime::worker;
use crate::transport::lane::Lane;
use crate::transport::uri::Uri;

impl Migration {
    pub(super) fn start(
        plan: &Plan<'_>,
        output: Output,
        inbox: Inbox<InboxMessage>,
        (mut lanes, link): (Vec<Lane>, Link),
        memory: Arc<SourceMemory>,
        host: HostThread,
    ) -> Result<Migration> {
        let table = memory.table()?;
        let core = |plan, uri, background| Source::new(plan, uri, background, Instant::now());
        let mut migration = Migration::new(plan, output, inbox, link, memory, host, core);
        migration.idle = lanes.split_off(1);
        let lane = lanes.pop().expect("the demand lane is there");
        migration.congestion = lane.congestion.clone().unwrap_or_else(|| "none".into());
        migration.digest_as(&lane);
        let receiver = Receiver::for_source(&table).checked(lane.is_checked());
        migration.start_demand(lane, receiver)?;
        Ok(migration)
    }

    /// Turns digests off for a destination that hashes less than this side, in both directions.
    pub(super) fn digest_as(&self, demand: &Lane) {
        let is_whole = demand.capabilities.contains(Capabilities::WHOLE_DIGESTS);
        self.memory.digest_is_lost.fetch_or(!is_whole, Relaxed);
    }

    /// Without lanes. `core` makes the core from its plan, the address to dial, and whether there is a background.
    pub(super) fn new(
        plan: &Plan<'_>,
        output: Output,
        inbox: Inbox<InboxMessage>,
        link: Link,
        memory: Arc<SourceMemory>,
        host: HostThread,
        core: impl FnOnce(control::source::Plan, Option<Uri>, bool) -> Source,
    ) -> Migration {
        if link.recovers() {
            let post = inbox.post();
            plan.watch.link(move |order| post.send(order.into()));
        }
        if let Some(precopy) = plan.precopy {
            memory.pass_bandwidth.set(precopy.max_bandwidth);
            let post = inbox.post();
            let end = move || post.send(InboxMessage::EndPasses);
            plan.watch.has_passes(plan.postcopy, memory.pass_bandwidth.clone(), end);
        }
        let (counters, total_bytes) = (&memory.counters, memory.total_bytes());
        let kept = link.keeper.as_ref().map(|keeper| Kept {
            session: keeper.session(),
            directory_option: keeper.directory_option(),
        });
        let decided = control::source::Plan {
            postcopy: plan.postcopy,
            bulk_lanes: link.session.bulk_lanes,
            rounds: plan.precopy.map(|precopy| control::source::RoundsPlan {
                passes_max: precopy.passes_max,
                downtime_limit: precopy.downtime_limit,
                timeout: precopy.timeout,
            }),
            recovers: link.recovers(),
            kept,
            is_checked: memory.is_checked,
            is_embedded: inbox.is_embedded(),
            total_bytes,
            step_timeout: plan.step_timeout,
            // Random enough for its purpose: each new state has new keys.
            seed: RandomState::new().build_hasher().finish(),
        };
        Migration {
            core: core(decided, link.uri.clone(), plan.background),
            answers: VecDeque::new(),
            lane_count: link.session.bulk_lanes,
            progress: Progress::new(plan.watch, counters, total_bytes, &output, plan.quiet),
            output,
            host,
            has_monitor: plan.has_monitor,
            link,
            follows: plan.cores.is_empty(),
            idle_cores: plan.idle_cores,
            awake: None,
            adapts: plan.order == super::Order::Adaptive,
            cores: Cores::choose(plan.cores, crate::runtime::role::Role::Source),
            zero_copy: !plan.stays_local,
            demand: None,
            demand_thread: None,
            idle: Vec::new(),
            bulk: Vec::new(),
            bulk_threads: Vec::new(),
            release_thread: None,
            allocated_bytes: 0,
            release_bytes: 0,
            congestion: "none".into(),
            memory,
            inbox,
        }
    }

    /// Has the bulk lanes send the remaining pages, each page once.
    pub(super) fn start_bulk(&mut self) -> Result<()> {
        if self.lane_count == 0 {
            self.command(Command::Background);
            return Ok(());
        }
        // Lanes that already run because of rounds.
        self.order_bulk(Order::Serve);
        self.start_bulk_threads(false)
    }

    /// Has the bulk lanes send the dirty pages once.
    pub(super) fn send_pass(&mut self) -> Result<()> {
        self.start_bulk_threads(true)?;
        self.order_bulk(Order::Pass);
        Ok(())
    }

    /// Sends the order to all served bulk lanes.
    pub(super) fn order_bulk(&self, order: Order) {
        self.bulk.iter().for_each(|lane| lane.order(order));
    }

    /// Starts the threads of lanes that have none yet.
    fn start_bulk_threads(&mut self, has_rounds: bool) -> Result<()> {
        let lanes = self.idle.len();
        for (index, lane) in std::mem::take(&mut self.idle).into_iter().enumerate() {
            let (orders, queue) = channel();
            let bulk = BulkLane {
                lane,
                orders: queue,
                has_rounds,
                memory: self.memory.clone(),
                index,
                lanes,
                core: self.cores.bulk(index),
                zero_copy: self.zero_copy,
                post: self.inbox.post(),
            };
            let name = format!("umem-bulk-{}", index + 1);
            let (waker, thread) =
                worker::start(&name, &self.inbox, move |started| bulk.run(started))?;
            self.bulk.push(BulkHandle { orders, waker });
            self.bulk_threads.push(thread);
        }
        Ok(())
    }

    /// Starts the thread that serves a demand lane.
    pub(super) fn start_demand(&mut self, lane: Lane, receiver: Receiver) -> Result<()> {
        let (commands, queue) = channel();
        let socket = lane.socket();
        let demand = DemandLane {
            lane,
            receiver,
            memory: self.memory.clone(),
            core: self.cores.demand(),
            follows: self.follows,
            idle_cores: self.idle_cores,
            adapts: self.adapts,
            commands: queue,
            post: self.inbox.post(),
        };
        let (waker, thread): (Waker, _) =
            worker::start("umem-demand", &self.inbox, move |started| demand.run(started))?;
        self.demand = Some(DemandHandle { commands, waker, socket });
        self.demand_thread = Some(thread);
        Ok(())
    }

    /// The guest has gone: from now on the pages that the destination has, earlier ones included, are freed.
    pub(super) fn start_release(&mut self) -> Result<()> {
        if !self.memory.releases {
            return Ok(());
        }
        let releaser = Releaser { memory: self.memory.clone() };
        let start = move |started| releaser.run(started);
        let (waker, thread) = worker::start("umem-release", &self.inbox, start)?;
        // Earlier acknowledgements found no thread to wake.
        self.memory.releaser.get_or_init(|| waker).wake();
        self.release_thread = Some(thread);
        Ok(())
    }
}
