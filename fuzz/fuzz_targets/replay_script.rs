// SPDX-License-Identifier: MIT OR Apache-2.0
//! Any text as a script: the parser accepts or refuses it, and each operation
//! that it accepts prints as a line that parses to the same operation.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let mut limit = 65535;
    let Ok(cases) = dirty_script::parse(text, &mut limit) else {
        return;
    };
    for line in cases.iter().flat_map(|case| &case.lines) {
        let printed = line.op.to_string();
        let again = dirty_script::parse(&printed, &mut limit).expect(&printed);
        assert_eq!(again[0].lines[0].op, line.op, "{printed}");
    }
});
