//! `umem`, the command. Everything is in the library.

// SAFETY: the section takes pointers to functions that the C library calls before `main`; this one touches
// nothing that the standard library would have to prepare.
#[used]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = before_main;

extern "C" fn before_main() {
    umem::cli::before_main();
}

fn main() {
    std::process::exit(umem::cli::main());
}
