//! Rules of the house that no compiler holds: dependencies between rooms point downwards, libraries do not print,
//! nothing is left unfinished, every example configuration works.
//!
//! Each rule is a function from a text to findings. A test runs it over the tree, and another shows that it can fail.
//! Rules read code only: comments and the insides of strings are blanked out first (line numbers stay), and so are test
//! modules where a rule is about the product. Start at `ROOMS`.

use std::fs;
use std::path::{Path, PathBuf};

use tandem::config::Options;

/// The rooms of the server (files or folders directly in `src/`) and what each may name: rooms of the server, and
/// other crates of this workspace, whole or one module of them. A room that is not here is an error, so that whoever
/// adds one decides where it stands.
const ROOMS: Rooms = &[
    ("main", &["*"]),
    ("lib", &[]),
    ("cli", &["bench", "config", "host"]),
    // It stands where `control` stands for a server: it opens devices, and speaks to servers as a front-end does.
    (
        "bench",
        &["config", "control", "sim", "stats", "virtio", "nvme_driver"],
    ),
    // How a PCI address and an initiator's name are written is known where they are read.
    ("config", &["nvme_driver::vfio", "scsi::Initiator"]),
    ("plan", &["config", "scsi::Initiator"]),
    // It sees controllers from outside, as PCI functions.
    ("host", &["nvme_driver::vfio"]),
    (
        "control",
        &[
            "config",
            "plan",
            "vhost",
            "reactor",
            "stats",
            "datapath",
            "virtio",
            "scsi",
            "block",
            "nvme_driver",
            "nvme_model",
        ],
    ),
    // Guest memory is mapped for the device where it is mapped for us: nothing else of NVMe is known there.
    (
        "vhost",
        &[
            "datapath",
            "virtio",
            "block",
            "stats",
            "nvme_driver::dma",
            "nvme_driver::fault",
        ],
    ),
    // How it is woken is the seam that devices have too.
    ("reactor", &["datapath", "stats", "nvme_driver::transport"]),
    (
        "datapath",
        &["virtio", "scsi", "block", "stats", "nvme_driver"],
    ),
    ("virtio", &["block"]),
    ("scsi", &["block"]),
    ("block", &[]),
    ("stats", &[]),
    (
        "sim",
        &[
            "virtio",
            "scsi",
            "block",
            "datapath",
            "reactor",
            "vhost",
            "stats",
            "nvme_driver",
            "nvme_model",
        ],
    ),
];

/// The modules of the driver: spec <- transport <- {dma, mmio, queue_pair} <- admin <- controller.
const DRIVER_ROOMS: Rooms = &[
    (
        "lib",
        &[
            "admin",
            "canary",
            "controller",
            "dma",
            "error",
            "mmio",
            "fault",
            "pages",
            "quirks",
            "queue_pair",
            "spec",
            "transport",
            "vfio",
        ],
    ),
    ("spec", &[]),
    ("canary", &[]),
    ("transport", &["spec", "quirks", "canary"]),
    ("quirks", &[]),
    ("mmio", &["canary"]),
    ("fault", &[]),
    ("pages", &["spec"]),
    ("vfio", &["spec", "transport", "fault", "quirks"]),
    ("dma", &["spec", "transport", "mmio", "pages"]),
    ("error", &["dma", "spec", "transport"]),
    (
        "queue_pair",
        &["spec", "transport", "dma", "mmio", "error", "canary"],
    ),
    (
        "admin",
        &["spec", "transport", "dma", "mmio", "error", "queue_pair"],
    ),
    (
        "controller",
        &[
            "spec",
            "transport",
            "dma",
            "mmio",
            "error",
            "queue_pair",
            "admin",
        ],
    ),
];

/// The model shares the wire truth and the seam with the driver and nothing else: a bug in shared ring code would
/// cancel itself out. `dma` is there for the types that it re-exports from the seam.
const MODEL_MAY_NAME: &[&str] = &[
    "nvme_driver::spec",
    "nvme_driver::transport",
    "nvme_driver::dma",
];

/// Rooms that give up `unsafe` for good, by their root module.
const SAFE_ROOMS: &[&str] = &[
    "nvme-driver/src/spec/mod.rs",
    "src/block.rs",
    "src/config/mod.rs",
    "src/host/mod.rs",
    "src/plan.rs",
    "src/scsi/mod.rs",
];

type Rooms = &'static [(&'static str, &'static [&'static str])];

// ---- the rules ----

/// What `room` names and must not.
fn forbidden_edges(rooms: Rooms, room: &str, code: &Code) -> Vec<String> {
    let Some((_, allowed)) = rooms.iter().find(|(known, _)| *known == room) else {
        return vec![format!(
            "{}: room `{room}` is not in the table of tests/tidy.rs: decide what it may name",
            code.path
        )];
    };
    let mut findings = Vec::new();
    for reference in references(code) {
        let Reference {
            line,
            target,
            module,
        } = reference;
        let within = target == room || allowed.contains(&"*");
        if !within
            && !allowed.contains(&target.as_str())
            && !allowed.contains(&format!("{target}::{module}").as_str())
        {
            findings.push(format!(
                "{}:{line}: `{room}` must not name `{target}::{module}`",
                code.path
            ));
        }
    }
    findings
}

/// What the model takes from the driver and must not.
fn forbidden_model_edges(code: &Code) -> Vec<String> {
    references(code)
        .into_iter()
        .filter(|reference| reference.target == "nvme_driver")
        .filter(|reference| {
            !MODEL_MAY_NAME
                .contains(&format!("{}::{}", reference.target, reference.module).as_str())
        })
        .map(
            |Reference {
                 line,
                 target,
                 module,
             }| {
                format!(
                    "{}:{line}: the model must not name `{target}::{module}`",
                    code.path
                )
            },
        )
        .collect()
}

/// Identifiers that contain a word of another world.
fn foreign_words(words: &[&str], code: &Code) -> Vec<String> {
    code.tokens()
        .filter(|(_, token)| words.iter().any(|word| token.to_lowercase().contains(word)))
        .map(|(line, token)| format!("{}:{line}: `{token}` does not belong here", code.path))
        .collect()
}

/// Libraries return text or log; they do not print.
fn prints(code: &Code) -> Vec<String> {
    macros(code, &["println", "eprintln", "print", "eprint", "dbg"])
}

/// What is not finished or not wanted is not there.
fn unfinished(code: &Code) -> Vec<String> {
    let mut findings = macros(code, &["todo", "unimplemented"]);
    let tokens: Vec<(usize, &str)> = code.tokens().collect();
    for window in tokens.windows(3) {
        if let [
            (line, "allow" | "expect"),
            (_, "("),
            (_, "dead_code" | "unused"),
        ] = window
        {
            findings.push(format!(
                "{}:{line}: dead code is deleted, not allowed",
                code.path
            ));
        }
        if let [(line, "#"), (_, "["), (_, "ignore")] = window {
            findings.push(format!(
                "{}:{line}: a test that does not run proves nothing",
                code.path
            ));
        }
    }
    findings
}

fn macros(code: &Code, names: &[&str]) -> Vec<String> {
    let tokens: Vec<(usize, &str)> = code.tokens().collect();
    let calls = tokens
        .windows(2)
        .filter(|pair| pair[1].1 == "!" && names.contains(&pair[0].1));
    calls
        .map(|pair| {
            format!(
                "{}:{}: `{}!` does not belong here",
                code.path, pair[0].0, pair[0].1
            )
        })
        .collect()
}

fn lacks_forbid_unsafe(code: &Code) -> Option<String> {
    let attribute = ["#", "!", "[", "forbid", "(", "unsafe_code", ")", "]"];
    let tokens: Vec<&str> = code.tokens().map(|(_, token)| token).collect();
    let found = tokens
        .windows(attribute.len())
        .any(|window| window == attribute);
    (!found).then(|| format!("{}: lacks #![forbid(unsafe_code)]", code.path))
}

/// The first screen of the README holds the two commands that a stranger needs.
fn missing_commands(readme: &str) -> Vec<String> {
    let first_screen: String = readme.lines().take(30).collect::<Vec<_>>().join("\n");
    ["scripts/dev demo", "scripts/dev test"]
        .into_iter()
        .filter(|command| !first_screen.contains(command))
        .map(|command| format!("README.md does not name `{command}` in its first 30 lines"))
        .collect()
}

fn useless_config(path: &Path, text: &str) -> Option<String> {
    let config = Options::from_toml(text, path).and_then(Options::resolve);
    config.err().map(|error| error.to_string())
}

// ---- reading code ----

/// A source file with comments and the insides of strings blanked out.
struct Code {
    path: String,
    text: String,
}

struct Reference {
    line: usize,
    /// A room of the same crate, or a crate of the workspace.
    target: String,
    /// What is named of it; empty for the crate or room as such.
    module: String,
}

impl Code {
    fn new(path: &str, source: &str) -> Self {
        Self {
            path: path.to_owned(),
            text: blank(source),
        }
    }

    /// Without `#[cfg(test)]` items: their dependencies are not those of the product.
    fn product(path: &str, source: &str) -> Self {
        let mut code = Self::new(path, source);
        while let Some(start) = code.text.find("#[cfg(test)]") {
            let end = item_end(&code.text, start + "#[cfg(test)]".len());
            let gap: String = code.text[start..end]
                .chars()
                .map(|char| if char == '\n' { '\n' } else { ' ' })
                .collect();
            code.text.replace_range(start..end, &gap);
        }
        code
    }

    /// Identifiers, `::`, and single characters, with their lines.
    fn tokens(&self) -> impl Iterator<Item = (usize, &str)> {
        let mut rest = self.text.as_str();
        let mut line = 1;
        std::iter::from_fn(move || {
            let blank = rest.len() - rest.trim_start().len();
            line += rest[..blank].matches('\n').count();
            rest = &rest[blank..];
            let first = rest.chars().next()?;
            let length = match first {
                _ if is_word(first) => rest.find(|char| !is_word(char)).unwrap_or(rest.len()),
                ':' if rest.starts_with("::") => 2,
                _ => first.len_utf8(),
            };
            let (token, after) = rest.split_at(length);
            rest = after;
            Some((line, token))
        })
    }
}

fn is_word(char: char) -> bool {
    char.is_alphanumeric() || char == '_'
}

/// The end of the item that begins at `start`: its closing brace, or its semicolon if that comes first.
fn item_end(text: &str, start: usize) -> usize {
    let mut depth = 0;
    for (offset, char) in text[start..].char_indices() {
        match char {
            '{' => depth += 1,
            '}' if depth == 1 => return start + offset + 1,
            '}' => depth -= 1,
            ';' if depth == 0 => return start + offset + 1,
            _ => {}
        }
    }
    text.len()
}

/// Replaces comments and the insides of string and character literals by blanks.
fn blank(source: &str) -> String {
    let chars: Vec<char> = source.chars().collect();
    let at = |index: usize| chars.get(index).copied().unwrap_or('\0');
    let mut out = String::with_capacity(source.len());
    let mut index = 0;
    while index < chars.len() {
        let end = match at(index) {
            '/' if at(index + 1) == '/' => find(&chars, index, |rest| rest[0] == '\n'),
            '/' if at(index + 1) == '*' => block_comment_end(&chars, index),
            '"' => string_end(&chars, index),
            'r' if !(index > 0 && is_word(at(index - 1)) && at(index - 1) != 'b')
                && raw_hashes(&chars, index).is_some() =>
            {
                raw_string_end(&chars, index, raw_hashes(&chars, index).unwrap_or(0))
            }
            // A character, not a lifetime: a backslash, or a quote right after one character.
            '\'' if at(index + 1) == '\\' => find(&chars, index + 3, |rest| rest[0] == '\'') + 1,
            '\'' if at(index + 2) == '\'' => index + 3,
            char => {
                out.push(char);
                index += 1;
                continue;
            }
        };
        let end = end.min(chars.len());
        out.extend(
            chars[index..end]
                .iter()
                .map(|&char| if char == '\n' { '\n' } else { ' ' }),
        );
        index = end;
    }
    out
}

fn find(chars: &[char], start: usize, matches: impl Fn(&[char]) -> bool) -> usize {
    (start..chars.len())
        .find(|&index| matches(&chars[index..]))
        .unwrap_or(chars.len())
}

fn block_comment_end(chars: &[char], start: usize) -> usize {
    let mut depth = 0;
    let mut index = start;
    while index < chars.len() {
        match (chars[index], chars.get(index + 1)) {
            ('/', Some('*')) => depth += 1,
            ('*', Some('/')) if depth == 1 => return index + 2,
            ('*', Some('/')) => depth -= 1,
            _ => {
                index += 1;
                continue;
            }
        }
        index += 2;
    }
    chars.len()
}

fn string_end(chars: &[char], start: usize) -> usize {
    let mut index = start + 1;
    while index < chars.len() && chars[index] != '"' {
        index += if chars[index] == '\\' { 2 } else { 1 };
    }
    index + 1
}

/// The number of `#` of the raw string that begins at `r`, if one does.
fn raw_hashes(chars: &[char], start: usize) -> Option<usize> {
    let hashes = chars[start + 1..]
        .iter()
        .take_while(|&&char| char == '#')
        .count();
    (chars.get(start + 1 + hashes) == Some(&'"')).then_some(hashes)
}

fn raw_string_end(chars: &[char], start: usize, hashes: usize) -> usize {
    let quote = |rest: &[char]| {
        rest[0] == '"'
            && rest[1..]
                .iter()
                .take(hashes)
                .filter(|&&char| char == '#')
                .count()
                == hashes
    };
    find(chars, start + hashes + 2, quote) + 1 + hashes
}

/// Every path that leaves the module it is in: `crate::room::item`, `tandem::room::item`, `nvme_driver::module::item`,
/// each branch of a `{...}` apart. A chain of two `super` or more counts as leaving, since it hides where it goes.
fn references(code: &Code) -> Vec<Reference> {
    let tokens: Vec<(usize, &str)> = code.tokens().collect();
    let token = |index: usize| tokens.get(index).map_or("", |(_, token)| *token);
    let mut found = Vec::new();
    for (index, &(line, root)) in tokens.iter().enumerate() {
        let reference = |target: &str, module: &str| Reference {
            line,
            target: target.to_owned(),
            module: module.to_owned(),
        };
        match root {
            "crate" | "tandem" if token(index + 1) == "::" => {
                for (target, next) in branches(&tokens, index + 2) {
                    let module = if token(next) == "::" {
                        token(next + 1)
                    } else {
                        ""
                    };
                    found.push(reference(target, module));
                }
            }
            "nvme_driver" | "nvme_model" if token(index + 1) == "::" => {
                for (module, _) in branches(&tokens, index + 2) {
                    found.push(reference(root, module));
                }
            }
            "nvme_driver" | "nvme_model" => found.push(reference(root, "")),
            "super" if token(index + 1) == "::" && token(index + 2) == "super" => {
                found.push(reference("super::super", token(index + 4)));
            }
            _ => {}
        }
    }
    found
}

/// The first names after a `::` at `index`: one, or those of each branch of a group; with the index behind each.
fn branches<'a>(tokens: &[(usize, &'a str)], index: usize) -> Vec<(&'a str, usize)> {
    let token = |index: usize| tokens.get(index).map_or("", |(_, token)| *token);
    if token(index) != "{" {
        return vec![(token(index), index + 1)];
    }
    let (mut depth, mut names) = (0, Vec::new());
    for position in index..tokens.len() {
        match token(position) {
            "{" => depth += 1,
            "}" if depth == 1 => break,
            "}" => depth -= 1,
            name if depth == 1 && name != "," && ["{", ","].contains(&token(position - 1)) => {
                names.push((name, position + 1));
            }
            _ => {}
        }
    }
    names
}

// ---- the tree ----

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file below `folder` as path from the root and text. A folder that is not there has none.
fn rust_files(folder: &str) -> Vec<(String, String)> {
    let mut folders = vec![root().join(folder)];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for path in entries(&folder) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path
                    .strip_prefix(root())
                    .expect("below the root")
                    .to_str()
                    .expect("UTF-8 name");
                files.push((
                    name.to_owned(),
                    fs::read_to_string(&path).expect("readable"),
                ));
            }
        }
    }
    files.sort();
    files
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries
        .map(|entry| entry.expect("readable folder").path())
        .collect()
}

/// The product code of a crate, each file with its room: the first name below `src/`. Files called `tests.rs` and
/// folders called `tests` are test modules.
fn product_files(source_folder: &str) -> Vec<(String, Code)> {
    let files: Vec<(String, Code)> = rust_files(source_folder)
        .into_iter()
        .filter_map(|(path, source)| {
            let below = path
                .strip_prefix(source_folder)?
                .trim_start_matches('/')
                .to_owned();
            let names: Vec<&str> = below
                .split('/')
                .map(|name| name.trim_end_matches(".rs"))
                .collect();
            (!names.contains(&"tests"))
                .then(|| (names[0].to_owned(), Code::product(&path, &source)))
        })
        .collect();
    assert!(
        !files.is_empty(),
        "{source_folder} holds no code: was it moved?"
    );
    files
}

#[track_caller]
fn assert_none(findings: impl IntoIterator<Item = String>) {
    let findings: Vec<String> = findings.into_iter().collect();
    assert!(
        findings.is_empty(),
        "{} finding(s):\n{}",
        findings.len(),
        findings.join("\n")
    );
}

#[test]
fn server_dependencies_point_downwards() {
    assert_none(
        product_files("src")
            .iter()
            .flat_map(|(room, code)| forbidden_edges(ROOMS, room, code)),
    );
}

#[test]
fn driver_dependencies_point_downwards() {
    let files = product_files("nvme-driver/src");
    assert_none(
        files
            .iter()
            .flat_map(|(room, code)| forbidden_edges(DRIVER_ROOMS, room, code)),
    );
}

#[test]
fn driver_and_model_know_nothing_of_virtio_or_the_server() {
    let files = [
        product_files("nvme-driver/src"),
        product_files("nvme-driver/model/src"),
    ]
    .concat_files();
    assert_none(
        files
            .iter()
            .flat_map(|code| foreign_words(&["virtio", "vhost", "virtqueue", "tandem"], code)),
    );
}

#[test]
fn model_shares_only_the_wire_and_the_seam_with_the_driver() {
    assert_none(
        product_files("nvme-driver/model/src")
            .iter()
            .flat_map(|(_, code)| forbidden_model_edges(code)),
    );
}

#[test]
fn libraries_do_not_print() {
    let libraries = ["src", "nvme-driver/src", "nvme-driver/model/src"]
        .map(product_files)
        .concat_files();
    let libraries = libraries
        .iter()
        .filter(|code| !["src/main.rs", "src/cli.rs"].contains(&code.path.as_str()));
    assert_none(libraries.flat_map(prints));
}

#[test]
fn nothing_is_unfinished() {
    let folders = ["src", "tests", "benches", "examples", "fuzz", "nvme-driver"];
    let files = folders.iter().flat_map(|folder| rust_files(folder));
    assert_none(files.flat_map(|(path, source)| unfinished(&Code::new(&path, &source))));
}

#[test]
fn safe_rooms_forbid_unsafe_code() {
    let sources = SAFE_ROOMS
        .iter()
        .filter_map(|path| Some((path, fs::read_to_string(root().join(path)).ok()?)));
    assert_none(
        sources.filter_map(|(path, source)| lacks_forbid_unsafe(&Code::new(path, &source))),
    );
}

#[test]
fn readme_names_both_commands_in_its_first_screen() {
    assert_none(missing_commands(
        &fs::read_to_string(root().join("README.md")).expect("README.md"),
    ));
}

#[test]
fn every_file_in_config_parses_and_resolves() {
    let files = entries(&root().join("config"));
    assert!(
        files.iter().any(|path| path.ends_with("demo.toml")),
        "config/demo.toml is what the demo shows"
    );
    assert_none(
        files.iter().filter_map(|path| {
            useless_config(path, &fs::read_to_string(path).expect("a text file"))
        }),
    );
}

/// The code of several crates, without the rooms.
trait ConcatFiles {
    fn concat_files(self) -> Vec<Code>;
}

impl<const N: usize> ConcatFiles for [Vec<(String, Code)>; N] {
    fn concat_files(self) -> Vec<Code> {
        self.into_iter().flatten().map(|(_, code)| code).collect()
    }
}

// ---- each rule can fail ----

mod rules_can_fail {
    use super::*;

    fn edges(room: &str, source: &str) -> Vec<String> {
        forbidden_edges(ROOMS, room, &Code::product("x.rs", source))
    }

    #[test]
    fn edge_upwards_is_found_in_every_spelling() {
        for source in [
            "use crate::control::server;",
            "use crate::{block::Lba, control::server};",
            "use crate::{\n    control,\n    block::{Lba, BlockCount},\n};",
            "fn f() { crate::control::run() }",
            "pub use crate :: control as c;",
            "use tandem::control;",
            "use super::super::control;",
            "use crate::*;",
            "use nvme_driver::spec::Cid;",
            "use ::nvme_driver as driver;",
            "fn f() -> nvme_model::Model { g() }",
            "extern crate nvme_model;",
        ] {
            assert_eq!(
                edges("virtio", source).len(),
                1,
                "{source}: {:?}",
                edges("virtio", source)
            );
        }
    }

    #[test]
    fn edge_downwards_or_within_is_accepted() {
        for source in [
            "use crate::block::{Lba, BlockCount};",
            "use crate::virtio::chain::Chain; use super::chain::Chain;",
            "//! Knows nothing of [`crate::control`].\n/* crate::control */ const S: &str = \"crate::control\";",
            "const R: &str = r#\"crate::control \"quoted\" \"#; const Q: char = '\"'; fn f<'a>(x: &'a str) {}",
            "#[cfg(test)]\nmod tests {\n    use crate::control::server;\n    fn f() { if true {} }\n}",
            "#[cfg(test)]\nuse nvme_model::Model;",
        ] {
            assert_eq!(edges("virtio", source), [""; 0], "{source}");
        }
    }

    #[test]
    fn edge_after_a_literal_or_test_module_is_still_found_on_its_line() {
        let source = "const Q: char = '\"';\nconst E: char = '\\'';\nconst S: &str = \"a\\\"b\";\n/* /* nested */ */\n\
                      #[cfg(test)]\nmod tests { fn f() {} }\nuse crate::control;\n";
        assert_eq!(
            edges("virtio", source),
            ["x.rs:7: `virtio` must not name `control::`"]
        );
    }

    #[test]
    fn only_one_module_of_a_crate_may_be_allowed() {
        assert_eq!(edges("vhost", "use nvme_driver::dma::DmaMapping;"), [""; 0]);
        assert_eq!(
            edges("vhost", "use nvme_driver::{dma::DmaMapping, QueuePair};"),
            ["x.rs:1: `vhost` must not name `nvme_driver::QueuePair`"]
        );
    }

    #[test]
    fn room_unknown_to_the_table_is_found() {
        assert_eq!(
            edges("attic", ""),
            ["x.rs: room `attic` is not in the table of tests/tidy.rs: decide what it may name"]
        );
    }

    #[test]
    fn only_control_and_sim_may_name_the_model() {
        let may: Vec<&str> = ROOMS
            .iter()
            .map(|(room, _)| *room)
            .filter(|room| edges(room, "use nvme_model::Model;").is_empty())
            .collect();
        assert_eq!(may, ["main", "control", "sim"]);
    }

    #[test]
    fn tables_have_no_cycle() {
        for rooms in [ROOMS, DRIVER_ROOMS] {
            // Take away rooms that name nothing that is left, until none is left.
            let mut left: Vec<_> = rooms.iter().collect();
            while !left.is_empty() {
                let names: Vec<&str> = left.iter().map(|(room, _)| *room).collect();
                let before = left.len();
                left.retain(|(_, allowed)| allowed.iter().any(|target| names.contains(target)));
                assert!(left.len() < before, "a cycle among {names:?}");
            }
        }
    }

    #[test]
    fn driver_edge_upwards_is_found() {
        let code = Code::product(
            "ring.rs",
            "use crate::admin::AdminQueue;\nuse crate::QueuePair;",
        );
        assert_eq!(forbidden_edges(DRIVER_ROOMS, "queue_pair", &code).len(), 2);
    }

    #[test]
    fn model_that_borrows_ring_code_is_found() {
        let code = Code::product(
            "io.rs",
            "use nvme_driver::spec::Cid;\nuse nvme_driver::queue_pair::ring;\nuse nvme_driver::Controller;",
        );
        assert_eq!(
            forbidden_model_edges(&code),
            [
                "io.rs:2: the model must not name `nvme_driver::queue_pair`",
                "io.rs:3: the model must not name `nvme_driver::Controller`"
            ]
        );
    }

    #[test]
    fn foreign_word_in_code_is_found_and_in_prose_is_not() {
        let words = |source| foreign_words(&["virtio"], &Code::new("x.rs", source));
        assert_eq!(
            words("//! Knows nothing of virtio.\nstruct VirtioRing;"),
            ["x.rs:2: `VirtioRing` does not belong here"]
        );
    }

    #[test]
    fn print_in_a_library_is_found() {
        for source in [
            "println!(\"\")",
            "eprintln ! ()",
            "std::print!()",
            "dbg!(x)",
        ] {
            assert_eq!(prints(&Code::product("x.rs", source)).len(), 1, "{source}");
        }
        assert_eq!(
            prints(&Code::product(
                "x.rs",
                "writeln!(f)?; fn print() {} // println!"
            )),
            [""; 0]
        );
    }

    #[test]
    fn unfinished_code_is_found() {
        for source in [
            "#[allow(dead_code)] fn f() {}",
            "#![allow( dead_code, unused)]",
            "#[expect(dead_code)]",
            "fn f() { todo!() }",
            "fn f() { unimplemented!(\"later\") }",
            "#[ignore = \"slow\"] fn f() {}",
            "#[test]\n#[ignore]\nfn f() {}",
        ] {
            assert_eq!(unfinished(&Code::new("x.rs", source)).len(), 1, "{source}");
        }
    }

    #[test]
    fn room_without_forbid_is_found() {
        assert!(
            lacks_forbid_unsafe(&Code::new("x.rs", "//! #![forbid(unsafe_code)]\nfn f() {}"))
                .is_some()
        );
        assert!(lacks_forbid_unsafe(&Code::new("x.rs", "#![deny(unsafe_code)]")).is_some());
        assert!(lacks_forbid_unsafe(&Code::new("x.rs", "#![forbid(unsafe_code)]")).is_none());
    }

    #[test]
    fn readme_that_hides_a_command_is_found() {
        let late = format!("scripts/dev demo{}scripts/dev test", "\n".repeat(40));
        assert_eq!(
            missing_commands(&late),
            ["README.md does not name `scripts/dev test` in its first 30 lines"]
        );
    }

    #[test]
    fn config_that_does_not_parse_or_resolve_is_found() {
        let broken = |text| useless_config(Path::new("x.toml"), text);
        assert!(
            broken("[sever]")
                .is_some_and(|finding| finding.starts_with("x.toml:1: unknown field `sever`"))
        );
        assert!(
            broken("[server]\ncores = \"0\"")
                .is_some_and(|finding| finding.starts_with("no device"))
        );
    }
}
