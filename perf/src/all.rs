//! `all`: every measurement with quick settings, and a page of the results.

use std::path::{Path, PathBuf};

use argh::FromArgs;
use serde_json::{Value, json};

use crate::error::{Context, Result, failure, usage};
use crate::memory::{List, Pool};
use crate::report::{progress, write};
use crate::{Arguments, interrupt, page};

/// Measures all subjects, one after the other, and writes a page of the results.
#[derive(FromArgs)]
#[argh(
    subcommand,
    name = "all",
    note = "A subject that cannot be measured on this machine is left out; the page states why. Some of \
            them need root; `qemu` and both `rounds` need the kernel and QEMU of the tests, `link10` iperf3."
)]
pub(crate) struct Options {
    /// turns of each subject (default 2); subjects that take seconds have six times as many, `qemu`,
    /// `rounds` and `size` one more
    #[argh(option, default = "2")]
    rounds: usize,
    /// the guests' RAM, MiB; `qemu` and `rounds` have twice as much, `size` up to eight times (default 1024)
    #[argh(option, default = "1024")]
    size: usize,
    /// measure only these, separated by commas: floor, land, zeroes, fault, qemu, qemu-idle,
    /// rounds-hot, rounds-idle, link10, patterns, size, bench
    #[argh(option)]
    only: Option<List<String>>,
    /// on a virtual machine: move all free memory except this much, MiB, into the kernel's pool of
    /// huge pages, so that the measurements use the same memory again and find it warm (needs root;
    /// not for `size`; default: none; 9 times --size is enough)
    #[argh(option)]
    leave: Option<usize>,
    /// the page; a drawing of the same name with the extension .svg is written beside it (default
    /// RESULTS.md)
    #[argh(option, default = "PathBuf::from(\"RESULTS.md\")")]
    out: PathBuf,
    /// a directory for each result as JSON, from which `umem-perf page` makes a page (default:
    /// perf-results beside this program)
    #[argh(option)]
    results: Option<PathBuf>,
    /// the umem to measure (default: the one beside this program)
    #[argh(option)]
    umem: Option<PathBuf>,
}

/// `qemu` needs a part for the guest's kernel.
const SIZE_MIB_MIN: usize = 256;

/// One measurement and its name.
struct Job {
    name: &'static str,
    arguments: String,
}

pub(crate) fn run(options: &Options, command: &str) -> Result<()> {
    let jobs = chosen(options)?;
    let directory = match &options.results {
        Some(directory) => directory.clone(),
        None => std::env::current_exe()
            .context(|| "this program's path")?
            .with_file_name("perf-results"),
    };
    std::fs::create_dir_all(&directory).context(|| format!("making {}", directory.display()))?;
    page::check_writable(&options.out)?;
    let (mut files, mut failed) = (Vec::new(), 0);
    for (index, job) in jobs.iter().enumerate() {
        progress(&format!("{} of {}: umem-perf {}", index + 1, jobs.len(), job.arguments));
        let leave = options.leave.filter(|_| job.name != "size");
        let _held = leave.map(Pool::hold_all_but).transpose()?;
        let result = measured(job, options.umem.as_deref());
        // A measurement that Ctrl-C has cut off gives no result.
        interrupt::check()?;
        let object = result.unwrap_or_else(|error| {
            failed += 1;
            progress(&format!("{} is left out: {error}", job.name));
            job.failed(&error.to_string())
        });
        let file = directory.join(format!("{}.json", job.name));
        write(&file, &format!("{object}\n"))?;
        files.push(file);
    }
    page::make(&files, &options.out, Some(command))?;
    progress(&format!("{} is written, from {}", options.out.display(), directory.display()));
    match failed {
        0 => Ok(()),
        count => failure(format!(
            "{count} of {} subjects could not be measured; {} states why",
            jobs.len(),
            options.out.display()
        )),
    }
}

impl Job {
    fn failed(&self, error: &str) -> Value {
        let (what, command) = (self.name, self.command());
        json!({ "event": "failed", "what": what, "command": command, "error": error })
    }

    fn command(&self) -> String {
        format!("umem-perf {}", self.arguments)
    }
}

/// The result of one job.
fn measured(job: &Job, umem: Option<&Path>) -> Result<Value> {
    let umem = umem.map(|path| path.to_string_lossy().into_owned());
    let mut words: Vec<&str> = job.arguments.split(' ').collect();
    if let Some(umem) = umem.as_deref().filter(|_| job.name != "floor") {
        words.extend(["--umem", umem]);
    }
    let arguments = Arguments::from_args(&["umem-perf"], &words);
    let arguments = arguments.map_err(|exit| exit.output.trim().to_owned())?;
    let measures = arguments.what.measures().ok_or("every job measures")?;
    Ok(measures.measured()?.named(job.name).object(&job.command()))
}

/// The jobs of the options.
fn chosen(options: &Options) -> Result<Vec<Job>> {
    if options.rounds == 0 {
        return usage("--rounds is at least 1");
    }
    if options.size < SIZE_MIB_MIN {
        return usage(format!("--size is at least {SIZE_MIB_MIN} MiB"));
    }
    let mut jobs = jobs(options);
    let Some(List(names)) = &options.only else { return Ok(jobs) };
    if let Some(name) = names.iter().find(|&name| jobs.iter().all(|job| job.name != name)) {
        let known: Vec<&str> = jobs.iter().map(|job| job.name).collect();
        return usage(format!("--only {name}: give one of {}", known.join(", ")));
    }
    jobs.retain(|job| names.iter().any(|name| name == job.name));
    Ok(jobs)
}

/// All jobs, in the order of the page.
fn jobs(options: &Options) -> Vec<Job> {
    let Options { size, rounds, .. } = options;
    let (double, half) = (2 * size, size / 2);
    // With two rounds the median would be the figure of neither.
    let (more, many) = (rounds + 1, 6 * rounds);
    let sizes: Vec<String> = [1, 2, 4, 8].iter().map(|times| (times * size).to_string()).collect();
    let sizes = sizes.join(",");
    [
        ("qemu", format!("qemu --size {double} --fill {size} --rounds {more}")),
        ("qemu-idle", format!("qemu --idle --size {double} --fill {size} --rounds {more}")),
        // A move of these, with the guest's boot and the check of its memory, takes most of a minute: only the movers
        // that umem has targets against.
        (
            "rounds-hot",
            format!(
                "rounds --loads hot --links loopback --only qemu-hybrid,umem-postcopy,umem-hybrid \
                 --size {double} --fill {size} --rounds {more}"
            ),
        ),
        (
            "rounds-idle",
            format!(
                "rounds --loads idle --links 10g --only qemu-precopy,qemu-multifd,umem-precopy \
                 --size {double} --fill {size} --rounds {more}"
            ),
        ),
        ("fault", format!("fault --into memfd,anonymous --size {half} --rounds {many}")),
        ("land", format!("land --readers 0 --lanes 1,2 --size {size} --rounds {many}")),
        (
            "zeroes",
            format!(
                "land --into memfd,huge-tmpfs --zero 50,90 --readers 0 --size {size} --rounds {many}"
            ),
        ),
        ("link10", format!("link10 --size {size} --rounds {rounds}")),
        ("bench", format!("bench --size {size} --rounds {rounds}")),
        ("patterns", format!("patterns --size {half} --rounds {rounds}")),
        ("size", format!("size --sizes {sizes} --rounds {more}")),
        ("floor", format!("floor --size {size} --rounds {rounds}")),
    ]
    .map(|(name, arguments)| Job { name, arguments })
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(arguments: &[&str]) -> Options {
        Options::from_args(&["all"], arguments).unwrap()
    }

    #[test]
    fn every_job_parses_as_a_measuring_command_line() {
        for job in jobs(&options(&[])) {
            let words: Vec<&str> = job.arguments.split(' ').collect();
            let arguments = Arguments::from_args(&["umem-perf"], &words)
                .unwrap_or_else(|exit| panic!("{}: {}", job.arguments, exit.output));
            assert!(arguments.what.measures().is_some(), "{}", job.arguments);
        }
    }

    #[test]
    fn jobs_are_chosen_by_their_names() {
        let names = |arguments: &[&str]| -> Result<Vec<&str>> {
            Ok(chosen(&options(arguments))?.iter().map(|job| job.name).collect())
        };
        assert_eq!(names(&["--only", "size,land"]).unwrap(), ["land", "size"]);
        assert!(names(&["--only", "land,lnad"]).unwrap_err().to_string().contains("lnad"));
        assert_eq!(names(&[]).unwrap().len(), 12);
    }
}
