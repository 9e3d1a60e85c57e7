// SPDX-License-Identifier: MIT OR Apache-2.0
//! The seeds of the repository's fuzz target. The package of this crate leaves this file out.

#[allow(dead_code)] // other tests use the rest
#[path = "support/hostile.rs"]
mod hostile;

#[test]
fn seeds() {
    let folder = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../fuzz/corpus/vfio_user_bytes"
    );
    let mut seeds = 0;
    for file in std::fs::read_dir(folder).unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        hostile::both(&bytes);
        seeds += 1;
    }
    assert!(seeds > 0);
}
