use super::*;

fn words(line: &str) -> Vec<String> {
    line.split(' ').map(str::to_owned).collect()
}

#[test]
fn qemu_is_recognised_by_its_program_name() {
    assert!(is_qemu("qemu-system-x86_64") && is_qemu("/usr/libexec/qemu-kvm") && is_qemu("kvm"));
    assert!(!is_qemu("/opt/qemu/bin/firecracker") && !is_qemu("umem"));
}

#[test]
fn incoming_is_added_unless_it_is_given() {
    let added = qemu_arguments(&words("-m 1G"), 9);
    assert!(added.iter().any(|a| a == "defer"));
    assert!(!qemu_arguments(&words("-incoming defer"), 9).iter().any(|a| a == "-incoming"));
}
