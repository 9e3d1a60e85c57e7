// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why a command did not run to its end.

use std::fmt;
use std::process::ExitCode;

/// One sentence with the cause and, where there is one, the way out.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line asks for what cannot be.
    Usage(String),
    /// Something broke on the way.
    Runtime(String),
}

impl Failure {
    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Usage(_) => ExitCode::from(2),
            Self::Runtime(_) => ExitCode::from(1),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Usage(sentence) | Self::Runtime(sentence)) = self;
        f.write_str(sentence)
    }
}

/// For `map_err`: what could not be done, and the error as its cause.
pub(crate) fn cannot<E: fmt::Display>(what: &str) -> impl FnOnce(E) -> Failure + '_ {
    move |cause| Failure::Runtime(format!("cannot {what}: {cause}"))
}
