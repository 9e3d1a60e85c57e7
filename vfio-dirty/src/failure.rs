// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why a command did not run to its end.

use std::error::Error;
use std::fmt;
use std::io;
use std::process::ExitCode;

use nix::errno::Errno;

/// One sentence with the cause and, if there is one, the way out.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line asks for something impossible. Exit status 2.
    Usage(String),
    /// Something failed while the command ran. Exit status 1.
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

/// For `map_err`: says what could not be done, and the error as its cause.
pub(crate) fn cannot<E: Error + 'static>(what: &str) -> impl FnOnce(E) -> Failure + '_ {
    move |cause| Failure::Runtime(format!("cannot {what}: {}", explain(&cause)))
}

/// Says what `cause` says. If the limit of open files is the cause, says so, and how to raise it:
/// the text of errno alone does not tell whose limit it is.
pub(crate) fn explain(cause: &(dyn Error + 'static)) -> String {
    if is_file_limit(cause) {
        return format!(
            "this process may open too few files ({cause}); allow more with `ulimit -n 256`"
        );
    }
    cause.to_string()
}

/// Whether `cause` is that this process has reached its limit of open files.
pub(crate) fn is_file_limit(cause: &(dyn Error + 'static)) -> bool {
    let io = cause.downcast_ref::<io::Error>();
    io.and_then(io::Error::raw_os_error) == Some(libc::EMFILE)
        || cause.downcast_ref() == Some(&Errno::EMFILE)
}
