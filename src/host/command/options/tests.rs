use super::*;

fn words(line: &str) -> Vec<String> {
    line.split(' ').map(str::to_owned).collect()
}

#[test]
fn finds_the_ram_in_both_forms() {
    let line = words(
        "-m 2G -object memory-backend-file,id=ram0,size=2G,share=on,mem-path=/dev/shm/a,,b \
         --object {\"qom-type\":\"memory-backend-file\",\"id\":\"ram1\",\"share\":true,\
         \"mem-path\":\"/dev/shm/c\",\"size\":4096} -object rng-random,id=r",
    );
    let ram = ram_of_qemu(&line, Kind::Shared).unwrap();
    let expected = ["ram0=/dev/shm/a,b", "ram1=/dev/shm/c"].map(|t| t.parse().unwrap());
    assert_eq!(ram, expected);
}

#[test]
fn refuses_what_cannot_work_and_says_why() {
    let file = "-object memory-backend-file,id=ram0,size=1G,mem-path=/dev/shm/x";
    for (line, hint) in [
        (file.to_owned(), "share=off"),
        (format!("{file},share=on,prealloc=on"), "prealloc=on of RAM backend ram0"),
        (format!("{file},share=on -mem-prealloc"), "-mem-prealloc"),
        (format!("{file},share=on -overcommit mem-lock=on"), "mem-lock"),
        (format!("{file},share=on -device vfio-pci,host=1"), "vfio-pci"),
        (format!("{file},share=on -netdev vhost-user,id=n"), "vhost-user"),
        (format!("{file},share=on -daemonize"), "-daemonize"),
        (format!("{file},share=on -incoming tcp::1"), "-incoming defer"),
        ("-object memory-backend-memfd,id=ram0,size=1G,share=on".into(), "memory-backend-memfd"),
        ("-object memory-backend-file,id=r,share=on,mem-path=/dev/shm".into(), "a directory"),
    ] {
        let error = ram_of_qemu(&words(&line), Kind::Shared).unwrap_err().to_string();
        assert!(error.contains(hint), "{line}: {error}");
    }
}

#[test]
fn qemu_is_known_by_its_name() {
    assert!(is_qemu("qemu-system-x86_64") && is_qemu("/usr/libexec/qemu-kvm") && is_qemu("kvm"));
    assert!(!is_qemu("/opt/qemu/bin/firecracker") && !is_qemu("umem"));
}

#[test]
fn incoming_is_added_unless_it_is_there() {
    let added = qemu_arguments(&words("-m 1G"), 9);
    assert!(added.iter().any(|a| a == "defer"));
    assert!(!qemu_arguments(&words("-incoming defer"), 9).iter().any(|a| a == "-incoming"));
}
