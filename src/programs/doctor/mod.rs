//! `umem doctor`: whether this machine, and this user on it, meet umem's requirements.
//!
//! Checks try the real thing: they make a ring, open a userfaultfd, request a thread's priority. They release
//! everything and change nothing on the machine.
//!
//! - [`kernel`]: its version, io_uring, userfaultfd, idle cores, KVM
//! - [`limits`]: this user's limits: descriptors, locked memory, mappings, priority
//! - [`memory`]: the place of the guest's RAM: /dev/shm, huge pages
//! - [`network`]: congestion control

mod kernel;
mod limits;
mod memory;
mod network;

use serde_json::json;

use crate::observe::output::Output;

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Ok,
    /// umem works, but slower than possible, or not for every guest.
    Warning,
    /// umem cannot work on one side of a migration, or on both.
    Missing,
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Warning => "warning",
            Status::Missing => "missing",
        }
    }
}

/// One check.
#[derive(Debug)]
struct Check {
    name: &'static str,
    status: Status,
    /// The state found.
    found: String,
    /// The use that umem makes of it.
    purpose: &'static str,
    /// A command to type, or another remedy.
    remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, purpose: &'static str, found: impl Into<String>) -> Check {
        Check { name, status: Status::Ok, found: found.into(), purpose, remedy: None }
    }

    fn warning(self, remedy: impl Into<String>) -> Check {
        Check { status: Status::Warning, remedy: Some(remedy.into()), ..self }
    }

    fn missing(self, remedy: impl Into<String>) -> Check {
        Check { status: Status::Missing, remedy: Some(remedy.into()), ..self }
    }
}

/// Runs all checks and prints a line for each: status, name, state, use; below it the remedy. The value is the
/// process's exit status: 1 if a requirement is missing.
pub fn run(json: bool) -> i32 {
    let checks = [
        kernel::release(),
        kernel::pages(),
        kernel::io_uring(),
        kernel::userfaultfd(),
        kernel::userfaultfd_features(),
        limits::open_files(),
        limits::locked_memory(),
        limits::mappings(),
        limits::priority(),
        limits::early(),
        kernel::idle_cores(),
        memory::shared(),
        memory::huge_pages(),
        memory::hugetlb_pool(),
        network::congestion_control(),
        kernel::kvm(),
    ];
    let count = |status| checks.iter().filter(|check| check.status == status).count();
    let (warnings, missing) = (count(Status::Warning), count(Status::Missing));
    let output = Output::new(json);
    for check in &checks {
        if json {
            output.event("checked", check.fields(), "");
        } else {
            output.line(&check.text());
        }
    }
    if json {
        let works = missing == 0;
        output.event(
            "diagnosed",
            json!({ "works": works, "warnings": warnings, "missing": missing }),
            "",
        );
    } else {
        output.line(&verdict(warnings, missing));
    }
    i32::from(missing != 0)
}

fn verdict(warnings: usize, missing: usize) -> String {
    match (missing, warnings) {
        (0, 0) => "umem can work here.".into(),
        (0, _) => format!(
            "umem can work here; the warnings ({warnings}) make it slower or exclude some guests."
        ),
        _ => format!("umem cannot work here: solve the missing requirements ({missing})."),
    }
}

impl Check {
    fn fields(&self) -> serde_json::Value {
        json!({
            "name": self.name,
            "status": self.status.name(),
            "found": self.found,
            "purpose": self.purpose,
            "remedy": self.remedy,
        })
    }

    fn text(&self) -> String {
        let line =
            format!("{:<8} {}: {} ({})", self.status.name(), self.name, self.found, self.purpose);
        match &self.remedy {
            Some(remedy) => format!("{line}\n         {remedy}"),
            None => line,
        }
    }
}

/// The name of this process's user.
fn user() -> String {
    let id = nix::unistd::geteuid();
    match nix::unistd::User::from_uid(id) {
        Ok(Some(user)) => user.name,
        _ => id.to_string(),
    }
}
