// SPDX-License-Identifier: MIT OR Apache-2.0
//! The seeds of the repository's fuzz target `restore`. The package of this crate leaves this
//! file out.

#[path = "support/altered.rs"]
mod altered;

#[test]
fn seeds() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/restore");
    let mut seeds = 0;
    for file in std::fs::read_dir(folder).unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        altered::check(&bytes);
        seeds += 1;
    }
    assert!(seeds > 0);
}
