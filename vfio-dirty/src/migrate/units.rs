// SPDX-License-Identifier: MIT OR Apache-2.0
//! Figures as people write and read them.

pub(super) const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Parses `4096`, `64M` or `1G`.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.char_indices().next_back() {
        Some((at, 'K' | 'k')) => (&text[..at], 1 << 10),
        Some((at, 'M' | 'm')) => (&text[..at], MIB),
        Some((at, 'G' | 'g')) => (&text[..at], GIB),
        _ => (text, 1),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(unit))
        .ok_or_else(|| "a size is a whole number with an optional K, M or G, as in 512M".into())
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
        for bad in ["", "G", "-1M", "1.5G", "1T", "99999999999999G", "é"] {
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
        assert_eq!(plural(1, "page"), "1 page");
        assert_eq!(plural(1_234_567, "page"), "1,234,567 pages");
    }
}
