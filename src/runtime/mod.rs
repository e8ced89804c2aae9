//! Services for processes and threads: a control thread's inbox, workers, panics, cores and
//! priorities, printing. Only [`role`] refers to migrations.

pub(crate) mod accepting;
pub(crate) mod bandwidth;
pub(crate) mod cores;
pub(crate) mod follow;
pub(crate) mod hex;
pub(crate) mod idle;
pub(crate) mod inbox;
pub(crate) mod os_text;
pub(crate) mod panics;
pub(crate) mod polling;
pub(crate) mod print;
pub(crate) mod priority;
pub(crate) mod private_socket;
pub(crate) mod process;
pub(crate) mod role;
pub(crate) mod screen;
pub(crate) mod worker;
