//! `--report`: a page that a browser renders correctly, in either colour scheme, and the figures.

mod support;

use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::Value;
use support::killed::{How, Move};
use support::{Chromium, Guests, Qmp, Scheme, Scratch, Umem};

fn demo(report: &Path, more: &[&str]) {
    let output = Command::new(env!("CARGO_BIN_EXE_umem"))
        .args(["demo", "--json", "--size", "64", "--report"])
        .arg(report)
        .args(more)
        .output()
        .expect("umem starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {stderr}", output.status);
}

/// The expected colour of a chart: the drawn value of its most important element.
const PICTURES: [(&str, &str, &str); 4] = [
    ("#throughput", ".rate", "stroke"),
    ("#latency", ".bar", "fill"),
    ("#map", "path.data", "fill"),
    ("#timeline", ".pages", "fill"),
];

#[test]
fn browser_renders_all_four_charts_light_and_dark() {
    let scratch = Scratch::new();
    let page = scratch.path("report.html");
    demo(&page, &[]);
    let mut chromium = Chromium::start();
    for scheme in [Scheme::Light, Scheme::Dark] {
        chromium.open(&page, scheme);
        let ground = colour(&chromium.evaluate("getComputedStyle(document.body).backgroundColor"));
        let is_light = ground.iter().all(|&part| part > 200);
        let is_dark = ground.iter().all(|&part| part < 60);
        assert!(if matches!(scheme, Scheme::Light) { is_light } else { is_dark }, "{ground:?}");
        for (figure, element, property) in PICTURES {
            let expression = format!(
                "getComputedStyle(document.querySelector('{figure} {element}')).{property}"
            );
            let expected = colour(&chromium.evaluate(&expression));
            let picture = chromium.screenshot(&format!("{figure} svg"));
            // A thin line is blended with the background.
            let is_near = |pixel: &&[u8; 3]| {
                pixel.iter().zip(expected).all(|(&part, wished)| part.abs_diff(wished) < 32)
            };
            let drawn = picture.pixels.iter().filter(is_near).count();
            assert!(drawn > 50, "{scheme:?}: {figure} has {drawn} pixels of {expected:?}");
            let first = picture.pixels[0];
            let others = picture.pixels.iter().filter(|&&pixel| pixel != first).count();
            let share = others as f64 / picture.pixels.len() as f64;
            assert!((0.01..0.99).contains(&share), "{scheme:?}: {figure}: {share}");
        }
        let outside = chromium.evaluate(
            "Math.max(...[...document.querySelectorAll('figure svg')].map(svg => \
             Math.max(...[...svg.querySelectorAll('rect, text, path')].map(e => \
             e.getBoundingClientRect().right - svg.getBoundingClientRect().right))))",
        );
        assert!(outside.as_f64().unwrap() < 1.0, "part of the page is cut off: {outside}");
        let title = chromium.evaluate("document.title");
        assert!(title.as_str().unwrap().contains("moved in"), "{title}");
    }
    assert!(chromium.console().is_empty(), "{:#?}", chromium.console());
}

/// A computed colour, `rgb(1, 2, 3)`.
fn colour(value: &Value) -> [u8; 3] {
    let text = value.as_str().expect("a colour");
    let numbers = text.trim_start_matches("rgb(").trim_end_matches(')');
    let parts: Vec<u8> = numbers.split(", ").map(|part| part.parse().expect(text)).collect();
    parts.try_into().expect("three parts")
}

#[test]
fn figures_of_both_sides_match_the_report() {
    let scratch = Scratch::new();
    let file = scratch.path("report.json");
    demo(&file, &["--lanes", "2"]);
    let sides: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    for (side, role) in sides.as_array().unwrap().iter().zip(["source", "destination"]) {
        let completed = &side["completed"];
        assert_eq!(side["role"], role);
        assert_eq!(completed["role"], role);
        let last = side["samples"].as_array().unwrap().last().unwrap();
        for field in ["data_bytes", "zero_bytes", "hole_bytes", "pages_demand"] {
            assert_eq!(last[field], completed[field], "{role}: {field}");
        }
        let cells = side["map"]["cells"].as_array().unwrap();
        let sum = |field: &str| cells.iter().map(|cell| cell[field].as_u64().unwrap()).sum::<u64>();
        let pages: u64 = ["demand", "background", "zero", "hole"].map(sum).iter().sum();
        assert_eq!(pages, 64 * 256, "{role}: the map has every page");
        assert!(sum("demand") > 0, "{role}");
        assert!(cells.iter().all(|cell| cell["complete_s"].is_f64()), "{role}");
        let phases = side["phases"].as_array().unwrap();
        assert!(phases.len() > 5, "{role}: {phases:?}");
        assert!(phases.windows(2).all(|pair| pair[0]["end_s"] == pair[1]["begin_s"]), "{role}");
    }
    let destination = &sides[1];
    let faults = destination["faults"].as_array().unwrap();
    let count: u64 = faults.iter().map(|bucket| bucket[2].as_u64().unwrap()).sum();
    assert_eq!(count, destination["completed"]["fault_latency_us"]["count"].as_u64().unwrap());
}

#[test]
fn unwritable_report_is_refused_before_the_move() {
    let error = Umem::start(["demo", "--json", "--report", "/nonexistent/report.html"]).fails();
    assert!(error.contains("/nonexistent/report.html"), "{error}");
}

/// Also before the move has begun: before there are lanes, and before any connection.
#[test]
fn failed_move_leaves_a_report_of_the_failure() {
    let scratch = Scratch::new();
    let page = scratch.path("report.html");
    let ram = scratch.ram("source");
    std::fs::write(&ram, [1; 4096]).unwrap();
    let (word, ram) = (page.display().to_string(), format!("ram0={}", ram.display()));
    // No process listens there.
    let arguments = ["migrate", "-p", "--report", &word, "--ram", &ram, "tcp:127.0.0.1:1"];
    let error = Umem::start(arguments).fails();
    assert!(error.contains("cannot connect"), "{error}");
    let html = std::fs::read_to_string(&page).unwrap();
    let title = html.split("<title>").nth(1).and_then(|rest| rest.split("</title>").next());
    assert_eq!(title, Some(&*format!("A guest did not move: {error}")));

    let file = scratch.path("report.json");
    let handoff = scratch.path("handoff").display().to_string();
    let mut incoming = Umem::start([
        "incoming",
        "--json",
        "--report",
        &file.display().to_string(),
        "--handoff",
        &handoff,
        "tcp:127.0.0.1:0",
    ]);
    incoming.event("listening");
    incoming.signal(Signal::SIGINT);
    let error = incoming.fails();
    let figures: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!((&figures["error"], &figures["role"]), (&error.into(), &"destination".into()));
}

/// Both sides measure a part of the downtime, and have the same sum.
#[test]
fn both_sides_report_one_downtime() {
    for mode in [&["-p"][..], &["--stop-first"], &[], &["-p", "--precopy"]] {
        let scratch = Scratch::new();
        let mut guests = Guests::quiet(&scratch, &["--json"]);
        let mut migrate = guests.migrate(&[&["--json"][..], mode].concat());
        let downtime = |event: &Value| {
            let ms = event["downtime_ms"].as_f64();
            ms.unwrap_or_else(|| panic!("no downtime in {event}"))
        };
        let events = ["running", "completed"];
        let ours = events.map(|name| downtime(&migrate.event(name)));
        let theirs = events.map(|name| downtime(&guests.incoming.event(name)));
        for one in ours.iter().chain(&theirs) {
            assert!(*one > 0.0 && (one - ours[0]).abs() < 0.01, "{mode:?}: {ours:?}, {theirs:?}");
        }
        migrate.succeeds();
        Qmp::connect(&scratch.path("destination")).quit();
        guests.incoming.succeeds();
    }
}

/// What an earlier process moved is there, and in no rate of this one.
#[test]
fn report_of_a_takeover_shows_what_came_before() {
    let mut moving = Move::switched(How { mib: 96, threads: 1, ..How::default() });
    moving.cutter.let_pages_go();
    moving.pass(8 << 20);
    moving.incoming.kill();
    moving.migrate.kill();
    let reports =
        ["source", "destination"].map(|side| moving.scratch.path(&format!("{side}.json")));
    let options = reports.each_ref().map(|path| ["--report", path.to_str().unwrap()]);
    moving.incoming = moving.resume_with("incoming", &options[1]);
    moving.migrate = moving.resume_with("migrate", &options[0]);
    let (scratch, guest, [_, there], (migrate, incoming)) = moving.arrive();
    Qmp::connect(&scratch.path(&format!("{there}.qmp"))).quit();
    guest.succeeds();
    for (path, completed) in reports.iter().zip([migrate, incoming]) {
        let report: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let number = |value: &Value, name: &str| value[name].as_u64().unwrap();
        let cells = report["map"]["cells"].as_array().unwrap();
        let pages = |name: &str| cells.iter().map(|cell| number(cell, name)).sum::<u64>();
        let earlier = pages("earlier");
        assert!(earlier >= (2 << 20) / 4096, "{earlier} pages came before");
        let all = ["demand", "background", "zero", "hole", "earlier"].map(pages);
        assert!(all.iter().sum::<u64>() >= (96 << 20) / 4096, "{all:?}");
        // Only what came in this process's time is in its rates.
        let samples = report["samples"].as_array().unwrap();
        let crossed = |sample: &Value| number(sample, "crossed_bytes");
        assert!(crossed(samples.first().unwrap()) <= 8 << 20, "{}", samples[0]);
        let here = crossed(samples.last().unwrap());
        assert!(
            here + earlier * 4096 <= number(&completed, "total_bytes") + (1 << 20),
            "{here} bytes"
        );
    }
}
