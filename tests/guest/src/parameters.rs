//! The parameters on the kernel's command line.

use std::fs;
use std::str::FromStr;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Parameters {
    pub(crate) mib: u64,
    pub(crate) threads: u64,
    pub(crate) seed: u64,
    pub(crate) write_percent: u64,
    pub(crate) mode: Mode,
    pub(crate) hot_mib: u64,
    pub(crate) sweep: bool,
    pub(crate) balloon_mib: u64,
    /// Pages that the host has read as zeroes, and not as anything.
    pub(crate) given_is_zeroes: bool,
    pub(crate) disk_mib: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Random,
    Sequential,
    Hot,
    Idle,
}

impl Parameters {
    /// Mounts /proc, which has the command line and the size of memory.
    pub(crate) fn read() -> Result<Self, String> {
        mount_proc()?;
        let read =
            |path: &str| fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
        Self::parse(&read("/proc/cmdline")?, &read("/proc/meminfo")?)
    }

    fn parse(command_line: &str, meminfo: &str) -> Result<Self, String> {
        let mut parameters = Parameters {
            mib: total_mib(meminfo).ok_or("no MemTotal in /proc/meminfo")? * 60 / 100,
            threads: 2,
            seed: 1,
            write_percent: 30,
            mode: Mode::Random,
            hot_mib: 64,
            sweep: true,
            balloon_mib: 0,
            given_is_zeroes: true,
            disk_mib: 0,
        };
        for word in command_line.split_ascii_whitespace() {
            let Some((name, value)) =
                word.strip_prefix("umem.").and_then(|rest| rest.split_once('='))
            else {
                continue;
            };
            let wrong = || format!("umem.{name}={value} means nothing");
            match name {
                "mib" => parameters.mib = number(value).ok_or_else(wrong)?,
                "threads" => parameters.threads = number(value).ok_or_else(wrong)?,
                "seed" => parameters.seed = number(value).ok_or_else(wrong)?,
                "write" => parameters.write_percent = number(value).ok_or_else(wrong)?,
                "hot" => {
                    parameters.hot_mib = number(value).filter(|&mib| mib > 0).ok_or_else(wrong)?;
                }
                "sweep" => parameters.sweep = number::<u64>(value).ok_or_else(wrong)? != 0,
                "balloon" => parameters.balloon_mib = number(value).ok_or_else(wrong)?,
                "given" => {
                    parameters.given_is_zeroes = match value {
                        "zeroes" => true,
                        "any" => false,
                        _ => return Err(wrong()),
                    }
                }
                "disk" => parameters.disk_mib = number(value).ok_or_else(wrong)?,
                "mode" => {
                    parameters.mode = match value {
                        "random" => Mode::Random,
                        "sequential" => Mode::Sequential,
                        "hot" => Mode::Hot,
                        "idle" => Mode::Idle,
                        _ => return Err(wrong()),
                    }
                }
                _ => return Err(format!("umem.{name} is no parameter")),
            }
        }
        Ok(parameters)
    }

    /// The pages that load threads choose from, of so many that there are: the first ones.
    pub(crate) fn load_pages(&self, pages: u64) -> u64 {
        match self.mode {
            Mode::Hot => pages.min(self.hot_mib * PAGES_A_MIB),
            Mode::Random | Mode::Sequential | Mode::Idle => pages,
        }
    }
}

const PAGES_A_MIB: u64 = 256;

fn mount_proc() -> Result<(), String> {
    // SAFETY: all arguments are C strings or null.
    let result = unsafe {
        libc::mount(c"proc".as_ptr(), c"/proc".as_ptr(), c"proc".as_ptr(), 0, std::ptr::null())
    };
    if result == 0 {
        return Ok(());
    }
    Err(format!("mounting /proc: {}", std::io::Error::last_os_error()))
}

fn total_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(number::<u64>(line.split_ascii_whitespace().next()?)? / 1024)
}

fn number<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal:        1024000 kB\nMemFree: 1 kB\n";

    #[test]
    fn defaults_come_from_the_size_of_memory() {
        let parameters = Parameters::parse("console=ttyS0 quiet", MEMINFO).unwrap();
        assert_eq!((parameters.mib, parameters.threads), (600, 2));
        assert_eq!((parameters.write_percent, parameters.mode), (30, Mode::Random));
    }

    #[test]
    fn the_command_line_overrides() {
        let line =
            "a umem.mib=64 umem.mode=idle umem.write=0 umem.sweep=0 umem.seed=9 umem.given=any b=c";
        let parameters = Parameters::parse(line, MEMINFO).unwrap();
        assert_eq!((parameters.mib, parameters.seed), (64, 9));
        assert_eq!((parameters.write_percent, parameters.mode), (0, Mode::Idle));
        assert!(!parameters.sweep && !parameters.given_is_zeroes);
    }

    #[test]
    fn hot_load_stays_in_the_hot_set_and_others_have_all_pages() {
        let pages = |line| Parameters::parse(line, MEMINFO).unwrap().load_pages(25_600);
        assert_eq!(pages("umem.mode=hot"), 16_384);
        assert_eq!(pages("umem.mode=hot umem.hot=1"), 256);
        assert_eq!(pages("umem.mode=hot umem.hot=500"), 25_600);
        assert_eq!(pages("umem.mode=random umem.hot=1"), 25_600);
    }

    #[test]
    fn wrong_parameters_are_reported() {
        for line in ["umem.mib=x", "umem.mode=slow", "umem.mibs=1", "umem.hot=0"] {
            assert!(Parameters::parse(line, MEMINFO).is_err(), "{line}");
        }
    }
}
