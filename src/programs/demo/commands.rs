//! What the demo's processes are started with.

use super::process::{Process, this_program};
use super::ram::RAM_NAME;
use super::{Demo, Options};
use crate::error::Result;

impl Demo<'_> {
    pub(super) fn start_guest(&mut self) -> Result<Process> {
        let mut arguments = self.guest_arguments("source.qmp");
        arguments.extend(options([("--ram", self.source_ram.option())]));
        let mut guest = Process::start("the source's guest", &arguments)?;
        guest.event(&self.inbox, "ready")?;
        Ok(guest)
    }

    /// What both guests are told.
    fn guest_arguments(&self, socket: &str) -> Vec<String> {
        let demo = self.options;
        let mut arguments = vec!["guest".to_owned()];
        arguments.extend(options([
            ("--qmp", self.directory.file(socket)),
            ("--size", demo.size_mib.to_string()),
            ("--threads", demo.threads.to_string()),
            ("--write-percent", demo.write_percent.to_string()),
            ("--zero-percent", demo.zero_percent.to_string()),
            ("--hole-percent", demo.hole_percent.to_string()),
            ("--seed", self.seed.to_string()),
        ]));
        arguments
    }

    pub(super) fn start_incoming(&self) -> Result<Process> {
        let kind = self.options.kind;
        let mut arguments = vec!["incoming".to_owned(), "--json".to_owned()];
        arguments.extend(options([("--qmp", self.directory.file("destination.qmp"))]));
        arguments.extend(match &self.destination_ram {
            Some(ram) => options([("--kind", kind.name().to_owned()), ("--ram", ram.option())]),
            None => options([("--handoff", self.directory.file("handoff"))]),
        });
        if let Some(flags) = self.options.postcopy_flags {
            arguments.extend(options([("--postcopy-flags", flags.to_string())]));
        }
        arguments.extend(self.security());
        arguments.extend(self.shown("destination.json"));
        if self.options.quiet {
            arguments.push("--quiet".into());
        }
        arguments.push("tcp:127.0.0.1:0".into());
        arguments.push("--".into());
        arguments.push(this_program()?.display().to_string());
        arguments.extend(self.incoming_guest_arguments());
        Process::start("umem incoming", &arguments)
    }

    fn incoming_guest_arguments(&self) -> Vec<String> {
        let demo = self.options;
        let mut arguments = self.guest_arguments("destination.qmp");
        arguments.push("--incoming".into());
        for (is_on, switch) in [(demo.discard, "--discard"), (demo.huge, "--huge")] {
            if is_on {
                arguments.push(switch.into());
            }
        }
        arguments.extend(options([("--kind", demo.kind.name().to_owned())]));
        arguments.extend(match &self.destination_ram {
            Some(ram) => options([("--ram", ram.option())]),
            None => options([
                ("--ram", RAM_NAME.to_owned()),
                ("--handoff", self.directory.file("handoff")),
                ("--shards", demo.shards.to_string()),
            ]),
        });
        arguments
    }

    pub(super) fn start_migrate(&self, uri: &str) -> Result<Process> {
        // The destination shows the progress of both.
        let mut arguments: Vec<String> =
            ["migrate", "--json", "--quiet", "--qmp"].map(str::to_owned).to_vec();
        arguments.push(self.directory.file("source.qmp"));
        arguments.push("--lanes".into());
        arguments.push(self.options.lanes.to_string());
        arguments.extend(self.options.checksum.then(|| "--checksum".to_owned()));
        arguments.push(if self.options.postcopy { "-p" } else { "--stop-first" }.into());
        arguments.extend(self.options.precopy.then(|| "--precopy".to_owned()));
        arguments.extend(self.security());
        if let Some(limit) = self.options.max_postcopy_bandwidth {
            arguments.extend(options([("--max-postcopy-bandwidth", limit.to_string())]));
        }
        arguments.extend(self.shown("source.json"));
        arguments.push(uri.into());
        Process::start("umem migrate", &arguments)
    }

    /// What both sides are told of it.
    fn security(&self) -> Vec<String> {
        let Options { tls_creds, secret_file, .. } = self.options;
        [("--tls-creds", tls_creds), ("--secret-file", secret_file)]
            .into_iter()
            .filter_map(|(name, path)| {
                Some([name.to_owned(), path.as_ref()?.display().to_string()])
            })
            .flatten()
            .collect()
    }

    /// What either side is to show: figures for the report in a file of this name, a trace.
    fn shown(&self, recording: &str) -> Vec<String> {
        let mut arguments = Vec::new();
        if self.options.report.is_some() {
            arguments.extend(options([("--report", self.directory.file(recording))]));
        }
        if self.options.verbose {
            arguments.push("--verbose".into());
        }
        arguments
    }
}

/// Options with their values as words of a command line.
fn options<const N: usize>(options: [(&str, String); N]) -> Vec<String> {
    options.into_iter().flat_map(|(option, value)| [option.to_owned(), value]).collect()
}
