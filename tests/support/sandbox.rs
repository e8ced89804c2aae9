//! Programs without certain system calls, as in a container or a service with a filter.

use std::ffi::c_long;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// For this program, and those that it starts, the kernel answers these system calls with an error.
pub(crate) fn forbid(command: &mut Command, calls: &[c_long], errno: i32) {
    install(command, calls.iter().map(|&call| (call, None)), errno);
}

/// As above for one system call, if its argument of this index is this number.
pub(crate) fn forbid_with(command: &mut Command, call: c_long, argument: (u32, u32), errno: i32) {
    install(command, [(call, Some(argument))].into_iter(), errno);
}

type Forbidden = (c_long, Option<(u32, u32)>);

/// The offset of the arguments in `struct seccomp_data`.
const ARGUMENTS_OFFSET: u32 = 16;

fn install(command: &mut Command, calls: impl Iterator<Item = Forbidden>, errno: i32) {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let load = |offset: u32| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset);
    let skips_unless = |k: u32, jf: u8| libc::sock_filter {
        jf,
        ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, k)
    };
    let refusal = statement(libc::BPF_RET, libc::SECCOMP_RET_ERRNO | errno.unsigned_abs());
    // The call's number is the first field of `struct seccomp_data`.
    let mut program = Vec::new();
    for (call, argument) in calls {
        program.push(load(0));
        match argument {
            None => program.extend([skips_unless(call as u32, 1), refusal]),
            Some((index, number)) => program.extend([
                skips_unless(call as u32, 3),
                load(ARGUMENTS_OFFSET + 8 * index),
                skips_unless(number, 1),
                refusal,
            ]),
        }
    }
    program.push(statement(libc::BPF_RET, libc::SECCOMP_RET_ALLOW));
    let install = move || {
        let filter =
            libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
        let mode = libc::c_ulong::from(libc::SECCOMP_MODE_FILTER);
        // SAFETY: the filter lies in memory that the closure owns, and the kernel copies it.
        let result = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
                | libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const filter)
        };
        if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: two system calls, and memory that was allocated before the fork.
    unsafe { command.pre_exec(install) };
}
