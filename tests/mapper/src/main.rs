//! A program that maps a RAM file and treats the mapping by command, for the tests of the preload object: it calls the
//! C library as a monitor would, and does not know umem.
//!
//! It reads one command a line and answers each with one line. Offsets and lengths are bytes.
//!
//! | command | answer |
//! |---|---|
//! | `map shared\|private LENGTH PATH` | the mapping's address |
//! | `anonymous LENGTH` | the address of private memory without a file, which the commands below are about from then on |
//! | `read OFFSET` | the byte there |
//! | `write OFFSET BYTE` | `ok` |
//! | `advise OFFSET LENGTH ADVICE` | `ok`; the advice is the number that `madvise(2)` takes |
//! | `lock OFFSET LENGTH` | `ok` |
//! | `unmap OFFSET LENGTH` | `ok` |
//! | `punch OFFSET LENGTH` | `ok`: the file has a hole there |
//! | `remap LENGTH NEW-LENGTH FLAGS` | `ok`: the mapping may be elsewhere now |
//! | `fork OFFSET` | `byte N` if a child can read it, `signal N` if that ended the child |
//!
//! Where the C library reports an error the answer is `errno N`. It ends with its input.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program of the tests, or a measurement"
)]

use std::ffi::{CString, c_int, c_void};
use std::io::{BufRead, Write};
use std::ptr::null_mut;

fn main() {
    let mut mapping = Mapping { start: null_mut(), file: -1 };
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("commands are text");
        let words: Vec<&str> = line.split(' ').collect();
        let answer = mapping.carry_out(&words);
        println!("{}", answer.unwrap_or_else(|errno| format!("errno {errno}")));
        std::io::stdout().flush().expect("the test reads the answers");
    }
}

/// The one mapping. It is reached only through its address, because others write there.
struct Mapping {
    start: *mut c_void,
    file: c_int,
}

impl Mapping {
    fn carry_out(&mut self, words: &[&str]) -> Result<String, c_int> {
        match *words {
            ["map", sharing, length, path] => self.map(sharing, number(length), path),
            ["anonymous", length] => self.map_anonymous(number(length)),
            ["read", offset] => Ok(self.read(number(offset)).to_string()),
            ["write", offset, byte] => {
                let byte = u8::try_from(number(byte)).expect("a byte");
                // SAFETY: the tests name offsets inside the mapping.
                unsafe { self.at(number(offset)).write_volatile(byte) };
                Ok("ok".into())
            }
            ["advise", offset, length, advice] => {
                let (start, advice) = (self.at(number(offset)), flags(advice));
                // SAFETY: advice on our own mapping, which holds no Rust objects.
                let result = unsafe { libc::madvise(start.cast(), number(length), advice) };
                if result == 0 { Ok("ok".into()) } else { Err(errno()) }
            }
            ["lock", offset, length] => {
                // SAFETY: a part of our own mapping, whose contents stay.
                let result = unsafe { libc::mlock(self.at(number(offset)).cast(), number(length)) };
                if result == 0 { Ok("ok".into()) } else { Err(errno()) }
            }
            ["unmap", offset, length] => {
                let start = self.at(number(offset));
                // SAFETY: a part of our own mapping, which holds no Rust objects.
                let result = unsafe { libc::munmap(start.cast(), number(length)) };
                if result == 0 { Ok("ok".into()) } else { Err(errno()) }
            }
            ["punch", offset, length] => {
                let flags = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                let (offset, length) = (number(offset) as i64, number(length) as i64);
                // SAFETY: the file is open for as long as this program runs.
                let result = unsafe { libc::fallocate(self.file, flags, offset, length) };
                if result == 0 { Ok("ok".into()) } else { Err(errno()) }
            }
            ["remap", length, new_length, flag] => {
                let (length, new_length) = (number(length), number(new_length));
                // SAFETY: our own mapping; its new address replaces the old one.
                let moved = unsafe { libc::mremap(self.start, length, new_length, flags(flag)) };
                if moved == libc::MAP_FAILED {
                    return Err(errno());
                }
                self.start = moved;
                Ok("ok".into())
            }
            ["fork", offset] => Ok(self.fork(number(offset))),
            _ => panic!("no such command: {words:?}"),
        }
    }

    fn map(&mut self, sharing: &str, length: usize, path: &str) -> Result<String, c_int> {
        let sharing = if sharing == "shared" { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        let path = CString::new(path).expect("a path");
        // SAFETY: the path is a string; the mapping is a new one at an address of the kernel's choice.
        unsafe {
            let file = libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CREAT, 0o600);
            assert!(file >= 0 && libc::ftruncate(file, length as i64) == 0, "errno {}", errno());
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let start = libc::mmap(null_mut(), length, protection, sharing, file, 0);
            let errno = errno();
            self.file = file;
            if start == libc::MAP_FAILED {
                return Err(errno);
            }
            self.start = start;
        }
        Ok((self.start as usize).to_string())
    }

    fn map_anonymous(&mut self, length: usize) -> Result<String, c_int> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: the mapping is a new one at an address of the kernel's choice.
        let start = unsafe { libc::mmap(null_mut(), length, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(errno());
        }
        self.start = start;
        Ok((self.start as usize).to_string())
    }

    fn at(&self, offset: usize) -> *mut u8 {
        self.start.cast::<u8>().wrapping_add(offset)
    }

    fn read(&self, offset: usize) -> u8 {
        // SAFETY: the tests name offsets inside the mapping; in a child it may be gone, which the tests check.
        unsafe { self.at(offset).read_volatile() }
    }

    fn fork(&self, offset: usize) -> String {
        let mut status = 0;
        // SAFETY: this program has one thread of its own, and the child only reads and ends.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                libc::_exit(self.read(offset).into());
            }
            assert!(child > 0 && libc::waitpid(child, &raw mut status, 0) == child);
        }
        if libc::WIFSIGNALED(status) {
            return format!("signal {}", libc::WTERMSIG(status));
        }
        format!("byte {}", libc::WEXITSTATUS(status))
    }
}

fn number(word: &str) -> usize {
    word.parse().unwrap_or_else(|_| panic!("not a number: {word}"))
}

fn flags(word: &str) -> c_int {
    word.parse().unwrap_or_else(|_| panic!("not a number: {word}"))
}

fn errno() -> c_int {
    std::io::Error::last_os_error().raw_os_error().expect("the C library sets errno")
}
