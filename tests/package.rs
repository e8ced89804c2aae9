//! The Debian package: each file that it lists is made or is there, a C program builds from what it installs, and its
//! unit gives umem the devices that umem opens.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use support::{Scratch, provided};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs a program to its end; returns its output.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(
        output.status.success() && err.is_empty(),
        "{command:?}: {}\n{out}\n{err}",
        output.status
    );
    out.into_owned()
}

/// What a build leaves, and what is staged from it.
struct Staged {
    scratch: Scratch,
}

impl Staged {
    fn new() -> Staged {
        let scratch = Scratch::new();
        let umem = Path::new(env!("CARGO_BIN_EXE_umem"));
        let build = scratch.path("build");
        fs::create_dir(&build).unwrap();
        std::os::unix::fs::symlink(umem, build.join("umem")).unwrap();
        // The one that belongs to this test; that beside umem may be older.
        let library = umem.with_file_name("deps").join("libumem.so");
        std::os::unix::fs::symlink(library, build.join("libumem.so")).unwrap();
        let mut stage = Command::new(root().join("src/programs/install/stage"));
        run(stage.arg(&build).arg(scratch.path("files")));
        Staged { scratch }
    }

    /// Where an asset of the package is taken from.
    fn source(&self, asset: &str) -> PathBuf {
        if let Some(made) = asset.strip_prefix("target/package/") {
            self.scratch.path("files").join(made)
        } else if let Some(built) = asset.strip_prefix("target/release/") {
            self.scratch.path("build").join(built)
        } else {
            root().join(asset)
        }
    }

    /// Puts all assets below `into` as the package does.
    fn install(&self, into: &Path) {
        for (asset, destination) in assets() {
            let directory = into.join(destination);
            fs::create_dir_all(&directory).unwrap();
            for file in matching(&self.source(&asset)) {
                run(Command::new("cp").arg("-P").arg(file).arg(&directory));
            }
        }
    }
}

/// The files in the package: the source, perhaps with an asterisk in its name, and the directory.
fn assets() -> Vec<(String, String)> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["metadata", "--format-version", "1", "--no-deps", "--offline"]).current_dir(root());
    let metadata: Value = serde_json::from_str(&run(&mut cargo)).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let umem = packages.iter().find(|package| package["name"] == "umem").unwrap();
    let assets = umem["metadata"]["deb"]["assets"].as_array().unwrap();
    let text = |asset: &Value, index: usize| asset[index].as_str().unwrap().to_owned();
    assets.iter().map(|asset| (text(asset, 0), text(asset, 1))).collect()
}

/// The files of a path whose last part may begin with an asterisk.
fn matching(path: &Path) -> Vec<PathBuf> {
    let name = path.file_name().unwrap().to_str().unwrap();
    let Some(end) = name.strip_prefix('*') else { return vec![path.to_owned()] };
    let Ok(files) = fs::read_dir(path.parent().unwrap()) else { return Vec::new() };
    let files = files.map(|entry| entry.unwrap().path());
    files.filter(|file| file.to_str().unwrap().ends_with(end)).collect()
}

#[test]
fn every_file_of_the_package_exists_after_staging() {
    let staged = Staged::new();
    let assets = assets();
    assert!(assets.len() > 15, "{assets:?}");
    for (asset, _) in assets {
        let files = matching(&staged.source(&asset));
        assert!(!files.is_empty() && files.iter().all(|file| file.exists()), "{asset}: {files:?}");
    }
}

#[test]
fn package_script_runs_in_the_root_of_the_project() {
    let script = fs::read_to_string(root().join("src/programs/install/deb")).unwrap();
    let change =
        script.lines().find_map(|line| line.strip_prefix("cd ")).expect("it changes to the root");
    let path = change.replace("BASH_SOURCE[0]", "script");
    let mut shell = Command::new("bash");
    shell.arg("-c").arg(format!("cd {path} && pwd -P"));
    shell.env("script", root().join("src/programs/install/deb"));
    let expected = root().canonicalize().unwrap();
    assert_eq!(run(&mut shell).trim(), expected.to_str().unwrap());
}

/// The program asks for the library by its SONAME, and finds it where the package has put it.
#[test]
fn c_program_builds_and_runs_with_the_installed_files() {
    let staged = Staged::new();
    let installed = staged.scratch.path("installed");
    staged.install(&installed);
    let mut config = Command::new(provided("UMEM_TEST_TOOLS", "tools").join("pkg-config"));
    config.args(["--cflags", "--libs", "umem"]);
    // What it thinks to be a system's directory would be left out.
    config.env("PKG_CONFIG_ALLOW_SYSTEM_CFLAGS", "1").env("PKG_CONFIG_ALLOW_SYSTEM_LIBS", "1");
    config.env("PKG_CONFIG_LIBDIR", installed.join("usr/lib/pkgconfig"));
    config.env("PKG_CONFIG_SYSROOT_DIR", &installed);
    let flags = run(&mut config);
    let program = staged.scratch.path("embed");
    let mut gcc = Command::new("gcc");
    gcc.arg(installed.join("usr/share/doc/umem/examples/embed.c")).arg("-o").arg(&program);
    run(gcc.args(flags.split_whitespace()));
    let dynamic = run(Command::new("objdump").arg("-p").arg(&program));
    assert!(dynamic.lines().any(|line| line.split_whitespace().eq(["NEEDED", "libumem.so.0"])));
    let mut embed = Command::new(program);
    embed.env("LD_LIBRARY_PATH", installed.join("usr/lib"));
    let printed = run(embed.arg("shared").arg(staged.scratch.path("socket")));
    assert_eq!(printed, "shared: ok\n");
}

/// The C compiler's lines in the document, for the example.
#[test]
fn c_program_builds_with_the_line_in_the_document() {
    let document = fs::read_to_string(root().join("docs/embedding.md")).unwrap();
    let line = document.lines().find(|line| line.starts_with("    gcc ")).expect("a line for gcc");
    let scratch = Scratch::new();
    let library = Path::new(env!("CARGO_BIN_EXE_umem")).with_file_name("deps/libumem.a");
    let words = line.split_whitespace().skip(1).map(|word| match word {
        "monitor.c" => "tests/embed/embed.c",
        "target/release/libumem.a" => library.to_str().unwrap(),
        word => word,
    });
    let mut gcc = Command::new("gcc");
    run(gcc.args(words).arg("-o").arg(scratch.path("embed")).current_dir(root()));
}

#[test]
fn service_unit_allows_each_device_that_umem_opens() {
    let unit =
        fs::read_to_string(root().join("src/programs/install/umem-incoming@.service")).unwrap();
    assert!(unit.contains("DevicePolicy=closed"), "all devices are open");
    let allowed: Vec<&str> =
        unit.lines().filter_map(|line| line.strip_prefix("DeviceAllow=")).collect();
    // `DevicePolicy=closed` itself leaves null, zero, full, random and urandom. /dev/shm is a directory.
    for (file, device) in
        [("src/runtime/idle.rs", "/dev/cpu_dma_latency"), ("src/fault/open.rs", "/dev/userfaultfd")]
    {
        let source = fs::read_to_string(root().join(file)).unwrap();
        assert!(source.contains(&format!("{device}\"")), "{file} does not open {device} any more");
        assert!(allowed.contains(&format!("{device} rw").as_str()), "{device}: {allowed:?}");
    }
    // Those of the guest: its processor, its network, its disks.
    for device in ["/dev/kvm", "/dev/net/tun", "block-*"] {
        assert!(allowed.contains(&format!("{device} rw").as_str()), "{device}: {allowed:?}");
    }
}
