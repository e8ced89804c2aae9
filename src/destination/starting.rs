//! The start of a migration at the destination: its threads.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Instant;

use super::admission::prepare::Adopted;
use super::faults::latency::Latencies;
use super::faults::serving::{FaultThread, Servers};
use super::lanes::acks::Acks;
use super::lanes::bulk::BulkLane;
use super::lanes::demand::{Command, DemandLane, RequestsFrom};
use super::link::Link;
use super::memory::touch::{self, TouchThread};
use super::memory::{self, GuestMemory};
use super::session::keeping::session_of;
use super::side::GuestSide;
use super::{InboxMessage, Migration, Open, Plan, Serving, Threads};
use crate::control::destination::{Core, Input, SessionPolicy};
use crate::error::{Context, Result};
use crate::host::thread::HostThread;
use crate::observe::output::Output;
use crate::observe::progress::Progress;
use crate::runtime::cores::Cores;
use crate::runtime::inbox::Inbox;
use crate::runtime::worker::{self, ThreadHandle};
use crate::transport::lane::{self, Lane};

/// Threads that serve the faults of a guest in shards, each with its own ring.
const FAULT_THREADS_MAX: usize = 16;

impl<'a> Migration<'a> {
    pub(super) fn start(
        plan: &Plan<'_>,
        output: Output,
        inbox: &'a Inbox<InboxMessage>,
        open: Open,
        host: HostThread,
        side: &mut GuestSide,
    ) -> Result<Migration<'a>> {
        let Open { mut lanes, guard, receiver, adopted, keeping, runs_itself } = open;
        let Adopted { regions, sources, landing } = adopted;
        let has_rounds = lanes.has_rounds();
        if has_rounds {
            memory::check_rounds(&regions, side.can_empty()).inspect_err(|error| {
                lane::tell(&lanes.demand.socket(), lanes.demand.is_checked(), error);
            })?;
        }
        let mut guest = GuestMemory::new(regions, sources);
        if has_rounds {
            guest.begin_rounds(lanes.demand.is_checked());
        }
        if let Some(pid) = side.memory_pid() {
            guest.belongs_to(pid);
        }
        let keeper = keeping.map(|keeping| keeping.begin(&mut guest, side)).transpose();
        let is_checked = lanes.demand.is_checked();
        let keeper =
            keeper.inspect_err(|error| lane::tell(&lanes.demand.socket(), is_checked, error))?;
        let congestion = lanes.demand.congestion.clone().unwrap_or_else(|| "none".into());
        let demand_socket = lanes.demand.socket();
        let (link, acks) = (Link::new(&mut lanes, guard), lanes.acks());
        let terms = SessionPolicy {
            recovers: link.recovers,
            has_bulk_lanes: !lanes.bulk.is_empty(),
            is_checked,
            is_private: guest.needs_touch(),
            runs_itself,
            is_embedded: inbox.is_embedded(),
            session: keeper.as_ref().map(session_of),
            step_timeout: plan.step_timeout,
        };
        let core = Core::new(terms, link.entrance(), Instant::now());
        let lane = Some((lanes.demand, receiver));
        let (lane_count, landing) = (lanes.bulk.len(), landing);
        let requests_from = if runs_itself { RequestsFrom::Command } else { RequestsFrom::Stop };
        let serving =
            Serving { core, link, keeper, lane, requests_from, acks, lane_count, landing };
        let (mut migration, reach) =
            Migration::begin(plan, output, inbox, Arc::new(guest), serving, host)?;
        migration.congestion = congestion;
        migration.threads.demand_socket = Some(demand_socket);
        let started = migration
            .start_faults(&reach)
            .and_then(|()| migration.start_toucher(plan.touch, side))
            .and_then(|()| migration.start_bulk(lanes.bulk, acks));
        match started {
            Ok(()) => {
                let landing = migration.landing.clone();
                migration.feed(Input::Begin(landing), side);
                Ok(migration)
            }
            Err(error) => Err(migration.give_up(error, side)),
        }
    }

    /// Starts the demand thread alone.
    pub(super) fn begin(
        plan: &Plan<'_>,
        output: Output,
        inbox: &'a Inbox<InboxMessage>,
        guest: Arc<GuestMemory>,
        serving: Serving,
        host: HostThread,
    ) -> Result<(Migration<'a>, ThreadHandle)> {
        let Serving { core, link, keeper, lane, requests_from, acks, lane_count, landing } =
            serving;
        let is_checked = link.is_checked();
        let has_whole_digests = link.has_whole_digests();
        let cores = Cores::choose(plan.cores, crate::runtime::role::Role::Destination);
        let (commands, queue) = channel();
        if link.recovers {
            let post = inbox.post();
            plan.watch.link(move |order| post.send(order.into()));
        }
        let demand = DemandLane {
            lane,
            guest: guest.clone(),
            serves_faults: !guest.is_sharded(),
            core: cores.demand(),
            follows: plan.cores.is_empty(),
            idle_cores: plan.idle_cores,
            requests_from,
            has_background: lane_count == 0,
            recovers: link.recovers,
            acks: Acks::new(acks),
            commands: queue,
            post: inbox.post(),
        };
        let (reach, demand_thread) =
            worker::start("umem-demand", inbox, move |started| demand.run(started))?;
        let (counters, total_bytes) = (&guest.counters, landing.total_bytes());
        let migration = Migration {
            progress: Progress::new(plan.watch, counters, total_bytes, &output, plan.quiet),
            core,
            outcome: None,
            output,
            inbox,
            guest,
            host,
            link,
            threads: Threads {
                cores,
                servers: Servers::new(Vec::new()),
                commands,
                demand: reach.waker.clone(),
                demand_socket: None,
                demand_thread: Some(demand_thread),
                bulk_wakers: Vec::new(),
                bulk_threads: Vec::new(),
                fault_wakers: Vec::new(),
                fault_threads: Vec::new(),
                toucher: None,
                touch_thread: None,
            },
            keeper,
            landing,
            is_checked,
            digests_are_known: has_whole_digests,
            source_digests: None,
            lane_count: u16::try_from(lane_count).expect("at most 64"),
            rounds_ended: 0,
            congestion: "none".into(),
            idle_cores: plan.idle_cores,
            awake: None,
            latencies: Latencies::new(),
        };
        Ok((migration, reach))
    }

    /// Starts the fault threads of a guest in shards, and records the thread of each shard.
    pub(super) fn start_faults(&mut self, demand: &ThreadHandle) -> Result<()> {
        let sources = self.guest.sources.len();
        if !self.guest.is_sharded() {
            self.threads.servers = Servers::new(vec![demand.mailbox.clone(); sources]);
            return Ok(());
        }
        let threads = sources.min(self.threads.cores.count()).min(FAULT_THREADS_MAX);
        let mut mailboxes = Vec::new();
        for index in 0..threads {
            let thread = FaultThread {
                guest: self.guest.clone(),
                sources: (index..sources).step_by(threads).collect(),
                core: self.threads.cores.any(index),
                demand: demand.mailbox.clone(),
            };
            let name = format!("umem-faults-{}", index + 1);
            let (reach, handle) =
                worker::start(&name, self.inbox, move |started| thread.run(started))?;
            mailboxes.push(reach.mailbox);
            self.threads.fault_wakers.push(reach.waker);
            self.threads.fault_threads.push(handle);
        }
        let of_source = |source: usize| mailboxes[source % threads].clone();
        self.threads.servers = Servers::new((0..sources).map(of_source).collect());
        let _ = self.threads.commands.send(Command::Servers(self.threads.servers.clone()));
        demand.waker.wake();
        Ok(())
    }

    pub(super) fn start_toucher(&mut self, eager: bool, side: &GuestSide) -> Result<()> {
        if !self.guest.needs_touch() {
            return Ok(());
        }
        let process = side.process().expect("private memory belongs to another process");
        let socket = process.handoff.stream().try_clone();
        let thread = TouchThread {
            guest: self.guest.clone(),
            socket: socket.context(|| "the hand-over socket")?.into(),
            eager,
            core: self.threads.cores.bulk(0),
            post: self.inbox.post(),
        };
        let (work, ours) = touch::ways();
        let (waker, handle) =
            worker::start("umem-touch", self.inbox, move |started| thread.run(work, started))?;
        let (queue, toucher) = ours.reach(waker, eager);
        self.guest.set_toucher(queue);
        self.threads.toucher = Some(toucher);
        self.threads.touch_thread = Some(handle);
        Ok(())
    }

    pub(super) fn start_bulk(&mut self, lanes: Vec<Lane>, acks: bool) -> Result<()> {
        for (index, lane) in lanes.into_iter().enumerate() {
            let bulk = BulkLane {
                lane,
                regions: self.landing.clone(),
                acks: Acks::new(acks),
                guest: self.guest.clone(),
                core: self.threads.cores.bulk(index),
                servers: self.threads.servers.clone(),
                ahead: None,
                post: self.inbox.post(),
            };
            let name = format!("umem-bulk-{}", index + 1);
            let (waker, thread) =
                worker::start(&name, self.inbox, move |started| bulk.run(started))?;
            self.threads.bulk_wakers.push(waker);
            self.threads.bulk_threads.push(thread);
        }
        Ok(())
    }
}
