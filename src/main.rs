//! `umem`, the command. Everything is in the library.

fn main() {
    std::process::exit(umem::cli::main());
}
