//! The rooms of the source: the places of files, and one direction of use between the modules of a folder.
//!
//! The test reads the tokens of every file: `use` lines, and paths that begin with `crate`, `super` or `self`. A path
//! is followed through `pub use` to the module of the item. Each path from one module to another is an edge between the
//! two children of their common folder. In every folder these edges must not form a circle. Uses of a module's own
//! parent or child are not edges, nor are uses under `#[cfg(test)]`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{fs, mem};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// The crates whose modules are read: the folder of each one's root file.
const CRATES: [&str; 5] = ["src", "src/preload/src", "wire/src", "ring/src", "perf/src"];

/// The files allowed in `src` itself; all others have a folder.
const LOOSE: [&str; 2] = ["lib.rs", "main.rs"];

/// Circles allowed for now: the folder, two of its modules, and the reason. An entry allows the first module to use the
/// second; an unneeded entry fails the test.
const EXCEPTIONS: [(&str, &str, &str, &str); 0] = [];

/// The path to a module from its crate's root; the root's own is empty.
type ModulePath = Vec<String>;

/// One `mod`, with or without a file of its own.
#[derive(Default)]
struct Module {
    /// The bindings of its `use` lines: the name, and its path from the root.
    bound: BTreeMap<String, ModulePath>,
    /// Every path to another module, with its line.
    paths: Vec<(ModulePath, usize)>,
    file: PathBuf,
}

/// The modules of one crate.
#[derive(Default)]
struct Crate {
    modules: BTreeMap<ModulePath, Module>,
    /// The files of modules under `#[cfg(test)]`.
    tests: Vec<ModulePath>,
}

/// One folder's children, and their uses: the pair, and a place that shows it.
type Edges = BTreeMap<(String, String), String>;

#[test]
fn sibling_modules_import_without_cycles() {
    let mut report = String::new();
    let mut is_needed = [false; EXCEPTIONS.len()];
    for root in CRATES {
        for (folder, mut edges) in Crate::read(Path::new(root)).folders() {
            let name = Path::new(root).join(folder.join("/")).display().to_string();
            let name = name.trim_end_matches('/');
            for (index, &(place, from, to, _)) in EXCEPTIONS.iter().enumerate() {
                if place == name {
                    is_needed[index] = edges.remove(&(from.into(), to.into())).is_some();
                }
            }
            for circle in circles(&edges) {
                let _ = writeln!(
                    report,
                    "{name}: {}",
                    circle.iter().cloned().collect::<Vec<_>>().join(", ")
                );
                for ((from, to), place) in &edges {
                    if circle.contains(from) && circle.contains(to) {
                        let _ = writeln!(report, "    {from} uses {to}: {place}");
                    }
                }
            }
        }
    }
    assert!(report.is_empty(), "modules that import each other in a circle:\n{report}");
    for (index, exception) in EXCEPTIONS.iter().enumerate() {
        assert!(is_needed[index], "the exception is no longer needed: {exception:?}");
    }
}

#[test]
fn architecture_map_lists_each_folder_below_its_imports() {
    let text = fs::read_to_string("ARCHITECTURE.md").expect("the file exists");
    let (_, map) = text.split_once("## The map").expect("the document has a map");
    let place = |folder: &str| {
        map.find(&format!("`src/{folder}/`"))
            .unwrap_or_else(|| panic!("the map lacks src/{folder}"))
    };
    let folders = Crate::read(Path::new("src")).folders();
    let edges = &folders[&ModulePath::new()];
    assert!(edges.len() > 30, "only {} folders use each other", edges.len());
    for ((from, to), line) in edges {
        assert!(place(to) < place(from), "{from} uses {to}, and the map has it below: {line}");
    }
}

#[test]
fn src_contains_folders_and_two_files() {
    let loose: Vec<_> = entries(Path::new("src"))
        .into_iter()
        .filter(|path| path.is_file())
        .map(|path| path.file_name().expect("an entry has a name").to_string_lossy().into_owned())
        .filter(|name| !LOOSE.contains(&name.as_str()))
        .collect();
    assert!(loose.is_empty(), "files of src that belong into a folder: {loose:?}");
}

/// Every set of modules that reach each other.
fn circles(edges: &Edges) -> Vec<BTreeSet<String>> {
    let nodes: BTreeSet<&String> = edges.keys().flat_map(|(from, to)| [from, to]).collect();
    let reached: BTreeMap<&String, BTreeSet<&String>> = nodes
        .iter()
        .map(|&node| {
            let mut seen = BTreeSet::new();
            let mut next = VecDeque::from([node]);
            while let Some(at) = next.pop_front() {
                for (from, to) in edges.keys() {
                    if from == at && seen.insert(to) {
                        next.push_back(to);
                    }
                }
            }
            (node, seen)
        })
        .collect();
    let circle = |node: &&String| -> BTreeSet<String> {
        reached[*node]
            .iter()
            .filter(|other| reached[**other].contains(*node))
            .map(|other| (*other).clone())
            .collect()
    };
    let circles: BTreeSet<_> = nodes.iter().map(circle).filter(|circle| circle.len() > 1).collect();
    circles.into_iter().collect()
}

impl Crate {
    /// Reads every file below `root`, without those of another crate.
    fn read(root: &Path) -> Crate {
        let mut read = Crate::default();
        read.folder(root, root);
        let tests = mem::take(&mut read.tests);
        read.modules.retain(|module, _| !tests.iter().any(|test| module.starts_with(test)));
        assert!(read.modules.len() > 5, "{} has modules", root.display());
        read
    }

    fn folder(&mut self, root: &Path, folder: &Path) {
        for path in entries(folder) {
            if path.is_dir() {
                if !path.join("src").is_dir() {
                    self.folder(root, &path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let inside =
                    path.strip_prefix(root).expect("the file is below the root").with_extension("");
                let mut module: ModulePath =
                    inside.iter().map(|part| part.to_string_lossy().into_owned()).collect();
                if matches!(module.last().map(String::as_str), Some("mod" | "lib" | "main")) {
                    module.pop();
                }
                let text = fs::read_to_string(&path).expect("a source file can be read");
                let tokens: TokenStream =
                    text.parse().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                self.module(&module, &path, tokens);
            }
        }
    }

    /// Collects one module's bindings and paths; a `mod x { … }` in it is a further module.
    fn module(&mut self, module: &ModulePath, file: &Path, tokens: TokenStream) {
        self.modules.entry(module.clone()).or_default().file = file.to_path_buf();
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let mut at = 0;
        while at < tokens.len() {
            if is_punct(&tokens, at, '#') && is_test(tokens.get(at + 1)) {
                if is_word(&tokens, at + 2, "mod") {
                    let test = tokens.get(at + 3).map(ToString::to_string);
                    self.tests.push(module.iter().cloned().chain(test).collect());
                }
                at = after_item(&tokens, at + 2);
            } else if is_word(&tokens, at, "mod") && is_brace(tokens.get(at + 2)) {
                let mut inner = module.clone();
                inner.push(tokens[at + 1].to_string());
                if let TokenTree::Group(group) = &tokens[at + 2] {
                    self.module(&inner, file, group.stream());
                }
                at += 3;
            } else if is_word(&tokens, at, "use") {
                at = self.path(module, &[], &tokens, at + 1, true);
            } else if ["crate", "super", "self"].iter().any(|word| is_word(&tokens, at, word))
                && is_colons(&tokens, at + 1)
            {
                at = self.path(module, &[], &tokens, at, false);
            } else {
                if let TokenTree::Group(group) = &tokens[at] {
                    self.module(module, file, group.stream());
                }
                at += 1;
            }
        }
    }

    /// Collects the path that begins at `at`, behind `prefix`. Returns its end.
    fn path(
        &mut self,
        module: &ModulePath,
        prefix: &[String],
        tokens: &[TokenTree],
        mut at: usize,
        binds: bool,
    ) -> usize {
        let mut path = prefix.to_vec();
        let begin = at;
        loop {
            match tokens.get(at) {
                Some(TokenTree::Ident(word)) if *word == "crate" && path.is_empty() => {
                    path.push("crate".into());
                }
                Some(TokenTree::Ident(word)) if *word == "self" && path.is_empty() => {
                    path.push("crate".into());
                    path.extend(module.iter().cloned());
                }
                Some(TokenTree::Ident(word)) if *word == "super" => {
                    if path.is_empty() {
                        path.push("crate".into());
                        path.extend(module.iter().cloned());
                    }
                    path.pop();
                }
                // `use a::{self}` is a itself.
                Some(TokenTree::Ident(word)) if *word == "self" => {}
                Some(TokenTree::Ident(word)) => {
                    // A path without `crate` leads to a child, or to another crate.
                    if path.is_empty() {
                        path.push("crate".into());
                        path.extend(module.iter().cloned());
                    }
                    path.push(word.to_string());
                }
                Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace && binds => {
                    let inner: Vec<TokenTree> = group.stream().into_iter().collect();
                    let mut from = 0;
                    while from < inner.len() {
                        from = self.path(module, &path, &inner, from, true).max(from) + 1;
                    }
                    return at + 1;
                }
                Some(TokenTree::Punct(punct)) if punct.as_char() == '*' && binds => {
                    self.take(module, &path, None, &tokens[begin]);
                    return at + 1;
                }
                _ => break,
            }
            at += 1;
            if !is_colons(tokens, at) {
                break;
            }
            at += 2;
        }
        let mut name = path.last().cloned();
        if binds && is_word(tokens, at, "as") {
            name = tokens.get(at + 1).map(ToString::to_string);
            at += 2;
        }
        if let Some(token) = tokens.get(begin) {
            self.take(module, &path, name.filter(|_| binds), token);
        }
        at
    }

    fn take(
        &mut self,
        module: &ModulePath,
        path: &[String],
        name: Option<String>,
        token: &TokenTree,
    ) {
        let Some(path) = path.strip_prefix(&["crate".to_owned()]) else { return };
        let taken = self.modules.get_mut(module).expect("the module is being read");
        if let Some(name) = name {
            taken.bound.insert(name, path.to_vec());
        }
        taken.paths.push((path.to_vec(), token.span().start().line));
    }

    /// The module of the item that `path` names.
    fn resolve(&self, path: &[String]) -> ModulePath {
        let mut at: ModulePath = Vec::new();
        let mut left: VecDeque<String> = path.iter().cloned().collect();
        // A name bound to itself has no target.
        let mut bindings_left = 8;
        while let Some(name) = left.pop_front() {
            let mut child = at.clone();
            child.push(name.clone());
            if self.modules.contains_key(&child) {
                at = child;
            } else if let Some(bound) =
                self.modules.get(&at).and_then(|module| module.bound.get(&name))
                && bindings_left > 0
                && *bound != child
            {
                bindings_left -= 1;
                for part in bound.iter().rev() {
                    left.push_front(part.clone());
                }
                at.clear();
            } else {
                break;
            }
        }
        at
    }

    /// For each folder, the uses between its children.
    fn folders(&self) -> BTreeMap<ModulePath, Edges> {
        let mut folders: BTreeMap<ModulePath, Edges> = BTreeMap::new();
        for (module, taken) in &self.modules {
            for (path, line) in &taken.paths {
                let used = self.resolve(path);
                let common = module.iter().zip(&used).take_while(|(a, b)| a == b).count();
                if common < module.len() && common < used.len() {
                    let edge = (module[common].clone(), used[common].clone());
                    let place = || format!("{}:{line} ({})", taken.file.display(), path.join("::"));
                    folders
                        .entry(module[..common].to_vec())
                        .or_default()
                        .entry(edge)
                        .or_insert_with(place);
                }
            }
        }
        folders
    }
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("a folder can be read").path())
        .collect();
    entries.sort();
    entries
}

fn is_word(tokens: &[TokenTree], at: usize, word: &str) -> bool {
    matches!(tokens.get(at), Some(TokenTree::Ident(ident)) if *ident == word)
}

fn is_punct(tokens: &[TokenTree], at: usize, character: char) -> bool {
    matches!(tokens.get(at), Some(TokenTree::Punct(punct)) if punct.as_char() == character)
}

fn is_colons(tokens: &[TokenTree], at: usize) -> bool {
    is_punct(tokens, at, ':') && is_punct(tokens, at + 1, ':')
}

fn is_brace(token: Option<&TokenTree>) -> bool {
    matches!(token, Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace)
}

/// An attribute that restricts its item to tests.
fn is_test(attribute: Option<&TokenTree>) -> bool {
    let words: String =
        attribute.map(ToString::to_string).unwrap_or_default().split_whitespace().collect();
    words.starts_with("[cfg(test")
        || words.starts_with("[cfg(all(test")
        || words.starts_with("[cfg(any(test")
}

/// The end of the item that begins at `at`: behind its braces, or its semicolon.
fn after_item(tokens: &[TokenTree], mut at: usize) -> usize {
    while at < tokens.len() {
        at += 1;
        if is_punct(tokens, at - 1, ';') || is_brace(tokens.get(at - 1)) {
            break;
        }
    }
    at
}
