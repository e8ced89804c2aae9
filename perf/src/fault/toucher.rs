//! The guest that `fault` and `patterns` move: it touches pages and times each access.
//!
//! Its first access waits until the source has connected; from then on it runs. An access *waited*
//! if its thread slept in it (a voluntary context switch): an access to a present page costs at
//! most a fault, which does not sleep.

use std::fs::{File, OpenOptions};
use std::io::IoSlice;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use argh::FromArgs;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::json;

use super::pattern::Pattern;
use crate::error::{Context, Result, usage};
use crate::memory::{Mapping, PAGE_BYTES, Pages};
use crate::userfault::Userfault;

/// The guest of `fault` and `patterns`, which start it: touches pages and times each access.
#[derive(FromArgs)]
#[argh(subcommand, name = "toucher")]
pub(crate) struct Options {
    /// its memory, MiB
    #[argh(option)]
    size: usize,
    /// its kind: memfd, huge-tmpfs, hugetlb, anonymous, anonymous-huge or private
    #[argh(option)]
    kind: Pages,
    /// the file of its memory, NAME=PATH
    #[argh(option)]
    ram: Option<String>,
    /// the socket where anonymous memory is handed over
    #[argh(option)]
    handoff: Option<PathBuf>,
    /// accesses to make (default: as many as there are pages)
    #[argh(option)]
    count: Option<usize>,
    /// their order: random (the default), sequential, backward, strided or hot-set
    #[argh(option, default = "Pattern::Random")]
    pattern: Pattern,
    /// computing time after each access, µs (default 0)
    #[argh(option, default = "0")]
    think_us: u64,
}

/// Touches, reports the times, and stays until it is ended.
pub(crate) fn run(options: &Options) -> Result<()> {
    let bytes = options.size << 20;
    let mapping = match (&options.ram, &options.handoff) {
        (Some(ram), None) => {
            let path = ram.split_once('=').map_or(ram.as_str(), |(_, path)| path);
            options.kind.map_file(&open(path)?, bytes)?
        }
        (None, Some(_)) => Mapping::anonymous(bytes, options.kind == Pages::AnonymousHuge)?,
        _ => return usage("give either --ram or --handoff"),
    };
    let _kept = options
        .handoff
        .as_ref()
        .map(|socket| hand_over(socket, &mapping, options.kind))
        .transpose()?;
    let pages = bytes / PAGE_BYTES;
    let first = touch(&mapping, 0);
    let mut waited_ns = Vec::with_capacity(pages);
    let mut queue = RunQueue::open();
    let mut queued_ns = Vec::with_capacity(if queue.is_some() { pages } else { 0 });
    let (mut already_there, mut wrong) = (0_u64, u64::from(first != 0));
    let mut slept = sleeps()?;
    let think = Duration::from_micros(options.think_us);
    for page in options.pattern.accesses(pages, options.count.unwrap_or(pages)) {
        let began = Instant::now();
        let number = touch(&mapping, page);
        let nanoseconds = u64::try_from(began.elapsed().as_nanos())?;
        wrong += u64::from(number != page as u64);
        let now = sleeps()?;
        if now > slept {
            waited_ns.push(nanoseconds);
            if let Some(queue) = &mut queue {
                queued_ns.push(queue.since_last()?.min(nanoseconds));
            }
        } else {
            already_there += 1;
        }
        slept = now;
        let thinking = Instant::now();
        while thinking.elapsed() < think {
            std::hint::spin_loop();
        }
    }
    println!(
        "{}",
        json!({
            "event": "touched",
            "waited_ns": waited_ns,
            "queued_ns": queued_ns,
            "already_there": already_there,
            "wrong": wrong,
        })
    );
    loop {
        nix::unistd::pause();
    }
}

/// The first word of a page.
pub(super) fn touch(mapping: &Mapping, page: usize) -> u64 {
    let (start, _) = mapping.at(page * PAGE_BYTES);
    // SAFETY: inside the mapping, aligned; volatile, as another process provides the page.
    unsafe { start.cast::<u64>().read_volatile() }
}

/// The time in which this thread was ready to run without a core.
struct RunQueue {
    schedstat: File,
    total_ns: u64,
}

impl RunQueue {
    /// None if the kernel does not count it (CONFIG_SCHED_INFO).
    fn open() -> Option<RunQueue> {
        let schedstat = File::open("/proc/thread-self/schedstat").ok()?;
        let mut queue = RunQueue { schedstat, total_ns: 0 };
        queue.since_last().ok()?;
        Some(queue)
    }

    /// Nanoseconds since the last call.
    fn since_last(&mut self) -> Result<u64> {
        let mut text = [0; 64];
        let count = self.schedstat.read_at(&mut text, 0).context(|| "this thread's schedstat")?;
        // Time on a core, time waiting for one, number of times that it got one.
        let mut words = std::str::from_utf8(&text[..count])?.split_whitespace();
        let total_ns = words.nth(1).ok_or("schedstat has no second word")?.parse()?;
        let before = std::mem::replace(&mut self.total_ns, total_ns);
        Ok(total_ns - before)
    }
}

/// How often this thread has slept.
pub(super) fn sleeps() -> Result<i64> {
    Ok(getrusage(UsageWho::RUSAGE_THREAD).context(|| "getrusage")?.voluntary_context_switches())
}

fn open(path: &str) -> Result<File> {
    OpenOptions::new().read(true).write(true).open(path).context(|| path.to_owned())
}

/// Sends Firecracker's message. The result has to be kept while umem serves the memory.
fn hand_over(socket: &Path, mapping: &Mapping, pages: Pages) -> Result<(UnixStream, Userfault)> {
    let uffd = Userfault::of(mapping, pages)?;
    let stream = UnixStream::connect(socket).context(|| socket.display())?;
    let page_bytes = pages.page_bytes();
    let message = json!([{
        "base_host_virt_addr": mapping.at(0).0.expose_provenance() as u64,
        "size": mapping.bytes(),
        "offset": 0,
        "page_size": page_bytes,
        "page_size_kib": page_bytes,
    }])
    .to_string();
    let (descriptors, text) = ([uffd.descriptor()], [IoSlice::new(message.as_bytes())]);
    let rights = [ControlMessage::ScmRights(&descriptors)];
    sendmsg::<()>(stream.as_raw_fd(), &text, &rights, MsgFlags::MSG_NOSIGNAL, None)
        .context(|| "handing the memory over")?;
    Ok((stream, uffd))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    /// Two threads that both want one core wait for it in turns.
    #[test]
    fn run_queue_counts_the_time_without_a_core() {
        let Some(mut queue) = RunQueue::open() else {
            return eprintln!("this kernel does not count how long a thread waits for a core");
        };
        let [core, _] = crate::machine::two_cores().unwrap();
        crate::machine::pin(core).unwrap();
        let waited = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            // The thread inherits the core.
            scope.spawn(|| {
                while !waited.load(std::sync::atomic::Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
            while queue.since_last().unwrap() == 0 {}
            waited.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }

    #[test]
    fn sleeps_counts_only_blocking_waits() {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            tell.send(nix::unistd::gettid()).unwrap();
            let before = sleeps().unwrap();
            far.read_exact(&mut [0]).unwrap();
            let (after, again) = (sleeps().unwrap(), sleeps().unwrap());
            (after - before, again - after)
        });
        let stat = format!("/proc/self/task/{}/stat", told.recv().unwrap());
        while !std::fs::read_to_string(&stat).unwrap().contains(") S ") {
            std::thread::yield_now();
        }
        near.write_all(&[1]).unwrap();
        assert_eq!(thread.join().unwrap(), (1, 0));
    }
}
