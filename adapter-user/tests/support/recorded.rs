// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the recordings of the running Linux driver are. The model's tests include
//! this file too.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;

/// The random traces: `traces/NAME.vt.gz` and `traces/NAME.ideal.gz`.
pub(crate) const TRACES: [&str; 5] = [
    "p1-emu-new",
    "p2-emu-reuse",
    "p3-pci-new",
    "p4-pci-reuse",
    "p5-mixed-reuse",
];

pub(crate) fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../adapter-user/tests/data")
        .join(name)
}

pub(crate) fn unpacked(name: &str) -> String {
    let file = fs::File::open(data(name)).expect("test data");
    let mut text = String::new();
    let read = GzDecoder::new(file).read_to_string(&mut text);
    read.expect("gzip");
    text
}

/// The table scripts, in the order in which they were recorded. The last one is left
/// out, because it crashed the kernel that was recorded.
pub(crate) fn table_scripts() -> Vec<PathBuf> {
    let mut scripts: Vec<PathBuf> = fs::read_dir(data("scripts"))
        .expect("scripts")
        .map(|entry| entry.expect("entry").path())
        .filter(|path| !path.ends_with("t9b-nounpin.vt"))
        .collect();
    scripts.sort();
    scripts
}
