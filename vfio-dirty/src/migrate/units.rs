// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sizes and counts as people write and read them.

pub(super) const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Parses `4096`, `64M`, `64MiB` or `1 GiB`. All units are powers of 1024.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let end = text.find(|c: char| !c.is_ascii_digit());
    let (digits, unit) = text.split_at(end.unwrap_or(text.len()));
    let unit: Option<u64> = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" => Some(1),
        "k" | "kib" => Some(1 << 10),
        "m" | "mib" => Some(MIB),
        "g" | "gib" => Some(GIB),
        "t" | "tib" => Some(1 << 40),
        _ => None,
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(unit?))
        .ok_or_else(|| {
            "a size is a whole number, alone or with K, M, G or T (or KiB, MiB, GiB or TiB), \
             as in 512M"
                .into()
        })
}

/// `1 GiB`, `1.5 GiB`, `64 MiB`.
pub(super) fn size(bytes: u64) -> String {
    let (unit, name) = if bytes >= GIB {
        (GIB, "GiB")
    } else {
        (MIB, "MiB")
    };
    let value = bytes as f64 / unit as f64;
    if bytes % unit == 0 {
        format!("{value} {name}")
    } else {
        format!("{value:.1} {name}")
    }
}

/// `262,144`.
pub(super) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A count in at most 7 columns: `262,144`, `16,777k` or `4,294M`, rounded down.
pub(super) fn narrow(number: u64) -> String {
    match number {
        0..=999_999 => count(number),
        1_000_000..=999_999_999 => count(number / 1_000) + "k",
        _ => count(number / 1_000_000) + "M",
    }
}

/// `1 page`, `2,000 pages`.
pub(super) fn plural(number: u64, noun: &str) -> String {
    let s = if number == 1 { "" } else { "s" };
    format!("{} {noun}{s}", count(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("1G"), Ok(1 << 30));
        assert_eq!(parse_size("64m"), Ok(64 << 20));
        assert_eq!(parse_size("12345"), Ok(12345));
        for gib in ["1GiB", "1 GiB", "1gib", "1024MiB", "1048576KiB"] {
            assert_eq!(parse_size(gib), Ok(1 << 30), "{gib}");
        }
        assert_eq!(parse_size("2T"), Ok(2 << 40));
        assert_eq!(parse_size("2TiB"), Ok(2 << 40));
        for bad in [
            "",
            "G",
            "-1M",
            "1.5G",
            "1MB",
            "1P",
            "99999999999999G",
            "é",
            "1 é",
        ] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(size(1 << 30), "1 GiB");
        assert_eq!(size(3 << 29), "1.5 GiB");
        assert_eq!(size(64 << 20), "64 MiB");
    }

    #[test]
    fn counts() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(1_000), "1,000");
        assert_eq!(narrow(999_999), "999,999");
        assert_eq!(narrow(16_777_216), "16,777k");
        assert_eq!(narrow(4_294_967_296), "4,294M");
        assert_eq!(plural(1, "page"), "1 page");
        assert_eq!(plural(1_234_567, "page"), "1,234,567 pages");
    }
}
