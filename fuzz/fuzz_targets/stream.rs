#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| umem_test_fuzz::run("stream", input));
