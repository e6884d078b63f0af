//! What `deny.toml` asks of licences and sources, checked from `Cargo.lock` and the registry's own copies: without a
//! network and without cargo-deny, on the platform that the tests run on.

use std::collections::BTreeSet;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

type TestResult<T = ()> = Result<T, Box<dyn Error>>;

fn toml_file(name: &str) -> TestResult<toml::Table> {
    Ok(fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name))?.parse()?)
}

/// A list of texts in `deny.toml`.
fn allowed(table: &str, key: &str) -> TestResult<BTreeSet<String>> {
    let deny = toml_file("deny.toml")?;
    let list = deny.get(table).and_then(|table| table.get(key)).and_then(toml::Value::as_array);
    let list = list.ok_or_else(|| format!("deny.toml has no {key} in [{table}]"))?;
    Ok(list.iter().filter_map(toml::Value::as_str).map(str::to_owned).collect())
}

#[test]
fn every_crate_comes_from_one_registry_with_its_checksum() -> TestResult {
    let mut registries = BTreeSet::new();
    let lock = toml_file("Cargo.lock")?;
    let packages = lock.get("package").and_then(toml::Value::as_array).ok_or("Cargo.lock lists no packages")?;
    assert!(packages.len() > 50, "{} packages", packages.len());
    for package in packages {
        let text = |key: &str| package.get(key).and_then(toml::Value::as_str).unwrap_or_default();
        if text("name") == env!("CARGO_PKG_NAME") {
            continue;
        }
        let registry = text("source").strip_prefix("registry+");
        registries.insert(registry.ok_or_else(|| format!("{}: {:?}", text("name"), text("source")))?);
        assert_eq!(text("checksum").len(), 64, "{} has no checksum", text("name"));
    }
    assert_eq!(registries.len(), 1, "{registries:?}");
    Ok(())
}

#[test]
fn every_crate_has_an_allowed_licence() -> TestResult {
    let licences = allowed("licenses", "allow")?;
    let version = String::from_utf8(Command::new("rustc").arg("-vV").output()?.stdout)?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).ok_or("rustc does not say its host")?;
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["metadata", "--offline", "--locked", "--format-version", "1", "--filter-platform", host]);
    let ran = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).output()?;
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let metadata: Value = serde_json::from_slice(&ran.stdout)?;
    let packages = metadata.get("packages").and_then(Value::as_array).ok_or("no packages")?;
    assert!(packages.len() > 50, "{} packages", packages.len());
    for package in packages {
        let text = |key: &str| package.get(key).and_then(Value::as_str).unwrap_or_default();
        let allowed = allows(text("license"), &licences);
        assert!(allowed, "{} {}: licence {:?}", text("name"), text("version"), text("license"));
    }
    Ok(())
}

/// True if an SPDX expression can be met by allowed licences; `/` is how old crates write OR.
fn allows(expression: &str, licences: &BTreeSet<String>) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let holds = either(&words, &mut at, licences);
    holds && at == words.len()
}

fn either(words: &[&str], at: &mut usize, licences: &BTreeSet<String>) -> bool {
    let mut holds = both(words, at, licences);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        holds |= both(words, at, licences);
    }
    holds
}

fn both(words: &[&str], at: &mut usize, licences: &BTreeSet<String>) -> bool {
    let mut holds = one(words, at, licences);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        holds &= one(words, at, licences);
    }
    holds
}

fn one(words: &[&str], at: &mut usize, licences: &BTreeSet<String>) -> bool {
    let word = words.get(*at).copied().unwrap_or_default();
    *at += 1;
    if word == "(" {
        let holds = either(words, at, licences);
        *at += 1;
        return holds;
    }
    let mut name = word.to_owned();
    if words.get(*at) == Some(&"WITH") {
        name = format!("{name} WITH {}", words.get(*at + 1).copied().unwrap_or_default());
        *at += 2;
    }
    licences.contains(&name)
}

#[test]
fn licence_expressions_are_read_as_spdx_means_them() {
    let licences = ["MIT", "Zlib", "Unicode-3.0"].map(str::to_owned).into();
    for good in [
        "MIT",
        "GPL-3.0 OR MIT",
        "MIT/Apache-2.0",
        "(MIT OR X) AND Unicode-3.0",
        "A WITH e OR Zlib",
        "X OR MIT AND Zlib",
    ] {
        assert!(allows(good, &licences), "{good}");
    }
    for bad in ["", "GPL-3.0", "MIT AND GPL-3.0", "MIT WITH e", "(MIT OR X) AND Y", "X AND (MIT)", "MIT MIT", "MIT-0"] {
        assert!(!allows(bad, &licences), "{bad}");
    }
}
