//! A module imports only what stands below it.
//!
//! Parses the sources and collects each path that leaves its module: in `use` items, and inline (`crate::…`,
//! `super::…`). Modules that tests alone are built with may import anything. `cargo test -p tidegate --test layout --
//! --nocapture` prints the arrows.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by a panic; the arrows are to be seen"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use proc_macro2::{TokenStream, TokenTree};
use syn::{Attribute, Item, ItemMod, UseTree};

/// The modules of the crate, from the bottom up, as the table in `lib.rs` has them.
const LAYERS: [&str; 34] = [
    "websocket",
    "vocabulary",
    "clock",
    "timeout",
    "file",
    "watch",
    "auth",
    "delivery",
    "history",
    "config",
    "descriptors",
    "telemetry",
    "tls",
    "crypto",
    "shrink",
    "limits",
    "settings",
    "budget",
    "traffic",
    "health",
    "room_map",
    "framing",
    "hub",
    "http1",
    "request",
    "protocol",
    "session",
    "drain",
    "shard",
    "driver",
    "server",
    "cli",
    "node",
    "reload",
];

#[test]
fn modules_import_only_lower_modules() {
    let arrows = arrows();
    for (from, to) in &arrows {
        println!("{from:12} -> {}", to.iter().map(String::as_str).collect::<Vec<_>>().join(" "));
    }
    let unknown: Vec<_> = arrows.keys().filter(|module| height(module).is_none()).collect();
    assert!(unknown.is_empty(), "give these modules a place in LAYERS: {unknown:?}");
    let upward: Vec<_> = arrows
        .iter()
        .flat_map(|(from, to)| to.iter().map(move |to| (from, to)))
        .filter(|(from, to)| height(to) >= height(from))
        .collect();
    assert!(upward.is_empty(), "these modules import what stands above them: {upward:?}");
}

/// A name at the root would be a way around the rule.
#[test]
fn the_crate_root_contains_only_modules() {
    let root = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    for item in syn::parse_file(&root).unwrap().items {
        assert!(
            matches!(item, Item::Mod(ItemMod { content: None, .. })),
            "{}",
            quote::ToTokens::to_token_stream(&item)
        );
    }
}

/// The modules that a simulation runs: time, randomness and sockets come to them from outside.
const CORE: [&str; 17] = [
    "websocket",
    "vocabulary",
    "clock",
    "delivery",
    "history",
    "shrink",
    "limits",
    "settings",
    "budget",
    "traffic",
    "room_map",
    "framing",
    "hub",
    "session",
    "drain",
    "shard",
    "protocol",
];
/// What they name neither in paths nor in macros.
const OUTSIDE: [&str; 11] = [
    "tokio",
    "tokio_util",
    "hyper",
    "hyper_util",
    "rustls",
    "socket2",
    "rustix",
    "getrandom",
    "thread",
    "TcpStream",
    "File",
];
/// Parts of protocols that are routes and not sessions.
const ROUTES: [[&str; 2]; 2] = [["protocol", "publish"], ["protocol", "endpoint"]];

#[test]
fn the_core_has_no_runtime_no_sockets_no_entropy_and_no_clock() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = 0;
    for (path, module) in sources(&root) {
        let is_core = CORE.iter().any(|core| module.first().is_some_and(|top| top == core));
        let is_route = ROUTES
            .iter()
            .any(|route| module.iter().zip(route).filter(|(own, name)| own == name).count() == 2);
        if !is_core || is_route {
            continue;
        }
        files += 1;
        let mut names = Vec::new();
        let file = syn::parse_file(&fs::read_to_string(&path).unwrap()).unwrap();
        file.items.iter().filter(|item| !is_for_tests(item)).for_each(|item| {
            idents(quote::ToTokens::to_token_stream(item), &mut names);
        });
        let outside: Vec<_> = names.iter().filter(|name| OUTSIDE.contains(&name.as_str())).collect();
        assert!(outside.is_empty(), "{} names {outside:?}", path.display());
        let reads_clock = names
            .windows(2)
            .any(|pair| ["Instant", "SystemTime"].contains(&pair[0].as_str()) && pair[1] == "now");
        assert!(!reads_clock || module == ["clock"], "{} reads the clock", path.display());
    }
    println!("{files} files are the core");
    assert!(files > 60, "{files} files");
}

fn is_for_tests(item: &Item) -> bool {
    match item {
        Item::Mod(ItemMod { attrs, .. }) => is_test(attrs),
        Item::Use(item) => is_test(&item.attrs),
        _ => false,
    }
}

/// Every identifier among tokens, in order.
fn idents(tokens: TokenStream, found: &mut Vec<String>) {
    for token in tokens {
        match token {
            TokenTree::Ident(ident) => found.push(ident.to_string()),
            TokenTree::Group(group) => idents(group.stream(), found),
            _ => {}
        }
    }
}

/// Where a module stands; the executable's own, last.
fn height(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| *layer == module).or((module == "serve").then_some(LAYERS.len()))
}

/// Which modules each module imports.
fn arrows() -> BTreeMap<String, BTreeSet<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut arrows = BTreeMap::new();
    for (path, module) in sources(&root) {
        let file = syn::parse_file(&fs::read_to_string(&path).unwrap()).unwrap();
        let mut found = Vec::new();
        collect(&file.items, &module, &mut found);
        let own = module.first().unwrap().clone();
        let to: &mut BTreeSet<String> = arrows.entry(own.clone()).or_default();
        to.extend(found.into_iter().filter(|other| *other != own));
    }
    arrows
}

/// Every source file with the path of its module; not the crate's root, and nothing that is a test.
fn sources(root: &Path) -> Vec<(PathBuf, Vec<String>)> {
    let mut sources = Vec::new();
    let mut folders = vec![(root.to_owned(), Vec::new())];
    while let Some((folder, module)) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            // `mod.rs` is the module of its folder.
            let module: Vec<_> =
                module.iter().cloned().chain((name != "mod").then(|| name.clone())).collect();
            if path.is_dir() {
                folders.push((path, module));
            } else if path.extension().is_some_and(|extension| extension == "rs")
                // The crate's root, which has modules and nothing else, and the executable's own.
                && !(module.len() == 1 && ["lib", "main", "allocator"].contains(&name.as_str()))
                && !is_only_for_tests(root, &module)
            {
                sources.push((path, module));
            }
        }
    }
    sources
}

/// Whether a module, or one that it is in, is declared for tests.
fn is_only_for_tests(root: &Path, module: &[String]) -> bool {
    (1..=module.len()).any(|length| {
        let (name, parents) = module.get(..length).and_then(<[_]>::split_last).unwrap();
        let parent = match parents {
            [] => root.join("lib.rs"),
            parents => root.join(parents.join("/")).with_extension("rs"),
        };
        let parent = if parent.exists() { parent } else { parent.with_extension("").join("mod.rs") };
        let file = syn::parse_file(&fs::read_to_string(&parent).unwrap()).unwrap();
        file.items.iter().any(|item| match item {
            Item::Mod(ItemMod { ident, attrs, .. }) => ident == name && is_test(attrs),
            _ => false,
        })
    })
}

fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.meta.require_list().is_ok_and(|list| list.tokens.to_string() == "test")
    })
}

/// Collects the modules of the crate that the items name. `module` is where the items stand.
fn collect(items: &[Item], module: &[String], found: &mut Vec<String>) {
    for item in items {
        match item {
            Item::Use(item) if is_test(&item.attrs) => {}
            Item::Use(item) => flatten(&item.tree, &mut Vec::new(), &mut |path| resolve(path, module, found)),
            Item::Mod(ItemMod { attrs, .. }) if is_test(attrs) => {}
            Item::Mod(ItemMod { ident, content: Some((_, items)), .. }) => {
                let inner: Vec<_> = module.iter().cloned().chain([ident.to_string()]).collect();
                collect(items, &inner, found);
            }
            item => inline_paths(quote::ToTokens::to_token_stream(item), module, found),
        }
    }
}

fn flatten(tree: &UseTree, path: &mut Vec<String>, found: &mut impl FnMut(&[String])) {
    match tree {
        UseTree::Path(step) => {
            path.push(step.ident.to_string());
            flatten(&step.tree, path, found);
            path.pop();
        }
        UseTree::Group(group) => group.items.iter().for_each(|tree| flatten(tree, path, found)),
        UseTree::Name(name) => found(&[path.as_slice(), &[name.ident.to_string()]].concat()),
        UseTree::Rename(name) => found(&[path.as_slice(), &[name.ident.to_string()]].concat()),
        UseTree::Glob(_) => found(path),
    }
}

/// Finds `crate::a::b` and `super::a` among tokens, within macros too.
fn inline_paths(tokens: TokenStream, module: &[String], found: &mut Vec<String>) {
    let mut path: Vec<String> = Vec::new();
    let mut tokens = tokens.into_iter();
    while let Some(token) = tokens.next() {
        match token {
            TokenTree::Ident(ident) if ident == "use" => {
                // Within a function or a macro.
                let ends =
                    |token: &TokenTree| matches!(token, TokenTree::Punct(punct) if punct.as_char() == ';');
                let tree: TokenStream = tokens.by_ref().take_while(|token| !ends(token)).collect();
                // Not `use<…>` of a captured lifetime.
                if let Ok(tree) = syn::parse2::<UseTree>(tree) {
                    flatten(&tree, &mut Vec::new(), &mut |path| resolve(path, module, found));
                }
            }
            TokenTree::Ident(ident) => {
                let ident = ident.to_string();
                if ident == "crate" || (ident == "super" && path.is_empty()) || !path.is_empty() {
                    path.push(ident);
                }
                continue;
            }
            TokenTree::Punct(punct) if punct.as_char() == ':' && !path.is_empty() => continue,
            TokenTree::Group(group) => inline_paths(group.stream(), module, found),
            _ => {}
        }
        resolve(&std::mem::take(&mut path), module, found);
    }
    resolve(&path, module, found);
}

/// Adds the top-level module that a path in `module` leads to, if it is one of this crate's.
fn resolve(path: &[String], module: &[String], found: &mut Vec<String>) {
    let mut at: Vec<String> = module.to_vec();
    let mut steps = path.iter().skip_while(|step| *step == "self");
    match steps.next().map(String::as_str) {
        Some("crate") => at.clear(),
        Some("super") => drop(at.pop()),
        _ => return,
    }
    for step in steps {
        if step == "super" {
            at.pop();
        } else {
            at.push(step.clone());
        }
    }
    found.extend(at.into_iter().next().filter(|top| height(top).is_some()));
}
