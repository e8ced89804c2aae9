//! tests/lib/fetch on machines of all kinds: with minimal archives made here, and without a network.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::tool;

/// A machine as its apt sees it, and the archives that its sources may name.
struct Machine {
    directory: TempDir,
}

/// A package with nothing but a program that prints its version and a library.
struct Package<'a> {
    name: &'a str,
    version: &'a str,
    /// Further fields, a line each.
    fields: &'a str,
    files: &'a [(&'a str, &'a str)],
}

const fn package<'a>(name: &'a str, version: &'a str, fields: &'a str) -> Package<'a> {
    Package { name, version, fields, files: &[] }
}

impl Machine {
    /// With nothing installed, no sources and no lists, and archives of Debian and of another vendor.
    fn new() -> Machine {
        let directory = tempfile::Builder::new().prefix("umem-test-").tempdir_in("/tmp").unwrap();
        let machine = Machine { directory };
        for directory in ["sources", "lists/partial", "cache"] {
            fs::create_dir_all(machine.path(directory)).unwrap();
        }
        machine.write("status", "");
        let conf = format!(
            "Dir::Etc::sourcelist \"{0}/sources.list\";\nDir::Etc::sourceparts \"{0}/sources\";\n\
             Dir::State::lists \"{0}/lists\";\nDir::State::status \"{0}/status\";\n\
             APT::Default-Release \"elsewhere\";\n\
             APT::Update::Post-Invoke {{ \"touch {0}/hook\"; }};\n",
            machine.root()
        );
        machine.write("apt.conf", &conf);

        let depends = "Depends: libthing1 (= 1), libc6 (>= 2.36)";
        let qemu = |version| {
            [
                Package {
                    name: "qemu-system-x86",
                    version,
                    fields: depends,
                    files: &[(
                        "usr/bin/qemu-system-x86_64",
                        "echo \"QEMU emulator version VERSION\"",
                    )],
                },
                package("qemu-system-common", version, ""),
                package("qemu-system-data", version, ""),
            ]
        };
        let linux = "linux-image-6.1.0-99-cloud-amd64";
        machine.archive("debian", "Debian", "bookworm", &qemu("7.2.1"));
        machine.archive(
            "debian",
            "Debian",
            "bookworm",
            &[
                package("seabios", "1", ""),
                package("fontconfig-config", "1", ""),
                package("fonts-dejavu-core", "1", ""),
                package("linux-image-cloud-amd64", "6.1.99", &format!("Depends: {linux}")),
                Package {
                    name: linux,
                    version: "6.1.99",
                    fields: "",
                    files: &[("boot/vmlinuz-6.1", "")],
                },
                Package {
                    name: "libthing1",
                    version: "1",
                    fields: "",
                    files: &[("usr/lib/x86_64-linux-gnu/libthing.so.1", "")],
                },
                Package {
                    name: "libc6",
                    version: "2.36",
                    fields: "",
                    files: &[("usr/lib/x86_64-linux-gnu/libc.so.6", "not this machine's")],
                },
                chromium("1"),
                tool_package(
                    "fish",
                    &[("usr/bin/fish", "echo fish VERSION"), ("etc/fish/config.fish", "")],
                ),
                tool_package("zsh", &[("bin/zsh", "echo zsh VERSION")]),
                tool_package("pkgconf-bin", &[("usr/bin/pkgconf", "echo VERSION")]),
            ],
        );
        machine.archive("debian", "Debian", "bookworm-backports", &qemu("10.0.1"));
        machine.archive("security", "Debian", "bookworm-security", &[chromium("2")]);
        machine.archive("debian", "Debian", "trixie", &qemu("9.9.9"));
        machine.archive("vendor", "Vendor", "bookworm", &qemu("99.9"));
        machine
    }

    fn root(&self) -> &str {
        self.directory.path().to_str().unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text.replace("ROOT", self.root())).unwrap();
    }

    /// Adds packages to one suite of an archive.
    fn archive(&self, archive: &str, origin: &str, suite: &str, packages: &[Package]) {
        let (pool, dists) =
            (self.path(archive).join("pool"), self.path(archive).join("dists").join(suite));
        let binary = dists.join("main/binary-amd64");
        fs::create_dir_all(&pool).unwrap();
        fs::create_dir_all(&binary).unwrap();
        let mut index = fs::read_to_string(binary.join("Packages")).unwrap_or_default();
        for package in packages {
            let control = package.build(&pool);
            let file = format!("pool/{}_{}.deb", package.name, package.version);
            let bytes = fs::read(self.path(archive).join(&file)).unwrap();
            let (size, sum) = (bytes.len(), sha256(&bytes));
            writeln!(index, "{control}Filename: {file}\nSize: {size}\nSHA256: {sum}\n").unwrap();
        }
        fs::write(binary.join("Packages"), &index).unwrap();
        let automatic = match suite.ends_with("-backports") {
            true => "NotAutomatic: yes\nButAutomaticUpgrades: yes\n",
            false => "",
        };
        let release = format!(
            "Origin: {origin}\nLabel: {origin}\nSuite: {suite}\nCodename: {suite}\n{automatic}\
             Date: Mon, 01 Jun 2026 00:00:00 UTC\nComponents: main\nArchitectures: amd64\nSHA256:\n \
             {} {} main/binary-amd64/Packages\n",
            sha256(index.as_bytes()),
            index.len()
        );
        fs::write(dists.join("Release"), release).unwrap();
    }

    /// Runs the script; returns its output.
    fn fetch(&self) -> Result<String, String> {
        let output = Command::new(tool("fetch"))
            .env("APT_CONFIG", self.path("apt.conf"))
            .env("UMEM_TEST_CACHE", self.path("cache"))
            .env_remove("UMEM_TEST_MIRROR")
            .output()
            .expect("the program starts");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(said) } else { Err(said) }
    }

    /// A fetch that succeeds: everything is there, from Debian, with all dependencies except the C library.
    fn has_everything(&self, chromium: &str) {
        let said = self.fetch().unwrap_or_else(|said| panic!("{said}"));
        let cache = self.path("cache");
        assert!(cache.join("vmlinuz").exists(), "{said}");
        let programs = [
            ("qemu-7.2", "qemu-system-x86 7.2.1"),
            ("qemu-10.0", "qemu-system-x86 10.0.1"),
            ("chromium", chromium),
            ("tools", "fish 1"),
        ];
        for (name, package) in programs {
            let packages = fs::read_to_string(cache.join(name).join("packages")).expect(name);
            let packages = packages.replace('\t', " ");
            assert!(packages.lines().any(|line| line == package), "{package}: {packages}");
            assert!(packages.contains("libc6 2.36"), "the whole package list: {packages}");
            let libraries = cache.join(name).join("root/usr/lib/x86_64-linux-gnu");
            assert!(libraries.join("libthing.so.1").exists(), "{name}: {packages}");
            assert!(!libraries.join("libc.so.6").exists(), "{name}");
        }
        assert!(!cache.join("apt").exists() && !self.path("hook").exists(), "{said}");
        assert_eq!(self.fetch().as_deref(), Ok(""), "the cache is complete");
    }
}

const fn chromium(version: &str) -> Package<'_> {
    Package {
        name: "chromium-headless-shell",
        version,
        fields: "Depends: libthing1 (= 1), libc6 (>= 2.36)",
        files: &[("usr/lib/chromium/chromium-headless-shell", "echo Chromium VERSION")],
    }
}

const fn tool_package<'a>(name: &'a str, files: &'a [(&'a str, &'a str)]) -> Package<'a> {
    Package { name, version: "1", fields: "Depends: libthing1 (= 1), libc6 (>= 2.36)", files }
}

impl Package<'_> {
    /// Writes the file, and returns the script's message about it.
    fn build(&self, pool: &Path) -> String {
        let Package { name, version, fields, files } = self;
        let mut control = format!(
            "Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: nobody <x@example.org>\n\
             Description: for a test\n"
        );
        if !fields.is_empty() {
            writeln!(control, "{fields}").unwrap();
        }
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("DEBIAN")).unwrap();
        fs::write(root.path().join("DEBIAN/control"), &control).unwrap();
        for (file, line) in *files {
            let file = root.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, format!("#!/bin/sh\n{}\n", line.replace("VERSION", version))).unwrap();
            make_executable(&file);
        }
        let target = pool.join(format!("{name}_{version}.deb"));
        let output = Command::new("dpkg-deb")
            .args(["-Znone", "--root-owner-group", "--build"])
            .args([root.path(), &target])
            .output()
            .expect("dpkg-deb");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        control
    }
}

fn make_executable(file: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(file, fs::Permissions::from_mode(0o755)).unwrap();
}

fn sha256(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Chromium from the security archive, a library that is newer than the archive's, and sources of other vendors.
#[test]
fn installed_packages_do_not_change_the_fetched_set() {
    let machine = Machine::new();
    let installed = "Status: install ok installed\nArchitecture: amd64\nDescription: for a test\n\
                     Maintainer: nobody <x@example.org>\n";
    machine.write(
        "status",
        &format!(
            "Package: chromium\nVersion: 999\nDepends: chromium-common (= 999)\n{installed}\n\
             Package: chromium-common\nVersion: 999\nBreaks: chromium-headless-shell (<< 999)\n{installed}\n\
             Package: libthing1\nVersion: 2\nBreaks: qemu-system-x86 (<< 11)\n{installed}\n\
             Package: libc6\nVersion: 2.99\nEssential: yes\n{installed}\n"
        ),
    );
    // Before Debian's in every order.
    machine.write("sources/a-vendor.list", "deb [trusted=yes] file:ROOT/vendor bookworm main\n");
    machine.write("sources/b.list", "deb [trusted=yes] http://127.0.0.1:1/ubuntu noble main\n");
    machine.write(
        "sources/debian.sources",
        "# A comment\n\nTypes: deb\nURIs: file:ROOT/nothing\nSuites: bookworm\nComponents: main\nEnabled: no\n\n\
         Types: deb deb-src\n# Another\nURIs: file:ROOT/debian\nSuites: bookworm\n bookworm-updates\n\
         Components: main contrib\nTrusted: yes\n\n\
         Types: deb\nURIs: file:ROOT/security/\nSuites: bookworm-security\nComponents: main\nTrusted: yes\n",
    );
    machine.has_everything("chromium-headless-shell 2");
}

/// Another release, another format of its sources, a mirror that does not answer, and no security archive.
#[test]
fn fetch_uses_the_mirror_of_another_debian_release() {
    let machine = Machine::new();
    machine.write(
        "sources.list",
        "# deb file:ROOT/nothing bookworm main\n\
         deb [trusted=yes] file:ROOT/gone stable main\n\
         deb-src [trusted=yes] file:ROOT/vendor trixie main\n\
         deb [arch=amd64 trusted=yes] file:ROOT/debian trixie contrib main # ours\n",
    );
    machine.has_everything("chromium-headless-shell 1");
}

#[test]
fn fetch_without_debian_names_the_variables_to_set() {
    let machine = Machine::new();
    machine.write("sources/vendor.list", "deb [trusted=yes] file:ROOT/vendor bookworm main\n");
    let said = machine.fetch().expect_err("nothing of Debian's");
    assert!(said.contains("UMEM_TEST_MIRROR=URL"), "{said}");
    assert!(!machine.path("cache/apt").exists(), "{said}");
}

/// A signature is required, whatever the machine's options for other sources.
#[test]
fn unsigned_archive_is_refused() {
    let machine = Machine::new();
    machine.write("sources/debian.list", "deb file:ROOT/debian bookworm main\n");
    let said = machine.fetch().expect_err("the archive has no signature");
    assert!(said.contains("not signed"), "{said}");
}

/// The machine decides where packages come from.
#[test]
fn fetch_contains_no_mirror_address() {
    let script = fs::read_to_string(tool("fetch")).unwrap();
    assert!(!script.contains("http:") && !script.contains("https:"), "{script}");
}
