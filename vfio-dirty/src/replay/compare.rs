// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compares a transcript with the expected one, line by line.

use std::fmt::Write as _;

/// How many differences are shown; the others are only counted.
const SHOWN: usize = 10;

/// Takes a transcript in pieces.
pub(crate) struct Comparison<'a> {
    expected: std::str::Lines<'a>,
    partial: Vec<u8>,
    lines: usize,
    different: usize,
    report: String,
}

impl<'a> Comparison<'a> {
    pub(crate) fn new(expected: &'a str) -> Self {
        Comparison {
            expected: expected.lines(),
            partial: Vec::new(),
            lines: 0,
            different: 0,
            report: String::new(),
        }
    }

    pub(crate) fn take(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if *byte == b'\n' {
                let line = std::mem::take(&mut self.partial);
                self.line(Some(&String::from_utf8_lossy(&line)));
            } else {
                self.partial.push(*byte);
            }
        }
    }

    /// Compares the next line of the transcript, or its end. Returns false when
    /// both have ended.
    fn line(&mut self, got: Option<&str>) -> bool {
        let expected = self.expected.next();
        if expected.is_none() && got.is_none() {
            return false;
        }
        self.lines += 1;
        if expected != got {
            self.different += 1;
            if self.different <= SHOWN {
                let end = "<end>";
                // Writing to a string cannot fail.
                let _ = writeln!(
                    self.report,
                    "line {}\n  expected {}\n  found    {}",
                    self.lines,
                    expected.unwrap_or(end).trim_start(),
                    got.unwrap_or(end).trim_start()
                );
            }
        }
        true
    }

    /// Returns the text to print, and whether everything was equal.
    pub(crate) fn finish(mut self) -> (String, bool) {
        if !self.partial.is_empty() {
            self.take(b"\n");
        }
        while self.line(None) {}
        let Comparison {
            lines, different, ..
        } = self;
        if different == 0 {
            return (format!("{lines} lines, no difference\n"), true);
        }
        let lines = format!("{lines} lines, {different} different\n");
        (self.report + &lines, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compare(expected: &str, got: &str) -> (String, bool) {
        let mut c = Comparison::new(expected);
        c.take(got.as_bytes());
        c.finish()
    }

    #[test]
    fn equal_text_has_no_difference() {
        assert_eq!(
            compare("a\nb\n", "a\nb\n"),
            ("2 lines, no difference\n".into(), true)
        );
        assert!(compare("a\nb", "a\nb\n").1);
    }

    #[test]
    fn differences_are_shown_and_counted() {
        let (text, equal) = compare("a\nb\nc\n", "a\nx\n");
        assert!(!equal);
        assert!(
            text.contains("line 2\n  expected b\n  found    x\n"),
            "{text}"
        );
        assert!(
            text.contains("line 3\n  expected c\n  found    <end>\n"),
            "{text}"
        );
        assert!(text.ends_with("3 lines, 2 different\n"), "{text}");
        let (text, equal) = compare("", &"y\n".repeat(12));
        assert!(!equal && text.ends_with("12 lines, 12 different\n"));
        assert_eq!(text.matches("found").count(), SHOWN);
    }
}
